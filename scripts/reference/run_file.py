"""JSON Schema and reference table of a run file, from the rules of the configuration's fields and run.proto's comments."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor

from scripts.reference.contract_text import comments
from scripts.reference.markdown import NOTE, table
from stillhouse.client.runfile.scalars import AUTOMATIC
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.fields import (
    ByWord,
    Choices,
    DefaultText,
    FieldInfo,
    JsonText,
    MaxLength,
    Range,
    Required,
    fields_of,
)
from stillhouse.student_trainer.config.schema import RunConfig

TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}
ONE_OF = {"ContextSpec": ("dataset", "teacher", "student")}
"""Messages of which exactly one of these fields is set."""


def json_schema() -> str:
    """The schema that `stillhouse run schema` prints."""
    told = comments()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stillhouse run file",
        "$ref": "#/$defs/RunSpec",
        "$defs": {message.name: _object(cls, message, told) for cls, message in sorted_messages().items()},
    }
    return _pretty(schema) + "\n"


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for each property of a definition, so that a diff shows fields."""
    if not isinstance(value, dict) or len(indent) == 4:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(key)}: {_pretty(each, inner)}" for key, each in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def page() -> str:
    """docs/reference/run-file.md."""
    told, parts = comments(), [_HEAD]
    for cls, message in sorted_messages().items():
        where = ", ".join(f"`{path}`" for path in paths(message.name)) or "The file itself."
        rows = [
            (
                f"`{name}`",
                _type_text(info),
                _default_text(info),
                _rule_text(info),
                told[f"{message.name}.{name}"],
            )
            for name, info in fields_of(cls).items()
        ]
        body = table(("Field", "Type", "Default", "Values", "Meaning"), rows) if rows else "No fields.\n"
        parts.append(f"\n## {message.name}\n\n{where}\n\n{told[message.name]}\n\n{body}")
    return "".join(parts)


_HEAD = f"""{NOTE}
# Run file

A run file is YAML or JSON with these fields, in snake_case or lowerCamelCase. `stillhouse run create FILE --validate` shows
the problems and the settings with all defaults; `stillhouse run schema` prints the JSON Schema (draft 2020-12) for
editors. With the YAML language server, write it to a file once and name it in the first line of a run file:

```yaml
# yaml-language-server: $schema=run_schema.json
```

A field without a value takes its default. Rules that tie fields together are checked when the run is created.
"""


def sorted_messages() -> dict[type[Any], Descriptor]:
    """Configuration class to message, in the order in which the file has them."""
    found: dict[type[Any], Descriptor] = {}

    def visit(cls: type[Any], message: Descriptor) -> None:
        if cls in found:
            return
        found[cls] = message
        for name, info in fields_of(cls).items():
            below = message.fields_by_name[name].message_type
            if info.nested is not None and below is not None:
                visit(info.nested, below)

    visit(RunConfig, RunSpec.DESCRIPTOR)
    return found


def paths(message: str) -> list[str]:
    """Every path in the file at which the message stands, such as "loss.terms[]"."""

    def below(cls: type[Any], prefix: str) -> Iterator[str]:
        names = {each: descriptor.name for each, descriptor in sorted_messages().items()}
        for name, info in fields_of(cls).items():
            if info.nested is not None:
                path = f"{prefix}{name}{'[]' * info.repeated}"
                if names[info.nested] == message:
                    yield path
                yield from below(info.nested, f"{path}.")

    return list(below(RunConfig, ""))


