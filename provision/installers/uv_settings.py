"""Reads uv's own files, and writes one that holds no more than where packages come from."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import child_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The keys whose values are addresses: a relative one is relative to its file.
_PLACES = ("index-url", "extra-index-url", "find-links")
# Of an index, what says where it is and how it is asked (source: uv's documentation of indexes). A value of them is a
# text, a boolean or a list of numbers, which TOML writes as JSON does.
_INDEX_KEYS = ("name", "url", "default", "explicit", "format", "authenticate", "ignore-error-codes")
_TRUE = ("1", "true", "t", "yes", "y", "on")  # (source: uv's parser of its boolean variables)


def paths(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the configuration files that uv reads outside of a project, the user's first.

    Source: uv's documentation of its configuration files.
    """
    if environ.get("UV_CONFIG_FILE"):
        return [Path(environ["UV_CONFIG_FILE"])]
    if sys.platform == "win32":
        return [
            Path(environ.get("APPDATA") or home / "AppData/Roaming") / "uv" / "uv.toml",
            Path(environ.get("SYSTEMDRIVE") or "C:") / "/ProgramData" / "uv" / "uv.toml",
        ]
    folders = [each for each in (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":") if each]
    system = [Path(folder) / "uv" / "uv.toml" for folder in [*folders, "/etc"]]
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "uv" / "uv.toml"
    return [user, next((file for file in system if file.exists()), system[-1])]


def read(environ: Mapping[str, str], home: Path) -> tuple[dict[str, Any], list[str]]:
    """Merge uv's files as uv does, and leave out what would change the result of an installation.

    Returns:
        The kept keys; and what is left out, in words: "exclude-newer of FILE".
    """
    if environ.get("UV_NO_CONFIG", "").lower() in _TRUE:
        return {}, []
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for file in paths(environ, home):
        try:
            held = parse(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            dropped.append(f"{file} (it cannot be read: {error})")
            continue
        in_pip = held.get("pip")
        tables = [(kept, held), (kept.setdefault("pip", {}), in_pip if isinstance(in_pip, dict) else {})]
        for merged, table in tables:
            dropped += [f"{key} of {file}" for key in _take(merged, table, file.absolute().parent)]
    if not kept.get("pip"):
        kept.pop("pip", None)
    return kept, dropped


def _take(merged: dict[str, Any], table: Mapping[str, Any], folder: Path) -> list[str]:
    """Merge what is kept of a table, and return the keys that a user may miss."""
    missed = []
    for key, value in table.items():
        verdict = child_environment.UV_TOML.get(key, child_environment.IGNORED)
        if verdict == child_environment.KEPT:
            _merge(merged, key, _absolute(key, value, folder))
            rows = value if key == "index" and isinstance(value, list) else []
            missed += ["an index's exclude-newer" for row in rows if isinstance(row, dict) and "exclude-newer" in row]
        elif verdict == child_environment.REPORTED:
            missed.append(key)
    return missed


def write(held: Mapping[str, Any], table: str = "") -> str:
    """Return keys as TOML; `table` is what they lie in, such as "tool.uv"."""
    plain = {key: value for key, value in held.items() if not _is_table(value)}
    lines = [f"[{table}]"] if table and plain else []
    lines += [f"{key} = {_value(value)}" for key, value in plain.items()]
    inside = f"{table}." if table else ""
    for key, value in held.items():
        if isinstance(value, dict):
            lines.append(write(value, f"{inside}{key}"))
        elif _is_table(value):
            for row in value:
                lines += [f"[[{inside}{key}]]", *(f"{name} = {_value(each)}" for name, each in row.items())]
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[str, Any]:
    """Read TOML with whichever parser is there: the toolbox installs itself with this module.

    Raises:
        ValueError: it is no TOML.
    """
    for name in ("tomllib", "tomli", "pip._vendor.tomli"):
        try:
            found: dict[str, Any] = importlib.import_module(name).loads(text)
        except ImportError:
            continue
        return found
    raise ValueError("this python has no parser of TOML")


def _merge(merged: dict[str, Any], key: str, value: object) -> None:
    """Join lists, the earlier file's first; of other values the earlier file's stays."""
    if isinstance(value, list) and isinstance(merged.get(key), list):
        merged[key] = [*merged[key], *value]
    else:
        merged.setdefault(key, value)


def _absolute(key: str, value: object, folder: Path) -> object:
    if key in _PLACES and isinstance(value, str):
        return _place(value, folder)
    if key in _PLACES and isinstance(value, list):
        return [_place(each, folder) if isinstance(each, str) else each for each in value]
    if key == "index" and isinstance(value, list):
        rows = [each for each in value if isinstance(each, dict) and isinstance(each.get("url"), str)]
        kept = [{name: row[name] for name in row if name in _INDEX_KEYS} for row in rows]
        return [each | {"url": _place(each["url"], folder)} for each in kept]
    return value


def _place(value: str, folder: Path) -> str:
    return value if "://" in value else os.path.join(folder, value)  # noqa: PTH118 (it may end in a slash)


def _is_table(value: object) -> bool:
    rows = isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)
    return rows or isinstance(value, dict)


def _value(value: object) -> str:
    """Return a string, number, boolean or list of these as TOML, which writes them as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def indexes(held: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """Return the indexes that kept keys name, each with its `url`; and whether they forbid any index."""
    in_pip = held.get("pip") or {}
    rows = [dict(row) for row in held.get("index", []) if not row.get("explicit")]
    for table in (held, in_pip):
        if isinstance(table.get("index-url"), str):
            rows.append({"url": table["index-url"], "default": True})
        extra = table.get("extra-index-url", [])
        rows += [{"url": url} for url in (extra if isinstance(extra, list) else [extra]) if isinstance(url, str)]
    return rows, bool(held.get("no-index") or in_pip.get("no-index"))


def find_links(held: Mapping[str, Any]) -> list[str]:
    """Return the folders and pages of files that kept keys name."""
    found = []
    for table in (held, held.get("pip") or {}):
        value = table.get("find-links", [])
        found += [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    return found
