"""builtin:json_schema: 1 if the response is JSON that fits the schema in the label, else 0 (``pip install 'togi[rewards]'``).

The label is a JSON Schema, as an object or as text. The JSON is the whole response, or its last fenced code block.
"""

import json
import re

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry

from togi.reward.verifiers import Labels, Texts, unusable

FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def reward_func(queries: Texts, prompts: Texts, labels: Labels, responses: Texts, **kwargs: object) -> list[float]:
    """1 or 0 per query. Raises Complaint for a label that is not a schema."""
    return [float(fits(response, label)) for response, label in zip(responses, labels, strict=True)]


def fits(response: str, label: object) -> bool:
    """Whether a response holds JSON of the schema. References to other documents are never fetched."""
    try:
        schema = json.loads(label) if isinstance(label, str) else label
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, RecursionError, SchemaError) as error:
        reason = getattr(error, "message", str(error))
        raise unusable(label, f"is no JSON Schema ({reason})", "point --label_key at a field of schemas") from None
    blocks = FENCE.findall(response)
    try:
        value = json.loads(blocks[-1] if blocks else response)
    except (ValueError, RecursionError):
        return False
    return bool(kind(schema, registry=Registry()).is_valid(value))
