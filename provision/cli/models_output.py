"""Shows models: what is here, what a pull will do and did, what a check found, what a model is made of."""

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
    from provision.models.inventory import CachedModel, Removal
    from provision.models.pipeline_info import PipelineStructure
    from provision.models.pull_plan import PullPlan
    from provision.models.verify import FileState

SCHEMA = 1


@dataclass
class ModelRow:
    """Hold the outcome of one model. `state`: ok, missing, corrupt, failed, or stand-in; `exit` is of its `error`.

    `load`: the line of Python that loads it.
    """

    name: str
    model: ModelSpec
    state: str = "failed"
    bytes_fetched: int = 0
    seconds: float = 0.0
    files: Sequence[FileState] = field(default_factory=list)
    said: str = ""
    error: str | None = None
    exit: Exit = Exit.FAILED
    load: str | None = None

    @property
    def bytes_total(self) -> int | None:
        """The bytes of its files; None where the size of one is not known."""
        sizes = {file.path: file.size for file in self.model.files}
        sizes |= {each.path: each.size for each in self.files if each.size is not None}
        known = [size for size in sizes.values() if size is not None]
        return sum(known) if len(known) == len(sizes) else None


def rows_json(command: str, rows: Sequence[ModelRow], code: int) -> str:
    """`models pull` and `models verify` for programs."""
    models = [
        {
            "name": row.name,
            "repo": row.model.repo,
            "revision": row.model.revision,
            "state": row.state,
            "bytes_fetched": row.bytes_fetched,
            "bytes_total": row.bytes_total,
            "seconds": round(row.seconds, 3),
            "files": [{"path": each.path, "size": each.size, "state": each.state} for each in row.files],
            "detail": row.said,
            "error": row.error,
            "load": row.load,
        }
        for row in rows
    ]
    return redact(json.dumps({"schema": SCHEMA, "command": command, "models": models, "exit": code}))


def row_lines(row: ModelRow, *, every_file: bool) -> str:
    """One model in lines: its state, then each file that is not as it should be, or `every_file`."""
    lines = [f"  {row.state:<8} {row.name:<32} {row.error or row.said}  ({row.seconds:.2f} s)"]
    lines += [f"    load it: {row.load}"] if row.load else []
    if all(each.state == "missing" for each in row.files):
        return redact(lines[0])
    for each in row.files:
        if every_file or each.state in {"corrupt", "failed"}:
            size = "" if each.size is None else f"{each.size:,} bytes"
            lines.append(f"    {each.state:<8} {each.path:<52} {each.reason or size}")
    return redact("\n".join(lines))


def plan_line(name: str, plan: PullPlan) -> str:
    """What a pull will do, before it does it."""
    here = sum(state.state == "ok" for state in plan.states)
    if plan.is_done:
        doubts = [f"{plan.unproven} pinned by nobody"] if plan.unproven else []
        doubts += [f"{count} by the word of {mirror}" for mirror, count in plan.by_mirrors.items()]
        proof = ", ".join(["every pinned hash right", *doubts]) if doubts else "every hash right"
        return f"{name}: all {here} files are here, {proof}"
    partial = sum(each.have for each in plan.needed)
    begun = f", {partial:,} bytes of them are here from an earlier run" if partial else ""
    corrupt = sum(state.state == "corrupt" for state in plan.states)
    bad = f"; {corrupt} are corrupt, and are kept beside" if corrupt else ""
    source = f"{plan.hubs[0].name} ({plan.hubs[0].endpoint})" if plan.hubs else "nowhere"
    return (
        f"{name}: {here} of {len(plan.states)} files are here{bad}; {plan.bytes_wanted:,} bytes to fetch from "
        f"{source}{begun}; {plan.free:,} bytes are free"
    )


def list_lines(found: Sequence[CachedModel], others: Mapping[str, int], stand_ins: Mapping[str, str | None]) -> str:
    """`models list` for people."""
    lines = []
    for each in found:
        known = "? GB" if each.model.bytes is None else f"{each.model.bytes / 1e9:.2f} GB"
        said = {"whole": "here", "absent": "-"}.get(each.state, f"{len(each.there)} of {len(each.states)} files")
        unpinned = sum(not file.locked for file in each.model.files)
        notes = [f"not pinned yet: {unpinned} of its files" if unpinned else "", each.model.note]
        name = each.asked.partition("+")[0]
        if name in stand_ins and each.state != "whole":
            said = f"stand-in ({stand_ins[name]})" if stand_ins[name] else "stand-in"
        variant = each.model.variant or "-"
        lines.append(f"  {each.asked:<34} {variant:<5} {known:>9}  {each.model.license:<22} {said}")
        lines += [f"      {note}" for note in notes if note]
    if others:
        lines.append("also in the cache:")
        lines += [f"  {name:<63} {size / 1e9:>8.2f} GB" for name, size in others.items()]
    return redact("\n".join(lines))


