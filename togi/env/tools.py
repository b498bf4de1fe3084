"""A method of a user's environment as a tool: its JSON schema from type hints and docstring, and the check of arguments.

Imported by the process that runs the environment, so pydantic is all that it needs.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from types import FunctionType
from typing import Any, NamedTuple, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUndefinedAnnotation,
    PydanticUserError,
    ValidationError,
    create_model,
)
from pydantic.json_schema import GenerateJsonSchema

from togi.reward.wire import Complaint

# What chat templates and servers accept as the name of a tool.
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HEADER = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields?|Raises|Examples?|Notes?|Attributes):\s*")
ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\(.*?\))?:\s+(.*)")
# Of the faults in one call; the first ones are enough to mend it.
SHOWN_FAULTS = 3
SHOWN_CHARACTERS = 80


class Tool(NamedTuple):
    """``schema``: in OpenAI's form. ``arguments``: a model whose field names are private and whose aliases are the arguments."""

    schema: dict[str, object]
    arguments: type[BaseModel]

    def checked(self, arguments: object) -> dict[str, object]:
        """The arguments as the method takes them. Nothing is converted: "3" is not 3. Raises ValueError with one line."""
        try:
            model = self.arguments.model_validate_json(json.dumps(arguments), strict=True)
        except ValidationError as error:
            faults = [
                _fault(fault["loc"], fault["type"], fault["msg"], fault["input"])
                for fault in error.errors(include_url=False, include_context=False)
            ]
            raise ValueError("; ".join(faults[:SHOWN_FAULTS])) from None
        given = {str(field.alias): name for name, field in self.arguments.model_fields.items()}
        return {alias: vars(model)[name] for alias, name in given.items() if name in model.model_fields_set}


class _Schema(GenerateJsonSchema):
    """Without the titles, which only repeat names."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


class Method(NamedTuple):
    """A public method of a class. ``function``: under its decorators. ``parameters``: without ``self``."""

    name: str
    function: FunctionType
    parameters: tuple[inspect.Parameter, ...]

    def __str__(self) -> str:
        return f"{self.name}() (line {self.function.__code__.co_firstlineno})"

    def takes(self, *arguments: object) -> bool:
        """Whether it can be called with these."""
        try:
            inspect.Signature(self.parameters).bind(*arguments)
        except TypeError:
            return False
        return True


def methods_of(klass: type[Any]) -> dict[str, Method]:
    """All public methods by their names, inherited ones too, as they are written: those of a base class first."""
    found = {}
    for name, value in inspect.getmembers(klass):
        written = inspect.getattr_static(klass, name)
        is_bound = isinstance(written, staticmethod | classmethod)
        function = inspect.unwrap(written.__func__ if is_bound else written)
        if not name.startswith("_") and inspect.isfunction(function):
            parameters = tuple(inspect.signature(value).parameters.values())
            found[name] = Method(name, function, parameters[0 if is_bound else 1 :])
    order = [name for parent in reversed(klass.__mro__) for name in vars(parent)]
    return {name: found[name] for name in dict.fromkeys(order) if name in found}


def tool_of(method: Method) -> Tool:
    """The tool of a method. Raises Complaint."""
    name, place = method.name, f"has a tool {method}"
    description, described = docstring(inspect.getdoc(method.function) or "")
    if not NAME.fullmatch(name):
        raise refusal(f"{place} whose name is not of ASCII letters, digits and _", "rename it")
    if not description:
        advice = "say what it does, which the model reads, or begin its name with _ if it is no tool"
        raise refusal(f"{place} without a docstring", advice)
    parameters = method.parameters
    if unknown := described.keys() - {parameter.name for parameter in parameters}:
        what = f"{place} whose docstring describes {', '.join(sorted(unknown))}, which it does not take"
        raise refusal(what, "correct the names under Args")
    try:
        hints = get_type_hints(method.function, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise refusal(f"{place} with a type hint that cannot be read ({error})", "import its names") from None
    fields: dict[str, Any] = {}
    for number, parameter in enumerate(parameters):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            what = f"{place} with the argument {parameter}, which cannot be given by its name"
            raise refusal(what, "give each argument a name and a type")
        if parameter.name not in hints:
            what = f"{place} whose argument {parameter.name} has no type hint"
            raise refusal(what, f"write {parameter.name}: int, or what it is")
        text = described.get(parameter.name)
        default = ... if parameter.default is parameter.empty else parameter.default
        field = Field(default, alias=parameter.name, description=text)
        fields[f"argument_{number}"] = (hints[parameter.name], field)
    try:
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        model: type[BaseModel] = create_model(name, __config__=config, **fields)
        schema = model.model_json_schema(schema_generator=_Schema)
        schema = _inlined(schema, schema.pop("$defs", {}), ())
    except (PydanticUserError, PydanticUndefinedAnnotation, TypeError) as error:
        what = f"{place} with an argument of a type that has no JSON form ({str(error).splitlines()[0]})"
        raise refusal(what, "use str, int, float, bool, list, dict, Literal, an enum, or None") from None
    parameters_schema = {"type": "object", "properties": schema["properties"], "required": schema.get("required", [])}
    function = {"name": name, "description": description, "parameters": parameters_schema}
    return Tool({"type": "function", "function": function}, model)


def refusal(what: str, advice: str) -> Complaint:
    """Why a class cannot be used."""
    return Complaint(what, advice, during_call=False)


def docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring in Google's style says of a method, and of each argument. ``text``: without indentation."""
    description, described = list[str](), dict[str, str]()
    section, entry, indent = "", "", 0
    for line in text.splitlines():
        if header := HEADER.fullmatch(line):
            section, entry = header[1], ""
        elif not section:
            description.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            found = ENTRY.fullmatch(line.strip() + " ")
            # An entry is as deep as the first one; what is deeper goes on with it.
            if found and (not entry or depth <= indent):
                entry, indent = found[1], depth
                described[entry] = found[2].strip()
            elif entry:
                described[entry] = f"{described[entry]} {line.strip()}".strip()
    return "\n".join(description).strip(), described


def _fault(where: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    name = ".".join(map(str, where))
    match kind:
        case "missing":
            return f"the argument {name!r} is missing"
        case "extra_forbidden":
            return f"there is no argument {name!r}"
        case "model_type" | "json_invalid":
            return "the arguments are not a JSON object"
    return f"{name}: {message} (it is {json.dumps(value)[:SHOWN_CHARACTERS]})"


def _inlined(schema: Any, definitions: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    """A schema with its definitions in their places, as chat templates do not follow references. Raises PydanticUserError."""
    if isinstance(schema, list):
        return [_inlined(item, definitions, inside) for item in schema]
    if not isinstance(schema, dict):
        return schema
    reference = str(schema.get("$ref", ""))
    name = reference.rpartition("/")[2]
    if name in inside:
        raise PydanticUserError(f"{name} contains itself", code=None)
    found = {**definitions[name], **schema} if name else schema
    return {
        key: _inlined(value, definitions, (*inside, name) if name else inside)
        for key, value in found.items()
        if key != "$ref"
    }
