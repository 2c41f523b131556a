"""Shows what became of the steps: lines for people, one object for programs."""

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
_COLORS = {"ok": "32", "done": "32", "drifted": "33", "blocked": "31", "failed": "31"}


class Screen:
    """Prints a line a step to stdout; while a step works, a live line on a terminal's stderr, or a line each ten s.

    Without a terminal nothing is said of a step that ends at once. `quiet`: nothing but faults.
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
        """Take what the flags say; `total` steps are set when they are known. `clock`, `pause`: as Ticker has them."""
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
        """A step begins (no outcome yet) or has ended."""
        if outcome is None:
            self.number += 1
            self.begin(step.name)
            return
        self.end()
        if not self.quiet or outcome.error:
            print(self.line(outcome), file=self.lines, flush=True)

    def watch(self, step: Step, outcome: Outcome | None) -> None:
        """A step is looked at before anything is done: its result is not printed yet."""
        if outcome is None:
            self.begin(f"looking at {step.name}")
        else:
            self.end()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Show that something is at work which is no step."""
        self.begin(what)
        try:
            yield
        finally:
            self.end()

    def progress(self, count: int, total: int, unit: str = "bytes", /) -> None:
        """So much more is done of the step at work; `total` 0 where it is not known.

        A step whose children do the work gives (0, total) where it knows how many bytes they will write.
        """
        if self._meter is not None:
            self._meter.add(count, total, unit)

    def tell(self, text: str) -> None:
        """The step at work waits, or does something else that takes long."""
        if not self.quiet:
            print(f"  {redact(text)}", file=sys.stderr, flush=True)
            if self._ticker is not None and not self.is_live:
                self._ticker.reset()

    def line(self, outcome: Outcome) -> str:
        """One step in one line: its state, name, what was found, and the time it took."""
        word = word_for(outcome)
        mark = f"\x1b[{_COLORS[word]}m{word:<8}\x1b[0m" if self.color else f"{word:<8}"
        text = redact(outcome.error or outcome.detail)
        return f"  {mark} {outcome.step:<28} {text}  ({outcome.seconds:.2f} s)"

    def begin(self, what: str) -> None:
        """Something begins."""
        self.end()
        if self.quiet:
            return
        meter = Meter(what, self._clock(), ChildWrites() if what.startswith("environment ") else None)
        plain = Ticker(meter, lambda words: _say(what, words), clock=self._clock, pause=self._pause)
        self._meter, self._ticker = meter, self._live(what, meter) if self.is_live else plain
        self._ticker.__enter__()

    def end(self) -> None:
        """It has ended, or an error ends it."""
        if self._ticker is not None:
            self._ticker.__exit__(None, None, None)
        if self._bar is not None:
            self._bar.stop()
        self._meter = self._ticker = self._bar = None

    def _live(self, what: str, meter: Meter) -> Ticker:
        head = f"[{self.number}/{self.total}] {what}" if self.total and self.number else what
        tasks: list[TaskID] = []

        def say(words: str) -> None:  # first after a second: what ends at once is not drawn
            if self._bar is None:
                self._bar = _bar(color=self.color)
                tasks.append(self._bar.add_task(redact(head), total=None, said=""))
                self._bar.start()
            share = meter.share()
            self._bar.update(tasks[0], total=None if share is None else 1.0, completed=share or 0.0, said=words)

        return Ticker(meter, say, interval=1.0, clock=self._clock, pause=self._pause)


def _say(what: str, words: str) -> None:
    # One write: a line of the main thread may not come into it.
    sys.stderr.write(f"  {redact(what)}: {words}\n")
    sys.stderr.flush()


def _bar(*, color: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    has_dots = "utf" in (sys.stderr.encoding or "").lower()
    columns = (
        SpinnerColumn("dots" if has_dots else "line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[said]}", markup=False),
    )
    console = Console(stderr=True, no_color=not color)
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)


def word_for(outcome: Outcome) -> str:
    """One word: ok, done, drifted, blocked or failed."""
    if outcome.after is State.BLOCKED:
        return "blocked"
    if outcome.error:
        return "failed"
    if outcome.after is State.DRIFTED:
        return "drifted"
    return "done" if outcome.changed else "ok"


