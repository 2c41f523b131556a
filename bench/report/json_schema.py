"""The schema of a run's file, made from the records: what is published cannot differ from what is written."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from typing import Any

from bench.core.result import SCHEMA, Run

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def of_run() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `run.json`."""
    known: dict[str, Any] = {}
    whole = _of(Run, known)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"firstlight: a run of the benchmark, schema {SCHEMA}",
        **whole,
        "$defs": dict(sorted(known.items())),
    }


def _of(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:
        inner = next(member for member in arguments if member is not type(None))
        return {"anyOf": [_of(inner, known), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0], known)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], known)}
    if dataclasses.is_dataclass(kind):
        return _of_record(kind, known)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return {"type": _PLAIN[kind]} if kind in _PLAIN else {}


def _of_record(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in known:
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        needed = [
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        known[name] = {}  # a record may hold its own kind
        known[name] = {
            "type": "object",
            "description": " ".join(str(kind.__doc__).split()),
            "properties": {field.name: _of(hints[field.name], known) for field in fields},
            "required": needed,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
