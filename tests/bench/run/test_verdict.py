"""The verdict: whether the numbers of a run can be believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.core.errors import Exit
from bench.core.result import Numerics, Result, Sample, Status
from bench.core.validation_records import Verdict, VerdictState
from bench.run.verdict import contended, exit_of, judge, spec_share
from tests.bench.conftest import a_case, a_host, a_result

CLEAN = a_result()
DISTURBED = a_result(a_case(dtype="bf16"), host=a_host(cpu_share=0.5))
SKIPPED = a_result(a_case(dtype="fp16"), status=Status.SKIPPED, reason="no time", samples=(), host=None)
CRASHED = a_result(status=Status.ERROR, reason="RuntimeError: it broke\nmore\nlines", samples=(), host=None)
LATE = a_result(status=Status.SKIPPED, reason="the budget leaves 2 s", samples=(), host=None)
TOO_SLOW = a_result(status=Status.TIMEOUT, reason="an image took 9 s: after 1 the budget leaves no time for another")
NUMBERS = Numerics(finite=True, image=None, image_sha256="0" * 64)
NAN = a_result(status=Status.ERROR, reason="the image holds NaN", numerics=replace(NUMBERS, finite=False))
FAR = a_result(status=Status.ERROR, reason="far", numerics=replace(NUMBERS, forward_error=0.9, tolerance=0.01))
LOST = a_result(status=Status.ERROR, reason="nan", numerics=replace(NUMBERS, tolerance=0.01, not_compared="nan"))
BROKE_LATER = a_result(
    status=Status.ERROR, reason="KeyError", numerics=replace(NUMBERS, forward_error=0.001, tolerance=0.01)
)


@pytest.mark.parametrize(
    ("results", "state"),
    [
        ([CLEAN, CLEAN, CLEAN], VerdictState.PASS),
        ([CLEAN, SKIPPED], VerdictState.PASS),
        ([CLEAN, LATE], VerdictState.PASS),
        ([CLEAN, CLEAN, DISTURBED], VerdictState.WARN),
        ([CLEAN, DISTURBED, DISTURBED], VerdictState.WARN),
        ([DISTURBED], VerdictState.WARN),
        ([CLEAN, replace(LATE, required=True)], VerdictState.NOT_JUDGED),
        ([CLEAN, replace(SKIPPED, required=True)], VerdictState.PASS),
        ([CLEAN, TOO_SLOW], VerdictState.PASS),
        ([CLEAN, replace(TOO_SLOW, required=True)], VerdictState.NOT_JUDGED),
        ([CLEAN, replace(TOO_SLOW, reason="the worker hung and was killed at its deadline")], VerdictState.NOT_JUDGED),
        ([], VerdictState.NOT_JUDGED),
        ([SKIPPED, SKIPPED], VerdictState.NOT_JUDGED),
        ([CLEAN, CLEAN, CLEAN, CRASHED], VerdictState.NOT_JUDGED),
        ([CLEAN, BROKE_LATER], VerdictState.NOT_JUDGED),
        ([CLEAN, NAN], VerdictState.FAIL),
        ([CLEAN, FAR], VerdictState.FAIL),
        ([CLEAN, LOST], VerdictState.FAIL),
        ([DISTURBED, CRASHED, FAR], VerdictState.FAIL),
    ],
)
def test_the_verdict_of_a_run(results: list[Result], state: VerdictState) -> None:
    assert judge(results).state is state


@pytest.mark.parametrize(
    ("status", "command"),
    [
        (Status.ERROR, "--model tiny-ddpm --dtype fp32"),
        (Status.OOM, "--model tiny-ddpm --dtype fp32 --set size=8"),
        (Status.TIMEOUT, "--model tiny-ddpm --dtype fp32 --budget 1800"),
    ],
)
def test_a_case_without_a_figure_is_named_with_the_next_command_and_fails_nothing(status: Status, command: str) -> None:
    failed = a_result(status=status, reason="why\nand its trace")
    found = judge([CLEAN, failed], "my suites/one.toml")
    command = f"bench run 'my suites/one.toml' --device cpu {command}"
    assert found == Verdict(VerdictState.NOT_JUDGED, (f"{failed.case.name}: why. Next: {command}",))


def test_a_disturbed_case_is_named_with_its_figure() -> None:
    assert judge([CLEAN, CLEAN, DISTURBED]).reasons == (
        f"{DISTURBED.case.name}: disturbed, it had 50% of its 2 threads",
    )


def test_a_run_without_a_measurement_says_so() -> None:
    assert judge([SKIPPED]).reasons == ("no case was measured",)


def test_a_clean_run_has_nothing_to_say() -> None:
    assert judge([CLEAN, SKIPPED]).reasons == ()


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
@pytest.mark.parametrize("cpu_share", [0.2, 0.84, 0.86, None])
def test_the_cpu_share_counts_on_the_cpu_alone(device: str, cpu_share: float | None) -> None:
    # A card computes while the host waits: there a low share is as it should be.
    result = a_result(a_case(device=device), host=a_host(cpu_share=cpu_share))
    low = device == "cpu" and cpu_share is not None and cpu_share < 0.85
    assert (contended(result) is not None) is low


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
@pytest.mark.parametrize(
    ("steal", "disturbed"), [(0.3, True), (0.06, True), (0.04, False), (0.0, False), (None, False)]
)
def test_stolen_time_counts_everywhere(device: str, steal: float | None, disturbed: bool) -> None:
    found = contended(a_result(a_case(device=device), host=a_host(steal_share=steal)))
    assert (found is not None) is disturbed
    if found is not None:
        assert f"{steal:.0%}" in found


def test_what_was_not_measured_was_not_disturbed() -> None:
    assert contended(a_result(samples=(), host=a_host(cpu_share=0.1))) is None
    assert contended(a_result(host=None)) is None


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (VerdictState.PASS, Exit.GOOD),
        (VerdictState.WARN, Exit.GOOD),
        (VerdictState.FAIL, Exit.VERDICT_FAIL),
        (VerdictState.NOT_JUDGED, Exit.NOT_JUDGED),
    ],
)
def test_each_verdict_has_its_exit_code(state: VerdictState, code: Exit) -> None:
    assert exit_of(Verdict(state)) is code


def test_a_warning_is_not_good_enough_where_it_is_strict() -> None:
    states = (VerdictState.PASS, VerdictState.WARN, VerdictState.FAIL, VerdictState.NOT_JUDGED)
    codes = [exit_of(Verdict(state), strict=True) for state in states]
    assert codes == [Exit.GOOD, Exit.NOT_JUDGED, Exit.VERDICT_FAIL, Exit.NOT_JUDGED]


def test_the_exit_codes_are_those_that_the_documents_promise() -> None:
    assert [int(code) for code in Exit] == [0, 1, 2, 3, 4, 5, 130]


def drifting(*seconds: float) -> tuple[Sample, ...]:
    return tuple(Sample(each, (each / 4,) * 4, each) for each in seconds)


def test_a_machine_that_became_another_one_is_no_clean_one() -> None:
    work = replace(a_result().work, copy_bytes_per_second=(50e9, 47e9, 32e9))
    slower = a_result(work=work, samples=drifting(2.0, 2.0, 2.0, 2.3, 2.3, 2.3))
    assert contended(slower) == "the machine itself changed: it copied 50, then 32 GB a second"
    assert contended(replace(slower, work=replace(work, copy_bytes_per_second=(50e9, 44e9)))) is None


def test_copies_alone_do_not_disturb_images_that_stay_the_same() -> None:
    work = replace(a_result().work, copy_bytes_per_second=(50e9, 32e9))
    assert contended(a_result(work=work, samples=drifting(2.0, 2.05, 2.0, 2.02))) is None
    assert contended(a_result(work=work, samples=drifting(2.0, 2.0, 2.3))) is not None


def test_more_than_a_cards_sheet_allows_is_doubted() -> None:
    work = replace(a_result().work, flops_per_step=int(40e12))
    fast = a_result(a_case(dtype="fp16", device="cuda:0"), work=work, software={"device": "Tesla T4"})
    assert spec_share(fast) == pytest.approx(80 / 65)
    found = judge([fast])
    assert found.state is VerdictState.WARN
    assert "1.23 times as fast as the card's sheet allows" in found.reasons[0]
    assert spec_share(replace(fast, software={"device": "NVIDIA L40"})) is None
    assert spec_share(replace(fast, case=a_case(dtype="bf16"))) is None, "its sheet has no bf16"
