"""How a mirror is written into pip's, conda's and uv's files: a marked block, or a merge; all else stays as it is."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from provision.config.toml import parse_toml
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BEGIN, END = "# >>> firstlight >>>", "# <<< firstlight <<<"
_FAULT = "Mend it, or take it away, then run again"


def pip_config(content: bytes, index: str | None, links: Sequence[str] = ()) -> bytes:
    """pip.conf with this index, and pages that link files.

    An option that is there already has its value replaced: configparser, which pip reads with, takes none twice.

    Raises:
        SpecError: it is no configuration that pip reads.
    """
    bare = _without_block(content)
    options = {name: value for name, value in (("index-url", index), ("find-links", " ".join(links))) if value}
    if not options:
        return bare
    _check_ini(bare)
    text = bare.decode("utf-8", "surrogateescape")
    newline = _newline(text)
    fresh = {}
    for name, value in options.items():
        text, count = _replace_option(text, name, value)
        if not count:
            fresh[name] = value
    block = [BEGIN, *(f"{name} = {value}" for name, value in fresh.items()), END]
    header = re.search(r"(?m)^\[global\][^\r\n]*(\r?\n|\Z)", text)
    if not fresh:
        pass
    elif header:
        start, rest = text[: header.end()], text[header.end() :]
        joined = newline.join(block)
        text = f"{start}{joined}{newline}{rest}" if start.endswith("\n") else f"{start}{newline}{joined}"
    else:
        text = _appended(text, [BEGIN, "[global]", *block[1:]], newline)
    whole = text.encode("utf-8", "surrogateescape")
    _check_ini(whole)
    return whole


def condarc(content: bytes, values: Mapping[str, Any]) -> bytes:
    """.condarc with these keys; in a mapping such as custom_channels what the user has beside ours stays.

    Raises:
        SpecError: it is no YAML that conda reads.
    """
    from ruamel.yaml import YAML

    bare = _without_block(content)
    if not values:
        return bare
    there = _load_yaml(bare)
    wanted = {
        key: {**there[key], **value} if _both_maps(there.get(key), value) else value for key, value in values.items()
    }
    if all(there.get(key) == value for key, value in wanted.items()):
        return bare
    text = bare.decode("utf-8", "surrogateescape")
    if not set(wanted) & set(there):
        lines = io.StringIO()
        writer = YAML()
        writer.width = 4096
        writer.dump(dict(wanted), lines)
        appended = _appended(text, [BEGIN, *lines.getvalue().splitlines(), END], _newline(text))
        whole = appended.encode("utf-8", "surrogateescape")
        if _reads_as(whole, {**there, **wanted}):
            return whole
    return _merged_yaml(bare, wanted)


def uv_config(content: bytes, index: str | None) -> bytes:
    """uv.toml with this default index.

    Raises:
        SpecError: it is no TOML.
    """
    bare = _without_block(content)
    if index is None:
        return bare
    try:
        text = bare.decode("utf-8")
        there = parse_toml(text)
    except ValueError as error:
        raise SpecError(f"it is not valid TOML: {error}. {_FAULT}.") from None
    named = there.get("index")
    default = next((each for each in named if each.get("default")), None) if isinstance(named, list) else None
    if default is None and "index-url" not in there:
        block = [BEGIN, "[[index]]", f"url = {_quoted(index)}", "default = true", END]
        appended = _appended(text, block, _newline(text))
        try:
            parse_toml(appended)
        except ValueError:
            pass  # its indexes are written inline: then nothing can be appended
        else:
            return appended.encode()
    return _merged_toml(text, index)


def _replace_option(text: str, name: str, value: str) -> tuple[str, int]:
    """Give an option of [global] or [install] another value, continuation lines and all; and how many there were."""
    spelled = name.replace("-", "[-_]")
    pattern = re.compile(rf"(?mi)^({spelled}[ \t]*[=:][ \t]*)[^\r\n]*((?:\r?\n[ \t]+[^\r\n]*)*)")
    parts = re.split(r"(?m)^(?=\[)", text)
    count = 0
    for number, part in enumerate(parts):
        if re.match(r"\[(global|install)\]", part):
            parts[number], found = pattern.subn(lambda match: f"{match.group(1)}{value}", part)
            count += found
    return "".join(parts), count


def _check_ini(content: bytes) -> None:
    import configparser

    try:
        configparser.RawConfigParser().read_string(content.decode("utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise SpecError(f"pip cannot read it: {' '.join(str(error).split())}. {_FAULT}.") from None


def _load_yaml(content: bytes) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe").load(content.decode("utf-8"))
    except (UnicodeDecodeError, YAMLError, ValueError) as error:
        raise SpecError(f"it is not valid YAML: {' '.join(str(error).split())}. {_FAULT}.") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SpecError(f"it is no mapping of conda's keys. {_FAULT}.")
    return found


def _reads_as(content: bytes, wanted: Mapping[str, Any]) -> bool:
    try:
        return _load_yaml(content) == dict(wanted)
    except SpecError:
        return False


def _merged_yaml(content: bytes, wanted: Mapping[str, Any]) -> bytes:
    from ruamel.yaml import YAML

    merging = YAML(typ="rt")
    merging.preserve_quotes = True
    merging.width = 4096
    text = content.decode("utf-8")
    document = merging.load(text)
    for key, value in wanted.items():
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
    for each in document.get("index", []):
        if each.get("default"):
            each["url"] = index
            break
    else:
        if "index-url" not in document:
            document["index"].append({"url": index, "default": True})
    return str(tomlkit.dumps(document)).encode()


def _both_maps(one: object, other: object) -> bool:
    return isinstance(one, dict) and isinstance(other, dict)


def _appended(text: str, block: Sequence[str], newline: str) -> str:
    """The text with a block at its end. A last line without its newline gets one, and the block ends without."""
    joined = newline.join(block)
    if text and not text.endswith("\n"):
        return f"{text}{newline}{joined}"
    return f"{text}{joined}{newline}"


def _without_block(content: bytes) -> bytes:
    """The content without our block, as it was before it was put in."""
    found = re.search(
        rb"(\r?\n)?" + re.escape(BEGIN.encode()) + rb".*?" + re.escape(END.encode()) + rb"(\r?\n)?", content, re.DOTALL
    )
    if not found:
        return content
    before, after = found.group(1) or b"", found.group(2) or b""
    # At the end without a newline: then the one before it was ours. Else the one behind it was.
    return content[: found.start()] + (before if after else b"") + content[found.end() :]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
