"""What a run of cases says of itself: whether its numbers can be believed. It judges no card."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.errors import BUDGET, Exit
from bench.core.result import Status, Trust
from bench.core.validation_records import Judgement, Verdict, VerdictState
from bench.gpu import specs
from bench.gpu.nvml import FAULT_REASONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.result import Host, Result, Tuning
    from bench.core.validation_records import GpuLoadStats

_ORDER = (VerdictState.FAIL, VerdictState.NOT_JUDGED, VerdictState.WARN)


def conclude(judgements: Sequence[Judgement]) -> Verdict:
    """All judgements in one word, and the reasons for it, the worst first.

    One failure fails the whole. Else what could not be judged leaves it open, whatever else there is to warn of: a
    verdict on the half of a host would be taken for one on all of it.
    """
    reasons = [
        " ".join(filter(None, (f"{each.device}: {each.said}.", each.advice)))
        for state in _ORDER
        for each in judgements
        if each.state is state
    ]
    there = {each.state for each in judgements}
    return Verdict(next((state for state in _ORDER if state in there), VerdictState.PASS), tuple(reasons))


CLEAN, CONTENDED = "clean", "contended"
# A clean run on 2 threads waits 0.4 % of the time for a core, one with a third busy process 30 % and more; it uses 98 %
# of both, a disturbed one 38 to 70 % (measured on a shared 2-core host).
_CLEAN_WAIT_SHARE = 0.05
_CLEAN_CPU_SHARE = 0.85
_CLEAN_PRESSURE_SHARE = 0.25
_CLEAN_STEAL_SHARE = 0.05
_CLEAN_THROTTLED_SHARE = 0.1
# A copy varies by a tenth from one asking to the next. On a shared 2-core virtual machine it went from 50 to 32 GB/s,
# and a UNet from 0.64 to 0.53 s, for minutes each: most likely its cores were moved, which a guest cannot see.
_SAME_MACHINE = 1.25
_STEADY = 0.05  # of so much the images of an undisturbed case differ, from the first third to the last


def trust(result: Result) -> Trust | None:
    """Whether a case's figures are its own; None where it has none."""
    if result.host is None or not result.samples:
        return None
    reasons = tuple(_disturbances(result, result.host))
    return Trust(CONTENDED if reasons else CLEAN, reasons)


def same_machine(one: Result, two: Result) -> bool:
    """Whether two cases were measured undisturbed, and a copy in memory was as fast beside both."""
    copies = [max(each.work.copy_bytes_per_second, default=1.0) for each in (one, two)]
    alike = max(copies) <= _SAME_MACHINE * min(copies) or min(copies) == 1.0
    return alike and contended(one) is None and contended(two) is None


def contended(result: Result) -> str | None:
    """Why a case's numbers are not its own, or None."""
    known = result.trust or trust(result)
    return ", ".join(known.reasons) if known is not None and known.state == CONTENDED else None


def crowded(host: Host, device: str) -> str | None:
    """What else the machine did while a device was measured, or None where it was alone."""
    return ", ".join(_crowds(host, device)) or None


def _disturbances(result: Result, host: Host) -> Iterator[str]:
    yield from _crowds(host, result.case.device)
    copies = result.work.copy_bytes_per_second
    is_other = bool(copies) and max(copies) > _SAME_MACHINE * min(copies)
    if is_other and stats.level_shift(result.samples) > _STEADY:  # a copy alone changes no image
        yield f"the machine itself changed: it copied {copies[0] / 1e9:.0f}, then {copies[-1] / 1e9:.0f} GB a second"
    if host.gpu is not None:
        yield from _gpu_disturbances(host.gpu)


def _crowds(host: Host, device: str) -> Iterator[str]:
    if host.steal_share is not None and host.steal_share > _CLEAN_STEAL_SHARE:
        yield f"the hypervisor took {host.steal_share:.0%} of the CPU time"
    if host.wait_share is not None:
        if host.wait_share > _CLEAN_WAIT_SHARE:
            yield f"its threads waited {host.wait_share:.0%} of the time for a core"
    elif device == "cpu" and host.cpu_share is not None and host.cpu_share < _CLEAN_CPU_SHARE:
        yield f"it had {host.cpu_share:.0%} of its {host.threads} threads"
    elif host.pressure_share is not None and host.pressure_share > _CLEAN_PRESSURE_SHARE:
        yield f"something waited {host.pressure_share:.0%} of the time for a core"


