"""Pulls, verifies or builds one model for a command, and says what became of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from provision.cli import models_output
from provision.cli.models_output import DownloadBars, ModelRow
from provision.core import layout
from provision.core.errors import FirstlightError, from_os_error
from provision.core.step import State
from provision.models import architectures, load_line, pins, stand_ins
from provision.models import step as model_step
from provision.models.hub_client import HubError
from provision.models.snapshots import SnapshotStep
from provision.models.verify import Depth, FileState
from provision.volume.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.manifest import Manifest
    from provision.models.pull import Pull
    from provision.models.pull_plan import PullPlan

_WORDS = {Depth.SIZE: "every size", Depth.HEADER: "every size and header", Depth.HASH: "every hash"}


def pull(work: Pull, say: Callable[[str], None], *, quiet: bool, dry_run: bool) -> ModelRow:
    """Say the plan, and carry it out; what fails becomes the row's error."""
    started = time.perf_counter()
    row = ModelRow(work.name, work.spec)
    work.health.tell = say
    try:
        with _hashing(work, quiet=quiet) as bars:
            plan = work.plan(bars.advance)
        say(models_output.plan_line(work.name, plan))
        if dry_run:
            row.files = plan.states
            row.state, row.said = ("ok", "nothing to do") if plan.is_done else ("missing", "not fetched: a dry run")
            return row
        sizes = {each.file.path: each.listed.size - each.have for each in plan.fetched}
        with DownloadBars(work.name, sizes, wanted=not quiet) as bars:
            work.run(plan, bars.advance)
        model_step.record(work.root, work.name, None)
        row.files = work.look(Depth.SIZE)
        row.state = _worst(row)
        said = [work.health.summary() or "everything was here", *work.health.warnings(), *_doubts(plan), *work.notes]
        row.said = "; ".join(said)
    except BrokenPipeError:  # nobody listens any more
        raise
    except (FirstlightError, OSError) as error:
        known = from_os_error(error) if isinstance(error, OSError) else error
        row.files, row.error, row.exit = work.look(Depth.SIZE), str(known), known.exit
        if type(known) is HubError and not work.hubs.offline:
            row.error += f". Look for another: {layout.program()} mirrors probe --tool hf"
    row.bytes_fetched = work.arrived
    row.seconds = time.perf_counter() - started
    return row


def refused(models: Iterable[tuple[str, ModelSpec]], error: FirstlightError | OSError) -> list[ModelRow]:
    """What became of models of which none could be begun."""
    known = from_os_error(error) if isinstance(error, OSError) else error
    return [ModelRow(name, model, error=str(known), exit=known.exit) for name, model in models]


def verify(work: Pull, depth: Depth, *, quiet: bool) -> ModelRow:
    """Look at every file without the network."""
    started = time.perf_counter()
    row = ModelRow(work.name, work.spec)
    with _hashing(work, quiet=quiet) as bars:
        row.files = work.look(depth, bars.advance)
    row.state = _worst(row)
    wrong = sum(each.state != "ok" for each in row.files)
    row.said = f"not right: {wrong} of {len(row.files)} files" if wrong else f"{_WORDS[depth]} is right"
    unpinned = sum(not file.locked for file in work.spec.files)
    if unpinned and not wrong:
        row.said += f", but {unpinned} of {len(row.files)} files are pinned by nobody: a pull asks the official hub"
    if all(each.state == "missing" for each in row.files):
        row.said = f"not here. To fetch it: {layout.program()} models pull {work.name}"
    told = {pins.source(work.root, work.spec, file.path) for file in work.spec.files} - {None, "official"}
    if told:
        row.said += f"; some are pinned by the word of {', '.join(sorted(map(str, told)))} alone"
    row.seconds = time.perf_counter() - started
    return row


def stand_in(
    root: Root, name: str, model: ModelSpec, envs: Path, python: Path, *, quiet: bool, dry_run: bool
) -> ModelRow:
    """Build a model's architecture with random weights.

    Raises:
        SpecError: nothing is known of its architecture.
    """
    started = time.perf_counter()
    row = ModelRow(name, model)
    architecture = architectures.load(envs, model.architecture)
    repo, size = stand_ins.repo_of(name), stand_ins.size_of(model, architecture)
    if dry_run:
        row.state, row.said = "missing", f"not built: a dry run; {size:,} bytes of random weights"
        return row
    try:
        with DownloadBars(name, {repo: size}, wanted=not quiet) as bars:
            snapshot = stand_ins.build(root, name, model, envs, python, lambda count, _: bars.advance(repo, count))
        row.state, row.said = "stand-in", f"random weights, as {repo}; this is not {model.repo}"
        row.load = load_line.of_stand_in(name, model, architecture)
        files = sorted(path for path in snapshot.rglob("*") if path.is_file())
        row.files = [
            FileState(path.relative_to(snapshot).as_posix(), path.stat().st_size, "stand-in") for path in files
        ]
    except FirstlightError as error:
        row.error, row.exit = str(error), error.exit
    row.seconds = time.perf_counter() - started
    return row


def heal(root: Root, known: Manifest) -> str:
    """Mend refs, snapshots and links; a cache that cannot be written is looked at as it is. What was done, or ""."""
    step = SnapshotStep(
        root, [pins.apply(root, model) for model in known.every()], Journal(root.journal, "models verify")
    )
    found = step.check()
    if found.state is not State.DRIFTED:
        return ""
    try:
        step.apply()
    except OSError as error:
        return f"not mended: {found.detail} ({error.strerror})"
    return f"mended: {found.detail}"


def _doubts(plan: PullPlan) -> list[str]:
    """What is here and was not held against the official hub's word."""
    found = [f"{plan.unproven} files are pinned by nobody"] if plan.unproven else []
    found += [f"{count} files are pinned by the word of {mirror} alone" for mirror, count in plan.by_mirrors.items()]
    return [*found, "the official hub could not be asked about them"] if found else []


def _hashing(work: Pull, *, quiet: bool) -> DownloadBars:
    here = [work.snapshot / file.path for file in work.spec.files]
    sizes = {path.relative_to(work.snapshot).as_posix(): path.stat().st_size for path in here if path.is_file()}
    what = "hashing" if sizes else "asking where its files are"
    return DownloadBars(f"{work.name}: {what}", sizes, wanted=not quiet)


def _worst(row: ModelRow) -> str:
    states = {each.state for each in row.files}
    return next((state for state in ("failed", "corrupt", "missing") if state in states), "ok")
