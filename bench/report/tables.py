"""Show a run as tables for a terminal or as Markdown; this module imports neither torch nor worker code."""

from __future__ import annotations

import statistics
from datetime import timezone
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.errors import BUDGET
from bench.core.result import Status
from bench.run import disturbance, judge_cases
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
    "!: other work used the machine during this measurement. Stop it and run again, or compare with "
    "`bench run --interleave A B`"
)
# Forty convolutions at a load of 14 on 2 cores take 4.0 s, and 0.6 s with the variable (torch 2.13, libgomp).
SPINNING = (
    "   when other programs use the cores, torch's threads spend most of the time spinning while they wait for each "
    "other. With OMP_WAIT_POLICY=passive in the environment they sleep instead"
)
TREND = ("UTC", "device", "verdict", "product", "copy", "loop", "against first", "against best")


def terminal(run: Run, *, color: bool, width: int | None) -> str:
    """Return the run as a table for a terminal, with notes below it.

    Args:
        run: the run.
        color: whether colour codes are allowed.
        width: the width in columns; None: the width of the terminal.
    """
    from rich.table import Table
    from rich.text import Text

    # rich would read brackets in the name of a machine or model as markup, so this is a Text.
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
        if result.status is Status.SKIPPED:  # the notes list it
            continue
        cells = row(result)
        # The reason is in the notes, since it would widen the columns of the table.
        cells_shown = cells if result.status is Status.OK else (cells[0], result.status.value)
        table.add_row(*(Text(cell) for cell in cells_shown))
    return rendered(table, color=color, width=width) + "\n".join(notes(run)) + "\n"


def rendered(renderable: RenderableType, *, color: bool, width: int | None) -> str:
    """Return an object of the library rich, such as a table, as text for a terminal.

    Args:
        renderable: the object.
        color: whether colour codes are allowed.
        width: the width in columns; None: the width of the terminal.
    """
    import io

    from rich.console import Console

    sink = io.StringIO()
    Console(file=sink, force_terminal=color, no_color=not color, width=width, highlight=False).print(renderable)
    return sink.getvalue()


def markdown(run: Run) -> str:
    """Return the run as Markdown."""
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


def comparison(comparison_result: Comparison, *, color: bool, width: int | None) -> str:
    """Return the comparison of two runs as a table for a terminal, with notes below it."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("case", "before", "after", "change", "threshold", ""):
        table.add_column(name, justify="left" if name in {"case", ""} else "right", overflow="fold")
    for row in comparison_result.rows:
        change = ""
        if row.ratio is not None:
            change = f"{row.ratio.median - 1:+.1%} ({row.ratio.low - 1:+.1%} to {row.ratio.high - 1:+.1%})"
        seconds = (f"{_figure(side.median)} s" if side is not None else "" for side in (row.before, row.after))
        state = f"{row.state}: {row.reason}" if row.reason else row.state
        table.add_row(*(Text(cell) for cell in (row.name, *seconds, change, f"{row.floor:.1%}", state)))
    lines = [f"differs: {software}" for software in comparison_result.differs]
    if comparison_result.alone:
        lines.append(f"only in one of the runs: {', '.join(comparison_result.alone)}")
    if not comparison_result.rows:
        lines.append("the two runs have no case in common")
    lines.append("before, after: median seconds per image; change: of the medians, with its 95 % bootstrap interval")
    return rendered(table, color=color, width=width) + "\n".join(lines) + "\n"


def tuning_table(result: TuneResult, *, color: bool, width: int | None) -> str:
    """Return the result of `bench tune` for a terminal: a table of all settings, the gain, and the code.

    The fastest setting comes first; the excluded ones come last.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{result.default.case.model}: {machine_line(result.run)}"), title_justify="left")
    for name in ("setting", "s/image", "speedup", "error vs fp32", "peak", ""):
        table.add_column(name, justify="left" if name in {"setting", ""} else "right", overflow="fold")
    default_seconds = stats.least_image_seconds(result.default)
    ruled_out = {trial.case: reason for trial in result.tries if (reason := judge_cases.exclusion_reason(trial))}
    for trial in sorted(result.tries, key=lambda trial: (trial.case in ruled_out, stats.least_image_seconds(trial))):
        seconds = stats.least_image_seconds(trial)
        error = trial.numerics.forward_error if trial.numerics else None
        cells = (
            ", ".join(trial.case.settings),
            _figure(seconds) if trial.samples else "",
            f"{default_seconds / seconds:.2f}" if trial.samples else "",
            f"{error:.1g}" if error is not None else "",
            memory_of(trial) if trial.samples else "",
            "ruled out" if trial.case in ruled_out else "disturbed" if disturbance.of_case(trial) else "",
        )
        table.add_row(*(Text(cell) for cell in cells))
    lines = [f"{', '.join(case.settings)}: {reason}" for case, reason in ruled_out.items()]
    lines += [
        "s/image: the fastest image of each trial; the gain is measured again, with images of both settings in turns"
    ]
    lines += gain_lines(result.tuning)
    return rendered(table, color=color, width=width) + "\n".join([*lines, "", result.tuning.code]) + "\n"


