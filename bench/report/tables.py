"""Shows a run: a table on the terminal, Markdown for a page. Imports neither torch nor a worker."""

from __future__ import annotations

import statistics
from datetime import timezone
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.errors import BUDGET
from bench.core.result import Status
from bench.run import verdict
from bench.validate import history
from bench.validate.expectations import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from bench.core.result import Case, Result, Run, Tuning
    from bench.core.validation_records import Reading
    from bench.run.compare import Comparison
    from bench.run.tune import TuneResult
    from bench.validate.history import ValidationHistory

COLUMNS = ("case", "s/step", "images/s", "load s", "first s", "peak")
ADVICE = (
    "!: measured while something else used the machine: end that and run again, or compare with "
    "`bench run --interleave A B`"
)
# Forty convolutions beside a load of 14 on 2 cores: 4.0 s, and 0.6 s with it (torch 2.13, libgomp).
SPINNING = (
    "   threads that wait for each other spin, beside others for most of the time: "
    "OMP_WAIT_POLICY=passive lets them sleep"
)
TREND = ("UTC", "device", "verdict", "product", "copy", "loop", "against first", "against best")


def terminal(run: Run, *, color: bool, width: int | None) -> str:
    """The run as a table for a terminal, with what is to be said below it.

    Args:
        run: the run.
        color: whether control codes are allowed.
        width: columns, else as the terminal has.
    """
    from rich.table import Table
    from rich.text import Text

    # Text, not markup: what a machine or a model calls itself may hold brackets.
    table = Table(title=Text(f"{run.suite}: {machine_line(run)}"), title_justify="left")
    for name in COLUMNS:
        first = name == "case"
        table.add_column(
            name,
            justify="left" if first else "right",
            no_wrap=not first,
            overflow="fold",
            min_width=12 if first else None,
        )
    for result in run.results:
        if result.status is Status.SKIPPED:  # it has no figure: the notes have a line for it
            continue
        cells = row(result)
        # A reason is for the notes; in the table it would push the figures apart.
        shown = cells if result.status is Status.OK else (cells[0], result.status.value)
        table.add_row(*(Text(cell) for cell in shown))
    return drawn(table, color=color, width=width) + "\n".join(notes(run)) + "\n"


def drawn(what: RenderableType, *, color: bool, width: int | None) -> str:
    """A table, or its title, as text for a terminal."""
    import io

    from rich.console import Console

    sink = io.StringIO()
    Console(file=sink, force_terminal=color, no_color=not color, width=width, highlight=False).print(what)
    return sink.getvalue()


def markdown(run: Run) -> str:
    """The run as Markdown."""
    lines = [f"# {run.suite}: {run.id}", "", machine_line(run), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row(result)) + " |" for result in run.results]
    lines += ["", *(f"- {note}" for note in notes(run))]
    pictures = [result for result in run.results if result.numerics and result.numerics.image]
    lines += [
        "",
        *(f"![{result.case.name}]({result.numerics.image})" for result in pictures if result.numerics),
    ]
    return "\n".join(lines).rstrip() + "\n"