def list_json(found: Sequence[CachedModel], others: Mapping[str, int], stand_ins: Mapping[str, str | None]) -> str:
    """`models list` for programs."""
    models = [
        {
            "name": each.asked,
            "repo": each.model.repo,
            "revision": each.model.revision,
            "variant": each.model.variant,
            "license": each.model.license,
            "bytes": each.model.bytes,
            "unpinned": sum(not file.locked for file in each.model.files),
            "state": each.state,
            "stand_in": each.asked.partition("+")[0] in stand_ins,
            "note": each.model.note,
        }
        for each in found
    ]
    return redact(json.dumps({"schema": SCHEMA, "models": models, "others": dict(others)}))


def structure_lines(name: str, model: ModelSpec, found: PipelineStructure, load: str | None) -> str:
    """A model as people know it from printing a pipeline."""
    variant = f"{model.variant}, " if model.variant else ""
    lines = [
        f"{found.pipeline or name}: {model.repo} at {model.revision[:7]} ({variant}{model.license})",
        f"  read from {found.read_from}",
    ]
    shown = [
        (
            each.name,
            each.kind or "?",
            "" if each.parameters is None else f"{each.parameters:,}",
            each.dtype or "",
            "" if each.bytes is None else f"{each.bytes / 1e6:,.1f} MB",
        )
        for each in found.components
    ]
    wide = [max([len(row[column]) for row in shown], default=0) for column in range(5)]
    to_the = "<<><>"
    for row in shown:
        cells = [f"{text:{side}{width}}" for text, side, width in zip(row, to_the, wide, strict=True)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    total = sum(each.parameters or 0 for each in found.components)
    size = sum(each.bytes or 0 for each in found.components)
    lines.append(f"  in all: {total:,} parameters, {size / 1e6:,.1f} MB of weights")
    if found.scheduler:
        lines.append(f"  scheduler: {found.scheduler[0]}")
        lines += [f"    {key} = {value}" for key, value in sorted(found.scheduler[1].items())]
    lines += [f"  {model.note}"] if model.note else []
    lines += [f"  load it: {load}"] if load else []
    return redact("\n".join([*lines, *(f"  amiss: {fault}" for fault in found.faults)]))


def structure_json(name: str, model: ModelSpec, found: PipelineStructure, load: str | None) -> str:
    """The same for programs."""
    scheduler = {"class": found.scheduler[0], "settings": found.scheduler[1]} if found.scheduler else None
    whole = {
        "schema": SCHEMA,
        "name": name,
        "repo": model.repo,
        "revision": model.revision,
        "variant": model.variant,
        "license": model.license,
        "pipeline": found.pipeline,
        "read_from": found.read_from,
        "components": [asdict(each) for each in found.components],
        "scheduler": scheduler,
        "load": load,
        "faults": found.faults,
    }
    return redact(json.dumps(whole))


def removal_line(name: str, gone: Removal) -> str:
    """What a removal frees."""
    files = len(gone.links) or len(gone.blobs)
    return f"{name}: {files} files go, {gone.bytes:,} bytes come free"


def removal_json(name: str, gone: Removal, code: int, *, removed: bool) -> str:
    """The same for programs."""
    files = len(gone.links) or len(gone.blobs)
    told = {"name": name, "files": files, "bytes": gone.bytes, "removed": removed, "exit": code}
    return redact(json.dumps({"schema": SCHEMA, "command": "models remove", **told}))


def seed_lines(names: Sequence[str], hosts: Sequence[str], port: int) -> str:
    """How other hosts are pointed at this one."""
    lines = [f"serving {', '.join(names)}, read-only, until Ctrl-C. On another host:"]
    pull = f"provision models pull {names[0]} --endpoint"
    lines += [f"  {pull} http://{each}:{port}" for each in hosts or ["THIS-HOST"]]
    first = hosts[0] if hosts else "THIS-HOST"
    lines += [
        "or for good, in a catalogue of yours (host.toml: catalogue = FILE):",
        f'  [hf.lan]\n  url = "http://{first}:{port}"',
        "What the manifest pins is verified there; a model with files that are not pinned takes --trust-mirror.",
    ]
    return "\n".join(lines)


class DownloadBars:
    """A bar a file and one for all, on a terminal's stderr; elsewhere a line each ten seconds."""

    def __init__(
        self,
        what: str,
        sizes: Mapping[str, int],
        done: int = 0,
        *,
        wanted: bool,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        """Take what is at work, {path: bytes that will come}, and the bytes of them that are done.

        `clock`, `pause`: as Ticker has them.
        """
        self._sizes = sizes
        self._tasks: dict[str, int] = {}
        self._bar = None
        self._ticker: Ticker | None = None
        if not wanted:
            return
        if not sizes or not sys.stderr.isatty() or os.environ.get("TERM") in {None, "", "dumb"}:
            self._meter = Meter(what, clock())
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
        self._whole = self._bar.add_task(what, total=sum(sizes.values()), completed=done)

    def __enter__(self) -> Self:
        """Draw."""
        if self._bar is not None:
            self._bar.start()
        if self._ticker is not None:
            self._ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
        if self._ticker is not None:
            self._ticker.__exit__(kind, error, trace)

    def advance(self, path: str, count: int) -> None:
        """Bytes of a file have come."""
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

    def _print(self, words: str) -> None:
        sys.stderr.write(f"  {redact(self._meter.name)}: {words}\n")
        sys.stderr.flush()
