"""Tests the verdict of a run, which says whether its figures are reliable and its numbers right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.core.errors import Exit
from bench.core.result import Numerics, Result, Sample, Status
from bench.core.verdict import Verdict, VerdictState, exit_code
from bench.run import disturbance
from bench.run.judge_cases import judge, spec_share
from tests.bench.conftest import a_case, a_host, a_result

CLEAN = a_result()
DISTURBED = a_result(a_case(dtype="bf16"), host=a_host(cpu_share=0.5))
SKIPPED = a_result(a_case(dtype="fp16"), status=Status.SKIPPED, reason="no time", samples=(), host=None)
CRASHED = a_result(status=Status.ERROR, reason="RuntimeError: failure\nmore\nlines", samples=(), host=None)
LATE = a_result(status=Status.SKIPPED, reason="the budget leaves 2 s", samples=(), host=None)
TOO_SLOW = a_result(
    status=Status.TIMEOUT, reason="an image took 9 s: after 1 images the budget leaves no time for another"
)
NUMBERS = Numerics(finite=True, image=None, image_sha256="0" * 64)
NAN = a_result(status=Status.ERROR, reason="the image holds NaN", numerics=replace(NUMBERS, finite=False))
INACCURATE = a_result(status=Status.ERROR, reason="far", numerics=replace(NUMBERS, forward_error=0.9, tolerance=0.01))
NAN_DIFFERENCE = a_result(
    status=Status.ERROR, reason="nan", numerics=replace(NUMBERS, tolerance=0.01, not_compared="nan")
)
FAILED_LATER = a_result(
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
        ([CLEAN, FAILED_LATER], VerdictState.NOT_JUDGED),
        ([CLEAN, NAN], VerdictState.FAIL),
        ([CLEAN, INACCURATE], VerdictState.FAIL),
        ([CLEAN, NAN_DIFFERENCE], VerdictState.FAIL),
        ([DISTURBED, CRASHED, INACCURATE], VerdictState.FAIL),
    ],
    ids=[
        "all clean",
        "clean and skipped",
        "clean and no time",
        "one of three disturbed",
        "two of three disturbed",
        "one disturbed",
        "no time for a required case",
        "required case skipped",
        "clean and too slow",
        "required case too slow",
        "clean and a hung worker",
        "no results",
        "all skipped",
        "one crashed",
        "one failed after right numbers",
        "one with NaN",
        "one inaccurate",
        "one with a NaN difference",
        "disturbed, crashed and inaccurate",
    ],
)
def test_verdict_of_a_run_depends_on_its_results(results: list[Result], state: VerdictState) -> None:
    assert judge(results).state is state


@pytest.mark.parametrize(
    ("status", "command"),
    [
        (Status.ERROR, "--model tiny-ddpm --dtype fp32"),
        (Status.OOM, "--model tiny-ddpm --dtype fp32 --set size=8"),
        (Status.TIMEOUT, "--model tiny-ddpm --dtype fp32 --budget 1800"),
    ],
)
def test_case_that_failed_is_a_reason_of_the_verdict_with_the_command_that_repeats_it(
    status: Status, command: str
) -> None:
    failed = a_result(status=status, reason="why\nand its trace")
    judged = judge([CLEAN, failed], "my suites/one.toml")
    command = f"bench run 'my suites/one.toml' --device cpu {command}"
    assert judged == Verdict(VerdictState.NOT_JUDGED, (f"{failed.case.name}: why. Next: {command}",))


def test_disturbed_case_is_a_reason_of_the_verdict() -> None:
    assert judge([CLEAN, CLEAN, DISTURBED]).reasons == (
        f"{DISTURBED.case.name}: disturbed, it used only 50% of the time of its 2 threads",
    )


def test_verdict_of_a_run_without_a_measured_case_says_so() -> None:
    assert judge([SKIPPED]).reasons == ("no case was measured",)


def test_verdict_of_an_undisturbed_run_has_no_reasons() -> None:
    assert judge([CLEAN, SKIPPED]).reasons == ()


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
@pytest.mark.parametrize("cpu_share", [0.2, 0.84, 0.86, None])
def test_low_cpu_share_disturbs_only_cases_on_the_cpu(device: str, cpu_share: float | None) -> None:
    # While a GPU computes the host waits, so a low share is normal.
    result = a_result(a_case(device=device), host=a_host(cpu_share=cpu_share))
    low = device == "cpu" and cpu_share is not None and cpu_share < 0.85
    assert (disturbance.of_case(result) is not None) is low


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
@pytest.mark.parametrize(
    ("steal", "disturbed"), [(0.3, True), (0.06, True), (0.04, False), (0.0, False), (None, False)]
)
def test_steal_time_above_5_percent_disturbs_cases_on_every_device(
    device: str, steal: float | None, disturbed: bool
) -> None:
    reason = disturbance.of_case(a_result(a_case(device=device), host=a_host(steal_share=steal)))
    assert (reason is not None) is disturbed
    if reason is not None:
        assert f"{steal:.0%}" in reason


def test_case_without_samples_or_host_load_is_not_disturbed() -> None:
    assert disturbance.of_case(a_result(samples=(), host=a_host(cpu_share=0.1))) is None
    assert disturbance.of_case(a_result(host=None)) is None


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (VerdictState.PASS, Exit.GOOD),
        (VerdictState.WARN, Exit.GOOD),
        (VerdictState.FAIL, Exit.VERDICT_FAIL),
        (VerdictState.NOT_JUDGED, Exit.NOT_JUDGED),
    ],
)
def test_verdict_pass_and_warn_exit_with_0_and_fail_with_3_and_not_judged_with_5(
    state: VerdictState, code: Exit
) -> None:
    assert exit_code(Verdict(state)) is code


def test_verdict_warn_exits_with_5_if_strict() -> None:
    states = (VerdictState.PASS, VerdictState.WARN, VerdictState.FAIL, VerdictState.NOT_JUDGED)
    codes = [exit_code(Verdict(state), strict=True) for state in states]
    assert codes == [Exit.GOOD, Exit.NOT_JUDGED, Exit.VERDICT_FAIL, Exit.NOT_JUDGED]


def test_exit_codes_are_0_to_5_and_130() -> None:
    assert [int(code) for code in Exit] == [0, 1, 2, 3, 4, 5, 130]


def drifting(*seconds: float) -> tuple[Sample, ...]:
    return tuple(Sample(image_seconds, (image_seconds / 4,) * 4, image_seconds) for image_seconds in seconds)


def test_case_is_disturbed_if_copy_rate_and_image_time_both_changed() -> None:
    work = replace(a_result().work, copy_bytes_per_second=(50e9, 47e9, 32e9))
    slower = a_result(work=work, samples=drifting(2.0, 2.0, 2.0, 2.3, 2.3, 2.3))
    assert disturbance.of_case(slower) == "the speed of the machine changed: its copy rate went from 50 to 32 GB/s"
    assert disturbance.of_case(replace(slower, work=replace(work, copy_bytes_per_second=(50e9, 44e9)))) is None


def test_case_is_not_disturbed_if_the_copy_rate_changed_and_the_images_did_not() -> None:
    work = replace(a_result().work, copy_bytes_per_second=(50e9, 32e9))
    assert disturbance.of_case(a_result(work=work, samples=drifting(2.0, 2.05, 2.0, 2.02))) is None
    assert disturbance.of_case(a_result(work=work, samples=drifting(2.0, 2.0, 2.3))) is not None


def test_rate_above_the_data_sheet_of_the_card_is_a_warning() -> None:
    work = replace(a_result().work, flops_per_step=int(40e12))
    fast = a_result(a_case(dtype="fp16", device="cuda:0"), work=work, software={"device": "Tesla T4"})
    assert spec_share(fast) == pytest.approx(80 / 65)
    judged = judge([fast])
    assert judged.state is VerdictState.WARN
    assert "1.23 times as fast as the card's data sheet allows" in judged.reasons[0]
    assert spec_share(replace(fast, software={"device": "NVIDIA L40"})) is None
    assert spec_share(replace(fast, case=a_case(dtype="bf16"))) is None, "its sheet has no bf16"
