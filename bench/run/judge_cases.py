"""Judges a run of cases by the reliability of its own numbers; `bench.validate.judge` judges devices."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.errors import BUDGET
from bench.core.result import Status
from bench.core.verdict import Verdict, VerdictState
from bench.gpu import specs
from bench.run import disturbance

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.result import Result, Tuning


def exclusion_reason(result: Result) -> str | None:
    """Return the reason for which `bench tune` must not choose a setting, however fast it is; None if there is none.

    A setting is excluded if its measurement failed, or if its numbers may be wrong.
    """
    if result.status is not Status.OK:
        return f"{result.status.value}: {result.cause}"
    numerics = result.numerics
    if numerics is not None and numerics.repeats is False:
        return "a second image with the same seed has different numbers"
    if (numerics is None or numerics.forward_error is None) and not result.case.is_reference:
        reason = numerics.not_compared if numerics is not None else None
        return f"its numbers were not compared with fp32: {reason or 'there was no time'}"
    return None


def judge(results: Sequence[Result], suite: str = "") -> Verdict:
    """Return the verdict on a run of cases.

    fail: a case has wrong numbers. could not judge: no case was measured, or a case that can run on the device was not.
    (A case that is not required and had no time does not count.) warn: a figure is disturbed or doubtful. `suite`: the
    name of the suite, for the commands that measure a case again.
    """
    wrong = [result for result in results if is_wrong(result)]
    unmeasured = [result for result in results if is_unmeasured(result) and result not in wrong]
    disturbed = [(result, reason) for result in results if (reason := disturbance.of_case(result))]
    doubted = [(result, doubt) for result in results for doubt in _doubts(result)]
    reasons = [f"{result.case.name}: {result.cause}" for result in wrong]
    reasons += [f"{result.case.name}: {result.cause}. {_repeat_command(result, suite)}" for result in unmeasured]
    reasons += [f"{result.case.name}: disturbed, {reason}" for result, reason in disturbed]
    reasons += [f"{result.case.name}: {doubt}" for result, doubt in doubted]
    if wrong:
        return Verdict(VerdictState.FAIL, tuple(reasons))
    if not any(result.status is Status.OK for result in results):
        return Verdict(VerdictState.NOT_JUDGED, (*reasons, "no case was measured"))
    if unmeasured:
        return Verdict(VerdictState.NOT_JUDGED, tuple(reasons))
    return Verdict(VerdictState.WARN if disturbed or doubted else VerdictState.PASS, tuple(reasons))


def is_wrong(result: Result) -> bool:
    """Return whether a case has wrong numbers: NaN, infinity, or a distance from fp32 above the tolerance."""
    numerics = result.numerics
    if result.status is not Status.ERROR or numerics is None:
        return False
    error, tolerance = numerics.forward_error, numerics.tolerance
    return not numerics.finite or (tolerance is not None and (error is None or error > tolerance))


def is_unmeasured(result: Result) -> bool:
    """Return whether a case that can run has no figure: it crashed, hung, starved, or is required and had no time."""
    if result.status is not Status.OK and BUDGET in (result.reason or ""):
        return result.required
    return result.status not in {Status.OK, Status.SKIPPED}


def _repeat_command(result: Result, suite: str) -> str:
    """Return "Next: " and the command that measures a case again, with less memory or more time if it lacked that."""
    case = result.case
    words = ["bench run", shlex.quote(suite) if suite else ""]
    words.append(f"--device {case.device} --model {case.model} --dtype {case.dtype}")
    if result.status is Status.OOM:
        words.append("--set batch=1" if case.batch > 1 else f"--set size={max(8, case.height // 16 * 8)}")
    elif result.status in {Status.TIMEOUT, Status.SKIPPED}:
        words.append("--budget 1800")
    return f"Next: {' '.join(word for word in words if word)}"


def judge_tuning(results: Sequence[Result], tuning: Tuning) -> Verdict:
    """Return the verdict on a run of `bench tune`, by the cases with the default and the best setting only.

    Other settings may fail without a fault of the machine.
    """
    judged = judge([result for result in results if result.case in {tuning.default, tuning.best}])
    if tuning.doubt is None:
        return judged
    return Verdict(VerdictState.NOT_JUDGED, (*judged.reasons, tuning.doubt))


def _doubts(result: Result) -> Iterator[str]:
    """Yield a text for each doubtful figure of a case that was measured."""
    if result.status is not Status.OK:
        return
    if result.numerics is not None and result.numerics.repeats is False:
        yield "a second image with the same seed has different numbers"
    share = stats.peak_share(result)
    if share is not None and share > 1:
        yield f"it computes {share:.2f} times as fast as the fastest probe, so one of the two is wrong"
    of_sheet = spec_share(result)
    if of_sheet is not None and of_sheet > 1:
        yield f"it computes {of_sheet:.2f} times as fast as the card's data sheet allows, so one of the two is wrong"


def spec_share(result: Result) -> float | None:
    """Return the achieved FLOPs a second over those on the GPU's data sheet for the dtype.

    None without such a figure.
    """
    spec = specs.find(result.software.get("device", ""))
    achieved = stats.achieved_flops(result)
    sheet = spec[1].flops(result.case.dtype) if spec is not None else None
    return achieved / sheet if achieved is not None and sheet is not None else None