def _object(cls: type[Any], message: Descriptor, told: Mapping[str, str]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required = []
    for name, info in fields_of(cls).items():
        properties[name] = _property(
            info, told[f"{message.name}.{name}"], message.fields_by_name[name].message_type
        )
        if _is_required(info):
            assert "_" not in name, "a required field would need both spellings"
            required.append(name)
    for name in list(properties):
        camel = message.fields_by_name[name].json_name
        if camel != name:
            properties[camel] = {"$ref": f"#/$defs/{message.name}/properties/{name}", "doNotSuggest": True}
    schema = {
        "description": told[message.name],
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    if required:
        schema["required"] = required
    if message.name in ONE_OF:
        schema["oneOf"] = [{"required": [name]} for name in ONE_OF[message.name]]
    return schema


def _property(info: FieldInfo, comment: str, message: Descriptor | None) -> dict[str, Any]:
    found = info.rule(DefaultText)
    schema: dict[str, Any] = {"description": f"{comment} Default: {found.text}." if found else comment}
    if info.mapping:
        return schema | {"type": "object", "additionalProperties": {"type": "string"}}
    if info.nested is not None:
        assert message is not None
        ref: dict[str, Any] = {"$ref": f"#/$defs/{message.name}"}
        if (by_word := info.rule(ByWord)) is not None:
            word = _value(fields_of(info.nested)[by_word.field])
            return schema | {"anyOf": [{"type": "array", "items": {"anyOf": [ref, word]}}, word]}
        return schema | ({"type": "array", "items": ref} | _least(info) if info.repeated else ref)
    value = _value(info)
    if info.repeated:  # one value where several may stand is a list of it alone
        return schema | {"anyOf": [{"type": "array", "items": value} | _least(info), value]}
    if found is None and info.default not in (None, ""):
        schema["default"] = info.default
    is_auto = info.name in AUTOMATIC
    # An empty value is the default.
    of_json = info.rule(JsonText)
    value["type"] = [
        value["type"],
        *(["string"] if is_auto else []),
        *([of_json.kind] if of_json else ()),
        "null",
    ]
    if is_auto:
        value["pattern"] = "^auto$"
    if "enum" in value:
        value["enum"] = [*value["enum"], None]
    return schema | value


def _value(info: FieldInfo) -> dict[str, Any]:
    """Schema of one value, or of one item of a list."""
    schema: dict[str, Any] = {"type": TYPES[info.python_type]}
    words, span, longest = info.rule(Choices), info.rule(Range), info.rule(MaxLength)
    if words is not None:
        schema["enum"] = list(words)
    if span is not None:
        schema["exclusiveMinimum" if span.open_low else "minimum"] = span.low
        if span.high != float("inf"):
            schema["exclusiveMaximum" if span.open_high else "maximum"] = span.high
    if longest is not None:
        schema["maxLength"] = longest.characters
    if info.rule(JsonText):
        schema["contentMediaType"] = "application/json"
    if info.rule(Required) and not info.repeated:
        schema["minLength"] = 1
    return schema


def _least(info: FieldInfo) -> dict[str, int]:
    required = info.rule(Required)
    return {"minItems": 1} if required and not (required.unless_offline or required.unless_task) else {}


def _is_required(info: FieldInfo) -> bool:
    required = info.rule(Required)
    if info.nested is not None and info.default is dataclasses.MISSING and not info.repeated:
        return any(map(_is_required, fields_of(info.nested).values()))
    return required is not None and not (required.unless_offline or required.unless_task)


def _type_text(info: FieldInfo) -> str:
    if info.mapping:
        return "text by name"
    if info.nested is not None:
        name = sorted_messages()[info.nested].name
        by_word = info.rule(ByWord)
        text = f"[{name}](#{name.lower()})" + (f", or its {by_word.field} alone" if by_word else "")
    else:
        text = {str: "text", bool: "true or false", int: "integer", float: "number"}[info.python_type]
        text += ", or auto" if info.name in AUTOMATIC else ""
        if of_json := info.rule(JsonText):
            text = {"object": "fields", "array": "list"}[of_json.kind] + ", or JSON text"
    if not info.repeated:
        return text
    return f"list of {text}" if info.nested else f"{text}, or list of {text}"


def _default_text(info: FieldInfo) -> str:
    found, default = info.rule(DefaultText), info.default
    if found is not None:
        return found.text
    if info.rule(Required):
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, int | float) else default if isinstance(default, str) else ""


def _rule_text(info: FieldInfo) -> str:
    if info.rule(Choices):
        return ", ".join(f"`{word}`" for word in info.rule(Choices) or ())
    span, longest = info.rule(Range), info.rule(MaxLength)
    return str(span or (f"at most {longest.characters} characters" if longest else ""))
