"""Convert frozen dataclasses to JSON and back; a value that does not fit the type of its field is rejected."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from enum import Enum
from typing import Any, TypeVar

_T = TypeVar("_T")


def dumps(record: object) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(plain(record), ensure_ascii=False)


def loads(text: str, kind: type[_T]) -> _T:
    """Return the record of the dataclass `kind` that a JSON text holds.

    Raises:
        ValueError: the text is not JSON, a field is missing or unknown, or a value has another type than its field.
    """
    return typing.cast("_T", record(json.loads(text, parse_constant=_reject), kind, kind.__name__))


def _reject(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def plain(value: object) -> Any:
    """Return a value with the types of JSON.

    Each record in it becomes a dict, each tuple a list, and each Enum its value.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def record(value: Any, kind: Any, where: str) -> Any:  # noqa: C901, PLR0911 (one branch per kind of type)
    """Convert a value with the types of JSON to the type `kind`; the inverse of `plain`.

    Args:
        value: the value as `json.loads` returns it.
        kind: the type, as a field of a record declares it.
        where: the place of the value, such as "Run.results[0].case"; it is in the messages of errors.

    Raises:
        ValueError: the value does not fit the type.
    """
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in {types.UnionType, typing.Union}:
        inner = [member for member in typing.get_args(kind) if member is not type(None)]
        return None if value is None else record(value, inner[0], where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        return tuple(record(item, typing.get_args(kind)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        return {str(key): record(item, typing.get_args(kind)[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, where)
    if issubclass(kind, Enum):
        values = [member.value for member in kind]
        if value not in values:
            raise ValueError(f"{where} is {value!r}; expected one of: {', '.join(values)}")
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which is not a finite number")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {value!r}, not {kind.__name__}")
    return value


def _dataclass(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")  # noqa: TRY004 (all misfits raise the same error)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]}")
    arguments = {name: record(item, hints[name], f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
