"""Defines the setup step that pulls a model, or builds its stand-in if no hub delivers the model."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from provision.core.errors import FirstlightError
from provision.core.redact import redact
from provision.core.step import Check, State
from provision.fs import records
from provision.fs.atomic import write_atomic
from provision.fs.file_lock import exclusive_lock
from provision.models import former_ids, load_line, stand_ins
from provision.models.hub_client import HubError
from provision.models.pull import Pull
from provision.models.verify import Depth
from provision.net.download import DownloadError
from provision.net.source_health import SourceHealth

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.models.architectures import Architecture
    from provision.models.hub_client import Hub
    from provision.models.hubs import Hubs
    from provision.models.verify import FileState

_LISTING_SECONDS = 1.0  # the timeout of the request that shows whether a hub is available again


class ModelStep:
    """Makes sure that all files of a model are in the hub cache, or that its stand-in is recorded with a reason.

    Args:
        root: the root.
        name: the name of the model in the manifest.
        spec: the entry of the manifest.
        hubs: the hubs to use.
        retry: if a stand-in is recorded, request the listing again once in this run (setup does, status does not).
        progress: called with (bytes since the last call, bytes in total) while files are downloaded or hashed.
        build: a function that builds the stand-in and reports its progress; None: the stand-in is only recorded.
        tell: called with a text for the user before each long wait.
        pinned: the revisions of the model's repository that the manifest pins.
        architecture: the architecture of the model; None if it is unknown.
    """

    essential = False
    local = False

    def __init__(
        self,
        root: Root,
        name: str,
        spec: ModelSpec,
        hubs: Hubs,
        *,
        retry: bool,
        progress: Progress,
        build: Callable[[Progress], Path] | None = None,
        tell: Callable[[str], None] = lambda _: None,
        pinned: Collection[str] = (),
        architecture: Architecture | None = None,
    ) -> None:
        """Store the arguments that the class describes."""
        self.name = f"model {name}"
        self.root = root
        self.model = name
        self.pull = Pull(root, name, spec, hubs, pinned=pinned, health=SourceHealth(tell=tell))
        self.retry = retry
        self.progress = progress
        self.build = build
        self.architecture = architecture

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        spec = self.pull.spec
        known = f"{spec.bytes / 1e9:.2f} GB, " if spec.bytes else ""
        return f"pull {spec.repo} ({known}{spec.license}) from {self.pull.hubs.every()[0].shown}"

    def check(self, *, deep: bool = False) -> Check:
        """Check the presence and size of every file; with `deep`, compare also the hash of every file with its pin.

        The state is ok as well if all files are missing and a reason for a stand-in is recorded.
        """
        states = self.pull.check_files(Depth.HASH if deep else Depth.SIZE, self._hashed)
        wrong = [state for state in states if state.state != "ok"]
        if not wrong:
            return self._complete_state(
                sum(state.size or 0 for state in states), ", every hash matches" if deep else ""
            )
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        detail = f"{wrong[0].path} {wrong[0].reason}{more}"
        reason = self._stand_in_reason(states)
        if reason is None:
            return Check(State.DRIFTED, detail)
        if stand_ins.snapshot_of(self.root, self.model) is None:
            said = f"{self.model}: none of its files is present ({reason})"
            return Check(State.OK, "absent; bench uses random weights", said)
        load = _to_load(load_line.of_stand_in(self.model, self.pull.spec, self.architecture))
        return Check(
            State.OK, f"stand-in: random weights{load}", f"{self.model}: stand-in with random weights ({reason})"
        )

    def retry_reason(self) -> str | None:
        """Return a reason to run `apply` although the state is ok: a hub is available again, or no stand-in is built.

        None if there is no such reason, if no stand-in is recorded, or without `retry`.
        """
        if not self.retry or self._stand_in_reason(self.pull.check_files(Depth.SIZE)) is None:
            return None
        if hub := self._available_hub():
            return f"{hub.shown} answers now"
        if self.build is not None and stand_ins.snapshot_of(self.root, self.model) is None:
            return "the stand-in is not built"
        return None

    def _stand_in_reason(self, states: Sequence[FileState]) -> str | None:
        """Return the recorded reason for a stand-in.

        None if no reason is recorded, if all files are right, or if a file is present and wrong.
        """
        lacking = [state for state in states if state.state != "ok"]
        if not lacking or any(state.state != "missing" for state in lacking):
            return None
        return recorded(self.root).get(self.model)

    def _complete_state(self, size: int, how: str) -> Check:
        """Return the state of a model whose files are right.

        It is drifted if a link by a former id is missing and can be made, else ok.

        Args:
            size: the size of all files in bytes.
            how: a text for the detail, such as ", every hash matches".
        """
        hub, spec, said = self.root.hub_in_use, self.pull.spec, list(self.pull.health.warnings())
        if lost := former_ids.missing(hub, spec):
            if former_ids.can_be_made(hub, spec):
                return Check(State.DRIFTED, f"{spec.repo} cannot be loaded as {lost[0]} (former id)")
            said.append(f"{hub} is read-only, so {spec.repo} cannot be loaded as {lost[0]} (former id)")
        fetched = self.pull.health.summary()
        how += f": {fetched}" if fetched else ""
        load = _to_load(load_line.of_model(self.root, spec, self.architecture))
        return Check(State.OK, f"{spec.repo}, {size:,} bytes{how}{load}", "; ".join(said) or None)

    def apply(self) -> None:
        """Pull the missing files; if no hub delivers them, build the stand-in and record it with the reason.

        Raises:
            FirstlightError: a hub sent wrong content, or the disk is full or cannot be written.
        """
        try:
            plan = self.pull.plan(self._hashed)
            total = plan.bytes_wanted
            self.pull.run(plan, lambda _, count: self.progress(count, total))
        except (HubError, DownloadError) as error:
            record(self.root, self.model, self._build_stand_in(str(error)))
        else:
            record(self.root, self.model, None)

    def _hashed(self, _path: str, count: int) -> None:
        """Report that `count` bytes of a present file were hashed."""
        self.progress(count, self.pull.spec.bytes or 0, "bytes hashed")

    def _build_stand_in(self, reason: str) -> str:
        """Build the stand-in, and return the reason to record; if the build fails, its error is added."""
        if self.build is None:
            return reason
        try:
            self.build(self.progress)
        except FirstlightError as error:
            return f"{reason}; no stand-in was built: {error}"
        return reason

    def _available_hub(self) -> Hub | None:
        """Return the first hub that sends a listing within a second; None without one."""
        spec = self.pull.spec
        for hub in self.pull.hubs.every():
            with suppress(HubError):
                hub.listing(spec.repo, spec.revision, seconds=_LISTING_SECONDS)
                return hub
        return None


def _to_load(line: str | None) -> str:
    return f"; load it: {line}" if line else ""


def recorded(root: Root) -> dict[str, str]:
    """Return {name of a model: the reason for its stand-in} from the record in the root; {} if it cannot be read."""
    try:
        return records.texts(records.read_state(root.stand_ins))
    except (OSError, ValueError):
        return {}


def record(root: Root, model: str, reason: str | None) -> None:
    """Record in the root the reason for a model's stand-in; if `reason` is None, delete the model's record."""
    if reason is None and model not in recorded(root):
        return
    with exclusive_lock(root.stand_ins):
        kept = recorded(root)
        wanted = {name: why for name, why in kept.items() if name != model}
        if reason is not None:
            wanted[model] = redact(reason)
        if wanted != kept:
            write_atomic(root.stand_ins, json.dumps(wanted, indent=1, sort_keys=True) + "\n")
