"""Formats models for people and programs: lists, plans, results of pulls and checks, components, progress bars."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from provision.core.errors import Exit
from provision.core.progress import Meter, Ticker
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from provision.config.models import ModelSpec
    from provision.models.hub_in_use import HubInUse
    from provision.models.inventory import CachedModel, Removal
    from provision.models.pipeline_info import PipelineStructure
    from provision.models.pull_plan import PullPlan
    from provision.models.verify import FileState

SCHEMA = 1


@dataclass
class ModelRow:
    """Hold the result of a command for one model.

    `state` is "ok", "missing", "corrupt", "failed" or "stand-in". `detail` is a text for the user. `error` is the
    message of a failure, or None, and `exit` its exit code. `load` is the line of Python that loads the model.
    """

    name: str
    model: ModelSpec
    state: str = "failed"
    bytes_fetched: int = 0
    seconds: float = 0.0
    files: Sequence[FileState] = field(default_factory=list)
    detail: str = ""
    error: str | None = None
    exit: Exit = Exit.FAILED
    load: str | None = None

    @property
    def bytes_total(self) -> int | None:
        """Return the total size of the model's files in bytes; None if the size of a file is unknown."""
        sizes = {file.path: file.size for file in self.model.files}
        sizes |= {file.path: file.size for file in self.files if file.size is not None}
        known_sizes = [size for size in sizes.values() if size is not None]
        return sum(known_sizes) if len(known_sizes) == len(sizes) else None


def rows_json(command: str, rows: Sequence[ModelRow], code: int) -> str:
    """Return the output of `models pull --json` or `models verify --json`; `code` is the exit code."""
    models = [
        {
            "name": row.name,
            "repo": row.model.repo,
            "revision": row.model.revision,
            "state": row.state,
            "bytes_fetched": row.bytes_fetched,
            "bytes_total": row.bytes_total,
            "seconds": round(row.seconds, 3),
            "files": [{"path": file.path, "size": file.size, "state": file.state} for file in row.files],
            "detail": row.detail,
            "error": row.error,
            "load": row.load,
        }
        for row in rows
    ]
    return redact(json.dumps({"schema": SCHEMA, "command": command, "models": models, "exit": code}))


def row_lines(row: ModelRow, *, every_file: bool) -> str:
    """Return the lines for one model: its state, then its corrupt and failed files, or all files (`every_file`)."""
    lines = [f"  {row.state:<8} {row.name:<32} {row.error or row.detail}  ({row.seconds:.2f} s)"]
    lines += [f"    load it: {row.load}"] if row.load else []
    if all(file.state == "missing" for file in row.files):
        return redact(lines[0])
    for file in row.files:
        if every_file or file.state in {"corrupt", "failed"}:
            size = "" if file.size is None else f"{file.size:,} bytes"
            lines.append(f"    {file.state:<8} {file.path:<52} {file.reason or size}")
    return redact("\n".join(lines))


def hub_lines(hub: HubInUse) -> list[str]:
    """Return the line with the hub cache in use and, if it has a problem, a second line with the problem."""
    return [hub.line, *([f"  {hub.problem}"] if hub.problem else [])]


def add_problem(rows: Sequence[ModelRow], hub: HubInUse) -> None:
    """Add the problem of the hub cache to each row, if programs of this shell do not find the hub cache."""
    if hub.problem is not None and not hub.is_found:
        for row in rows:
            row.detail = "; ".join(filter(None, [row.detail, hub.problem]))


def plan_line(name: str, plan: PullPlan) -> str:
    """Return the line that is printed before a pull: the present files, and the bytes to download and their source."""
    present = sum(state.state == "ok" for state in plan.states)
    if plan.is_done:
        unconfirmed = [f"{plan.unproven} without a pinned hash"] if plan.unproven else []
        unconfirmed += [f"{count} with a hash from {mirror} only" for mirror, count in plan.by_mirrors.items()]
        proof = ", ".join(["every pinned hash matches", *unconfirmed]) if unconfirmed else "every hash matches"
        return f"{name}: all {present} files are present, {proof}"
    partial = sum(file.have for file in plan.needed)
    resumed = f", resuming {partial:,} bytes of an earlier run" if partial else ""
    corrupt = sum(state.state == "corrupt" for state in plan.states)
    set_aside = f"; {corrupt} are corrupt and are kept under another name" if corrupt else ""
    source = f"{plan.hubs[0].name} ({plan.hubs[0].endpoint})" if plan.hubs else "nowhere"
    return (
        f"{name}: {present} of {len(plan.states)} files are present{set_aside}; {plan.bytes_wanted:,} bytes to fetch "
        f"from {source}{resumed}; {plan.free:,} bytes are free"
    )


