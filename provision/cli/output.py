"""Prints the progress and the results of steps, and formats the results of commands as text and as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.progress import ChildWrites, Meter, Ticker
from provision.core.redact import redact
from provision.core.step import State, exit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import Progress, TaskID

    from provision.core.step import Outcome, Step
    from provision.environments.discover import DiscoveredEnvironment
    from provision.host.provider import ResolvedRoot
    from provision.setup.doctor import Finding
    from provision.setup.undo import JournaledRun

SCHEMA = 1
_MIXED_SHOWN = 5
_CHECKS = {"plan", "status", "verify"}  # the commands that check what setup applies
_COLORS = {"ok": "32", "done": "32", "drifted": "33", "blocked": "31", "failed": "31"}


class Screen:
    """Prints one line for each step to stdout, and the progress of the current step to stderr.

    The progress is a live line on a terminal, else one line every ten seconds. With `quiet` only the lines of failed
    and blocked steps are printed. With `json_output` all lines go to stderr, because the JSON object goes to stdout.
    """

    def __init__(
        self,
        *,
        json_output: bool,
        quiet: bool,
        color: bool,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        """Take the options; `clock` and `pause` are as for Ticker. The caller sets `total`, the number of steps."""
        self.total = 0
        self.lines = sys.stderr if json_output else sys.stdout
        self.quiet = quiet
        self.color = color and self.lines.isatty()
        self.is_live = sys.stderr.isatty() and os.environ.get("TERM") not in {None, "", "dumb"}
        self.number = 0
        self._clock = clock
        self._pause = pause
        self._meter: Meter | None = None
        self._ticker: Ticker | None = None
        self._bar: Progress | None = None

    def listen(self, step: Step, outcome: Outcome | None) -> None:
        """Show the progress of a step that begins (`outcome` is None), or print the line of a step that has ended."""
        if outcome is None:
            self.number += 1
            self.begin(step.name)
            return
        self.end()
        if not self.quiet or outcome.error:
            print(self.line(outcome), file=self.lines, flush=True)

    def watch(self, step: Step, outcome: Outcome | None) -> None:
        """Show the progress while a step is being checked, and print no line for its result."""
        if outcome is None:
            self.begin(f"checking {step.name}")
        else:
            self.end()

    @contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Show the progress of work that is not a step, during a `with` block; `work` describes it."""
        self.begin(work)
        try:
            yield
        finally:
            self.end()

    def progress(self, count: int, total: int, unit: str = "bytes", /) -> None:
        """Add `count` units to the progress of the current step; `total` is 0 if it is not known.

        A step whose child processes do the work reports (0, total) if the number of bytes to write is known.
        """
        if self._meter is not None:
            self._meter.add(count, total, unit)

    def emit(self, text: str) -> None:
        """Print a line to stderr, such as the reason for a wait of the current step."""
        if not self.quiet:
            print(f"  {redact(text)}", file=sys.stderr, flush=True)
            if self._ticker is not None and not self.is_live:
                self._ticker.reset()

    def line(self, outcome: Outcome) -> str:
        """Return the line of a step: its state, name, detail or error, and its time in seconds."""
        word = state_word(outcome)
        mark = f"\x1b[{_COLORS[word]}m{word:<8}\x1b[0m" if self.color else f"{word:<8}"
        text = redact(outcome.error or outcome.detail)
        return f"  {mark} {outcome.step:<28} {text}  ({outcome.seconds:.2f} s)"

    def begin(self, name: str) -> None:
        """Start to show the progress of a step or of other work."""
        self.end()
        if self.quiet:
            return
        meter = Meter(name, self._clock(), ChildWrites() if name.startswith("environment ") else None)
        plain = Ticker(meter, lambda text: _print_progress(name, text), clock=self._clock, pause=self._pause)
        self._meter, self._ticker = meter, self._live(name, meter) if self.is_live else plain
        self._ticker.__enter__()

    def end(self) -> None:
        """Stop the display of progress, after the work has ended or failed."""
        if self._ticker is not None:
            self._ticker.__exit__(None, None, None)
        if self._bar is not None:
            self._bar.stop()
        self._meter = self._ticker = self._bar = None

    def _live(self, name: str, meter: Meter) -> Ticker:
        head = f"[{self.number}/{self.total}] {name}" if self.total and self.number else name
        tasks: list[TaskID] = []

        def update(text: str) -> None:  # first called after one second, so work that ends before shows no bar
            if self._bar is None:
                self._bar = _bar(color=self.color)
                tasks.append(self._bar.add_task(redact(head), total=None, status=""))
                self._bar.start()
            share = meter.share()
            self._bar.update(tasks[0], total=None if share is None else 1.0, completed=share or 0.0, status=text)

        return Ticker(meter, update, interval=1.0, clock=self._clock, pause=self._pause)


def _print_progress(name: str, text: str) -> None:
    # One call of write, so that output of the main thread cannot split the line.
    sys.stderr.write(f"  {redact(name)}: {text}\n")
    sys.stderr.flush()


def _bar(*, color: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    has_dots = "utf" in (sys.stderr.encoding or "").lower()
    columns = (
        SpinnerColumn("dots" if has_dots else "line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[status]}", markup=False),
    )
    console = Console(stderr=True, no_color=not color)
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)


def state_word(outcome: Outcome) -> str:
    """Return the word for the result of a step: "ok", "done" (applied), "drifted", "blocked" or "failed"."""
    if outcome.after is State.BLOCKED:
        return "blocked"
    if outcome.error:
        return "failed"
    if outcome.after is State.DRIFTED:
        return "drifted"
    return "done" if outcome.changed else "ok"


