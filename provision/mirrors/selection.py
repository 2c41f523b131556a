"""The step that chooses a mirror for each tool by completeness and speed, and records the choice on the volume."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from provision.config import toml
from provision.core import layout
from provision.core.errors import FirstlightError
from provision.core.step import Check, State
from provision.installers import pip_settings
from provision.mirrors import chosen_mirrors
from provision.mirrors import probe as mirror_probe
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorChoice, MirrorRecord, MirrorSource
from provision.mirrors.tools import all_tools
from provision.mirrors.tools.tool import MachineSettings
from provision.volume.changes import keep_backup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.mirrors.catalogue import Catalogue
    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_mirror import ProbeResult, ProbeTarget
    from provision.mirrors.probe_needs import ProbeNeeds
    from provision.mirrors.tools.tool import Tool
    from provision.volume.journal import Journal

# A mirror must be this many times as fast as the official source. A smaller gain does not justify changes in the
# user's settings files.
_MINIMUM_SPEEDUP = 1.5
_FALLBACKS = 4  # further mirrors that are recorded behind the chosen one


def requested_mirrors(value: str | Mapping[str, str], catalogue: Catalogue) -> dict[str, str]:
    """Return {tool: auto, keep, official or the name of a mirror} for the value of `mirror` in host.toml.

    One name applies to all tools that the mirror serves. A tool without a value gets auto.

    Raises:
        SpecError: there is no such mirror, or it does not serve the tool.
    """
    tools = all_tools.names()
    if isinstance(value, str):
        if value in {"auto", "keep", OFFICIAL}:
            return dict.fromkeys(tools, value)
        toml.choose(value, ["auto", "keep", OFFICIAL, *catalogue.names()], "mirror")
        return {tool: value if tool in catalogue.tools_of(value) else "auto" for tool in tools}
    for tool, name in value.items():
        toml.choose(name, ["auto", "keep", OFFICIAL, *catalogue.of(tool)], f"mirror of {tool}")
    return {tool: value.get(tool, "auto") for tool in tools}


def rank(results: Sequence[ProbeResult]) -> list[ProbeResult]:
    """Return the usable results, the best first: by share of the files, then by MB/s, then in the given order."""
    usable = [result for result in results if result.error is None and result.held]
    return sorted(usable, key=lambda result: (-result.held / result.asked, -(result.megabytes_per_second or 0.0)))


@dataclass
class MirrorSelector:
    """Probe and choose the mirrors of one host. `record` is the present record of the volume."""

    catalogue: Catalogue
    needs: ProbeNeeds
    environ: Mapping[str, str]
    home: Path
    record: MirrorRecord

    @cached_property
    def machine(self) -> MachineSettings:
        """Return the settings of this machine: its variables and its user's files."""
        return MachineSettings(self.environ, self.home)

    @cached_property
    def probe_files(self) -> dict[str, list[ProbeFile]]:
        """Return {tool: the locked files that its mirrors are probed for}."""
        return {tool.name: tool.probe_files(self.needs) for tool in all_tools.TOOLS}

    def own_setting(self, tool: Tool) -> str | None:
        """Return the machine's own setting of a tool's source, in words, or None.

        A setting that firstlight wrote does not count.
        """
        return tool.own_setting(self.machine, self.record)

    def targets(self, tool: Tool, only: str | None = None) -> list[ProbeTarget]:
        """Return the sources of a tool to probe: the official one and every mirror, or only the source named `only`.

        The list is empty where the locks have no file for the tool.
        """
        if not self.probe_files[tool.name]:
            return []
        targets = [tool.target(tool.official(self.needs), self.needs)]
        for name, mirror in self.catalogue.of(tool.name).items():
            target = tool.target(mirror.source_for(name, self.needs), self.needs)
            if target is not None:
                targets.append(replace(target, redirects=mirror.redirects, reach=mirror.reach))
        return [target for target in targets if target is not None and only in {None, target.name}]

    def source(self, tool: Tool, name: str) -> MirrorSource:
        """Return a mirror of the catalogue as a source: with the address of the torch build and with conda channels."""
        if name == OFFICIAL:
            return MirrorSource(OFFICIAL)
        return self.catalogue.of(tool.name)[name].source_for(name, self.needs)

    def probe(self, targets: Sequence[ProbeTarget]) -> list[ProbeResult]:
        """Probe all targets at the same time; return the results in their order."""
        return mirror_probe.probe(
            targets, self.probe_files, partial(pip_settings.session, self.environ, self.machine.pip)
        )

    def auto(self, tool: Tool, results: Sequence[ProbeResult]) -> MirrorChoice:
        """Choose the best source of a tool from the probe results, with the next best ones as fallbacks.

        The official source is preferred unless a mirror is `_MINIMUM_SPEEDUP` times as fast. The machine's own
        setting takes precedence over any choice.
        """
        own_setting = self.own_setting(tool)
        if own_setting:
            return MirrorChoice("auto", (), f"this machine's own setting stays: {own_setting}")
        ranked = rank([result for result in results if result.target.tool == tool.name])
        if not ranked:
            why = "no mirror can be used" if self.probe_files[tool.name] else "the locks have no file to probe"
            return MirrorChoice("auto", (MirrorSource(OFFICIAL),), why)
        best = ranked[0]
        official = next((result for result in ranked if result.target.name == OFFICIAL), None)
        if official is not None and official.is_complete and _rate(official) * _MINIMUM_SPEEDUP >= _rate(best):
            best = official
        fallbacks = [result for result in ranked if result is not best][:_FALLBACKS]
        sources = [self._probed_source(tool, result) for result in (best, *fallbacks)]
        if not any(source.is_official for source in sources):
            sources.append(MirrorSource(OFFICIAL))
        return MirrorChoice("auto", tuple(sources), _summary(best))

    def named(self, tool: Tool, name: str, results: Sequence[ProbeResult]) -> MirrorChoice:
        """Choose a mirror by its name; the fallbacks are the official source, then the catalogue's other mirrors.

        Raises:
            FirstlightError: the probe of this mirror has failed.
        """
        if name == OFFICIAL:
            return MirrorChoice(OFFICIAL, (MirrorSource(OFFICIAL),), "nothing is overridden")
        result = next((row for row in results if (row.target.tool, row.target.name) == (tool.name, name)), None)
        if result is not None and result.error:
            raise FirstlightError(
                f"{name} cannot be used for {tool.name}: {result.error}. Run `{layout.program()} mirrors probe` to "
                "find another mirror, or add --offline to choose this one without a probe."
            )
        first = self._probed_source(tool, result) if result else self.source(tool, name)
        others = [self.source(tool, other) for other in self.catalogue.of(tool.name) if other != name]
        why = _summary(result) if result else "not probed"
        return MirrorChoice(name, (first, MirrorSource(OFFICIAL), *others[:_FALLBACKS]), why)

    def _probed_source(self, tool: Tool, result: ProbeResult) -> MirrorSource:
        """Return the source of a probe result, with the kind of page that the probe detected."""
        source = self.source(tool, result.target.name)
        return source if source.is_official else replace(source, kind=result.kind)