def list_lines(
    hub: HubInUse,
    cached: Sequence[CachedModel],
    unlisted: Mapping[str, int],
    stand_ins: Mapping[str, str | None],
) -> str:
    """Return the text of `models list`, as lines.

    Args:
        hub: the hub cache in use.
        cached: the entries of the manifest and the state of their files.
        unlisted: {name: bytes} of the other content of the cache.
        stand_ins: {model: recorded reason, or None} for each stand-in that is built.
    """
    lines = hub_lines(hub)
    for row in cached:
        size = "? GB" if row.model.bytes is None else f"{row.model.bytes / 1e9:.2f} GB"
        state = {"whole": "present", "absent": "-"}.get(row.state, f"{len(row.present)} of {len(row.states)} files")
        unpinned = sum(not file.locked for file in row.model.files)
        notes = [f"{unpinned} of its files have no pinned hash" if unpinned else "", row.model.note]
        name = row.name.partition("+")[0]
        if name in stand_ins and row.state != "whole":
            state = f"stand-in ({stand_ins[name]})" if stand_ins[name] else "stand-in"
        variant = row.model.variant or "-"
        lines.append(f"  {row.name:<34} {variant:<5} {size:>9}  {row.model.license:<22} {state}")
        lines += [f"      {note}" for note in notes if note]
    if unlisted:
        lines.append("also in the cache:")
        lines += [f"  {name:<63} {size / 1e9:>8.2f} GB" for name, size in unlisted.items()]
    return redact("\n".join(lines))


def list_json(
    hub: HubInUse,
    cached: Sequence[CachedModel],
    unlisted: Mapping[str, int],
    stand_ins: Mapping[str, str | None],
) -> str:
    """Return the output of `models list --json`; the parameters are those of `list_lines`."""
    models = [
        {
            "name": row.name,
            "repo": row.model.repo,
            "revision": row.model.revision,
            "variant": row.model.variant,
            "license": row.model.license,
            "bytes": row.model.bytes,
            "unpinned": sum(not file.locked for file in row.model.files),
            "state": row.state,
            "stand_in": row.name.partition("+")[0] in stand_ins,
            "note": row.model.note,
        }
        for row in cached
    ]
    return redact(json.dumps({"schema": SCHEMA, "hub": hub.to_dict(), "models": models, "others": dict(unlisted)}))


