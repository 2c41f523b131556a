"""Reads uv's own settings files, and writes a settings file that has only the package sources."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import child_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The settings whose values are URLs or paths; a relative path is relative to the folder of the settings file.
_ADDRESS_KEYS = ("index-url", "extra-index-url", "find-links")
# The keys of an [[index]] table that define the URL of the index and the access to it (source: uv's documentation of
# indexes). Their values are strings, booleans or lists of numbers, for which TOML and JSON have the same syntax.
_INDEX_KEYS = ("name", "url", "default", "explicit", "format", "authenticate", "ignore-error-codes")
_TRUE = ("1", "true", "t", "yes", "y", "on")  # source: uv's parser of its boolean variables


def paths(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the paths of the settings files that uv reads outside of a project: the user's, then the system's.

    A file may be missing. If UV_CONFIG_FILE is set, it is the only one.

    Source: uv's documentation of its configuration files.
    """
    if environ.get("UV_CONFIG_FILE"):
        return [Path(environ["UV_CONFIG_FILE"])]
    if sys.platform == "win32":
        return [
            Path(environ.get("APPDATA") or home / "AppData/Roaming") / "uv" / "uv.toml",
            Path(environ.get("SYSTEMDRIVE") or "C:") / "/ProgramData" / "uv" / "uv.toml",
        ]
    folders = [folder for folder in (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":") if folder]
    system = [Path(folder) / "uv" / "uv.toml" for folder in [*folders, "/etc"]]
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "uv" / "uv.toml"
    return [user, next((file for file in system if file.exists()), system[-1])]


def read(environ: Mapping[str, str], home: Path) -> tuple[dict[str, Any], list[str]]:
    """Merge uv's settings files as uv does, without the settings that would change the result of an installation.

    Args:
        environ: the environment variables.
        home: the user's home folder.

    Returns:
        (the kept settings, as in uv.toml; a text for each setting that is left out, such as "exclude-newer of FILE").
    """
    if environ.get("UV_NO_CONFIG", "").lower() in _TRUE:
        return {}, []
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for file in paths(environ, home):
        try:
            settings = parse(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            dropped.append(f"{file} (it cannot be read: {error})")
            continue
        pip_table = settings.get("pip")
        tables = [(kept, settings), (kept.setdefault("pip", {}), pip_table if isinstance(pip_table, dict) else {})]
        for merged, table in tables:
            dropped += [f"{key} of {file}" for key in _merge_table(merged, table, file.absolute().parent)]
    if not kept.get("pip"):
        kept.pop("pip", None)
    return kept, dropped


def _merge_table(merged: dict[str, Any], table: Mapping[str, Any], folder: Path) -> list[str]:
    """Add the kept settings of a table to `merged`.

    Args:
        merged: the settings so far.
        table: the table of a settings file.
        folder: the folder of that file.

    Returns:
        The keys that are left out although the user may expect them to have an effect.
    """
    dropped = []
    for key, value in table.items():
        effect = child_environment.UV_TOML.get(key, child_environment.IGNORED)
        if effect == child_environment.KEPT:
            absolute = _absolute(key, value, folder)
            if not _is_writable(absolute) or (key == "index" and not isinstance(value, list)):
                dropped.append(key)
                continue
            _merge(merged, key, absolute)
            rows = value if key == "index" and isinstance(value, list) else []
            dropped += ["an index's exclude-newer" for row in rows if isinstance(row, dict) and "exclude-newer" in row]
        elif effect == child_environment.REPORTED:
            dropped.append(key)
    return dropped


def write(settings: Mapping[str, Any], table: str = "") -> str:
    """Return settings as TOML text.

    Args:
        settings: {key: value}.
        table: the name of the table in which they are written, such as "tool.uv"; "" for the top of the file.
    """
    plain = {key: value for key, value in settings.items() if not _is_table(value)}
    lines = [f"[{table}]"] if table and plain else []
    lines += [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    parent = f"{table}." if table else ""
    for key, value in settings.items():
        if isinstance(value, dict):
            lines.append(write(value, f"{parent}{key}"))
        elif _is_table(value):
            for row in value:
                lines += [f"[[{parent}{key}]]", *(f"{name} = {_toml_value(item)}" for name, item in row.items())]
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[str, Any]:
    """Return the content of a TOML text, with the first available parser of tomllib, tomli and pip's tomli.

    The bootstrap runs this module before all packages of firstlight are installed, and Python 3.10 has no tomllib.

    Raises:
        ValueError: the text is not valid TOML or is too deep, or no parser is available.
    """
    for name in ("tomllib", "tomli", "pip._vendor.tomli"):
        try:
            content: dict[str, Any] = importlib.import_module(name).loads(text)
        except ImportError:
            continue
        except RecursionError:
            raise ValueError("it is too deep") from None
        return content
    raise ValueError("this Python has no TOML parser")


def _merge(merged: dict[str, Any], key: str, value: object) -> None:
    """Add one setting to `merged`: lists are joined, that of the earlier file first; other values are not replaced."""
    if isinstance(value, list) and isinstance(merged.get(key), list):
        merged[key] = [*merged[key], *value]
    else:
        merged.setdefault(key, value)


def _absolute(key: str, value: object, folder: Path) -> object:
    if key in _ADDRESS_KEYS and isinstance(value, str):
        return _absolute_path(value, folder)
    if key in _ADDRESS_KEYS and isinstance(value, list):
        return [_absolute_path(item, folder) if isinstance(item, str) else item for item in value]
    if key == "index" and isinstance(value, list):
        rows = [row for row in value if isinstance(row, dict) and isinstance(row.get("url"), str)]
        kept = [{name: row[name] for name in row if name in _INDEX_KEYS} for row in rows]
        return [row | {"url": _absolute_path(row["url"], folder)} for row in kept]
    return value


def _absolute_path(value: str, folder: Path) -> str:
    return value if "://" in value else os.path.join(folder, value)  # noqa: PTH118 (it may end in a slash)


def _is_writable(value: object) -> bool:
    """Return whether a value has the same syntax in TOML and JSON; a date, inf and nan have not."""
    if isinstance(value, list | dict):
        return all(map(_is_writable, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _is_table(value: object) -> bool:
    rows = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    return rows or isinstance(value, dict)


def _toml_value(value: object) -> str:
    """Return a string, number, boolean or list of them as TOML, which has the same syntax for these values as JSON."""
    return json.dumps(value, ensure_ascii=False)


def indexes(settings: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """Return the indexes in uv's settings, without the explicit ones.

    Args:
        settings: the kept settings, as `read` returns them.

    Returns:
        ([the table of an index, with "url" and perhaps "name" and "default"], whether no index may be used).
    """
    pip_table = settings.get("pip") or {}
    rows = [dict(row) for row in settings.get("index", []) if not row.get("explicit")]
    for table in (settings, pip_table):
        if isinstance(table.get("index-url"), str):
            rows.append({"url": table["index-url"], "default": True})
        extra = table.get("extra-index-url", [])
        rows += [{"url": url} for url in (extra if isinstance(extra, list) else [extra]) if isinstance(url, str)]
    return rows, bool(settings.get("no-index") or pip_table.get("no-index"))


def find_links(settings: Mapping[str, Any]) -> list[str]:
    """Return the values of find-links in the kept settings: folders, and URLs of pages with links to packages."""
    links = []
    for table in (settings, settings.get("pip") or {}):
        value = table.get("find-links", [])
        links += [link for link in (value if isinstance(value, list) else [value]) if isinstance(link, str)]
    return links
