"""Judges a run of cases by the reliability of its own numbers. It does not judge the device."""

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
    """Return one verdict for all judgements, with their reasons, the worst first.

    One failure fails the host. Otherwise one "could not judge" makes the verdict "could not judge", even if there are
    warnings: a verdict on a part of the host must not be taken for one on the whole host.
    """
    reasons = [
        " ".join(filter(None, (f"{judgement.device}: {judgement.said}.", judgement.advice)))
        for state in _ORDER
        for judgement in judgements
        if judgement.state is state
    ]
    states = {judgement.state for judgement in judgements}
    return Verdict(next((state for state in _ORDER if state in states), VerdictState.PASS), tuple(reasons))


CLEAN, CONTENDED = "clean", "contended"
# An undisturbed run on 2 threads waits 0.4 % of the time for a core and uses 98 % of both cores. With a third busy
# process it waits 30 % and more, and uses 38 to 70 % (measured on a shared 2-core host).
_CLEAN_WAIT_SHARE = 0.05
_CLEAN_CPU_SHARE = 0.85
_CLEAN_PRESSURE_SHARE = 0.25
_CLEAN_STEAL_SHARE = 0.05
_CLEAN_THROTTLED_SHARE = 0.1
# The copy rate varies by a tenth from one measurement to the next. On a shared 2-core virtual machine it went from 50
# to 32 GB/s, and a UNet from 0.64 to 0.53 s, for minutes each: most likely the hypervisor moved the virtual cores to
# other ones, which a guest cannot see.
_SAME_MACHINE_FACTOR = 1.25
_STEADY_SHARE = 0.05  # the images of an undisturbed case differ by less, from the first third to the last


def trust(result: Result) -> Trust | None:
    """Return whether a case's figures are undisturbed, with the reasons; None if it has no figures."""
    if result.host is None or not result.samples:
        return None
    reasons = tuple(_disturbances(result, result.host))
    return Trust(CONTENDED if reasons else CLEAN, reasons)


def same_machine(one: Result, two: Result) -> bool:
    """Return whether two cases were measured undisturbed, with the same copy rate in memory."""
    copies = [max(result.work.copy_bytes_per_second, default=1.0) for result in (one, two)]
    alike = max(copies) <= _SAME_MACHINE_FACTOR * min(copies) or min(copies) == 1.0
    return alike and disturbance(one) is None and disturbance(two) is None


def disturbance(result: Result) -> str | None:
    """Return why a case's numbers are disturbed; None if they are not."""
    judged = result.trust or trust(result)
    return ", ".join(judged.reasons) if judged is not None and judged.state == CONTENDED else None


def host_disturbance(host: Host, device: str) -> str | None:
    """Return what other processes of the host did while a device was measured; None if they did nothing."""
    return ", ".join(_host_disturbances(host, device)) or None


def _disturbances(result: Result, host: Host) -> Iterator[str]:
    yield from _host_disturbances(host, result.case.device)
    copies = result.work.copy_bytes_per_second
    is_changed = bool(copies) and max(copies) > _SAME_MACHINE_FACTOR * min(copies)
    if (
        is_changed and stats.level_shift(result.samples) > _STEADY_SHARE
    ):  # a change of only the copy rate does not matter
        first, last = (f"{rate / 1e9:.0f}" for rate in (copies[0], copies[-1]))
        yield f"the machine itself changed: its copy rate went from {first} to {last} GB/s"
    if host.gpu is not None:
        yield from _gpu_disturbances(host.gpu)


def _host_disturbances(host: Host, device: str) -> Iterator[str]:
    if host.steal_share is not None and host.steal_share > _CLEAN_STEAL_SHARE:
        yield f"the hypervisor took {host.steal_share:.0%} of the CPU time"
    if host.wait_share is not None:
        if host.wait_share > _CLEAN_WAIT_SHARE:
            yield f"its threads waited {host.wait_share:.0%} of the time for a core"
    elif device == "cpu" and host.cpu_share is not None and host.cpu_share < _CLEAN_CPU_SHARE:
        yield f"it used only {host.cpu_share:.0%} of the time of its {host.threads} threads"
    elif host.pressure_share is not None and host.pressure_share > _CLEAN_PRESSURE_SHARE:
        yield f"some process waited {host.pressure_share:.0%} of the time for a core"


def _gpu_disturbances(gpu: GpuLoadStats) -> Iterator[str]:
    if gpu.others:
        yield f"{gpu.others} other process{'es' if gpu.others > 1 else ''} used the card"
    for name, share in gpu.throttled.items():
        if name in FAULT_REASONS and share > _CLEAN_THROTTLED_SHARE:
            yield f"the card was throttled {share:.0%} of the time ({name})"


def exclusion_reason(result: Result) -> str | None:
    """Return why a setting is excluded, however fast it is; None if it is not.

    It is excluded if it failed, or if its numbers may be wrong.
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
    """Judge a run of cases: only numbers that are known to be wrong fail it, and noise is a warning.

    fail: a case has wrong numbers. could not judge: no case was measured, or a case that can run was not, unless it is
    not required and the budget left it no time. warn: a figure is disturbed or doubtful. `suite`: its name, for the
    commands that measure a case again.
    """
    wrong = [result for result in results if is_wrong(result)]
    unmeasured = [result for result in results if is_unmeasured(result) and result not in wrong]
    disturbed = [(result, reason) for result in results if (reason := disturbance(result))]
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


def _repeat_command(result: Result, suite: str) -> str:
    """Return the command that measures a case again, with more memory or time if that was missing."""
    case = result.case
    words = ["bench run", shlex.quote(suite) if suite else ""]
    words.append(f"--device {case.device} --model {case.model} --dtype {case.dtype}")
    if result.status is Status.OOM:
        words.append("--set batch=1" if case.batch > 1 else f"--set size={max(8, case.height // 16 * 8)}")
    elif result.status in {Status.TIMEOUT, Status.SKIPPED}:
        words.append("--budget 1800")
    return f"Next: {' '.join(word for word in words if word)}"


def judge_tuning(results: Sequence[Result], tuning: Tuning) -> Verdict:
    """Judge a search by its default and its best setting only: an excluded setting says nothing about the machine."""
    judged = judge([result for result in results if result.case in {tuning.default, tuning.best}])
    if tuning.doubt is None:
        return judged
    return Verdict(VerdictState.NOT_JUDGED, (*judged.reasons, tuning.doubt))


def _doubts(result: Result) -> Iterator[str]:
    """Yield what is doubtful about a case that succeeded."""
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
    """Return the achieved rate divided by the rate on the GPU's data sheet for the dtype; None without a data sheet."""
    spec = specs.find(result.software.get("device", ""))
    achieved = stats.achieved_flops(result)
    sheet = spec[1].flops(result.case.dtype) if spec is not None else None
    return achieved / sheet if achieved is not None and sheet is not None else None


def exit_of(verdict: Verdict, *, strict: bool = False) -> Exit:
    """Return the exit code of a verdict; with `strict` a warning is 5."""
    codes = {
        VerdictState.PASS: Exit.GOOD,
        VerdictState.WARN: Exit.NOT_JUDGED if strict else Exit.GOOD,
        VerdictState.FAIL: Exit.VERDICT_FAIL,
        VerdictState.NOT_JUDGED: Exit.NOT_JUDGED,
    }
    return codes[verdict.state]
