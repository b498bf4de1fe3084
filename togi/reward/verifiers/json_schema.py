"""builtin:json_schema: 1 if the response is JSON that fits the schema in the label, else 0 (``pip install '.[rewards]'``).

The label is a JSON Schema, as an object or as text. The JSON is the whole response, or its last fenced code block.
"""

import json
import re
from typing import NoReturn

from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from togi.reward.verifiers import Labels, Texts, judged, unusable

FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def reward_func(
    queries: Texts, prompts: Texts, labels: Labels, responses: Texts | None = None, **kwargs: object
) -> list[float | None]:
    """1 or 0 per query. Raises Complaint for a label that is not a schema."""
    return judged(labels, responses, validator, fits)


def fits(response: str, label: object) -> float:
    """1 if a response holds JSON of the schema, else 0. References to other documents are never fetched."""
    schema = validator(label)
    blocks = FENCE.findall(response)
    try:
        return float(schema.is_valid(loaded(blocks[-1] if blocks else response)))
    except (ValueError, RecursionError, OverflowError):
        return 0.0


def validator(label: object) -> Validator:
    """The schema of a label. Raises Complaint if it is none, or refers to what is not there."""
    try:
        schema = loaded(label) if isinstance(label, str) else label
        if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
            raise ValueError("its $schema is no text")
        if not isinstance(schema, dict | bool):
            raise ValueError("it is no object, true or false")
        kind = validator_for(schema)
        kind.check_schema(schema)
        check_references(schema, str(kind.META_SCHEMA["$schema"]))
        found: Validator = kind(schema, registry=REGISTRY)
        found.is_valid(None)  # a schema that is its own part has no end
        return found
    except ValueError as error:
        reason = str(error)
    except SchemaError as error:
        reason = error.message
    except Unresolvable as error:
        reason = f"nothing is at its reference {error.ref!r}"
    except RecursionError:
        reason = "it is nested, or refers to itself, without end"
    raise unusable(label, f"is no JSON Schema ({reason})", "point --label_key at a field of schemas")


def check_references(schema: object, dialect: str) -> None:
    """Follow every reference of a schema, and those of what it refers to. Raises Unresolvable."""
    specification = specification_with(dialect)
    root = specification.create_resource(schema)
    todo, seen = [(root, REGISTRY.resolver_with_root(root))], set()
    while todo:
        part, resolver = todo.pop()
        if id(part.contents) in seen:
            continue
        seen.add(id(part.contents))
        if isinstance(part.contents, dict) and isinstance(reference := part.contents.get("$ref"), str):
            found = resolver.lookup(reference)
            todo.append((specification.create_resource(found.contents), found.resolver))
        todo += [(below, resolver.in_subresource(below)) for below in part.subresources()]


def loaded(text: str) -> object:
    """The value of a JSON text. Raises ValueError, also for NaN and Infinity, which Python takes for JSON."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
