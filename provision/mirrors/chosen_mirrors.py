"""The record on the volume: the mirror that is chosen for each tool, and the files that were changed for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

SCHEMA = 1
OFFICIAL = "official"  # the source that a tool uses by default


@dataclass(frozen=True)
class MirrorSource:
    """Describe a source of one tool's files: a mirror or the official source.

    `url` is "" for the official source, whose address the tool has by default.
    `kind` is the layout of a torch mirror's pages, "index" or "find-links"; it is always "index" for other tools.
    `channels` is {conda channel: its address, without a trailing slash}.
    `defaults` is the address below which conda's channels main, r and msys2 are.
    """

    name: str
    url: str = ""
    kind: str = "index"
    channels: dict[str, str] = field(default_factory=dict)
    defaults: str | None = None

    @property
    def is_official(self) -> bool:
        """Return whether this is the official source, for which no setting is overridden."""
        return self.name == OFFICIAL

    @property
    def conda_addresses(self) -> set[str]:
        """Return every address that firstlight writes into conda's settings for this source."""
        channels = {url.removesuffix(f"/{name}") for name, url in self.channels.items()}
        return {address for address in (self.url, self.defaults, *channels) if address}


@dataclass(frozen=True)
class MirrorChoice:
    """Hold the sources of one tool: the chosen one first, then the fallbacks in their order.

    `asked` is the value from host.toml or the command: auto, official or the name of a mirror.
    `sources` is empty where the machine's own setting is kept. `why` gives the reason in words.
    """

    asked: str
    sources: tuple[MirrorSource, ...]
    why: str

    @property
    def first(self) -> MirrorSource:
        """Return the chosen source; the official one where there are no sources."""
        return self.sources[0] if self.sources else MirrorSource(OFFICIAL)


@dataclass(frozen=True)
class WrittenFile:
    """Describe one settings file that firstlight changed, with its content before and after.

    `kept` is the path of the original content on the volume, None where the file did not exist.
    `mode` is the original file mode. `sha256` is of the content that firstlight wrote.
    `folders` are the folders that were created for the file, the innermost first.
    """

    path: str
    kept: str | None
    mode: int | None
    sha256: str
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class MirrorRecord:
    """Hold all that mirrors.json on the volume records.

    `choices` is {tool: its choice}. `written` are the changed settings files.
    `nodefaults` leaves conda's default channels out.
    `restored` is true after `mirrors restore`; setup then chooses no mirror by itself.
    """

    choices: dict[str, MirrorChoice] = field(default_factory=dict)
    written: tuple[WrittenFile, ...] = ()
    nodefaults: bool = False
    restored: bool = False

    def chosen(self, tool: str) -> MirrorSource:
        """Return the chosen source of a tool; the official one where nothing was chosen."""
        return self.choices[tool].first if tool in self.choices else MirrorSource(OFFICIAL)

    def sources(self, tool: str) -> tuple[MirrorSource, ...]:
        """Return every source that a tool may use, the chosen one first."""
        return self.choices[tool].sources if tool in self.choices else ()


def record_path(root: Root) -> Path:
    """Return the path of the record on the volume."""
    return root.state / "mirrors.json"


def read(root: Root) -> MirrorRecord | None:
    """Read the record; return None where there is none, or where it cannot be read."""
    try:
        content = json.loads(record_path(root).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            return None
        return MirrorRecord(
            {tool: _choice(row) for tool, row in content["choices"].items()},
            tuple(WrittenFile(**(row | {"folders": tuple(row["folders"])})) for row in content["written"]),
            nodefaults=bool(content["nodefaults"]),
            restored=bool(content["restored"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _choice(row: dict[str, Any]) -> MirrorChoice:
    return MirrorChoice(row["asked"], tuple(MirrorSource(**source) for source in row["sources"]), row["why"])


def write(root: Root, record: MirrorRecord) -> None:
    """Write the record to the volume."""
    write_atomic(record_path(root), to_json(record))


def to_json(record: MirrorRecord) -> str:
    """Return the text of the record's file."""
    content = {"schema": SCHEMA, **asdict(record)}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
