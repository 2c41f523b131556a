"""Build the JSON Schema of run.json from the record classes, so that it always describes what is written."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from typing import Any

from bench.core.result import SCHEMA, Run

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def of_run() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `run.json`."""
    definitions: dict[str, Any] = {}
    whole = _of(Run, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"firstlight: a run of the benchmark, schema {SCHEMA}",
        **whole,
        "$defs": dict(sorted(definitions.items())),
    }


def _of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:
        inner = next(member for member in arguments if member is not type(None))
        return {"anyOf": [_of(inner, definitions), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    if dataclasses.is_dataclass(kind):
        return _of_record(kind, definitions)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return {"type": _PLAIN[kind]} if kind in _PLAIN else {}


def _of_record(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        required = [
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        definitions[name] = {}  # a record may contain its own class, which must then be found here
        definitions[name] = {
            "type": "object",
            "description": " ".join(str(kind.__doc__).split()),
            "properties": {field.name: _of(hints[field.name], definitions) for field in fields},
            "required": required,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
