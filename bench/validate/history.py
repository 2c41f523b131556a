"""The validations that are kept on the volume: what a card has reached before, and how that changes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from bench.core.validation_records import CUT, VerdictState
from bench.run import store
from bench.run import verdict as run_verdict
from bench.validate.expectations import OWN, TOGETHER, Expected, known_as, share_of
from bench.validate.rule_checks import is_wrong
from provision.core.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from bench.core.result import Run
    from bench.core.validation_records import DeviceFacts, Reading, Validation

_BAD = {VerdictState.FAIL, VerdictState.NOT_JUDGED}
_UNKNOWN = "unknown-card"  # the rule that leaves open what no table has: of such a card its own past is all there is


@dataclass(frozen=True)
class ValidationHistory:
    """The validations of a folder, oldest first, and what was passed over: why each of these cannot be read."""

    runs: tuple[Run, ...]
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """What a reading was in one run; `torch` is the version that it was measured with."""

    at: datetime
    run: str
    value: float
    torch: str | None


@dataclass(frozen=True)
class Trend:
    """One reading of one card (or processor) over the runs, in their order.

    `whose`: what it is known by, the uuid of a card, the host and name of a processor.
    """

    whose: str
    card: str
    name: str
    unit: str
    points: tuple[Point, ...]

    @property
    def first(self) -> float:
        """Its oldest figure."""
        return self.points[0].value

    @property
    def best(self) -> float:
        """The best that it ever was: the least of seconds, the most of everything else."""
        values = [point.value for point in self.points]
        return min(values) if self.unit == "s" else max(values)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each figure beside the best: 1.0 for that one, less for every other."""
        return tuple(self.best / each.value if self.unit == "s" else each.value / self.best for each in self.points)


@dataclass(frozen=True)
class HistoryLine:
    """One device in one run: its verdict, and the reading of each kind that tells most (see `lines`).

    `against_first` and `against_best`: its product as a part of the oldest and of the best of that name, 1.0 for the
    same; None where it has no product.
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
    """Keep a validation by its id, whole or not at all.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    return store.write(run, folder / f"{run.id}.json", flag="--root")


def load(folder: Path) -> ValidationHistory:
    """Read what is kept; a file that is no validation, or that this version cannot read, is named and passed over."""
    found: list[tuple[datetime, str, Run]] = []
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
            unread.append(f"{file} is a run, and no validation with a time.")
        else:
            found.append((at, run.id, run))
    found.sort(key=lambda each: each[:2])
    return ValidationHistory(tuple(run for _, _, run in found), tuple(unread))


def bests(kept: Sequence[Run], torch: str | None) -> dict[tuple[str, str], Expected]:
    """The best that each card ever was: {(its uuid, what `known_as` calls a reading): the figure, its run}.

    Of cards alone that passed or were warned of, that nothing disturbed, and with a torch of the same minor version:
    its libraries decide how fast a healthy card computes, and a ticket to the provider must not be about them. Of a
    processor there is none: its figures are its neighbours' too.
    """
    found: dict[tuple[str, str], tuple[Reading, Run]] = {}
    for run in kept:
        validation = run.validation
        if validation is None or not _is_alike(validation, torch):
            continue
        for card, reading in _figures(validation):
            if card.uuid is None or card.slice or CUT in reading.figures or not _is_good(validation, card.device):
                continue
            key = (card.uuid, known_as(reading, validation.cards))
            if key not in found or share_of(reading, reading.value or 1.0, found[key][0].value or 1.0) > 1:
                found[key] = (reading, run)
    return {
        key: Expected(reading.value, f"its own best, run {run.id}, torch {_torch(run.validation)}", OWN)
        for key, (reading, run) in found.items()
        if reading.value is not None
    }


def trends(kept: Sequence[Run]) -> tuple[Trend, ...]:
    """How each figure of each card changes over the runs, in the order in which they first came.

    A card is known by its uuid, so that it stays itself where its number changes; a processor by its host and name. Of
    several rounds of a run the best counts.
    """
    found: dict[tuple[str, str], tuple[DeviceFacts, Reading, list[Point]]] = {}
    for run in kept:
        at = _time(run)
        if run.validation is None or at is None:
            continue
        for key, (card, reading) in _best_of_run(run, run.validation).items():
            point = Point(at, run.id, reading.value or 0.0, _torch(run.validation))
            found.setdefault(key, (card, reading, []))[2].append(point)
    return tuple(
        Trend(whose, card.name, name, reading.unit, tuple(points))
        for (whose, name), (card, reading, points) in found.items()
    )