class MirrorStep:
    """Ensure that a source is chosen for each tool and recorded on the volume."""

    name = "mirrors"
    essential = False
    local = False

    def __init__(
        self,
        root: Root,
        requested: Mapping[str, str],
        catalogue: Catalogue,
        needs: Callable[[], ProbeNeeds],
        environ: Mapping[str, str],
        home: Path,
        journal: Journal,
        *,
        offline: bool,
        again: bool = False,
        nodefaults: bool | None = None,
    ) -> None:
        """Store the inputs of the choice.

        Args:
            root: the root on the volume.
            requested: {tool: auto, keep, official or the name of a mirror}.
            catalogue: the known mirrors.
            needs: returns the locked files; called only when mirrors are probed.
            environ: the environment variables of this process.
            home: the user's home folder.
            journal: the journal of this run.
            offline: probe nothing.
            again: choose anew, also where a choice is recorded.
            nodefaults: leave conda's default channels out; None keeps the recorded value.
        """
        self.root, self.requested, self.catalogue, self.needs = root, requested, catalogue, needs
        self.environ, self.home, self.journal = environ, home, journal
        self.offline, self.again, self.nodefaults = offline, again, nodefaults

    def describe(self) -> str:
        """Return the plan's line for this step."""
        return "probe every mirror for a few seconds, and choose by completeness and speed"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a choice is not probed again)
        """Check that the record has a choice for each tool, and that it is the requested one."""
        record = chosen_mirrors.read(self.root)
        if record is not None and record.restored and set(self.requested.values()) <= {"auto", "keep"}:
            return Check(
                State.OK,
                f"no mirrors since `mirrors restore`; to choose again, run `{layout.program()} mirrors use auto`",
            )
        missing = [tool for tool, name in self.requested.items() if not _has_choice(record, tool, name)]
        if missing and self.offline and all(self.requested[tool] == "auto" for tool in missing):
            return Check(State.OK, "not chosen yet, and this run is offline")
        if missing:
            return Check(State.DRIFTED, f"{', '.join(missing)}: not chosen yet")
        return Check(State.OK, _choices_text(record or MirrorRecord()))

    def retry_reason(self) -> str | None:
        """Return why to choose although a choice may stand, or None."""
        return "a new choice was requested" if self.again else None

    def apply(self) -> None:
        """Probe the mirrors, choose one for each tool, and record the choices."""
        record = chosen_mirrors.read(self.root) or MirrorRecord()
        selector = MirrorSelector(self.catalogue, self.needs(), self.environ, self.home, record)
        tools = [(all_tools.by_name(tool), name) for tool, name in self.requested.items() if name != "keep"]
        if not self.again:
            tools = [(tool, name) for tool, name in tools if not _has_choice(record, tool.name, name)]
        targets: list[ProbeTarget] = []
        for tool, name in tools:
            if not self.offline and name != OFFICIAL and not (name == "auto" and selector.own_setting(tool)):
                targets += selector.targets(tool, None if name == "auto" else name)
        results = selector.probe(targets) if targets else []
        choices = {
            tool.name: selector.auto(tool, results) if name == "auto" else selector.named(tool, name, results)
            for tool, name in tools
        }
        nodefaults = record.nodefaults if self.nodefaults is None else self.nodefaults
        updated = replace(record, choices={**record.choices, **choices}, restored=False, nodefaults=nodefaults)
        keep_backup(chosen_mirrors.record_path(self.root), chosen_mirrors.to_json(updated).encode(), self.journal)
        chosen_mirrors.write(self.root, updated)


def _has_choice(record: MirrorRecord | None, tool: str, requested: str) -> bool:
    if requested == "keep":
        return True
    if record is None or tool not in record.choices:
        return False
    return requested == "auto" or record.choices[tool].first.name == requested


def _choices_text(record: MirrorRecord) -> str:
    texts = []
    for tool, choice in record.choices.items():
        name = choice.first.name if choice.sources else "this machine's own"
        texts.append(f"{tool} {name}")
    return ", ".join(texts) or "nothing is overridden"


def _summary(result: ProbeResult) -> str:
    return f"{result.held} of {result.asked} locked files, {_rate(result):g} MB/s"


def _rate(result: ProbeResult) -> float:
    return result.megabytes_per_second or 0.0
