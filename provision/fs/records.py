"""Reads small records that another program, version, host or user may have written, with limits.

A record is opened without blocking, must be a regular file, and has a limited size and depth. Every text in it can
be the name of a file. Each fault raises ValueError, so that a caller handles all damaged records alike.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from pathlib import Path

_T = TypeVar("_T")
MOST_BYTES = 64 << 20  # the largest record in practice, of a conda package with 100,000 files, has 30 MB
_MOST_DEPTH = 64  # records of firstlight, conda and huggingface_hub have at most 6
_MOST_NUMBER = 1 << 63  # larger integers fit into no call of the system
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# Escapes of NUL and of surrogates. Only content that has one of them can contain a text that is not a file name.
_SUSPECT = re.compile(rb"\\u(0000|[dD][89a-fA-F])")


def read_bytes(path: Path, *, most_bytes: int = MOST_BYTES, follow_links: bool = True) -> bytes:
    """Return the content of a record.

    Args:
        path: the record.
        most_bytes: the largest size that is accepted.
        follow_links: whether `path` may be a symbolic link. The records of firstlight never are.

    Raises:
        ValueError: the record is a link, is not a regular file, or is too large.
        OSError: the record is missing or cannot be read.
    """
    try:
        descriptor = os.open(path, _OPEN | (0 if follow_links else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # a link; a socket
            raise ValueError("not a regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(most_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > most_bytes:
        raise ValueError(f"more than {most_bytes:,} bytes")
    return content


def read_json(path: Path, *, most_bytes: int = MOST_BYTES, follow_links: bool = True) -> object:
    """Return the content of a JSON record; arguments and errors are those of `read_bytes` and `parse`."""
    return parse(read_bytes(path, most_bytes=most_bytes, follow_links=follow_links))


def read_state(path: Path) -> dict[str, object]:
    """Return the JSON object of a record of firstlight itself, which is never a link.

    Raises:
        ValueError: the record is damaged.
        OSError: the record is missing or cannot be read.
    """
    return table(read_json(path, follow_links=False))


def parse(content: bytes, *, any_text: bool = False) -> object:
    """Return the value of a JSON text.

    Args:
        content: the text in UTF-8.
        any_text: accept texts that cannot be a file name; the caller checks them itself.

    Raises:
        ValueError: the text is not valid JSON in UTF-8, is too deep, or contains a text that cannot be a file name.
    """
    try:
        value: object = json.loads(content.decode("utf-8"), parse_constant=_reject)
    except RecursionError:
        raise ValueError("too deep") from None
    is_suspect = not any_text and _SUSPECT.search(content) is not None
    level = [value]
    for _ in range(_MOST_DEPTH):
        children = [child for item in level for child in _children(item)]
        if is_suspect and not all(map(is_file_text, [*level, *(key for item in level for key in _keys(item))])):
            raise ValueError("a text that cannot be the name of a file")
        if not children:
            return value
        level = children if is_suspect else [child for child in children if type(child) in {dict, list}]
    raise ValueError("too deep")


def is_file_text(value: object) -> bool:
    """Return whether a value is no text, or a text that can be a path: without NUL, and with bytes of its own."""
    if not isinstance(value, str):
        return True
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def table(value: object) -> dict[str, object]:
    """Return a value that is a JSON object.

    Raises:
        ValueError: it is another value.
    """
    return cast("dict[str, object]", typed(value, dict))


def rows(value: object) -> list[dict[str, object]]:
    """Return a value that is a list of JSON objects.

    Raises:
        ValueError: it is another value.
    """
    return [table(row) for row in typed(value, list)]


def typed(value: object, kind: type[_T]) -> _T:
    """Return a value of exactly this type.

    Raises:
        ValueError: it has another type.
    """
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def number(value: object) -> int:
    """Return a value that is an integer from 0 to 2**63 - 1.

    Raises:
        ValueError: it is another value.
    """
    if not 0 <= typed(value, int) < _MOST_NUMBER:
        raise ValueError("an integer out of range")
    return cast("int", value)


def texts(value: object) -> dict[str, str]:
    """Return a value that is a JSON object of texts.

    Raises:
        ValueError: it is another value.
    """
    return {name: typed(text, str) for name, text in table(value).items()}


def _children(value: object) -> list[object]:
    if type(value) is dict:
        return list(value.values())
    return value if type(value) is list else []


def _keys(value: object) -> list[object]:
    return list(value) if type(value) is dict else []


def _reject(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")
