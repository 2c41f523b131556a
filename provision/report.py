"""Shows what became of the steps: lines for people, one object for programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from provision.command import redact
from provision.step import State, exit_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress, TaskID

    from provision.discover import Found
    from provision.doctor import Finding
    from provision.profiles import Chosen
    from provision.step import Outcome, Step
    from provision.undo import Run

SCHEMA = 1
_MIXED_SHOWN = 5
_COLORS = {"ok": "32", "done": "32", "drifted": "33", "blocked": "31", "failed": "31"}


class Screen:
    """Prints a line a step to stdout, and on a terminal a progress bar to stderr while a step works."""

    def __init__(self, *, json_output: bool, quiet: bool, color: bool) -> None:
        """Take what the flags say; `total` steps are set when they are known."""
        self.total = 0
        self.lines = sys.stderr if json_output else sys.stdout
        self.quiet = quiet
        self.color = color and self.lines.isatty()
        self.bar_wanted = sys.stderr.isatty() and not quiet
        self.number = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def listen(self, step: Step, outcome: Outcome | None) -> None:
        """A step begins (no outcome yet) or has ended."""
        if outcome is None:
            self.number += 1
            self._start(step.name)
            return
        self._stop()
        if not self.quiet or outcome.error:
            print(self.line(outcome), file=self.lines, flush=True)

    def progress(self, arrived: int, total: int) -> None:
        """Bytes have arrived for the step at work."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total or None, advance=arrived)

    def tell(self, text: str) -> None:
        """The step at work waits, or does something else that takes long."""
        if not self.quiet:
            print(f"  {redact(text)}", file=sys.stderr, flush=True)

    def line(self, outcome: Outcome) -> str:
        """One step in one line: its state, name, what was found, and the time it took."""
        word = word_for(outcome)
        mark = f"\x1b[{_COLORS[word]}m{word:<8}\x1b[0m" if self.color else f"{word:<8}"
        text = redact(outcome.error or outcome.detail)
        return f"  {mark} {outcome.step:<28} {text}  ({outcome.seconds:.2f} s)"

    def _start(self, name: str) -> None:
        if not self.bar_wanted:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
        )
        pulls = (
            (DownloadColumn(binary_units=False),) if name.startswith(("model ", "relocate ", "environment ")) else ()
        )
        self._bar = Progress(*columns, *pulls, console=Console(stderr=True, no_color=not self.color), transient=True)
        self._task = self._bar.add_task(f"[{self.number}/{self.total}] {name}", total=None)
        self._bar.start()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def word_for(outcome: Outcome) -> str:
    """One word: ok, done, drifted, blocked or failed."""
    if outcome.after is State.BLOCKED:
        return "blocked"
    if outcome.error:
        return "failed"
    if outcome.after is State.DRIFTED:
        return "drifted"
    return "done" if outcome.changed else "ok"


def to_json(command: str, chosen: Chosen, outcomes: Sequence[Outcome], seconds: float) -> str:
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


def summary(command: str, chosen: Chosen, outcomes: Sequence[Outcome], seconds: float) -> str:
    """The last lines for a person: what stands, what stands in, and the next command where one is due."""
    changed = sum(outcome.changed for outcome in outcomes)
    drifted = sum(outcome.after is State.DRIFTED and not outcome.error for outcome in outcomes)
    wrong = sum(outcome.error is not None for outcome in outcomes)
    if wrong:
        head = f"{command}: {wrong} of {len(outcomes)} steps cannot go on"
    elif drifted:
        head = f"{command}: {drifted} of {len(outcomes)} steps are not as they should be; `make setup` mends that"
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


def findings_json(chosen: Chosen, found: Sequence[Finding]) -> str:
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


def runs_json(found: Sequence[Run]) -> str:
    """`undo --list` for programs."""
    return json.dumps({"schema": SCHEMA, "runs": [run.to_dict() for run in found]}, indent=1)


def runs(found: Sequence[Run]) -> str:
    """`undo --list` for people, the newest last."""
    lines = [
        f"{run.name:<28} {run.header.get('command') or '?':<12} {len(run.acts):>4} acts on "
        f"{run.header.get('host') or '?'}{', undone' if run.undone else ''}"
        for run in found
    ]
    return "\n".join(lines) or "no run has changed anything here"


def environments_json(found: Sequence[Found]) -> str:
    """`env list` for programs."""
    return json.dumps({"schema": SCHEMA, "envs": [each.to_dict() for each in found]}, indent=1)


def environments(found: Sequence[Found]) -> str:
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
    return "\n".join(lines) or "no environment is here; `make setup` makes one"
