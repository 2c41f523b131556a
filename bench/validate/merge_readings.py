"""Merges the readings of a repeated measurement with those of the first one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.core.validation_records import CUT
from bench.validate.expectations import share_of
from bench.validate.reading_checks import ONCE, is_wrong

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.validation_records import Reading


def merge(first: Sequence[Reading], again: Sequence[Reading]) -> tuple[Reading, ...]:
    """Return one reading for each quantity, in the order of `first`.

    For a repeated one, the reading that `settle` returns.
    """
    merged = {_identity(reading): reading for reading in first}
    for reading in again:
        before = merged.get(_identity(reading))
        merged[_identity(reading)] = settle(before, reading) if before is not None else reading
    return tuple(merged.values())


def settle(first: Reading, again: Reading) -> Reading:
    """Return the reading that counts, of two readings of the same quantity.

    A fault in both is a fault. A fault in one of them is a fault only if the other has no value. Otherwise the good
    reading counts, with the mark ONCE, which a rule turns into a warning. Of two good values the better one counts:
    other work makes a measurement slow, never fast.
    """
    if is_wrong(first) or is_wrong(again):
        return _settle_fault(first, again)
    if not again.value or not first.value:
        return again if again.value else first
    return again if first.limit is not None else _better(first, again)


def _settle_fault(first: Reading, again: Reading) -> Reading:
    if is_wrong(first) and is_wrong(again):
        return again
    good, wrong = (again, first) if is_wrong(first) else (first, again)
    return wrong if good.value is None else replace(good, figures=good.figures | {ONCE: 1.0})


def _better(first: Reading, again: Reading) -> Reading:
    if "first_quarter" in first.figures and "first_quarter" in again.figures:  # the one that slowed down less is better
        return max(
            again,
            first,
            key=lambda reading: reading.figures["last_quarter"] / (reading.figures["first_quarter"] or 1.0),
        )
    if "patterns" in first.figures and "patterns" in again.figures:  # the memory test that covered more is better
        return max(again, first, key=lambda reading: (reading.value or 0.0) * reading.figures["patterns"])
    better = again if share_of(first, again.value or 1.0, first.value or 1.0) >= 1 else first
    if CUT in first.figures and CUT in again.figures:
        return better
    # One of the two measured all shapes, so the better value is not a lower bound any more.
    return replace(better, figures={name: figure for name, figure in better.figures.items() if name != CUT})


def _identity(reading: Reading) -> tuple[str, str, str, int]:
    return reading.device, reading.probe, reading.name, reading.round