def of_host(kept: Sequence[Run], machine: Mapping[str, object]) -> tuple[Run, ...]:
    """The validations of one host: those of its name, and those of a card that its newest one has, whatever its name.

    A rented host is called otherwise after each start, and its volume may have been on another one before.
    """
    name = machine.get("hostname")
    named = [run for run in kept if run.machine.get("hostname") == name]
    cards = _uuids(named[-1]) if named else set()
    return tuple(run for run in kept if run in named or _uuids(run) & cards)


def lines(kept: Sequence[Run]) -> tuple[HistoryLine, ...]:
    """One line a device and run: the fastest product, the copy, and the loop with the largest batch."""
    known = {(each.whose, each.name): each for each in trends(kept)}
    found = []
    for run in kept:
        at = _time(run)
        if run.validation is None or at is None:
            continue
        best = _best_of_run(run, run.validation)
        for card in run.validation.cards:
            of_card = [reading for of, reading in best.values() if of == card]
            product, copy, loop = (_most(of_card, probe) for probe in ("product", "copy", "loop"))
            trend = known.get((_whose(run, card), product.name)) if product is not None else None
            value = product.value if product is not None else None
            found.append(
                HistoryLine(
                    at,
                    run.id,
                    card.device,
                    card.name,
                    run_verdict.conclude(
                        [each for each in run.validation.judgements if each.device == card.device]
                    ).state,
                    product,
                    copy,
                    loop,
                    value / trend.first if trend is not None and value is not None else None,
                    value / trend.best if trend is not None and value is not None else None,
                )
            )
    return tuple(found)


def _most(readings: Sequence[Reading], probe: str) -> Reading | None:
    """The reading of a phase that tells most: the fastest product, the loop of the largest batch."""
    found = [reading for reading in readings if reading.probe == probe]
    if probe == "loop":
        return max(found, key=lambda each: _batch(each.name), default=None)
    return max(found, key=lambda each: each.value or 0.0, default=None)


def _batch(name: str) -> int:
    last = name.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


def _best_of_run(run: Run, validation: Validation) -> dict[tuple[str, str], tuple[DeviceFacts, Reading]]:
    """{(uuid, or host and name of a processor; name of a reading): the best of the run's rounds}."""
    best: dict[tuple[str, str], tuple[DeviceFacts, Reading]] = {}
    for card, reading in _figures(validation):
        key = (_whose(run, card), reading.name)
        if key not in best or share_of(reading, reading.value or 1.0, best[key][1].value or 1.0) > 1:
            best[key] = (card, reading)
    return best


def _figures(validation: Validation) -> Iterator[tuple[DeviceFacts, Reading]]:
    """What of a validation can be better or worse: its speeds, and how threads add up. An error is within its limit.

    What cards reach all at once has the names of what each reaches alone, and is no figure of one card.
    """
    cards = {card.device: card for card in validation.cards}
    for reading in validation.readings:
        is_figure = (bool(reading.unit) or reading.probe == "threads") and reading.probe != TOGETHER
        if is_figure and reading.value and not is_wrong(reading) and reading.device in cards:
            yield cards[reading.device], reading


def _is_good(validation: Validation, device: str) -> bool:
    states = {each.state for each in validation.judgements if each.device == device and each.rule != _UNKNOWN}
    return device not in validation.disturbed and not states & _BAD


def _whose(run: Run, card: DeviceFacts) -> str:
    return card.uuid or f"{run.machine.get('hostname', '')} {card.name}".strip()


def _torch(validation: Validation | None) -> str | None:
    return validation.software.get("torch") if validation is not None else None


def _is_alike(validation: Validation, torch: str | None) -> bool:
    """Whether a validation was made with a torch of the same minor version."""
    theirs = _torch(validation)
    return theirs is not None and torch is not None and theirs.split(".")[:2] == torch.split(".")[:2]


def _uuids(run: Run) -> set[str]:
    cards = run.validation.cards if run.validation is not None else ()
    return {card.uuid for card in cards if card.uuid is not None}


def _time(run: Run) -> datetime | None:
    """When a run began; None where it does not say so in a way that can be read, with its zone."""
    try:
        at = datetime.fromisoformat(run.started)
    except ValueError:
        return None
    return at if at.tzinfo is not None else None
