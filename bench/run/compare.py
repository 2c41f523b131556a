"""Holds one run against another, case by case, and says slower only where nothing else explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.errors import Exit
from bench.core.result import Status
from bench.run import verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.result import Case, Result, Run
    from bench.core.stats import Summary

SLOWER, FASTER, SAME, NOT_JUDGED = "slower", "faster", "same", "could not judge"
# Below this no difference is named: five runs of one clean case agree within it.
LEAST_EFFECT = 0.03
# Two processes of one setting on a CPU: 0.30 and 0.34 s an image for as long as each lives, by where its weights lie
# (measured on a shared 2-core AMD EPYC). Of a pair, every image has them elsewhere.
_LUCK_OF_PLACE = 0.15
_NO_LESS = "two processes on a CPU may differ by so much: run --interleave finds less"


@dataclass(frozen=True)
class ComparedCase:
    """One case in both runs. `ratio` is of the seconds an image, after / before; `floor` what an effect must exceed."""

    name: str
    before: Summary | None
    after: Summary | None
    ratio: Summary | None
    floor: float
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two runs held against each other. `differs`: software that is not the same; it may be what is compared."""

    rows: tuple[ComparedCase, ...]
    differs: tuple[str, ...]
    alone: tuple[str, ...]

    @property
    def exit(self) -> Exit:
        """3 where a case became slower, 5 where none could be judged."""
        states = {row.state for row in self.rows}
        if SLOWER in states:
            return Exit.VERDICT_FAIL
        return Exit.NOT_JUDGED if not states - {NOT_JUDGED} else Exit.GOOD


def compare(before: Run, after: Run, *, least: float = LEAST_EFFECT) -> Comparison:
    """Compare the cases that both runs have.

    A case is slower only if the 95 % interval of the ratio of the medians excludes 1, and the effect exceeds the larger
    of `least` and the noise (each run's own interval, and how far the machine's own peak moved between them), and both
    ran on the same kind of machine, and neither was disturbed.

    Args:
        before: the older run, or the baseline.
        after: the newer one.
        least: the smallest effect that is named, as a share.
    """
    machine = "; ".join(_unlike_machines(before, after))
    known = {result.case: result for result in before.results}
    rows = [
        _row(result.case.name, known[result.case], result, machine, least, paired=False)
        for result in after.results
        if result.case in known
    ]
    both = {result.case for result in after.results} & set(known)
    alone = [case.name for case in (*known, *(result.case for result in after.results)) if case not in both]
    return Comparison(tuple(rows), tuple(_unlike_software(before, after)), tuple(alone))


def pairs(run: Run, *, least: float = LEAST_EFFECT) -> Comparison:
    """Compare within an interleaved run: every second case with the one before it, image by image."""
    rows = [
        _row(_both(one.case, two.case), one, two, "", least, paired=True)
        for one, two in zip(run.results[::2], run.results[1::2], strict=True)
    ]
    return Comparison(tuple(rows), (), ())


def paired_ratio(before: Result, after: Result) -> Summary:
    """Seconds an image, after / before, of two cases whose images were made in turns: of every image, warm or not.

    Raises:
        ValueError: one of them has none.
    """
    one, two = (
        [each.seconds / result.case.batch for each in (*result.warmups, *result.samples)] for result in (before, after)
    )
    count = min(len(one), len(two))
    return stats.paired_ratio(one[:count], two[:count])


def too_few(ratio: Summary) -> str | None:
    """Why the ratio of so few pairs says nothing, or None."""
    if ratio.count >= stats.FEWEST_PAIRS:
        return None
    return f"{ratio.count} pairs, and the median of fewer than {stats.FEWEST_PAIRS} is not known"


def _row(name: str, before: Result, after: Result, machine: str, least: float, *, paired: bool) -> ComparedCase:
    first, second = stats.image_seconds(before), stats.image_seconds(after)
    fault = machine or _fault(before, "before") or _fault(after, "after")
    if first is None or second is None:
        return ComparedCase(name, first, second, None, least, NOT_JUDGED, fault or "it has no samples")
    if paired:
        ratio = paired_ratio(before, after)
        floor = least
        fault = fault or too_few(ratio) or ""
    else:
        ratio = stats.ratio(*([each.seconds / side.case.batch for each in side.samples] for side in (before, after)))
        luck = _LUCK_OF_PLACE if after.case.device == "cpu" else 0.0
        floor = max(least, first.spread, second.spread, _moved(before, after), luck)
    if fault:
        return ComparedCase(name, first, second, ratio, floor, NOT_JUDGED, fault)
    effect = ratio.median - 1
    if ratio.low <= 1 <= ratio.high or abs(effect) <= floor:
        is_luck = floor == _LUCK_OF_PLACE and abs(effect) > least
        return ComparedCase(name, first, second, ratio, floor, SAME, _NO_LESS if is_luck else "")
    return ComparedCase(name, first, second, ratio, floor, SLOWER if effect > 0 else FASTER)


def _fault(result: Result, which: str) -> str | None:
    """Why a result is not to be compared."""
    if result.status is not Status.OK:
        return f"{which}: {result.status.value}"
    disturbed = verdict.contended(result)
    return f"{which}: {disturbed}" if disturbed else None


def _moved(before: Result, after: Result) -> float:
    """How far the machine's own peak, or what a copy in memory moves, was another one in the other run, as a share."""
    peaks = [max(each.work.peak_flops_per_second.values(), default=0.0) for each in (before, after)]
    copies = [max(each.work.copy_bytes_per_second, default=0.0) for each in (before, after)]
    return max((max(pair) / min(pair) - 1 for pair in (peaks, copies) if all(pair)), default=0.0)


def _unlike_machines(before: Run, after: Run) -> list[str]:
    """What of the machines differs, in words."""
    found = []
    for key in ("cpu", "cores", "cpu_quota", "gpus", "nvidia_driver"):
        one, two = before.machine.get(key), after.machine.get(key)
        if one != two:
            found.append(f"another machine: {key} {_shown(one)}, then {_shown(two)}")
    return found


def _unlike_software(before: Run, after: Run) -> list[str]:
    one, two = (_software(run.results) for run in (before, after))
    names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return [f"{name} {one.get(name, 'absent')}, then {two.get(name, 'absent')}" for name in names]


def _software(results: Sequence[Result]) -> dict[str, str]:
    return next((result.software for result in results if result.software), {})


def _shown(value: object) -> str:
    if isinstance(value, list):
        return (
            ", ".join(str(each.get("name", each)) if isinstance(each, dict) else str(each) for each in value) or "none"
        )
    return str(value)


def _both(one: Case, two: Case) -> str:
    return one.name if one == two else f"{one.name} / {two.name}"