def gain_lines(tuning: Tuning) -> list[str]:
    """Return the lines about the gain of `bench tune`."""
    best = ", ".join(tuning.best.settings)
    if tuning.best == tuning.default:
        lines = [f"the default is the fastest setting: {best}"]
    elif tuning.gain is None:
        lines = [best]
    else:
        interval = f"({tuning.gain_low:.2f} to {tuning.gain_high:.2f})"
        lines = [f"{best}: {tuning.gain:.2f} times as fast as the default {interval}"]
    lines += [f"not reliable: {tuning.doubt}"] if tuning.doubt else []
    return [*lines, *(note for note in tuning.notes if note != tuning.doubt)]


def trend(kept: ValidationHistory, *, color: bool, width: int | None) -> str:
    """Return the validations of a host as a table for a terminal, the newest last.

    Files that were skipped are listed below.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in TREND:
        table.add_column(name, justify="left" if name in TREND[:3] else "right", overflow="fold")
    for cells in trend_rows(kept.runs):
        table.add_row(*(Text(cell) for cell in cells))
    lines = [
        "product: the fastest dtype; against first, best: its change from the oldest validation, from the best one"
    ]
    lines += [f"skipped: {reason}" for reason in kept.unread]
    return rendered(table, color=color, width=width) + "\n".join(lines) + "\n"


def trend_rows(kept: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the cells of the columns TREND for each device of each validation; times are in UTC."""
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
        for line in history.history_lines(kept)
    ]


def _reading(reading: Reading | None) -> str:
    """Return a value with its unit, followed by the part of its name that the column's title does not have."""
    if reading is None or reading.value is None:
        return ""
    detail = reading.name.removeprefix(f"{reading.probe} ")
    return shown(reading.value, reading.unit) + (f" ({detail})" if detail != reading.name else "")


def row(result: Result) -> tuple[str, ...]:
    """Return one case as the cells of COLUMNS; a case without figures has its status and reason instead of figures."""
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
    mark = " !" if disturbance.of_case(result) else ""
    return (
        name,
        f"{_figure(steps.median)} ± {steps.spread:.1%}{mark}",
        _figure(rate),
        _figure(result.phases.load_seconds),
        _figure(result.phases.first_image_seconds),
        memory_of(result),
    )


def label(case: Case) -> str:
    """Return the name of a case for tables; the device is not in it, since a run has only one."""
    task = f" {case.task}" if case.task else ""
    name = f"{case.model}{task} {case.dtype} {case.scheduler} {case.height}x{case.width}, {case.steps} steps"
    name += f", batch {case.batch}" if case.batch > 1 else ""
    return ", ".join([name, *case.unusual.values()])


def machine_line(run: Run) -> str:
    """Return one line about the machine and the versions of its software."""
    gpus = ", ".join(str(gpu["name"]) for gpu in run.machine.get("gpus", []))
    software = software_of(run)
    versions = ", ".join(f"{name} {version}" for name, version in software.items())
    memory = f"{run.machine.get('memory_bytes', 0) / 1e9:.0f} GB"
    machine = f"{run.machine.get('cpu')}, {run.machine.get('cores')} cores, {memory}"
    return "; ".join(part for part in (machine, gpus, versions) if part)


def software_of(run: Run) -> dict[str, str]:
    """Return {name: version} of the software of the measured environment."""
    validated = run.validation.software if run.validation is not None else {}
    return next((result.software for result in run.results if result.software), validated)


def notes(run: Run) -> list[str]:
    """Return the lines below the table: verdict, choices, skipped cases, warnings and the total time."""
    lines = [f"verdict: {run.verdict.state.value}", *(f"  {reason}" for reason in run.verdict.reasons)]
    lines += run.notes
    lines += left_out(run)
    lines += [f"{label(result.case)}: {note}" for result in run.results for note in result.notes]
    measured = [result for result in run.results if result.status is Status.OK]
    if any(result.weights == "random" for result in measured):
        lines.append("weights: random where the model is not downloaded; speed and memory do not depend on them")
    if any(disturbance.of_case(result) for result in measured):
        lines.append(ADVICE)
    if any(disturbance.of_case(result) and result.case.device == "cpu" for result in measured):
        lines.append(SPINNING)
    counts = [len(result.samples) for result in measured]
    if counts:
        lines.append(
            f"samples: {min(counts)} to {max(counts)} images per case (median {statistics.median(counts):g}); "
            "s/step: median of all steps ± half its 95 % bootstrap interval; first s: seconds of the first image"
        )
    lines.append(f"whole run: {run.seconds:.0f} s")
    return lines


def left_out(run: Run) -> list[str]:
    """Return the lines about skipped cases: one line for all that had no time, and one line for each other case."""
    skipped = [result for result in run.results if result.status is Status.SKIPPED]
    late = [label(result.case) for result in skipped if (result.reason or "").startswith(BUDGET)]
    lines = [f"skipped {label(result.case)}: {result.reason}" for result in skipped if label(result.case) not in late]
    return lines + (
        [f"not measured for lack of time (use a larger --budget to measure them): {'; '.join(late)}"] if late else []
    )


def _figure(value: float | None) -> str:
    """Return a number with three significant digits."""
    return "" if value is None else f"{value:.3g}"


def memory_of(result: Result) -> str:
    """Return the peak of the device's memory as text; on a device that uses the host's memory, that of the host."""
    memory = result.memory
    if memory.device_peak_reserved_bytes:
        return f"{memory.device_peak_reserved_bytes / 1e9:.2f} GB"
    return f"{memory.host_run_peak_bytes / 1e9:.2f} GB" if memory.host_run_peak_bytes else "not readable"
