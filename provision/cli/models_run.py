"""Pulls, verifies or builds one model for a command, and returns the result as a row."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from provision.cli import models_output
from provision.cli.models_output import DownloadBars, ModelRow
from provision.core import layout
from provision.core.errors import FirstlightError, SpecError, from_os_error
from provision.core.step import State
from provision.models import architectures, load_line, pins, stand_ins
from provision.models import step as model_step
from provision.models.hub_client import HubError, is_host
from provision.models.snapshots import SnapshotStep
from provision.models.verify import Depth, FileState
from provision.volume.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.hubs import Hubs
    from provision.models.manifest import Manifest
    from provision.models.pull import Pull
    from provision.models.pull_plan import PullPlan

_CHECKED = {Depth.SIZE: "every size", Depth.HEADER: "every size and header", Depth.HASH: "every hash"}


def pull(work: Pull, emit: Callable[[str], None], *, quiet: bool, dry_run: bool) -> ModelRow:
    """Print the plan of a pull, run the pull, and return its result; an error is stored in the result, not raised.

    Args:
        work: the pull.
        emit: called with each line for the user.
        quiet: show no progress.
        dry_run: only print the plan, and download nothing.
    """
    started = time.perf_counter()
    row = ModelRow(work.name, work.spec)
    work.health.tell = emit
    try:
        with _hashing(work, quiet=quiet) as bars:
            plan = work.plan(bars.advance)
        emit(models_output.plan_line(work.name, plan))
        if dry_run:
            row.files = plan.states
            row.state, row.detail = ("ok", "nothing to do") if plan.is_done else ("missing", "not downloaded: dry run")
            return row
        sizes = {target.file.path: target.listed.size - target.have for target in plan.fetched}
        with DownloadBars(work.name, sizes, shown=not quiet) as bars:
            work.run(plan, bars.advance)
        model_step.record(work.root, work.name, None)
        row.files = work.check_files(Depth.SIZE)
        row.state = _worst(row)
        details = [
            work.health.summary() or "all files were present",
            *work.health.warnings(),
            *_unconfirmed(plan),
            *work.notes,
        ]
        row.detail = "; ".join(details)
    except BrokenPipeError:  # the reader of stdout has ended
        raise
    except (FirstlightError, OSError) as error:
        failure = from_os_error(error) if isinstance(error, OSError) else error
        row.files, row.error, row.exit = work.check_files(Depth.SIZE), str(failure), failure.exit
        if type(failure) is HubError and not work.hubs.offline:
            row.error += f". To find another hub: {layout.program()} mirrors probe --tool hf"
    row.bytes_fetched = work.arrived
    row.seconds = time.perf_counter() - started
    return row


def failed_rows(models: Iterable[tuple[str, ModelSpec]], error: FirstlightError | OSError) -> list[ModelRow]:
    """Return a failed row for each model whose pull could not start because of an error."""
    failure = from_os_error(error) if isinstance(error, OSError) else error
    return [ModelRow(name, model, error=str(failure), exit=failure.exit) for name, model in models]


def verify(work: Pull, depth: Depth, *, quiet: bool) -> ModelRow:
    """Check every file of a model without the network, and return the result."""
    started = time.perf_counter()
    row = ModelRow(work.name, work.spec)
    with _hashing(work, quiet=quiet) as bars:
        row.files = work.check_files(depth, bars.advance)
    row.state = _worst(row)
    invalid = sum(file.state != "ok" for file in row.files)
    row.detail = f"invalid: {invalid} of {len(row.files)} files" if invalid else f"{_CHECKED[depth]} matches"
    unpinned = sum(not file.locked for file in work.spec.files)
    if unpinned and not invalid:
        row.detail += (
            f", but {unpinned} of {len(row.files)} files have no pinned hash; a pull gets it from the official hub"
        )
    if all(file.state == "missing" for file in row.files):
        row.detail = f"absent. To download it: {layout.program()} models pull {work.name}"
    mirrors = {pins.source(work.root, work.spec, file.path) for file in work.spec.files} - {None, "official"}
    if mirrors:
        row.detail += f"; some hashes come from {', '.join(sorted(map(str, mirrors)))} only"
    row.seconds = time.perf_counter() - started
    return row


def stand_in(
    root: Root, name: str, model: ModelSpec, envs: Path, python: Path, *, quiet: bool, dry_run: bool
) -> ModelRow:
    """Build the stand-in of a model, and return the result.

    Raises:
        SpecError: the architecture is unknown.
    """
    started = time.perf_counter()
    row = ModelRow(name, model)
    architecture = architectures.load(envs, model.architecture)
    repo, size = stand_ins.repo_of(name), stand_ins.size_of(model, architecture)
    if dry_run:
        row.state, row.detail = "missing", f"not built: dry run; {size:,} bytes of random weights"
        return row
    try:
        with DownloadBars(name, {repo: size}, shown=not quiet) as bars:
            snapshot = stand_ins.build(root, name, model, envs, python, lambda count, _: bars.advance(repo, count))
        row.state, row.detail = "stand-in", f"random weights, as {repo}; this is not {model.repo}"
        row.load = load_line.of_stand_in(name, model, architecture)
        files = sorted(path for path in snapshot.rglob("*") if path.is_file())
        row.files = [
            FileState(path.relative_to(snapshot).as_posix(), path.stat().st_size, "stand-in") for path in files
        ]
    except FirstlightError as error:
        row.error, row.exit = str(error), error.exit
    row.seconds = time.perf_counter() - started
    return row


def repair(root: Root, manifest: Manifest) -> str:
    """Repair the refs, snapshots and links of the hub cache, and return the result as text for the user.

    The text is empty if there was nothing to repair. A cache that cannot be written stays as it is.
    """
    step = SnapshotStep(
        root, [pins.apply(root, model) for model in manifest.with_all_extras()], Journal(root.journal, "models verify")
    )
    check = step.check()
    if check.state is not State.DRIFTED:
        return ""
    try:
        step.apply()
    except OSError as error:
        return f"not repaired: {check.detail} ({error.strerror})"
    return f"repaired: {check.detail}"


def _unconfirmed(plan: PullPlan) -> list[str]:
    """Return warnings about present files whose hashes the official hub has not confirmed."""
    warnings = [f"{plan.unproven} files have no pinned hash"] if plan.unproven else []
    warnings += [f"{count} files have a hash from {mirror} only" for mirror, count in plan.by_mirrors.items()]
    return [*warnings, "the official hub could not be reached to confirm them"] if warnings else []


def _hashing(work: Pull, *, quiet: bool) -> DownloadBars:
    paths = [work.snapshot / file.path for file in work.spec.files]
    sizes = {path.relative_to(work.snapshot).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    activity = "hashing" if sizes else "reading the listings of the hubs"
    return DownloadBars(f"{work.name}: {activity}", sizes, shown=not quiet)


def _worst(row: ModelRow) -> str:
    states = {file.state for file in row.files}
    return next((state for state in ("failed", "corrupt", "missing") if state in states), "ok")


def check_token_hosts(hosts: list[str], hubs: Hubs) -> None:
    """Check that the pull uses a hub on each host of --send-token-to.

    Raises:
        SpecError: a host has no hub of the pull, so the flag has no effect.
    """
    for host in hosts:
        try:
            is_used = any(is_host(host, hub.endpoint) for hub in hubs.every())
        except ValueError:
            is_used = False
        if not is_used:
            shown = ", ".join(hub.shown for hub in hubs.every())
            raise SpecError(f"--send-token-to {host}: this pull uses no hub on that host. Its hubs are: {shown}.")
