"""Shows a validation: what the rules made of each device, and every figure behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.core.validation_records import CUT, VerdictState
from bench.report import tables
from bench.validate.expectations import TOGETHER, shown
from bench.validate.rule_checks import ONCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.result import Run
    from bench.core.validation_records import DeviceFacts, Judgement, Reading, Validation

COLUMNS = ("device", "reading", "figure", "expected", "of it")
# The worst comes first.
_ORDER = (VerdictState.FAIL, VerdictState.NOT_JUDGED, VerdictState.WARN, VerdictState.PASS)


def terminal(run: Run, *, color: bool, width: int | None) -> str:
    """A validation as a table for a terminal, with what is to be done below it.

    Args:
        run: a validation.
        color: whether control codes are allowed.
        width: columns, else as the terminal has.
    """
    from rich.table import Table
    from rich.text import Text

    # Text, not markup: what a machine calls itself may hold brackets.
    title = Text(f"{run.suite}: {tables.machine_line(run)}")
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:2] else "right", overflow="fold")
    for cells in rows(run):
        table.add_row(*(Text(cell) for cell in cells))
    shown_first = tables.drawn(table if table.row_count else title, color=color, width=width)
    return shown_first + "\n".join(notes(run)) + "\n"


def markdown(run: Run) -> str:
    """A validation as Markdown."""
    lines = [f"# {run.suite}: {run.id}", "", tables.machine_line(run), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows(run)]
    return "\n".join([*lines, "", *(f"- {note.strip()}" for note in notes(run))]) + "\n"


def rows(run: Run) -> list[tuple[str, ...]]:
    """Each reading as the cells of COLUMNS; a soak's rounds are summed up in `notes`."""
    validation = run.validation
    return [] if validation is None else [_row(each, validation) for each in validation.readings if not each.round]


def _row(reading: Reading, validation: Validation) -> tuple[str, ...]:
    judged = _expectation(reading, validation.judgements)
    name = f"{reading.name}, all at once" if reading.probe == TOGETHER else reading.name
    if judged is None or not judged.expected or not judged.value:
        return reading.device, name, told(reading), at_most(reading), ""
    share = judged.expected / judged.value if reading.unit == "s" else judged.value / judged.expected
    hoped = f"{shown(judged.expected, judged.unit)} ({judged.confidence})"
    return reading.device, name, told(reading), hoped, f"{share:.0%}"


def _expectation(reading: Reading, judgements: Sequence[Judgement]) -> Judgement | None:
    """What a reading was held against: the judgement that has its very figure, and a source."""
    of_it = (each for each in judgements if each.source is not None and each.device == reading.device)
    return next((each for each in of_it if (each.value, each.unit) == (reading.value, reading.unit)), None)


def told(reading: Reading) -> str:
    """A reading's figure in words; what is wrong with it, or why there is none."""
    if reading.fault is not None:
        return f"FAULT: {_first_line(reading.fault)}"
    if reading.value is None and ONCE in reading.figures:
        return "wrong once, and right when it was asked again"
    if reading.value is None:
        return f"none: {_first_line(reading.why_not or 'it says nothing')}"
    if reading.probe == "memory":
        tested, free = (reading.figures.get(key, 0.0) / 1e9 for key in ("tested_bytes", "free_bytes"))
        return f"{tested:.1f} of {free:.1f} GB free, no error"
    if reading.unit:
        bound = "at least " if CUT in reading.figures else ""
        return bound + shown(reading.value, reading.unit) + (" a step" if reading.unit == "s" else "")
    return f"{reading.value:.0%}" if reading.limit is None else f"off by {reading.value:.1e}"


def at_most(reading: Reading) -> str:
    """The limit of a relative error; "" of what has none."""
    return f"at most {reading.limit:.1e}" if reading.limit is not None else ""


