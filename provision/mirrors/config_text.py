"""Adds a mirror to the text of the settings files of pip, conda and uv, and keeps every other line unchanged.

New settings are written into a block between two marker lines, which can be removed again. If the file has the setting
already, its value is replaced.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from provision.config.toml import parse_toml
from provision.core import yaml_text
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BEGIN, END = "# >>> firstlight >>>", "# <<< firstlight <<<"
_ADVICE = "Change or remove the file, then run again"


def pip_config(content: bytes, index: str | None, links: Sequence[str] = ()) -> bytes:
    """Return the content of pip.conf with an index and with pages for find-links.

    If the file has the option already, its value is replaced, since pip rejects an option that is there twice.

    Args:
        content: the present content; the block of an earlier run is removed from it first.
        index: the URL of the index; None: add no index.
        links: the URLs of pages with links to packages, for the option find-links.

    Raises:
        SpecError: the content is not a configuration that pip can read.
    """
    bare = _without_block(content)
    options = {name: value for name, value in (("index-url", index), ("find-links", " ".join(links))) if value}
    if not options:
        return bare
    _check_ini(bare)
    text = bare.decode("utf-8", "surrogateescape")
    newline = _newline(text)
    new_options = {}
    for name, value in options.items():
        text, count = _replace_option(text, name, value)
        if not count:
            new_options[name] = value
    block = [BEGIN, *(f"{name} = {value}" for name, value in new_options.items()), END]
    header = re.search(r"(?m)^\[global\][^\r\n]*(\r?\n|\Z)", text)
    if not new_options:
        pass
    elif header:
        start, rest = text[: header.end()], text[header.end() :]
        joined = newline.join(block)
        text = f"{start}{joined}{newline}{rest}" if start.endswith("\n") else f"{start}{newline}{joined}"
    else:
        text = _appended(text, [BEGIN, "[global]", *block[1:]], newline)
    result = text.encode("utf-8", "surrogateescape")
    _check_ini(result)
    return result


def condarc(content: bytes, values: Mapping[str, Any]) -> bytes:
    """Return the content of .condarc with new values.

    The entries of a mapping such as custom_channels are added to the user's entries.

    Args:
        content: the present content; the block of an earlier run is removed from it first.
        values: {key of .condarc: value}; if it is empty, only the block is removed.

    Raises:
        SpecError: the content is not valid YAML, or not a mapping.
    """
    from ruamel.yaml import YAML

    bare = _without_block(content)
    if not values:
        return bare
    present = _load_yaml(bare)
    merged = {
        key: {**present[key], **value} if _both_maps(present.get(key), value) else value
        for key, value in values.items()
    }
    if all(present.get(key) == value for key, value in merged.items()):
        return bare
    text = bare.decode("utf-8", "surrogateescape")
    if not set(merged) & set(present):
        lines = io.StringIO()
        writer = YAML()
        writer.width = 4096
        writer.dump(dict(merged), lines)
        appended = _appended(text, [BEGIN, *lines.getvalue().splitlines(), END], _newline(text))
        result = appended.encode("utf-8", "surrogateescape")
        if _reads_as(result, {**present, **merged}):
            return result
    return _merged_yaml(bare, merged)


def uv_config(content: bytes, index: str | None) -> bytes:
    """Return the content of uv.toml with a default index.

    Args:
        content: the present content; the block of an earlier run is removed from it first.
        index: the URL of the index; None: only remove the block.

    Raises:
        SpecError: the content is not valid TOML.
    """
    bare = _without_block(content)
    if index is None:
        return bare
    try:
        text = bare.decode("utf-8")
        present = parse_toml(text)
    except ValueError as error:
        raise SpecError(f"it is not valid TOML: {error}. {_ADVICE}.") from None
    indexes = present.get("index", [])
    if not isinstance(indexes, list) or not all(isinstance(row, dict) for row in indexes):
        raise SpecError(f"its `index` is not a list of tables. {_ADVICE}.")
    default = next((row for row in indexes if row.get("default")), None)
    if default is None and "index-url" not in present:
        block = [BEGIN, "[[index]]", f"url = {_quoted(index)}", "default = true", END]
        appended = _appended(text, block, _newline(text))
        try:
            parse_toml(appended)
        except ValueError:
            pass  # the indexes are in an inline array, to which no table can be appended
        else:
            return appended.encode()
    return _merged_toml(text, index)


def _replace_option(text: str, name: str, value: str) -> tuple[str, int]:
    """Replace the value of an option of pip.conf in the sections [global] and [install], with its continuation lines.

    Args:
        text: the content of pip.conf.
        name: the name of the option.
        value: the new value.

    Returns:
        (the new text, the number of replaced values).
    """
    option = name.replace("-", "[-_]")
    pattern = re.compile(rf"(?mi)^({option}[ \t]*[=:][ \t]*)[^\r\n]*((?:\r?\n[ \t]+[^\r\n]*)*)")
    parts = re.split(r"(?m)^(?=\[)", text)
    count = 0
    for number, part in enumerate(parts):
        if re.match(r"\[(global|install)\]", part):
            parts[number], replaced = pattern.subn(lambda match: f"{match.group(1)}{value}", part)
            count += replaced
    return "".join(parts), count


def _check_ini(content: bytes) -> None:
    import configparser

    try:
        configparser.RawConfigParser().read_string(content.decode("utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise SpecError(f"pip cannot read this file: {' '.join(str(error).split())}. {_ADVICE}.") from None


def _load_yaml(content: bytes) -> dict[str, Any]:
    try:
        document = yaml_text.load(content.decode("utf-8"))
    except ValueError as error:
        raise SpecError(f"it is not valid YAML: {' '.join(str(error).split())}. {_ADVICE}.") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SpecError(f"it is not a mapping of conda's settings. {_ADVICE}.")
    return document


def _reads_as(content: bytes, expected: Mapping[str, Any]) -> bool:
    try:
        return _load_yaml(content) == dict(expected)
    except SpecError:
        return False


def _merged_yaml(content: bytes, values: Mapping[str, Any]) -> bytes:
    """Return a YAML file with new values; its comments, order and quotes are kept."""
    from ruamel.yaml import YAML

    merging = YAML(typ="rt")
    merging.preserve_quotes = True
    merging.width = 4096
    text = content.decode("utf-8")
    document = merging.load(text) or {}
    for key, value in values.items():
        if _both_maps(document.get(key), value):
            document[key].update(value)
        else:
            document[key] = value
    written = io.StringIO()
    merging.dump(document, written)
    return written.getvalue().replace("\n", _newline(text)).encode()


def _merged_toml(text: str, index: str) -> bytes:
    import tomlkit

    document: Any = tomlkit.parse(text)
    if "index-url" in document:
        document["index-url"] = index
    for row in document.get("index", []):
        if row.get("default"):
            row["url"] = index
            break
    else:
        if "index-url" not in document:
            document["index"].append({"url": index, "default": True})
    return str(tomlkit.dumps(document)).encode()


def _both_maps(first: object, second: object) -> bool:
    return isinstance(first, dict) and isinstance(second, dict)


def _appended(text: str, block: Sequence[str], newline: str) -> str:
    """Return the text with a block of lines at its end.

    If the last line of the text has no newline, a newline is added before the block, and none after the block. So
    `_without_block` can restore exactly the same bytes.
    """
    joined = newline.join(block)
    if text and not text.endswith("\n"):
        return f"{text}{newline}{joined}"
    return f"{text}{joined}{newline}"


def _without_block(content: bytes) -> bytes:
    """Return the content without firstlight's block: the same bytes as before the block was added."""
    match = re.search(
        rb"(\r?\n)?" + re.escape(BEGIN.encode()) + rb".*?" + re.escape(END.encode()) + rb"(\r?\n)?", content, re.DOTALL
    )
    if not match:
        return content
    before, after = match.group(1) or b"", match.group(2) or b""
    # If no newline follows the block, the newline before the block was added with it (see `_appended`). Otherwise the
    # newline after the block was added with it.
    return content[: match.start()] + (before if after else b"") + content[match.end() :]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