def to_json(command: str, chosen: ResolvedRoot, outcomes: Sequence[Outcome], seconds: float) -> str:
    """Return the JSON object that a command prints after it has run steps, as one line of text."""
    rows = [
        {
            "step": outcome.step,
            "before": outcome.before.value,
            "after": outcome.after.value,
            "changed": outcome.changed,
            "detail": redact(outcome.detail),
            "error": None if outcome.error is None else redact(outcome.error),
        }
        for outcome in outcomes
    ]
    whole = {
        "schema": SCHEMA,
        "command": command,
        "root": str(chosen.root.path),
        "profile": chosen.match.name if chosen.match else None,
        "outcomes": rows,
        "fallbacks": fallbacks(outcomes),
        "seconds": round(seconds, 3),
        "exit": int(exit_of(outcomes)),
    }
    return json.dumps(whole, ensure_ascii=False)


def success_json(command: str, **results: object) -> str:
    """Return the JSON object that a successful command prints; the keys of `results` are added to it."""
    return redact(json.dumps({"schema": SCHEMA, "command": command, **results, "exit": 0}))


def summary(command: str, chosen: ResolvedRoot, outcomes: Sequence[Outcome], seconds: float) -> str:
    """Return the last lines of a command's text: the result, the next command if needed, and the fallbacks in use."""
    changed = sum(outcome.changed for outcome in outcomes)
    drifted = sum(outcome.after is State.DRIFTED and not outcome.error for outcome in outcomes)
    failed = sum(outcome.error is not None for outcome in outcomes)
    if failed:
        head = f"{command}: {failed} of {len(outcomes)} steps failed or are blocked"
    elif drifted and command in _CHECKS:
        head = f"{command}: {drifted} of {len(outcomes)} steps have drifted; "
        head += f"to correct them, run `{layout.next_command('setup')}`"
    elif drifted:
        head = f"{command}: {drifted} of {len(outcomes)} steps would be applied; to apply them, omit --dry-run"
    elif changed:
        head = f"{command}: ready, {changed} of {len(outcomes)} steps changed"
    else:
        head = f"{command}: ready, nothing to change"
    lines = [f"{head}  ({seconds:.2f} s, root {chosen.root.path})"]
    in_use = fallbacks(outcomes)
    if in_use:
        lines += ["fallbacks:", *(f"  {text}" for text in in_use)]
    return "\n".join(lines)


def fallbacks(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each fallback in use, such as a stand-in or another build, without secrets."""
    return [redact(outcome.fallback) for outcome in outcomes if outcome.fallback]


def findings_json(chosen: ResolvedRoot, rows: Sequence[Finding]) -> str:
    """Return the output of `doctor --json`."""
    whole = {
        "schema": SCHEMA,
        "command": "doctor",
        "root": str(chosen.root.path),
        "profile": chosen.match.name if chosen.match else None,
        "findings": [finding.to_dict() for finding in rows],
    }
    return json.dumps(whole, ensure_ascii=False)


def findings(rows: Sequence[Finding]) -> str:
    """Return the text of `doctor`: a line for each finding and, for a fault, a second line with its remedy."""
    lines = []
    for finding in rows:
        lines.append(f"  {finding.state:<5} {finding.thing:<20} {redact(finding.text)}")
        if finding.fix:
            lines.append(f"        {'':<20} -> {finding.fix}")
    return "\n".join(lines)


def runs_json(rows: Sequence[JournaledRun]) -> str:
    """Return the output of `undo --list --json`."""
    return json.dumps({"schema": SCHEMA, "runs": [run.to_dict() for run in rows]}, indent=1)


def runs(rows: Sequence[JournaledRun]) -> str:
    """Return the text of `undo --list`: one line for each run, the newest last."""
    lines = [
        f"{run.name:<28} {run.header.command or '?':<12} {len(run.acts):>4} acts on "
        f"{run.header.host or '?'}:{_printable(run.header.home or '?')}{', undone' if run.undone else ''}"
        for run in rows
    ]
    return "\n".join(lines) or "no run has changed anything on this root"


def _printable(path: str) -> str:
    """Return a path for a terminal, quoted and with escapes if it has a line break or undecodable bytes."""
    return path if path.isprintable() else ascii(path)


def environments_json(rows: Sequence[DiscoveredEnvironment]) -> str:
    """Return the output of `env list --json`."""
    return json.dumps({"schema": SCHEMA, "envs": [environment.to_dict() for environment in rows]}, indent=1)


def environments(rows: Sequence[DiscoveredEnvironment]) -> str:
    """Return the text of `env list`: a few lines for each environment."""
    lines = []
    for environment in rows:
        place = "on the volume" if environment.on_volume else "not on the volume"
        facts = [environment.manager, environment.interpreter, environment.variant, f"{environment.packages} packages"]
        size = f"{environment.size_bytes / 1e9:.2f} GB"
        lines += [
            f"{environment.name:<20} {', '.join(filter(None, facts))}, {size}, {place}",
            f"  {environment.prefix}",
        ]
        if environment.activatable:
            lines.append(f"  activate it: {environment.activatable}")
        if environment.mixed:
            hidden = len(environment.mixed) - _MIXED_SHOWN
            more = f", and {hidden} more" if hidden > 0 else ""
            lines.append(f"  MIXED: {'; '.join(environment.mixed[:_MIXED_SHOWN])}{more}")
    return (
        "\n".join(lines)
        or f"there is no environment on this machine; to build one, run `{layout.next_command('setup')}`"
    )
