"""Reads TOML files into records with fixed keys and types; an error message names the file, the line and the key."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Strict(BaseModel):
    """Base of all records that are read from TOML: frozen, rejects unknown keys, and converts no types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# The tags by which pydantic selects the member of a union. pydantic puts them into the location of an error; the
# message leaves them out.
TAGS = (
    "a name",
    "a folder",
    "a table",
)


_S = TypeVar("_S", bound=BaseModel)


def load(path: Path, model: type[_S]) -> _S:
    """Return the content of one TOML file as a record of the class `model`.

    Raises:
        SpecError: the file cannot be read, is not valid TOML, or has a wrong key or type. The message for a wrong key
            or type names the file, the line and the key.
    """
    text, data = _parse(path)
    return _validate(path, text, data, model, ())


def load_tables(path: Path, model: type[_S]) -> dict[str, _S]:
    """Return {table name: record} of a TOML file whose top-level tables are all records of the class `model`.

    Raises:
        SpecError: as in `load`.
    """
    text, data = _parse(path)
    return {name: _validate(path, text, table, model, (name,)) for name, table in data.items()}


def parse_toml(text: str) -> dict[str, Any]:
    """Return the content of a TOML text as a dict; its keys and types are not checked.

    Raises:
        ValueError: the text is not valid TOML, or is too deep.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is too deep") from None


def choose(name: str, available: Sequence[str], kind: str) -> str:
    """Return `name` unchanged if it is one of the available names.

    Args:
        name: the requested name.
        available: the valid names.
        kind: the kind of thing that the names stand for, such as "model"; used in the message.

    Raises:
        SpecError: the name is not available; the message lists the available names.
    """
    if name not in available:
        raise SpecError(f"unknown {kind} {name!r}; available: {', '.join(available) or 'none'}.")
    return name


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, parse_toml(text)
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist.") from None
    except ValueError as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None


def _validate(path: Path, text: str, data: object, model: type[_S], prefix: tuple[str, ...]) -> _S:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = (*prefix, *(part for part in first["loc"] if part not in TAGS))
        key = ".".join(str(part) for part in location)
        line = line_of(text, location)
        valid_keys = ""
        if first["type"] == "extra_forbidden":
            valid_keys = f" Known keys: {', '.join(_fields(model, first['loc']))}."
            message = "unknown key"
        else:
            message = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{path}, line {line}, key {key}: {message}.{valid_keys}") from None


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys of the table in which an unknown key stands.

    Args:
        model: the record of the whole file.
        location: the keys and list indexes that lead to the unknown key, as pydantic reports them.
    """
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        inner = str(model.model_fields[part].annotation) if part in model.model_fields else ""
        for candidate in Strict.__subclasses__():
            if candidate.__name__ in inner:
                model = candidate
                break
    return list(model.model_fields)


def line_of(text: str, location: Sequence[int | str]) -> int:
    """Return the line number (from 1) of a key in a TOML text; of its nearest enclosing table if the key is absent.

    Args:
        text: the content of the file.
        location: the keys and list indexes that lead from the top level to the key, as pydantic reports them.
    """
    names = [str(part) for part in location if isinstance(part, str)]
    indexes = [part for part in location if isinstance(part, int)]
    table: list[str] = []
    seen_tables = -1
    best = 1
    depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[(\[?)\s*([^\]]+?)\s*\]", line)
        if header:
            table = [part.strip().strip("\"'") for part in header.group(2).split(".")]
            if header.group(1) and table == names[: len(table)]:
                seen_tables += 1
            in_reach = table == names[: len(table)] and not (header.group(1) and indexes and seen_tables != indexes[0])
            if in_reach and len(table) >= depth:
                best, depth = number, len(table)
            continue
        key = re.match(r"\s*(\"[^\"]+\"|'[^']+'|[\w-]+(?:\.[\w-]+)*)\s*=", line)
        if not key:
            continue
        path = [*table, *(part.strip("\"'") for part in key.group(1).split("."))]
        wrong_element = bool(table) and seen_tables >= 0 and bool(indexes) and seen_tables != indexes[0]
        if path == names[: len(path)] and len(path) > depth and not wrong_element:
            best, depth = number, len(path)
    return best
