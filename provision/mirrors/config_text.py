"""Writes a mirror into the text of pip's, conda's and uv's settings files, and keeps every other line unchanged.

New settings go into a marked block, which can be removed again. A setting that is already there gets the new value.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from provision.config.toml import parse_toml
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BEGIN, END = "# >>> firstlight >>>", "# <<< firstlight <<<"
_ADVICE = "Change or remove the file, then run again"


def pip_config(content: bytes, index: str | None, links: Sequence[str] = ()) -> bytes:
    """Return the content of pip.conf with this index and these pages of links.

    An option that the file already has gets the new value in place, since pip's configparser rejects duplicates.

    Args:
        content: the present content; a block from an earlier run is removed first.
        index: the address of the index; None adds no index.
        links: pages that link files, for `find-links`.

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
    """Return the content of .condarc with these keys.

    A mapping such as custom_channels is merged: the user's other entries stay.

    Args:
        content: the present content; a block from an earlier run is removed first.
        values: {key of .condarc: value}; without any, only the block is removed.

    Raises:
        SpecError: the content is not a mapping in YAML.
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
    """Return the content of uv.toml with this default index.

    Args:
        content: the present content; a block from an earlier run is removed first.
        index: the address of the index; None only removes the block.

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
    indexes = present.get("index")
    default = next((row for row in indexes if row.get("default")), None) if isinstance(indexes, list) else None
    if default is None and "index-url" not in present:
        block = [BEGIN, "[[index]]", f"url = {_quoted(index)}", "default = true", END]
        appended = _appended(text, block, _newline(text))
        try:
            parse_toml(appended)
        except ValueError:
            pass  # the file has its indexes in an inline array, to which no table can be appended
        else:
            return appended.encode()
    return _merged_toml(text, index)


def _replace_option(text: str, name: str, value: str) -> tuple[str, int]:
    """Replace the value of an option in [global] and [install], including its continuation lines.

    Returns:
        The new text, and the number of replaced values.
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
        raise SpecError(f"pip cannot read it: {' '.join(str(error).split())}. {_ADVICE}.") from None


def _load_yaml(content: bytes) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        document = YAML(typ="safe").load(content.decode("utf-8"))
    except (UnicodeDecodeError, YAMLError, ValueError) as error:
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
    """Return YAML with these values set; comments, order and quotes of the content stay."""
    from ruamel.yaml import YAML

    merging = YAML(typ="rt")
    merging.preserve_quotes = True
    merging.width = 4096
    text = content.decode("utf-8")
    document = merging.load(text)
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
    """Return the text with a block at its end.

    Where the last line has no newline, the newline is added before the block and the block ends without one. So
    `_without_block` can restore the text to the byte.
    """
    joined = newline.join(block)
    if text and not text.endswith("\n"):
        return f"{text}{newline}{joined}"
    return f"{text}{joined}{newline}"


def _without_block(content: bytes) -> bytes:
    """Return the content without firstlight's block, equal to the bytes before the block was added."""
    match = re.search(
        rb"(\r?\n)?" + re.escape(BEGIN.encode()) + rb".*?" + re.escape(END.encode()) + rb"(\r?\n)?", content, re.DOTALL
    )
    if not match:
        return content
    before, after = match.group(1) or b"", match.group(2) or b""
    # A block without a newline behind it was added with the newline before it (see `_appended`). Any other block was
    # added with the newline behind it.
    return content[: match.start()] + (before if after else b"") + content[match.end() :]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
