"""Compares two runs case by case, and reports a slowdown only if noise and disturbance do not explain it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.errors import Exit
from bench.core.result import Status
from bench.run import disturbance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.result import Case, Result, Run
    from bench.core.stats import Summary

SLOWER, FASTER, SAME, NOT_JUDGED = "slower", "faster", "same", "could not judge"
# A smaller change is not reported: five runs of one undisturbed case differed by less than this share.
MIN_EFFECT = 0.03
# Where the weights are in memory changes the speed of a process on a CPU for its whole life: two processes of one case
# took 0.30 and 0.34 s an image (measured on a shared 2-core AMD EPYC). The workers of a pair reallocate weights before
# each image, so this does not apply to pairs.
_PLACEMENT_EFFECT = 0.15
_PLACEMENT_NOTE = "two processes on a CPU can differ by this much. `bench run --interleave` finds smaller differences"


@dataclass(frozen=True)
class ComparedCase:
    """Hold the comparison of one case.

    `before`, `after`: seconds per image. `ratio`: after / before. `floor`: the smallest relative change that counts.
    `state`: SLOWER, FASTER, SAME or NOT_JUDGED. `reason`: why it could not be judged.
    """

    name: str
    before: Summary | None
    after: Summary | None
    ratio: Summary | None
    floor: float
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Hold the comparisons of all cases that two runs have in common.

    `differs`: a text for each library whose version differs, which may explain a change. `alone`: the names of cases
    that only one run has.
    """

    rows: tuple[ComparedCase, ...]
    differs: tuple[str, ...]
    alone: tuple[str, ...]

    @property
    def exit(self) -> Exit:
        """Return exit code 3 if a case became slower, 5 if no case could be judged, otherwise 0."""
        states = {row.state for row in self.rows}
        if SLOWER in states:
            return Exit.VERDICT_FAIL
        return Exit.NOT_JUDGED if not states - {NOT_JUDGED} else Exit.GOOD


def compare(before: Run, after: Run, *, least: float = MIN_EFFECT) -> Comparison:
    """Compare the cases that both runs have.

    A case is slower (or faster) only if all of this holds. The 95 % interval of the ratio of the medians excludes 1.
    The change exceeds both `least` and the noise. Both runs are from the same kind of machine, and neither was
    disturbed. The noise is the largest of these: each run's spread, the change of the machine's peak rates between the
    runs, and on a CPU the effect of memory placement.

    Args:
        before: the older run, or the baseline.
        after: the newer run.
        least: the smallest change that counts, as a share.
    """
    machine = "; ".join(_unlike_machines(before, after))
    earlier = {result.case: result for result in before.results}
    rows = [
        _row(result.case.name, earlier[result.case], result, machine, least, paired=False)
        for result in after.results
        if result.case in earlier
    ]
    both = {result.case for result in after.results} & set(earlier)
    alone = [case.name for case in (*earlier, *(result.case for result in after.results)) if case not in both]
    return Comparison(tuple(rows), tuple(_unlike_software(before, after)), tuple(alone))


def compare_pairs(run: Run, *, least: float = MIN_EFFECT) -> Comparison:
    """Compare the two cases of each pair in an interleaved run, image by image.

    Args:
        run: the run, whose results are pairs.
        least: the smallest change that counts, as a share.
    """
    rows = [
        _row(_both(one.case, two.case), one, two, "", least, paired=True)
        for one, two in zip(run.results[::2], run.results[1::2], strict=True)
    ]
    return Comparison(tuple(rows), (), ())


def paired_ratio(before: Result, after: Result) -> Summary:
    """Return the ratio of the seconds per image, after / before, of two cases whose images were made in turns.

    Warm-up images count too, since the two images of a pair are equally warm.

    Raises:
        ValueError: a case has no image.
    """
    one, two = (
        [image.seconds / result.case.batch for image in (*result.warmups, *result.samples)]
        for result in (before, after)
    )
    count = min(len(one), len(two))
    return stats.paired_ratio(one[:count], two[:count])


def too_few_pairs(ratio: Summary) -> str | None:
    """Return the reason for which the ratio is of too few pairs to be reliable; None if it is of enough pairs."""
    if ratio.count >= stats.FEWEST_PAIRS:
        return None
    return f"{ratio.count} pairs are too few: the median needs at least {stats.FEWEST_PAIRS}"


def _row(name: str, before: Result, after: Result, machine: str, least: float, *, paired: bool) -> ComparedCase:
    first, second = stats.image_seconds(before), stats.image_seconds(after)
    fault = machine or _fault(before, "before") or _fault(after, "after")
    if first is None or second is None:
        return ComparedCase(name, first, second, None, least, NOT_JUDGED, fault or "it has no samples")
    if paired:
        ratio = paired_ratio(before, after)
        floor = least
        fault = fault or too_few_pairs(ratio) or ""
    else:
        ratio = stats.ratio(
            *([sample.seconds / result.case.batch for sample in result.samples] for result in (before, after))
        )
        placement = _PLACEMENT_EFFECT if after.case.device == "cpu" else 0.0
        floor = max(least, first.spread, second.spread, _machine_change(before, after), placement)
    if fault:
        return ComparedCase(name, first, second, ratio, floor, NOT_JUDGED, fault)
    effect = ratio.median - 1
    if ratio.low <= 1 <= ratio.high or abs(effect) <= floor:
        is_placement = floor == _PLACEMENT_EFFECT and abs(effect) > least
        return ComparedCase(name, first, second, ratio, floor, SAME, _PLACEMENT_NOTE if is_placement else "")
    return ComparedCase(name, first, second, ratio, floor, SLOWER if effect > 0 else FASTER)


def _fault(result: Result, label: str) -> str | None:
    """Return the reason for which a result cannot be compared; None if it can. `label`: "before" or "after"."""
    if result.status is not Status.OK:
        return f"{label}: {result.status.value}"
    reason = disturbance.of_case(result)
    return f"{label}: {reason}" if reason else None


def _machine_change(before: Result, after: Result) -> float:
    """Return the relative change of the machine's peak FLOPs a second or of its copy rate, whichever is larger."""
    peaks = [max(result.work.peak_flops_per_second.values(), default=0.0) for result in (before, after)]
    copies = [max(result.work.copy_bytes_per_second, default=0.0) for result in (before, after)]
    return max((max(pair) / min(pair) - 1 for pair in (peaks, copies) if all(pair)), default=0.0)


def _unlike_machines(before: Run, after: Run) -> list[str]:
    """Return a text for each difference between the machines of two runs."""
    differences = []
    for key in ("cpu", "cores", "cpu_quota", "gpus", "nvidia_driver"):
        one, two = before.machine.get(key), after.machine.get(key)
        if one != two:
            differences.append(f"the machines differ: {key} was {_text_of(one)}, now {_text_of(two)}")
    return differences


def _unlike_software(before: Run, after: Run) -> list[str]:
    one, two = (_software(run.results) for run in (before, after))
    names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return [f"{name} {one.get(name, 'absent')}, then {two.get(name, 'absent')}" for name in names]


def _software(results: Sequence[Result]) -> dict[str, str]:
    return next((result.software for result in results if result.software), {})


def _text_of(value: object) -> str:
    if isinstance(value, list):
        names = [str(item.get("name", item)) if isinstance(item, dict) else str(item) for item in value]
        return ", ".join(names) or "none"
    return str(value)


def _both(one: Case, two: Case) -> str:
    return one.name if one == two else f"{one.name} / {two.name}"
