"""Draws damaged variants of valid files: wrong values in JSON and TOML, and changed bytes."""

from __future__ import annotations

import copy
import datetime as dt
import json
import os
from typing import TYPE_CHECKING, Any

import tomlkit
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

# `make fuzz` sets the number; without it the inputs are few, and the same in every run.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 0)
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1e308, 10**30, 2**63, "", "x", "\0", "a\0b", ".", "..", "../../x", "/", "~", "~/x"),
    *("\ud800", "\udcff", "\u202e", "a" * 300, "a/" * 3000, "2" * 5000, "\x1b[2J", "{0}", "%s", "x\ny", "é" * 200),
    *("https://user:secret@h/", "http://[::1", "http://h:99999/", "[::1", "file:///etc", "2020-99-99", "A;id;B"),
    *([], {}, [[]], {"a": {}}, [None], {"": ""}, [1, "x"]),
]
_PARTS = [
    *(b"\0", b"\xff", b"\n", b'"', b"'", b",,,", b"../", b"sha256=", b"-1", b"9" * 5000, b"\r", b"\x1b[31m", b"="),
    *(b"[", b"{", b"#", b": ", b"- ", b"&a ", b"*a", b"!!python/object ", b"[[", b"]]\n", b"\\u0000", b"\\ud800", b"%"),
]
_DEEP = [b"[" * 40_000, b"[" * 900 + b"]" * 900, b'{"a":' * 5000, b"a = " + b"[" * 5000, b"- " * 5000]


def fuzzed(few: int) -> Callable[[Any], Any]:
    """Return the settings of a test: `few` fixed inputs; with FUZZ_EXAMPLES new ones, so many for each 30 of `few`."""
    return settings(
        max_examples=max(few, EXAMPLES * few // 30),
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def bytes_of(sample: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for damaged texts: the file is cut, is another one, or has a few changed places."""
    changed = _changed(sample)
    bom = changed.map(lambda content: b"\xef\xbb\xbf" + content)
    cut = st.integers(0, len(sample)).map(lambda length: sample[:length])
    return changed | changed | changed | cut | bom | st.binary(max_size=300) | st.sampled_from(_DEEP)


def json_of(sample: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy for damaged JSON: mostly valid JSON with wrong values, else damaged bytes."""
    values = _values(sample).map(lambda value: json.dumps(value).encode())
    return values | values | values | bytes_of(json.dumps(sample, indent=1).encode())


def yaml_of(text: str, sample: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy for damaged YAML: the sample with wrong values, as JSON, else the text with changed bytes."""
    values = _values(sample).map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return values | bytes_of(text.encode())


def toml_of(text: str) -> st.SearchStrategy[bytes]:
    """Return a strategy for damaged TOML: valid TOML with wrong values, else the text with changed bytes."""
    values = _values(tomlkit.parse(text).unwrap()).map(_toml)
    return values | bytes_of(text.encode())


def _toml(value: Any) -> bytes:
    table = value if isinstance(value, dict) else {"value": value}
    return tomlkit.dumps(_without_null(table)).encode("utf-8", "replace")


def _without_null(value: Any) -> Any:
    """Return a value of TOML: a date in place of null, and no text that is not UTF-8."""
    if isinstance(value, dict):
        return {_without_null(key): _without_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return dt.date(2020, 1, 1) if value is None else value


def lines_of(sample: list[Any]) -> st.SearchStrategy[bytes]:
    """Return a strategy for files with one JSON value a line, as journals have them."""
    values = _values(sample).map(_lines)
    return values | values | values | bytes_of(_lines(sample))


def _lines(value: Any) -> bytes:
    rows = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@st.composite
def _changed(draw: st.DrawFn, sample: bytes) -> bytes:
    content = bytearray(sample)
    for _ in range(draw(st.sampled_from([1, 1, 2, 5]))):
        place = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["insert", "insert", "replace", "delete", "repeat"])):
            case "insert":
                content[place:place] = draw(st.sampled_from(_PARTS))
            case "replace":
                content[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "delete":
                del content[place : place + draw(st.integers(1, 20))]
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 60))]
    return bytes(content)


@st.composite
def _values(draw: st.DrawFn, sample: Any) -> Any:
    holder = [copy.deepcopy(sample)]
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        spots = list(_spots(holder))
        container, key = spots[draw(st.integers(0, len(spots) - 1))]
        match draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "wrap"])):
            case "replace":
                container[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            case "delete" if container is not holder:
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(["", "\0", "extra", "..", "a/b", "x" * 300]))] = container[key]
            case "add" if container is not holder:
                container.append(copy.deepcopy(container[key]))
            case _:
                container[key] = [container[key]]
    return holder[0]


def _spots(value: Any) -> Any:
    """Yield (container, key) of every value in a list or an object, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        yield value, key
        if isinstance(child, dict | list):
            yield from _spots(child)