def _gpu_disturbances(gpu: GpuLoadStats) -> Iterator[str]:
    if gpu.others:
        yield f"{gpu.others} other process{'es' if gpu.others > 1 else ''} used the card"
    for name, share in gpu.throttled.items():
        if name in FAULT_REASONS and share > _CLEAN_THROTTLED_SHARE:
            yield f"the card was slowed down {share:.0%} of the time ({name})"


def ruled_out(found: Result) -> str | None:
    """Why a setting is not to be taken, however fast it is: it failed, or its numbers may be wrong."""
    if found.status is not Status.OK:
        return f"{found.status.value}: {found.cause}"
    numerics = found.numerics
    if numerics is not None and numerics.repeats is False:
        return "the same seed gave other numbers the second time"
    if (numerics is None or numerics.forward_error is None) and not found.case.is_reference:
        why = numerics.not_compared if numerics is not None else None
        return f"its numbers were not compared with fp32's: {why or 'there was no time'}"
    return None


def judge(results: Sequence[Result], suite: str = "") -> Verdict:
    """Judge a run of cases: noise is a warning, and only numbers that are known to be wrong fail it.

    fail: a case has wrong numbers. could not judge: no case was measured, or one that can run was not, but for a case
    that is not required and for which the budget left no time. warn: a figure is disturbed or doubted. `suite` is
    named in the command that measures a case again.
    """
    wrong = [result for result in results if is_wrong(result)]
    unmeasured = [result for result in results if is_unmeasured(result) and result not in wrong]
    disturbed = [(result, reason) for result in results if (reason := contended(result))]
    doubted = [(result, doubt) for result in results for doubt in _doubts(result)]
    reasons = [f"{result.case.name}: {result.cause}" for result in wrong]
    reasons += [f"{result.case.name}: {result.cause}. {_next(result, suite)}" for result in unmeasured]
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
    """Return whether a case's numbers are known to be wrong: NaN, infinity, or beyond the tolerance to fp32."""
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


def _next(result: Result, suite: str) -> str:
    """The command that measures one case again, with what it lacked."""
    case = result.case
    words = ["bench run", shlex.quote(suite) if suite else ""]
    words.append(f"--device {case.device} --model {case.model} --dtype {case.dtype}")
    if result.status is Status.OOM:
        words.append("--set batch=1" if case.batch > 1 else f"--set size={max(8, case.height // 16 * 8)}")
    elif result.status in {Status.TIMEOUT, Status.SKIPPED}:
        words.append("--budget 1800")
    return f"Next: {' '.join(word for word in words if word)}"


def judge_tuning(results: Sequence[Result], tuning: Tuning) -> Verdict:
    """As `judge`, of the default and the best alone: a setting that was ruled out says nothing of the machine."""
    found = judge([result for result in results if result.case in {tuning.default, tuning.best}])
    if tuning.doubt is None:
        return found
    return Verdict(VerdictState.NOT_JUDGED, (*found.reasons, tuning.doubt))


def _doubts(result: Result) -> Iterator[str]:
    """What is odd about a case that went well."""
    if result.status is not Status.OK:
        return
    if result.numerics is not None and result.numerics.repeats is False:
        yield "the same seed gave other numbers the second time"
    share = stats.peak_share(result)
    if share is not None and share > 1:
        yield f"it computes {share:.2f} times as fast as the probes' best: one of the two is wrong"
    of_sheet = spec_share(result)
    if of_sheet is not None and of_sheet > 1:
        yield f"it computes {of_sheet:.2f} times as fast as the card's sheet allows: one of the two is wrong"


def spec_share(result: Result) -> float | None:
    """The achieved rate over what the card's sheet says of the case's dtype; None where no sheet is known."""
    found = specs.find(result.software.get("device", ""))
    achieved = stats.achieved_flops(result)
    sheet = found[1].flops(result.case.dtype) if found is not None else None
    return achieved / sheet if achieved is not None and sheet is not None else None


def exit_of(verdict: Verdict, *, strict: bool = False) -> Exit:
    """The exit code that a verdict stands for; `strict`: a warning is no good one."""
    codes = {
        VerdictState.PASS: Exit.GOOD,
        VerdictState.WARN: Exit.NOT_JUDGED if strict else Exit.GOOD,
        VerdictState.FAIL: Exit.VERDICT_FAIL,
        VerdictState.NOT_JUDGED: Exit.NOT_JUDGED,
    }
    return codes[verdict.state]
