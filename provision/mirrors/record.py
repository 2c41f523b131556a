"""Which mirrors this volume uses, and what was written for them: kept on the volume, read by all that fetches."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

SCHEMA = 1
OFFICIAL = "official"  # the source that a tool asks on its own


@dataclass(frozen=True)
class MirrorSource:
    """Where a tool may get its files.

    `url` is "" for the official one, which the tool itself knows. `kind`: of a torch mirror, index or find-links.
    `channels`: where conda's channels lie, without a trailing slash. `defaults`: where main, r and msys2 lie.
    """

    name: str
    url: str = ""
    kind: str = "index"
    channels: dict[str, str] = field(default_factory=dict)
    defaults: str | None = None

    @property
    def is_official(self) -> bool:
        """Whether nothing is overridden."""
        return self.name == OFFICIAL

    @property
    def bases(self) -> set[str]:
        """Every address that we write for it into conda's settings."""
        channels = {url.removesuffix(f"/{name}") for name, url in self.channels.items()}
        return {each for each in (self.url, self.defaults, *channels) if each}


@dataclass(frozen=True)
class MirrorChoice:
    """The sources of one tool, the chosen one first, then who is asked where it fails; `why` for people."""

    asked: str
    sources: tuple[MirrorSource, ...]
    why: str

    @property
    def first(self) -> MirrorSource:
        """The chosen one."""
        return self.sources[0] if self.sources else MirrorSource(OFFICIAL)


@dataclass(frozen=True)
class WrittenFile:
    """A file of which we changed the content: what it was (`kept`: a file on the volume; None: absent), and is now."""

    path: str
    kept: str | None
    mode: int | None
    sha256: str
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class MirrorRecord:
    """What stands on the volume. `restored`: the user took it all back, so setup leaves it alone."""

    choices: dict[str, MirrorChoice] = field(default_factory=dict)
    written: tuple[WrittenFile, ...] = ()
    nodefaults: bool = False
    restored: bool = False

    def chosen(self, tool: str) -> MirrorSource:
        """The source of a tool; the official one where nothing was chosen."""
        return self.choices[tool].first if tool in self.choices else MirrorSource(OFFICIAL)

    def sources(self, tool: str) -> tuple[MirrorSource, ...]:
        """Every source that a tool may use, the chosen one first."""
        return self.choices[tool].sources if tool in self.choices else ()


def file_of(root: Root) -> Path:
    """Where it is kept."""
    return root.state / "mirrors.json"


def read(root: Root) -> MirrorRecord | None:
    """What was chosen, or None where nothing was yet; a record that cannot be read counts as none."""
    try:
        found = json.loads(file_of(root).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            return None
        return MirrorRecord(
            {tool: _choice(row) for tool, row in found["choices"].items()},
            tuple(WrittenFile(**(row | {"folders": tuple(row["folders"])})) for row in found["written"]),
            nodefaults=bool(found["nodefaults"]),
            restored=bool(found["restored"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _choice(row: dict[str, Any]) -> MirrorChoice:
    return MirrorChoice(row["asked"], tuple(MirrorSource(**source) for source in row["sources"]), row["why"])


def write(root: Root, record: MirrorRecord) -> None:
    """Keep it."""
    write_atomic(file_of(root), text_of(record))


def text_of(record: MirrorRecord) -> str:
    """The record as it is kept."""
    whole = {"schema": SCHEMA, **asdict(record)}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"