def structure_lines(name: str, model: ModelSpec, structure: PipelineStructure, load: str | None) -> str:
    """Return the text of `models show`, as lines: the components of a model, similar to a printed pipeline."""
    variant = f"{model.variant}, " if model.variant else ""
    lines = [
        f"{structure.pipeline or name}: {model.repo} at {model.revision[:7]} ({variant}{model.license})",
        f"  read from {structure.read_from}",
    ]
    table = [
        (
            component.name,
            component.kind or "?",
            "" if component.parameters is None else f"{component.parameters:,}",
            component.dtype or "",
            "" if component.bytes is None else f"{component.bytes / 1e6:,.1f} MB",
        )
        for component in structure.components
    ]
    widths = [max([len(row[column]) for row in table], default=0) for column in range(5)]
    alignments = "<<><>"
    for row in table:
        cells = [f"{text:{side}{width}}" for text, side, width in zip(row, alignments, widths, strict=True)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    total = sum(component.parameters or 0 for component in structure.components)
    size = sum(component.bytes or 0 for component in structure.components)
    lines.append(f"  total: {total:,} parameters, {size / 1e6:,.1f} MB of weights")
    if structure.scheduler:
        lines.append(f"  scheduler: {structure.scheduler[0]}")
        lines += [f"    {key} = {value}" for key, value in sorted(structure.scheduler[1].items())]
    lines += [f"  {model.note}"] if model.note else []
    lines += [f"  load it: {load}"] if load else []
    return redact("\n".join([*lines, *(f"  fault: {fault}" for fault in structure.faults)]))


def structure_json(name: str, model: ModelSpec, structure: PipelineStructure, load: str | None) -> str:
    """Return the output of `models show --json`."""
    scheduler = {"class": structure.scheduler[0], "settings": structure.scheduler[1]} if structure.scheduler else None
    document = {
        "schema": SCHEMA,
        "name": name,
        "repo": model.repo,
        "revision": model.revision,
        "variant": model.variant,
        "license": model.license,
        "pipeline": structure.pipeline,
        "read_from": structure.read_from,
        "components": [asdict(component) for component in structure.components],
        "scheduler": scheduler,
        "load": load,
        "faults": structure.faults,
    }
    return redact(json.dumps(document))


def removal_line(name: str, removal: Removal) -> str:
    """Return the line with the number and the size of the files that a removal deletes."""
    files = len(removal.links) or len(removal.blobs)
    return f"{name}: {files} files are removed, {removal.bytes:,} bytes become free"


def removal_json(name: str, removal: Removal, code: int, *, removed: bool) -> str:
    """Return the output of `models remove --json`; `removed` is False for a dry run, `code` is the exit code."""
    files = len(removal.links) or len(removal.blobs)
    values = {"name": name, "files": files, "bytes": removal.bytes, "removed": removed, "exit": code}
    return redact(json.dumps({"schema": SCHEMA, "command": "models remove", **values}))


def seed_lines(names: Sequence[str], hosts: Sequence[str], port: int, *, needs_token: bool) -> str:
    """Return the lines that `models seed` prints: the commands of its clients, and which clients can download.

    Args:
        names: the served models.
        hosts: the addresses of the server; only ["127.0.0.1"] if no other host can reach it.
        port: the port of the server.
        needs_token: True if a client must send the token.
    """
    addresses = [f"http://{host}:{port}" for host in hosts or ["THIS-HOST"]]
    is_local = all(host.startswith("127.") for host in hosts) and bool(hosts)
    where = "On this host run:" if is_local else "On another host run:"
    prefix = "HF_TOKEN=TOKEN " if needs_token else ""
    lines = [f"serving {', '.join(names)}, read-only, until Ctrl-C. {where}"]
    for address in addresses:
        allowed = f" --send-token-to {address}" if needs_token else ""
        lines.append(f"  {prefix}provision models pull {names[0]} --endpoint {address}{allowed}")
    lines += [
        "or add it permanently to your own catalogue (host.toml: catalogue = FILE):",
        f'  [hf.lan]\n  url = "{addresses[0]}"',
        "The other host verifies pinned files. For a model with unpinned files it needs --trust-mirror.",
    ]
    if is_local:
        lines.append("No other host can reach this address. To serve the networks of this host: --bind 0.0.0.0")
    elif not needs_token:
        lines.append(
            "Every host that reaches this address can download these models. To require a token: --token TOKEN"
        )
    return "\n".join(lines)


class DownloadBars:
    """Shows a progress bar for each file, and one for all files, on stderr; without a terminal, a line every 10 s."""

    def __init__(
        self,
        title: str,
        sizes: Mapping[str, int],
        done: int = 0,
        *,
        shown: bool,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        """Prepare the bars without showing them.

        Args:
            title: the text before the bar for all files.
            sizes: {path: bytes to download or to hash}.
            done: the bytes of all files that are finished already.
            shown: False shows no progress.
            clock: returns the time in seconds, as for `Ticker`.
            pause: waits for seconds, as for `Ticker`.
        """
        self._sizes = sizes
        self._tasks: dict[str, int] = {}
        self._bar = None
        self._ticker: Ticker | None = None
        if not shown:
            return
        if not sizes or not sys.stderr.isatty() or os.environ.get("TERM") in {None, "", "dumb"}:
            self._meter = Meter(title, clock())
            self._meter.add(done, sum(sizes.values()))
            self._ticker = Ticker(self._meter, self._print, clock=clock, pause=pause)
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=False),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._whole = self._bar.add_task(title, total=sum(sizes.values()), completed=done)

    def __enter__(self) -> Self:
        """Show the bars."""
        if self._bar is not None:
            self._bar.start()
        if self._ticker is not None:
            self._ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bars from the terminal."""
        if self._bar is not None:
            self._bar.stop()
        if self._ticker is not None:
            self._ticker.__exit__(kind, error, trace)

    def advance(self, path: str, count: int) -> None:
        """Add `count` finished bytes of the file `path` to its bar and to the bar for all files."""
        if self._ticker is not None:
            self._meter.add(count)
        if self._bar is None:
            return
        from rich.progress import TaskID

        if path not in self._tasks:
            self._tasks[path] = self._bar.add_task(f"  {path}", total=self._sizes.get(path))
        self._bar.update(TaskID(self._tasks[path]), advance=count)
        self._bar.update(self._whole, advance=count)
        task = self._bar.tasks[self._bar.task_ids.index(TaskID(self._tasks[path]))]
        if task.finished:
            self._bar.update(TaskID(self._tasks[path]), visible=False)

    def _print(self, text: str) -> None:
        sys.stderr.write(f"  {redact(self._meter.name)}: {text}\n")
        sys.stderr.flush()
