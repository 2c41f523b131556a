"""Reads and writes the record of the chosen mirrors, the file mirrors.json in the root.

It has the mirror that is chosen for each tool, and the settings files that were changed for the mirrors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING

from provision.fs import records
from provision.fs.atomic import write_atomic
from provision.net.urls import is_address

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import TypeAdapter

    from provision.core.layout import Root

SCHEMA = 1
OFFICIAL = "official"  # the source that a tool uses by default


@dataclass(frozen=True)
class MirrorSource:
    """Describe a source from which one tool can download: a mirror or the official source.

    `name`: the name of the mirror in the catalogue, or "official".
    `url`: the URL; it may be "" for the official source, which the tool uses by default.
    `kind`: the layout of a torch mirror: "index", or "find-links" for one page with links to all files. It is "index"
        for the other tools.
    `channels`: {conda channel: its URL, without a trailing slash}.
    `defaults`: the URL below which conda's channels main, r and msys2 are; None if the mirror does not have them.
    """

    name: str
    url: str = ""
    kind: str = "index"
    channels: dict[str, str] = field(default_factory=dict)
    defaults: str | None = None

    @property
    def is_official(self) -> bool:
        """Return whether this is the official source, for which firstlight writes no setting."""
        return self.name == OFFICIAL

    @property
    def conda_addresses(self) -> set[str]:
        """Return all URLs that firstlight writes into conda's settings for this source."""
        channels = {url.removesuffix(f"/{name}") for name, url in self.channels.items()}
        return {address for address in (self.url, self.defaults, *channels) if address}


@dataclass(frozen=True)
class MirrorChoice:
    """Hold the sources that are chosen for one tool.

    `asked`: the requested value from host.toml or the command: "auto", "official" or the name of a mirror.
    `sources`: the chosen source first, then the fallbacks in their order; empty if the user's own setting is kept.
    `why`: the reason for the choice, as text.
    """

    asked: str
    sources: tuple[MirrorSource, ...]
    why: str

    @property
    def first(self) -> MirrorSource:
        """Return the chosen source; the official source if `sources` is empty."""
        return self.sources[0] if self.sources else MirrorSource(OFFICIAL)


@dataclass(frozen=True)
class WrittenFile:
    """Describe one settings file that firstlight has changed.

    `path`: the path of the settings file.
    `kept`: the path of the copy of its original content in the root; None if the file did not exist before.
    `mode`: the original file mode; None if the file did not exist.
    `sha256`: the hash of the content that firstlight has written, in hex; "" if firstlight has removed the file; or
        "edited since" if the user has edited the file between two runs.
    `folders`: the paths of the folders that firstlight has made for the file, the innermost first.
    """

    path: str
    kept: str | None
    mode: int | None
    sha256: str
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class MirrorRecord:
    """Hold the content of mirrors.json in the root.

    `choices`: {name of the tool: its choice}. `written`: the settings files that firstlight has changed.
    `nodefaults`: conda's default channels are left out of conda's settings.
    `restored`: the original settings were restored by `mirrors restore`, so setup chooses no mirror on its own.
    """

    choices: dict[str, MirrorChoice] = field(default_factory=dict)
    written: tuple[WrittenFile, ...] = ()
    nodefaults: bool = False
    restored: bool = False

    def chosen(self, tool: str) -> MirrorSource:
        """Return the chosen source of a tool; the official source if the record has no choice for the tool."""
        return self.choices[tool].first if tool in self.choices else MirrorSource(OFFICIAL)

    def sources(self, tool: str) -> tuple[MirrorSource, ...]:
        """Return the chosen source and the fallbacks of a tool, in this order; empty without a choice."""
        return self.choices[tool].sources if tool in self.choices else ()


_KEYS = {key.name for key in fields(MirrorRecord)}


def record_path(root: Root) -> Path:
    """Return the path of the record in a root; the file may be missing."""
    return root.state / "mirrors.json"


def read(root: Root) -> MirrorRecord | None:
    """Return the record of a root; None if there is no record, or if it is not valid."""
    try:
        content = records.read_state(record_path(root))
        if content.pop("schema", None) != SCHEMA or not set(content) >= _KEYS:
            return None
        # The lists of JSON are tuples of the record only if the value is read as JSON.
        record = _reader().validate_json(json.dumps(content), strict=True)
        sources = [source for choice in record.choices.values() for source in choice.sources]
        addresses = [url for row in sources for url in (row.url, row.defaults or "", *row.channels.values())]
        are_valid = all(map(is_address, filter(None, addresses)))
        are_absolute = all(file.path.startswith("/") for file in record.written)
    except (OSError, ValueError):
        return None
    return record if are_valid and (are_absolute or sys.platform == "win32") else None


@cache
def _reader() -> TypeAdapter[MirrorRecord]:
    from pydantic import TypeAdapter

    return TypeAdapter(MirrorRecord)


def write(root: Root, record: MirrorRecord) -> None:
    """Write the record to its file in the root."""
    write_atomic(record_path(root), to_json(record))


def to_json(record: MirrorRecord) -> str:
    """Return the text of mirrors.json for a record."""
    content = {"schema": SCHEMA, **asdict(record)}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