def notes(run: Run) -> list[str]:
    """What a reader must know beside the figures: the verdict, every rule that is not content, and what to do."""
    validation = run.validation
    if validation is None:
        return []
    lines = [f"verdict: {run.verdict.state.value}"]
    judged = sorted(validation.judgements, key=lambda each: _ORDER.index(each.state))
    for each in judged:
        if each.state is not VerdictState.PASS:
            lines.append(f"  {each.state.value}, {each.device}: {each.said}")
            lines += [f"    {each.advice}"] if each.advice else []
    # What passed and has no figure to show is a remark, such as a setting that costs a second.
    remarks = [each for each in judged if each.state is VerdictState.PASS and each.source is None]
    lines += [f"  {each.device}: {each.said}" for each in remarks]
    lines += [text for card in validation.cards if (text := card_line(card))]
    lines += list(_watched(validation))
    lines += list(_rounds(validation))
    seconds = ", ".join(f"{phase} {took:.1f}" for phase, took in validation.seconds.items())
    return [*lines, *([f"seconds a phase: {seconds}"] if seconds else []), f"whole run: {run.seconds:.0f} s"]


def card_line(card: DeviceFacts) -> str:
    """What the driver tells of a card, in one line; "" of a CPU."""
    if card.device == "cpu":
        return ""
    parts = [f"{card.device}: {card.name}", f"driver {card.driver}" if card.driver else ""]
    if card.power_limit_watts is not None:
        parts.append(f"{card.power_limit_watts:.0f} W at most")
    if card.pcie_generation is not None and card.pcie_width is not None:
        parts.append(f"PCIe {card.pcie_generation} x{card.pcie_width}")
    if card.ecc is not None:
        errors = f"{card.ecc_corrected or 0} corrected and {card.ecc_uncorrected or 0} uncorrectable errors"
        parts.append(f"ECC on, {errors}" if card.ecc else "ECC off")
    parts += [f"XID {', '.join(map(str, card.xids))}"] if card.xids else []
    parts += [] if card.driver_sees else ["the driver's library does not answer for it"]
    return ", ".join(part for part in parts if part)


def _watched(validation: Validation) -> Iterator[str]:
    for device, gpu in validation.watched.items():
        parts = [
            (gpu.clock_mhz_median, "{:.0f} MHz (median)"),
            (gpu.clock_mhz_minimum, "{:.0f} MHz at least"),
            (gpu.temperature_maximum, "{:.0f} °C at most"),
            (gpu.power_watts_mean, "{:.0f} W"),
        ]
        known = [form.format(value) for value, form in parts if value is not None]
        known += [f"{share:.0%} of the time slowed by {name}" for name, share in gpu.throttled.items()]
        known += ["what keeps its clocks down it does not say"] if gpu.reasons_told is False else []
        yield f"{device} under load: {', '.join(known) or 'it says nothing'}"


def _rounds(validation: Validation) -> Iterator[str]:
    """How each figure went over a soak; memory counts what was tested in all."""
    if validation.soak_seconds is None:
        return
    count = max((each.round for each in validation.readings), default=0)
    yield f"soak: {count} rounds in {validation.soak_seconds:.0f} s"
    found: dict[tuple[str, str], list[Reading]] = {}
    for each in validation.readings:
        if each.round and each.value is not None:
            found.setdefault((each.device, each.name), []).append(each)
    for (device, name), rounds in found.items():
        values = [reading.value or 0.0 for reading in rounds]
        if rounds[0].unit:
            least, most, last = (shown(value, rounds[0].unit) for value in (min(values), max(values), values[-1]))
            yield f"  {device} {name}: {least} to {most}, last {last}"
        elif rounds[0].probe == "memory":
            tested = sum(reading.figures.get("tested_bytes", 0.0) for reading in rounds) / 1e9
            yield f"  {device} memory: {tested:.0f} GB tested in all"


def _first_line(text: str) -> str:
    """Of a message that may be a traceback."""
    return next(iter(text.splitlines()), "")