def comparison(found: Comparison, *, color: bool, width: int | None) -> str:
    """Two runs held against each other, as a table for a terminal, with what is to be said below it."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("case", "before", "after", "change", "must exceed", ""):
        table.add_column(name, justify="left" if name in {"case", ""} else "right", overflow="fold")
    for each in found.rows:
        change = ""
        if each.ratio is not None:
            change = f"{each.ratio.median - 1:+.1%} ({each.ratio.low - 1:+.1%} to {each.ratio.high - 1:+.1%})"
        seconds = (f"{_figure(side.median)} s" if side is not None else "" for side in (each.before, each.after))
        said = f"{each.state}: {each.reason}" if each.reason else each.state
        table.add_row(*(Text(cell) for cell in (each.name, *seconds, change, f"{each.floor:.1%}", said)))
    lines = [f"differs: {what}" for what in found.differs]
    if found.alone:
        lines.append(f"in one of the two alone: {', '.join(found.alone)}")
    if not found.rows:
        lines.append("the two have no case in common")
    lines.append("seconds an image; the change of the medians with its 95 % bootstrap interval")
    return drawn(table, color=color, width=width) + "\n".join(lines) + "\n"


def tuned(found: TuneResult, *, color: bool, width: int | None) -> str:
    """A search as a table for a terminal, the fastest first, what was ruled out last; what was gained, and the code."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{found.default.case.model}: {machine_line(found.run)}"), title_justify="left")
    for name in ("setting", "s/image", "times the default", "from fp32", "peak", ""):
        table.add_column(name, justify="left" if name in {"setting", ""} else "right", overflow="fold")
    usual = stats.least_image_seconds(found.default)
    ruled_out = {each.case: why for each in found.tries if (why := verdict.ruled_out(each))}
    for each in sorted(found.tries, key=lambda each: (each.case in ruled_out, stats.least_image_seconds(each))):
        least = stats.least_image_seconds(each)
        error = each.numerics.forward_error if each.numerics else None
        cells = (
            ", ".join(each.case.settings),
            _figure(least) if each.samples else "",
            f"{usual / least:.2f}" if each.samples else "",
            f"{error:.1g}" if error is not None else "",
            memory_of(each) if each.samples else "",
            "ruled out" if each.case in ruled_out else "disturbed" if verdict.contended(each) else "",
        )
        table.add_row(*(Text(cell) for cell in cells))
    lines = [f"{', '.join(case.settings)}: {why}" for case, why in ruled_out.items()]
    lines += ["s/image is of the quickest of a try's images; the gain is measured once more, image by image in turns"]
    lines += gained(found.tuning)
    return drawn(table, color=color, width=width) + "\n".join([*lines, "", found.tuning.code]) + "\n"


def gained(tuning: Tuning) -> list[str]:
    """What a search has found, in words."""
    best = ", ".join(tuning.best.settings)
    if tuning.best == tuning.default:
        lines = [f"the default is the fastest setting: {best}"]
    elif tuning.gain is None:
        lines = [best]
    else:
        interval = f"({tuning.gain_low:.2f} to {tuning.gain_high:.2f})"
        lines = [f"{best}: {tuning.gain:.2f} times as fast as the default {interval}"]
    lines += [f"not to be believed: {tuning.doubt}"] if tuning.doubt else []
    return [*lines, *(note for note in tuning.notes if note != tuning.doubt)]


def trend(kept: ValidationHistory, *, color: bool, width: int | None) -> str:
    """The validations of a host as a table for a terminal, the newest last; below it what could not be read."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in TREND:
        table.add_column(name, justify="left" if name in TREND[:3] else "right", overflow="fold")
    for cells in trend_rows(kept.runs):
        table.add_row(*(Text(cell) for cell in cells))
    lines = ["product: the fastest of its dtypes; against first, best: the same product in the oldest and the best run"]
    lines += [f"passed over: {why}" for why in kept.unread]
    return drawn(table, color=color, width=width) + "\n".join(lines) + "\n"


def trend_rows(kept: Sequence[Run]) -> list[tuple[str, ...]]:
    """Each device of each validation as the cells of TREND; times in UTC."""
    return [
        (
            f"{line.at.astimezone(timezone.utc):%Y-%m-%d %H:%M}",
            f"{line.device} {line.card}",
            line.verdict.value,
            _reading(line.product),
            _reading(line.copy),
            _reading(line.loop),
            f"{line.against_first - 1:+.1%}" if line.against_first is not None else "",
            f"{line.against_best - 1:+.1%}" if line.against_best is not None else "",
        )
        for line in history.lines(kept)
    ]


def _reading(found: Reading | None) -> str:
    """A figure with its unit, and what it is of where the column does not say it all."""
    if found is None or found.value is None:
        return ""
    what = found.name.removeprefix(f"{found.probe} ")
    return shown(found.value, found.unit) + (f" ({what})" if what != found.name else "")


def row(result: Result) -> tuple[str, ...]:
    """One case as the cells of COLUMNS; a case without a number says why instead."""
    name = label(result.case) + (", real weights" if result.weights == "real" else "")
    steps = stats.step_seconds(result)
    if result.status is not Status.OK or steps is None:
        return (
            name,
            f"{result.status.value}: {result.cause}",
            "",
            "",
            "",
            "",
        )
    rate = stats.images_per_second(result)
    doubt = " !" if verdict.contended(result) else ""
    return (
        name,
        f"{_figure(steps.median)} ± {steps.spread:.1%}{doubt}",
        _figure(rate),
        _figure(result.phases.load_seconds),
        _figure(result.phases.first_image_seconds),
        memory_of(result),
    )


def label(case: Case) -> str:
    """A case as a row of a table names it; the device is the whole run's."""
    task = f" {case.task}" if case.task else ""
    name = f"{case.model}{task} {case.dtype} {case.scheduler} {case.height}x{case.width}, {case.steps} steps"
    name += f", batch {case.batch}" if case.batch > 1 else ""
    return ", ".join([name, *case.unusual.values()])


