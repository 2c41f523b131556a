"""Show a validation as text: the verdict, the judgements of the rules, and every reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.core.validation_records import CUT
from bench.core.verdict import VerdictState
from bench.report import tables
from bench.validate.expectations import TOGETHER, shown
from bench.validate.reading_checks import ONCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.result import Run
    from bench.core.validation_records import DeviceFacts, Reading, Validation
    from bench.core.verdict import Judgement

COLUMNS = ("device", "reading", "value", "expected", "share")
# Worst first.
_ORDER = (VerdictState.FAIL, VerdictState.NOT_JUDGED, VerdictState.WARN, VerdictState.PASS)


def terminal(run: Run, *, color: bool, width: int | None) -> str:
    """Return a validation as a table for a terminal, with notes below it.

    Args:
        run: a validation.
        color: whether colour codes are allowed.
        width: the width in columns; None: the width of the terminal.
    """
    from rich.table import Table
    from rich.text import Text

    # rich would read brackets in the name of a machine as markup, so this is a Text.
    title = Text(f"{run.suite}: {tables.machine_line(run)}")
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:2] else "right", overflow="fold")
    for cells in rows(run):
        table.add_row(*(Text(cell) for cell in cells))
    table_text = tables.rendered(table if table.row_count else title, color=color, width=width)
    return table_text + "\n".join(notes(run)) + "\n"


def markdown(run: Run) -> str:
    """Return a validation as Markdown."""
    lines = [f"# {run.suite}: {run.id}", "", tables.machine_line(run), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows(run)]
    return "\n".join([*lines, "", *(f"- {note.strip()}" for note in notes(run))]) + "\n"


def rows(run: Run) -> list[tuple[str, ...]]:
    """Return each reading as the cells of COLUMNS, without those of a soak, which `notes` summarizes."""
    validation = run.validation
    return (
        []
        if validation is None
        else [_row(reading, validation) for reading in validation.readings if not reading.round]
    )


def _row(reading: Reading, validation: Validation) -> tuple[str, ...]:
    judgement = _expectation(reading, validation.judgements)
    name = f"{reading.name}, all at once" if reading.probe == TOGETHER else reading.name
    if judgement is None or not judgement.expected or not judgement.value:
        return reading.device, name, figure_text(reading), limit_text(reading), ""
    share = judgement.expected / judgement.value if reading.unit == "s" else judgement.value / judgement.expected
    expected = f"{shown(judgement.expected, judgement.unit)} ({judgement.confidence})"
    return reading.device, name, figure_text(reading), expected, f"{share:.0%}"


def _expectation(reading: Reading, judgements: Sequence[Judgement]) -> Judgement | None:
    """Return the judgement that compared this reading with an expected value; None if there is none."""
    candidates = (
        judgement for judgement in judgements if judgement.source is not None and judgement.device == reading.device
    )
    return next(
        (judgement for judgement in candidates if (judgement.value, judgement.unit) == (reading.value, reading.unit)),
        None,
    )


def figure_text(reading: Reading) -> str:
    """Return the value of a reading as text; or its fault; or the reason for which it has no value."""
    if reading.fault is not None:
        return f"FAULT: {_first_line(reading.fault)}"
    if reading.value is None and ONCE in reading.figures:
        return "wrong once, right when it was repeated"
    if reading.value is None:
        return f"no value: {_first_line(reading.why_not or 'no reason given')}"
    if reading.probe == "memory":
        tested, free = (reading.figures.get(key, 0.0) / 1e9 for key in ("tested_bytes", "free_bytes"))
        return f"{tested:.1f} of {free:.1f} GB free, no error"
    if reading.unit:
        bound = "at least " if CUT in reading.figures else ""
        return bound + shown(reading.value, reading.unit) + (" a step" if reading.unit == "s" else "")
    return f"{reading.value:.0%}" if reading.limit is None else f"off by {reading.value:.1e}"


def limit_text(reading: Reading) -> str:
    """Return the limit of a relative error as text; "" for a reading without a limit."""
    return f"at most {reading.limit:.1e}" if reading.limit is not None else ""


def notes(run: Run) -> list[str]:
    """Return the lines below the table: the verdict, each judgement that is not "pass" with its advice, and facts."""
    validation = run.validation
    if validation is None:
        return []
    lines = [f"verdict: {run.verdict.state.value}"]
    judgements = sorted(validation.judgements, key=lambda judgement: _ORDER.index(judgement.state))
    for judgement in judgements:
        if judgement.state is not VerdictState.PASS:
            lines.append(f"  {judgement.state.value}, {judgement.device}: {judgement.said}")
            lines += [f"    {judgement.advice}"] if judgement.advice else []
    # A "pass" without an expected value is for information, such as a driver setting that has little effect.
    remarks = [
        judgement for judgement in judgements if judgement.state is VerdictState.PASS and judgement.source is None
    ]
    lines += [f"  {judgement.device}: {judgement.said}" for judgement in remarks]
    lines += [text for card in validation.cards if (text := card_line(card))]
    lines += list(_watched(validation))
    lines += list(_rounds(validation))
    seconds = ", ".join(f"{phase} {took:.1f}" for phase, took in validation.seconds.items())
    return [*lines, *([f"seconds a phase: {seconds}"] if seconds else []), f"whole run: {run.seconds:.0f} s"]


def card_line(card: DeviceFacts) -> str:
    """Return the facts that the driver reports about a GPU, in one line; "" for a CPU."""
    if card.device == "cpu":
        return ""
    parts = [f"{card.device}: {card.name}", f"driver {card.driver}" if card.driver else ""]
    if card.power_limit_watts is not None:
        parts.append(f"power limit {card.power_limit_watts:.0f} W")
    if card.pcie_generation is not None and card.pcie_width is not None:
        parts.append(f"PCIe {card.pcie_generation} x{card.pcie_width}")
    if card.ecc is not None:
        errors = f"{card.ecc_corrected or 0} corrected and {card.ecc_uncorrected or 0} uncorrectable errors"
        parts.append(f"ECC on, {errors}" if card.ecc else "ECC off")
    parts += [f"XID {', '.join(map(str, card.xids))}"] if card.xids else []
    parts += [] if card.driver_sees else ["NVML does not list it"]
    return ", ".join(part for part in parts if part)


def _watched(validation: Validation) -> Iterator[str]:
    """Yield a line per device with its clocks, temperature, power and throttling under sustained load."""
    for device, gpu in validation.watched.items():
        parts = [
            (gpu.clock_mhz_median, "{:.0f} MHz (median)"),
            (gpu.clock_mhz_minimum, "lowest {:.0f} MHz"),
            (gpu.temperature_maximum, "highest {:.0f} °C"),
            (gpu.power_watts_mean, "{:.0f} W (mean)"),
        ]
        texts = [template.format(value) for value, template in parts if value is not None]
        texts += [f"slowed by {name} {share:.0%} of the time" for name, share in gpu.throttled.items()]
        texts += ["throttle reasons are not reported"] if gpu.reasons_told is False else []
        yield f"{device} under load: {', '.join(texts) or 'no data'}"


def _rounds(validation: Validation) -> Iterator[str]:
    """Yield the lines about a soak: the range and the last value of each quantity, and the total of tested memory."""
    if validation.soak_seconds is None:
        return
    count = max((reading.round for reading in validation.readings), default=0)
    yield f"soak: {count} rounds in {validation.soak_seconds:.0f} s"
    rounds_of: dict[tuple[str, str], list[Reading]] = {}
    for reading in validation.readings:
        if reading.round and reading.value is not None:
            rounds_of.setdefault((reading.device, reading.name), []).append(reading)
    for (device, name), rounds in rounds_of.items():
        values = [reading.value or 0.0 for reading in rounds]
        if rounds[0].unit:
            least, most, last = (shown(value, rounds[0].unit) for value in (min(values), max(values), values[-1]))
            yield f"  {device} {name}: {least} to {most}, last {last}"
        elif rounds[0].probe == "memory":
            tested = sum(reading.figures.get("tested_bytes", 0.0) for reading in rounds) / 1e9
            yield f"  {device} memory: {tested:.0f} GB tested in all"


def _first_line(text: str) -> str:
    """Return the first line of a text that may be a traceback."""
    return next(iter(text.splitlines()), "")
