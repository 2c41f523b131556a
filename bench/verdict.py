"""What a run of cases says of itself: whether its numbers can be believed. It judges no card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.errors import Exit
from bench.result import Status, Verdict, VerdictState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.result import Result

# A clean run on 2 threads uses 98 % of both, a disturbed one 38 to 70 % (measured on a shared 2-core host).
_CLEAN_CPU_SHARE = 0.85
_CLEAN_STEAL_SHARE = 0.05


def contended(result: Result) -> str | None:
    """Why a case's numbers are not its own, or None."""
    if result.host is None or not result.samples:
        return None
    if result.host.steal_share is not None and result.host.steal_share > _CLEAN_STEAL_SHARE:
        return f"the hypervisor took {result.host.steal_share:.0%} of the CPU time"
    share = result.host.cpu_share
    if result.case.device == "cpu" and share is not None and share < _CLEAN_CPU_SHARE:
        return f"it had {share:.0%} of its {result.host.threads} threads"
    return None


def judge(results: Sequence[Result]) -> Verdict:
    """Fail when a case failed, could-not-judge when most were disturbed, warn when some were, else pass."""
    failed = [result for result in results if result.status not in {Status.OK, Status.SKIPPED}]
    disturbed = [(result, reason) for result in results if (reason := contended(result))]
    reasons = [f"{result.case.name}: {(result.reason or '').splitlines()[0]}" for result in failed if result.reason]
    reasons += [f"{result.case.name}: disturbed, {reason}" for result, reason in disturbed]
    measured = sum(result.status is Status.OK for result in results)
    if failed:
        return Verdict(VerdictState.FAIL, tuple(reasons))
    if measured == 0:
        return Verdict(VerdictState.NOT_JUDGED, (*reasons, "no case was measured"))
    if len(disturbed) * 2 > measured:
        return Verdict(VerdictState.NOT_JUDGED, tuple(reasons))
    return Verdict(VerdictState.WARN if disturbed else VerdictState.PASS, tuple(reasons))


def exit_of(verdict: Verdict) -> Exit:
    """The exit code that a verdict stands for."""
    codes = {
        VerdictState.PASS: Exit.GOOD,
        VerdictState.WARN: Exit.GOOD,
        VerdictState.FAIL: Exit.VERDICT_FAIL,
        VerdictState.NOT_JUDGED: Exit.NOT_JUDGED,
    }
    return codes[verdict.state]
