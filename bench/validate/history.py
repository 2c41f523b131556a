"""Reads and writes the validations on the volume, and computes the best values and the trends of each device."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from bench.core import verdict
from bench.core.validation_records import CUT
from bench.core.verdict import VerdictState
from bench.run import store
from bench.validate.expectations import OWN, TOGETHER, Expected, reading_key, share_of
from bench.validate.reading_checks import is_wrong
from provision.core.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from bench.core.result import Run
    from bench.core.validation_records import DeviceFacts, Reading, Validation

_BAD = {VerdictState.FAIL, VerdictState.NOT_JUDGED}
_UNKNOWN = "unknown-card"  # the rule on a GPU without expected values, which does not make its own values unusable


@dataclass(frozen=True)
class ValidationHistory:
    """Hold the validations of a folder, oldest first. `unread`: a message for each file that was skipped."""

    runs: tuple[Run, ...]
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """Hold the value of a reading in one run. `run`: the id of the run; `torch`: the version of torch that it used."""

    at: datetime
    run: str
    value: float
    torch: str | None


@dataclass(frozen=True)
class Trend:
    """Hold the values of one reading of one device over the runs, oldest first.

    `whose`: the UUID of a GPU, or the host and name of a CPU. `card`: the name of the device. `name`: the name of the
    reading.
    """

    whose: str
    card: str
    name: str
    unit: str
    points: tuple[Point, ...]

    @property
    def first(self) -> float:
        """Return the oldest value."""
        return self.points[0].value

    @property
    def best(self) -> float:
        """Return the best value: the smallest one if the unit is seconds, otherwise the largest one."""
        values = [point.value for point in self.points]
        return min(values) if self.unit == "s" else max(values)

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the speed of each value relative to the best one: 1.0 for the best, less for the others."""
        return tuple(self.best / point.value if self.unit == "s" else point.value / self.best for point in self.points)


@dataclass(frozen=True)
class HistoryLine:
    """Hold one device in one run: its verdict, and one representative reading each of product, copy and loop.

    `against_first`, `against_best`: its product over the oldest and over the best value of the same product in all
    runs; None without a product.
    """

    at: datetime
    run: str
    device: str
    card: str
    verdict: VerdictState
    product: Reading | None
    copy: Reading | None
    loop: Reading | None
    against_first: float | None
    against_best: float | None


