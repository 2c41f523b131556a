"""Chooses a mirror for each tool by what it holds and how fast it is, and keeps the choice on the volume."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from provision.config import toml
from provision.core import layout
from provision.core.errors import FirstlightError
from provision.core.step import Check, State
from provision.installers import pip_settings
from provision.mirrors import probe as mirror_probe
from provision.mirrors import record as mirror_record
from provision.mirrors.record import OFFICIAL, MirrorChoice, MirrorRecord, MirrorSource
from provision.mirrors.tools import all_tools
from provision.mirrors.tools.tool import MachineSettings
from provision.volume.changes import keep_backup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.mirrors.catalogue import Catalogue
    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_needs import ProbeNeeds
    from provision.mirrors.prober import ProbeResult, ProbeTarget
    from provision.mirrors.tools.tool import Tool
    from provision.volume.journal import Journal

# Writing into people's files is worth it from so much more speed on.
_WORTH = 1.5
_OTHERS = 4


def wanted_of(asked: str | Mapping[str, str], catalogue: Catalogue) -> dict[str, str]:
    """{tool: auto, keep, official or a mirror's name} from host.toml's `mirror`; what is not named is auto.

    Raises:
        SpecError: there is no such mirror, or it does not serve the tool.
    """
    tools = all_tools.names()
    if isinstance(asked, str):
        if asked in {"auto", "keep", OFFICIAL}:
            return dict.fromkeys(tools, asked)
        toml.choose(asked, ["auto", "keep", OFFICIAL, *catalogue.names()], "mirror")
        return {tool: asked if tool in catalogue.tools_of(asked) else "auto" for tool in tools}
    for tool, name in asked.items():
        toml.choose(name, ["auto", "keep", OFFICIAL, *catalogue.of(tool)], f"mirror of {tool}")
    return {tool: asked.get(tool, "auto") for tool in tools}


@dataclass
class MirrorSelector:
    """Asks the mirrors for one host."""

    catalogue: Catalogue
    needs: ProbeNeeds
    environ: Mapping[str, str]
    home: Path
    record: MirrorRecord

    @cached_property
    def machine(self) -> MachineSettings:
        """Return the settings of this machine."""
        return MachineSettings(self.environ, self.home)

    @cached_property
    def probe_files(self) -> dict[str, list[ProbeFile]]:
        """Return {tool: the locked files by which its mirrors are judged}."""
        return {tool.name: tool.probe_files(self.needs) for tool in all_tools.TOOLS}

    def own(self, tool: Tool) -> str | None:
        """Return this machine's own setting of a tool's source, in words, or None. What we wrote does not count."""
        return tool.own_setting(self.machine, self.record)

    def asked(self, tool: Tool, only: str | None = None) -> list[ProbeTarget]:
        """Return the sources of a tool to probe: the official one and every mirror, or only the one of a name.

        There is none where the locks need nothing of the tool.
        """
        if not self.probe_files[tool.name]:
            return []
        every = [tool.target(tool.official(self.needs), self.needs)]
        for name, mirror in self.catalogue.of(tool.name).items():
            target = tool.target(mirror.source_for(name, self.needs), self.needs)
            if target is not None:
                every.append(replace(target, redirects=mirror.redirects, reach=mirror.reach))
        return [target for target in every if target is not None and only in {None, target.name}]

    def source(self, tool: Tool, name: str) -> MirrorSource:
        """Return a mirror as it is used: with its build of torch, its channels."""
        if name == OFFICIAL:
            return MirrorSource(OFFICIAL)
        return self.catalogue.of(tool.name)[name].source_for(name, self.needs)

    def probe(self, asked: Sequence[ProbeTarget]) -> list[ProbeResult]:
        """Look at them all at once."""
        return mirror_probe.probe(
            asked, self.probe_files, partial(pip_settings.session, self.environ, self.machine.pip)
        )

    def auto(self, tool: Tool, found: Sequence[ProbeResult]) -> MirrorChoice:
        """The best of what was found: the official source stays where no mirror is much faster."""
        own = self.own(tool)
        if own:
            return MirrorChoice("auto", (), f"this machine's own setting stays: {own}")
        ranked = mirror_probe.ranked([each for each in found if each.asked_of.tool == tool.name])
        if not ranked:
            why = "no mirror can be used" if self.probe_files[tool.name] else "nothing of it is locked here"
            return MirrorChoice("auto", (MirrorSource(OFFICIAL),), why)
        best = ranked[0]
        official = next((each for each in ranked if each.asked_of.name == OFFICIAL), None)
        if official is not None and official.is_complete and _rate(official) * _WORTH >= _rate(best):
            best = official
        others = [each for each in ranked if each is not best][:_OTHERS]
        named = [self._used(tool, each) for each in (best, *others)]
        if not any(each.is_official for each in named):
            named.append(MirrorSource(OFFICIAL))
        return MirrorChoice("auto", tuple(named), f"{best.held} of {best.asked} locked files, {_rate(best):g} MB/s")

    def named(self, tool: Tool, name: str, found: Sequence[ProbeResult]) -> MirrorChoice:
        """A mirror by its name; the official source follows where it fails, then the others of the catalogue.

        Raises:
            FirstlightError: it was asked, and cannot be used.
        """
        if name == OFFICIAL:
            return MirrorChoice(OFFICIAL, (MirrorSource(OFFICIAL),), "nothing is overridden")
        probe = next((each for each in found if (each.asked_of.tool, each.asked_of.name) == (tool.name, name)), None)
        if probe is not None and probe.error:
            raise FirstlightError(
                f"{name} cannot be used for {tool.name}: it {probe.error}. Look for another: "
                f"{layout.program()} mirrors probe. To write it unasked: --offline"
            )
        first = self._used(tool, probe) if probe else self.source(tool, name)
        others = [self.source(tool, other) for other in self.catalogue.of(tool.name) if other != name]
        held = f"{probe.held} of {probe.asked} locked files, {_rate(probe):g} MB/s" if probe else "it was not asked"
        return MirrorChoice(name, (first, MirrorSource(OFFICIAL), *others[:_OTHERS]), held)

    def _used(self, tool: Tool, probe: ProbeResult) -> MirrorSource:
        source = self.source(tool, probe.asked_of.name)
        return source if source.is_official else replace(source, kind=probe.kind)


class MirrorStep:
    """For each tool it is decided where its files come from."""

    name = "mirrors"
    essential = False
    local = False

    def __init__(
        self,
        root: Root,
        wanted: Mapping[str, str],
        catalogue: Catalogue,
        needed: Callable[[], ProbeNeeds],
        environ: Mapping[str, str],
        home: Path,
        journal: Journal,
        *,
        offline: bool,
        again: bool = False,
        nodefaults: bool | None = None,
    ) -> None:
        """Take what is wanted of each tool; `again`: choose also where a choice stands."""
        self.root, self.wanted, self.catalogue, self.needed = root, wanted, catalogue, needed
        self.environ, self.home, self.journal = environ, home, journal
        self.offline, self.again, self.nodefaults = offline, again, nodefaults

    def describe(self) -> str:
        """The plan's line."""
        return "ask every mirror, a few seconds, and choose by what it holds and how fast it is"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a choice is not asked again)
        """Look whether there is a choice, and whether it is the one that is wanted."""
        record = mirror_record.read(self.root)
        if record is not None and record.restored and set(self.wanted.values()) <= {"auto", "keep"}:
            return Check(State.OK, f"taken back by you; choose again with: {layout.program()} mirrors use auto")
        left = [tool for tool, asked in self.wanted.items() if not _stands(record, tool, asked)]
        if left and self.offline and all(self.wanted[tool] == "auto" for tool in left):
            return Check(State.OK, "not chosen yet, and this run is offline")
        if left:
            return Check(State.DRIFTED, f"{', '.join(left)}: not chosen yet")
        return Check(State.OK, _told(record or MirrorRecord()))

    def retry_reason(self) -> str | None:
        """Return why to choose although a choice may stand, or None."""
        return "to be chosen" if self.again else None

    def apply(self) -> None:
        """Ask, choose, and keep the choice."""
        record = mirror_record.read(self.root) or MirrorRecord()
        chooser = MirrorSelector(self.catalogue, self.needed(), self.environ, self.home, record)
        tools = [(all_tools.by_name(tool), asked) for tool, asked in self.wanted.items() if asked != "keep"]
        if not self.again:
            tools = [(tool, asked) for tool, asked in tools if not _stands(record, tool.name, asked)]
        asked: list[ProbeTarget] = []
        for tool, name in tools:
            if not self.offline and name != OFFICIAL and not (name == "auto" and chooser.own(tool)):
                asked += chooser.asked(tool, None if name == "auto" else name)
        found = chooser.probe(asked) if asked else []
        fresh = {
            tool.name: chooser.auto(tool, found) if name == "auto" else chooser.named(tool, name, found)
            for tool, name in tools
        }
        nodefaults = record.nodefaults if self.nodefaults is None else self.nodefaults
        kept = replace(record, choices={**record.choices, **fresh}, restored=False, nodefaults=nodefaults)
        keep_backup(mirror_record.file_of(self.root), mirror_record.text_of(kept).encode(), self.journal)
        mirror_record.write(self.root, kept)


def _stands(record: MirrorRecord | None, tool: str, asked: str) -> bool:
    if asked == "keep":
        return True
    if record is None or tool not in record.choices:
        return False
    return asked == "auto" or record.choices[tool].first.name == asked


def _told(record: MirrorRecord) -> str:
    words = []
    for tool, choice in record.choices.items():
        name = choice.first.name if choice.sources else "this machine's own"
        words.append(f"{tool} {name}")
    return ", ".join(words) or "nothing is overridden"


def _rate(probe: ProbeResult) -> float:
    return probe.megabytes_per_second or 0.0
