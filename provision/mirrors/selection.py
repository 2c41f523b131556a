"""Defines the setup step that chooses a mirror for each tool by its files and speed, and records the choice."""

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
from provision.mirrors import probe_all as mirror_probe
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
_FALLBACKS = 4  # the number of further mirrors that are recorded as fallbacks


def requested_mirrors(value: str | Mapping[str, str], catalogue: Catalogue) -> dict[str, str]:
    """Return {name of the tool: "auto", "keep", "official" or the name of a mirror} for each tool.

    Args:
        value: the value of `mirror` in host.toml. A single name applies to all tools that the mirror serves. A tool
            without a value has "auto".
        catalogue: the known mirrors.

    Raises:
        SpecError: there is no mirror with this name, or none for the tool.
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
    """Return the results of the usable targets, the best first.

    They are sorted by the share of the probe files that the target has, then by MB/s, then in the given order.
    """
    usable = [result for result in results if result.error is None and result.held]
    return sorted(usable, key=lambda result: (-result.held / result.asked, -(result.megabytes_per_second or 0.0)))


@dataclass
class MirrorSelector:
    """Probes and chooses the mirrors of one host.

    `catalogue`: the known mirrors. `needs`: the locked packages and models of the host.
    `environ`: the environment variables. `home`: the user's home folder.
    `record`: the present record in the root, with the settings that firstlight has written.
    """

    catalogue: Catalogue
    needs: ProbeNeeds
    environ: Mapping[str, str]
    home: Path
    record: MirrorRecord

    @cached_property
    def machine(self) -> MachineSettings:
        """Return the host's own settings: the environment variables and the user's files."""
        return MachineSettings(self.environ, self.home)

    @cached_property
    def probe_files(self) -> dict[str, list[ProbeFile]]:
        """Return {name of the tool: the locked files that a probe requests from its mirrors}."""
        return {tool.name: tool.probe_files(self.needs) for tool in all_tools.TOOLS}

    def own_setting(self, tool: Tool) -> str | None:
        """Return, as text, the user's own setting of a tool's source; None without one.

        A setting that firstlight has written does not count.
        """
        return tool.own_setting(self.machine, self.record)

    def targets(self, tool: Tool, only: str | None = None) -> list[ProbeTarget]:
        """Return the sources of a tool to probe: the official source and every mirror.

        The list is empty if the lock files and models have no file for the tool.

        Args:
            tool: the tool.
            only: the name of the only source to return; None: return all.
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
        """Return the mirror with this name as a source, with the URL of the variant or of the conda channels."""
        if name == OFFICIAL:
            return MirrorSource(OFFICIAL)
        return self.catalogue.of(tool.name)[name].source_for(name, self.needs)

    def probe(self, targets: Sequence[ProbeTarget]) -> list[ProbeResult]:
        """Probe all targets at the same time, and return the results in the order of the targets."""
        return mirror_probe.probe(
            targets, self.probe_files, partial(pip_settings.session, self.environ, self.machine.pip)
        )

    def auto(self, tool: Tool, results: Sequence[ProbeResult]) -> MirrorChoice:
        """Choose the best source of a tool by the results of the probe, and the next best sources as fallbacks.

        If the official source has all files, a mirror is chosen only if it is more than 1.5 times as fast. If the user
        has a setting of their own, no source is chosen.
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
        """Choose the mirror with this name; the fallbacks are the official source, then other mirrors of the catalogue.

        Raises:
            FirstlightError: the probe of this mirror has failed.
        """
        if name == OFFICIAL:
            return MirrorChoice(OFFICIAL, (MirrorSource(OFFICIAL),), "the official source was requested")
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
        """Return the source of a probe result, with the layout of the torch mirror that the probe has detected."""
        source = self.source(tool, result.target.name)
        return source if source.is_official else replace(source, kind=result.kind)


class MirrorStep:
    """Makes sure that a source is chosen for each tool and recorded in the root."""

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
            root: the root.
            requested: {name of the tool: "auto", "keep", "official" or the name of a mirror}.
            catalogue: the known mirrors.
            needs: a function that returns the locked packages and models; called only by `apply`.
            environ: the environment variables of this process.
            home: the user's home folder.
            journal: the journal of the run.
            offline: probe no mirror.
            again: choose again, even if a choice is recorded.
            nodefaults: leave conda's default channels out of conda's settings; None: keep the recorded value.
        """
        self.root, self.requested, self.catalogue, self.needs = root, requested, catalogue, needs
        self.environ, self.home, self.journal = environ, home, journal
        self.offline, self.again, self.nodefaults = offline, again, nodefaults

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        return (
            "probe every mirror for a few seconds, and choose the mirror with the most locked files and the best speed"
        )

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a choice is not probed again)
        """Check that the record has the requested choice for each tool."""
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
        """Return a reason to run `apply` although the state may be ok; None without one."""
        return "a new choice was requested" if self.again else None

    def apply(self) -> None:
        """Probe the mirrors, choose a source for each tool, and record the choices.

        Raises:
            FirstlightError: the probe of a requested mirror has failed.
        """
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
    return ", ".join(texts) or "no mirror is chosen"


def _summary(result: ProbeResult) -> str:
    return f"{result.held} of {result.asked} locked files, {_rate(result):g} MB/s"


def _rate(result: ProbeResult) -> float:
    return result.megabytes_per_second or 0.0