def to_json(command: str, chosen: ResolvedRoot, outcomes: Sequence[Outcome], seconds: float) -> str:
    """The object that --json prints, on one line."""
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


def told_json(command: str, **told: object) -> str:
    """A command that succeeded, for programs: what it did, by name."""
    return redact(json.dumps({"schema": SCHEMA, "command": command, **told, "exit": 0}))


def summary(command: str, chosen: ResolvedRoot, outcomes: Sequence[Outcome], seconds: float) -> str:
    """The last lines for a person: what stands, what stands in, and the next command where one is due."""
    changed = sum(outcome.changed for outcome in outcomes)
    drifted = sum(outcome.after is State.DRIFTED and not outcome.error for outcome in outcomes)
    wrong = sum(outcome.error is not None for outcome in outcomes)
    if wrong:
        head = f"{command}: {wrong} of {len(outcomes)} steps cannot go on"
    elif drifted:
        head = f"{command}: {drifted} of {len(outcomes)} steps are not as they should be; "
        head += f"`{layout.next_command('setup')}` mends that"
    elif changed:
        head = f"{command}: ready, {changed} of {len(outcomes)} steps changed"
    else:
        head = f"{command}: ready, nothing to change"
    lines = [f"{head}  ({seconds:.2f} s, root {chosen.root.path})"]
    stand_ins = fallbacks(outcomes)
    if stand_ins:
        lines += ["fallbacks:", *(f"  {text}" for text in stand_ins)]
    return "\n".join(lines)


def fallbacks(outcomes: Sequence[Outcome]) -> list[str]:
    """Everything second-best that stands in somewhere."""
    return [redact(outcome.fallback) for outcome in outcomes if outcome.fallback]


def findings_json(chosen: ResolvedRoot, found: Sequence[Finding]) -> str:
    """`doctor` for programs."""
    whole = {
        "schema": SCHEMA,
        "command": "doctor",
        "root": str(chosen.root.path),
        "profile": chosen.match.name if chosen.match else None,
        "findings": [finding.to_dict() for finding in found],
    }
    return json.dumps(whole, ensure_ascii=False)


def findings(found: Sequence[Finding]) -> str:
    """`doctor` for people: a line a thing, and the command that mends it."""
    lines = []
    for finding in found:
        lines.append(f"  {finding.state:<5} {finding.thing:<20} {redact(finding.text)}")
        if finding.fix:
            lines.append(f"        {'':<20} -> {finding.fix}")
    return "\n".join(lines)


def runs_json(found: Sequence[JournaledRun]) -> str:
    """`undo --list` for programs."""
    return json.dumps({"schema": SCHEMA, "runs": [run.to_dict() for run in found]}, indent=1)


def runs(found: Sequence[JournaledRun]) -> str:
    """`undo --list` for people, the newest last."""
    lines = [
        f"{run.name:<28} {run.header.command or '?':<12} {len(run.acts):>4} acts on "
        f"{run.header.host or '?'}{', undone' if run.undone else ''}"
        for run in found
    ]
    return "\n".join(lines) or "no run has changed anything here"


def environments_json(found: Sequence[DiscoveredEnvironment]) -> str:
    """`env list` for programs."""
    return json.dumps({"schema": SCHEMA, "envs": [each.to_dict() for each in found]}, indent=1)


def environments(found: Sequence[DiscoveredEnvironment]) -> str:
    """`env list` for people: a few lines for each environment."""
    lines = []
    for each in found:
        place = "on the volume" if each.on_volume else "not on the volume"
        what = ", ".join(filter(None, [each.manager, each.interpreter, each.variant, f"{each.packages} packages"]))
        lines += [f"{each.name:<20} {what}, {each.size_bytes / 1e9:.2f} GB, {place}", f"  {each.prefix}"]
        if each.activatable:
            lines.append(f"  enter it: {each.activatable}")
        if each.mixed:
            more = f", and {len(each.mixed) - _MIXED_SHOWN} more" if len(each.mixed) > _MIXED_SHOWN else ""
            lines.append(f"  MIXED: {'; '.join(each.mixed[:_MIXED_SHOWN])}{more}")
    return "\n".join(lines) or f"no environment is here; `{layout.next_command('setup')}` makes one"