def keep(run: Run, folder: Path) -> Path:
    """Write a validation into a file named by its id, completely or not at all, and return the path.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    return store.write(run, folder / f"{run.id}.json", flag="--root")


def load(folder: Path) -> ValidationHistory:
    """Return the validations of a folder.

    Files that are no validation, or that this version cannot read, are listed as unread.
    """
    entries: list[tuple[datetime, str, Run]] = []
    unread: list[str] = []
    for file in sorted(folder.glob("*.json")):
        try:
            run = store.load(str(file), folder)
        except FirstlightError as error:
            unread.append(str(error))
            continue
        except OSError as error:
            unread.append(f"{file} cannot be read: {error.strerror}.")
            continue
        at = _time(run)
        if run.validation is None or at is None:
            unread.append(f"{file} is not a validation with a start time.")
        else:
            entries.append((at, run.id, run))
    entries.sort(key=lambda entry: entry[:2])
    return ValidationHistory(tuple(run for _, _, run in entries), tuple(unread))


def best_figures(kept: Sequence[Run], torch: str | None) -> dict[tuple[str, str], Expected]:
    """Return {(uuid, `reading_key` of a reading): its best value} of each GPU over all validations.

    A validation counts only if the GPU passed or had warnings and was not disturbed, and if torch had the same minor
    version as now (`torch`), since its libraries decide how fast a healthy GPU computes. CPUs have no best values,
    since other tenants of the host slow them down.
    """
    best: dict[tuple[str, str], tuple[Reading, Run]] = {}
    for run in kept:
        validation = run.validation
        if validation is None or not _has_same_torch(validation, torch):
            continue
        for card, reading in _figures(validation):
            if card.uuid is None or card.slice or CUT in reading.figures or not _is_good(validation, card.device):
                continue
            key = (card.uuid, reading_key(reading, validation.cards))
            if key not in best or share_of(reading, reading.value or 1.0, best[key][0].value or 1.0) > 1:
                best[key] = (reading, run)
    return {
        key: Expected(reading.value, f"its own best value, run {run.id}, torch {_torch(run.validation)}", OWN)
        for key, (reading, run) in best.items()
        if reading.value is not None
    }


def trends(kept: Sequence[Run]) -> tuple[Trend, ...]:
    """Return how each value of each device changes over the runs, in the order of first appearance.

    A GPU is identified by its UUID, since its number may change; a CPU by its host and name. If a run has several
    rounds, the best value counts.
    """
    series: dict[tuple[str, str], tuple[DeviceFacts, Reading, list[Point]]] = {}
    for run in kept:
        at = _time(run)
        if run.validation is None or at is None:
            continue
        for key, (card, reading) in _best_of_run(run, run.validation).items():
            point = Point(at, run.id, reading.value or 0.0, _torch(run.validation))
            series.setdefault(key, (card, reading, []))[2].append(point)
    return tuple(
        Trend(whose, card.name, name, reading.unit, tuple(points))
        for (whose, name), (card, reading, points) in series.items()
    )


def runs_of_host(kept: Sequence[Run], machine: Mapping[str, object]) -> tuple[Run, ...]:
    """Return the validations of one host: those with its host name, and those of a GPU that its newest validation has.

    A rented host may get another name at each start, and its volume may have been on another host before. `machine`:
    the facts of the host, as a run stores them.
    """
    name = machine.get("hostname")
    named = [run for run in kept if run.machine.get("hostname") == name]
    cards = _uuids(named[-1]) if named else set()
    return tuple(run for run in kept if run in named or _uuids(run) & cards)


def history_lines(kept: Sequence[Run]) -> tuple[HistoryLine, ...]:
    """Return one line per device and run: with its fastest product, its copy, and its loop with the largest batch."""
    trend_by_key = {(trend.whose, trend.name): trend for trend in trends(kept)}
    lines = []
    for run in kept:
        at = _time(run)
        if run.validation is None or at is None:
            continue
        best = _best_of_run(run, run.validation)
        for card in run.validation.cards:
            of_card = [reading for of, reading in best.values() if of == card]
            product, copy, loop = (_representative(of_card, probe) for probe in ("product", "copy", "loop"))
            trend = trend_by_key.get((_whose(run, card), product.name)) if product is not None else None
            value = product.value if product is not None else None
            lines.append(
                HistoryLine(
                    at,
                    run.id,
                    card.device,
                    card.name,
                    verdict.conclude([item for item in run.validation.judgements if item.device == card.device]).state,
                    product,
                    copy,
                    loop,
                    value / trend.first if trend is not None and value is not None else None,
                    value / trend.best if trend is not None and value is not None else None,
                )
            )
    return tuple(lines)


def _representative(readings: Sequence[Reading], probe: str) -> Reading | None:
    """Return the representative reading of a phase: the largest value; of loops, the one with the largest batch."""
    candidates = [reading for reading in readings if reading.probe == probe]
    if probe == "loop":
        return max(candidates, key=lambda reading: _batch(reading.name), default=None)
    return max(candidates, key=lambda reading: reading.value or 0.0, default=None)


def _batch(name: str) -> int:
    last = name.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


def _best_of_run(run: Run, validation: Validation) -> dict[tuple[str, str], tuple[DeviceFacts, Reading]]:
    """Return {(uuid, or host and name of a CPU; name of a reading): (device, the best reading of the run's rounds)}."""
    best: dict[tuple[str, str], tuple[DeviceFacts, Reading]] = {}
    for card, reading in _figures(validation):
        key = (_whose(run, card), reading.name)
        if key not in best or share_of(reading, reading.value or 1.0, best[key][1].value or 1.0) > 1:
            best[key] = (card, reading)
    return best


def _figures(validation: Validation) -> Iterator[tuple[DeviceFacts, Reading]]:
    """Yield (device, reading) of the readings that can be better or worse: speeds, and the scaling over threads.

    Readings of the phase with all devices at once are left out: they have the same names as those of a device alone.
    """
    cards = {card.device: card for card in validation.cards}
    for reading in validation.readings:
        is_figure = (bool(reading.unit) or reading.probe == "threads") and reading.probe != TOGETHER
        if is_figure and reading.value and not is_wrong(reading) and reading.device in cards:
            yield cards[reading.device], reading


def _is_good(validation: Validation, device: str) -> bool:
    states = {
        judgement.state
        for judgement in validation.judgements
        if judgement.device == device and judgement.rule != _UNKNOWN
    }
    return device not in validation.disturbed and not states & _BAD


def _whose(run: Run, card: DeviceFacts) -> str:
    return card.uuid or f"{run.machine.get('hostname', '')} {card.name}".strip()


def _torch(validation: Validation | None) -> str | None:
    return validation.software.get("torch") if validation is not None else None


def _has_same_torch(validation: Validation, torch: str | None) -> bool:
    """Return whether a validation was made with the same minor version of torch."""
    version = _torch(validation)
    return version is not None and torch is not None and version.split(".")[:2] == torch.split(".")[:2]


def _uuids(run: Run) -> set[str]:
    cards = run.validation.cards if run.validation is not None else ()
    return {card.uuid for card in cards if card.uuid is not None}


def _time(run: Run) -> datetime | None:
    """Return the start of a run; None if the stored text is not a time with a time zone."""
    try:
        at = datetime.fromisoformat(run.started)
    except ValueError:
        return None
    return at if at.tzinfo is not None else None