def machine_line(run: Run) -> str:
    """The machine and the software in one line."""
    gpus = ", ".join(str(gpu["name"]) for gpu in run.machine.get("gpus", []))
    software = software_of(run)
    versions = ", ".join(f"{name} {version}" for name, version in software.items())
    memory = f"{run.machine.get('memory_bytes', 0) / 1e9:.0f} GB"
    machine = f"{run.machine.get('cpu')}, {run.machine.get('cores')} cores, {memory}"
    return "; ".join(part for part in (machine, gpus, versions) if part)


def software_of(run: Run) -> dict[str, str]:
    """{name: version} of what computed."""
    validated = run.validation.software if run.validation is not None else {}
    return next((result.software for result in run.results if result.software), validated)


def notes(run: Run) -> list[str]:
    """What a reader must know beside the figures."""
    lines = [f"verdict: {run.verdict.state.value}", *(f"  {reason}" for reason in run.verdict.reasons)]
    lines += run.notes
    lines += left_out(run)
    measured = [result for result in run.results if result.status is Status.OK]
    if any(result.weights == "random" for result in measured):
        lines.append("weights: random ones stand in where the real ones are absent; speed and memory are the same")
    if any(verdict.contended(result) for result in measured):
        lines.append(ADVICE)
    if any(verdict.contended(result) and result.case.device == "cpu" for result in measured):
        lines.append(SPINNING)
    counts = [len(result.samples) for result in measured]
    if counts:
        lines.append(
            f"samples: {min(counts)} to {max(counts)} images a case (median {statistics.median(counts):g}); "
            "s/step is the median of all steps ± half its 95 % bootstrap interval; first s is the first image"
        )
    lines.append(f"whole run: {run.seconds:.0f} s")
    return lines


def left_out(run: Run) -> list[str]:
    """The cases that were skipped: those that were not begun in one line, the others with their reasons."""
    skipped = [result for result in run.results if result.status is Status.SKIPPED]
    late = [label(result.case) for result in skipped if (result.reason or "").startswith(BUDGET)]
    lines = [f"skipped {label(each.case)}: {each.reason}" for each in skipped if label(each.case) not in late]
    return lines + (
        [f"left out, no time was left (a larger --budget measures them): {'; '.join(late)}"] if late else []
    )


def _figure(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.3g}"


def memory_of(result: Result) -> str:
    """The peak of the device's memory, or of the host's where the device has none of its own."""
    memory = result.memory
    if memory.device_peak_reserved_bytes:
        return f"{memory.device_peak_reserved_bytes / 1e9:.2f} GB"
    return f"{memory.host_run_peak_bytes / 1e9:.2f} GB" if memory.host_run_peak_bytes else "not readable"
