"""Tests whole runs with a program in place of the worker: pairs of --interleave, repetitions, budget, stored run."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.result import Precision, Result, Run, Status
from bench.core.worker_requests import CaseRequest
from bench.launch import in_process, worker_process
from bench.run import case_outcome, compare, dtype_support, measure_cases, request, store, suite_run
from provision.core.errors import BlockedError, SpecError
from tests.bench.conftest import a_case
from tests.bench.fake_workers import PACED_IMAGES, PLAIN, WORKER, RecordedProgress
from tests.clock import Standing
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable

PACED_PAIR = "if case.dtype == 'bf16': seconds = 2.2\n" + PACED_IMAGES


def request_in(folder: Path, seconds: float) -> request.RunRequest:
    """Return a request for the tiny suite on the CPU with a budget in seconds, and with all files in one folder."""
    python = Path(sys.executable)
    return request.RunRequest(
        suite="tiny", device="cpu", python=python, root=str(folder), out=folder / "out", budget_seconds=seconds
    )


def suite_in(folder: Path, axes: str) -> str:
    """Write a suite file with one matrix block, whose lines are `axes`, and return its path."""
    file = folder / "mine.toml"
    head = 'description = "d"\n[budget]\ncpu = 60\ncuda = 60\nmps = 60\n[[matrix]]\nmodel = "tiny-ddpm"\n'
    file.write_text(head + axes)
    return str(file)


@pytest.fixture
def progress() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress) -> Callable[..., Run]:
    def run_program(program: str, **changes: Any) -> Run:
        file = tmp_path / "program.py"
        file.write_text(WORKER + program)
        monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
        # The clock of the budget stands still. The parent's wait for the worker keeps the real clock.
        clock = Standing()
        monkeypatch.setattr(suite_run, "time", clock)
        monkeypatch.setattr(measure_cases, "time", clock)
        monkeypatch.setattr(worker_process, "_GRACE_SECONDS", 600.0)
        run_request = request_in(tmp_path, 60.0)
        return suite_run.run(replace(run_request, **changes), progress)

    return run_program


def test_run_is_stored_with_its_command_and_clean_results(run: Callable[..., Run], tmp_path: Path) -> None:
    measured = run(PLAIN, command="bench run tiny")
    assert [result.status for result in measured.results] == [Status.OK] * 2
    assert all(result.trust and result.trust.state == "clean" for result in measured.results)
    assert store.load("", tmp_path / "out") == measured
    assert measured.command == "bench run tiny"


def test_only_the_first_case_of_each_setting_is_compared_with_fp32(run: Callable[..., Run], tmp_path: Path) -> None:
    suite = suite_in(tmp_path, 'dtype = ["fp32", "bf16"]\nscheduler = ["ddim", "ddpm"]\ncpu = {size = 16, steps = 4}\n')
    run(PLAIN, suite=suite)
    assert [logged["compare"] for logged in logged_requests()] == [True, False, True, False]


def test_highest_probe_rate_of_a_dtype_is_passed_to_later_cases(run: Callable[..., Run], tmp_path: Path) -> None:
    # Not the last rate: a disturbed probe must not make a later case seem too slow for the budget.
    suite = suite_in(
        tmp_path, 'dtype = ["fp32", "bf16"]\nscheduler = ["ddim", "ddpm"]\ncpu = {size = 16, steps = [4, 5]}\n'
    )
    run("work = Work(probe_flops_per_second=8e9 / turn)\n" + PLAIN, suite=suite)
    assert [logged["rate_known"] for logged in logged_requests()] == [
        None,
        8e9,
        8e9,
        8e9,
        None,
        8e9 / 5,
        8e9 / 5,
        8e9 / 5,
    ]


def test_disturbed_case_is_repeated_if_there_is_time(run: Callable[..., Run], progress: RecordedProgress) -> None:
    measured = run("if turn == 1: host = replace(host, wait_share=0.4)\n" + PLAIN)
    assert [result.attempts for result in measured.results] == [2, 1]
    assert [result.trust.state for result in measured.results if result.trust] == ["clean", "clean"]
    assert any("again" in line for line in progress.lines)


def test_case_that_stays_disturbed_keeps_its_first_samples(run: Callable[..., Run]) -> None:
    measured = run(
        "if case.model == 'tiny-ddpm': host = replace(host, wait_share=0.4); seconds = float(turn)\n" + PLAIN
    )
    first = measured.results[0]
    assert (first.attempts, first.samples[0].seconds) == (2, 1.0)
    assert first.trust is not None
    assert first.trust.reasons == ("its threads waited 40% of the time for a core",)
    assert measured.verdict.state.value == "warn"


TWO_KINDS = (
    'dtype = "fp32"\nscheduler = "ddpm"\ncpu = {size = 16, steps = 4}\n[[matrix]]\nrequired = true\n'
    'model = "tiny-ddpm"\ndtype = "fp32"\nscheduler = "ddim"\ncpu = {size = 16, steps = 4}\n'
)


def test_required_cases_come_first_and_are_repeated_before_the_others(run: Callable[..., Run], tmp_path: Path) -> None:
    disturbed = "if turn == 1: host = replace(host, wait_share=0.4)\n"
    measured = run(disturbed + PLAIN, suite=suite_in(tmp_path, TWO_KINDS))
    assert [logged["case"]["scheduler"] for logged in logged_requests()] == ["ddim", "ddim", "ddpm"]
    assert [result.case.scheduler for result in measured.results] == ["ddpm", "ddim"], "in the order of the file"
    assert [(result.required, result.attempts) for result in measured.results] == [(False, 1), (True, 2)]


def test_required_case_may_exceed_the_budget_of_its_suite(run: Callable[..., Run], tmp_path: Path) -> None:
    file = Path(suite_in(tmp_path, TWO_KINDS))
    file.write_text(file.read_text().replace("cpu = 60", "cpu = 1"))
    measured = run(PLAIN, suite=str(file), budget_seconds=None)
    assert measured.results[1].status is Status.OK
    first = logged_requests()[0]
    assert first["case"]["scheduler"] == "ddim"
    assert first["limit_seconds"] == 600.0
    assert first["checks_seconds"] <= 1.0


def test_results_of_a_skipped_pair_are_required_if_the_case_is(run: Callable[..., Run], tmp_path: Path) -> None:
    measured = run(
        PACED_PAIR, suite=suite_in(tmp_path, TWO_KINDS), interleave=("dtype=fp32", "dtype=bf16"), budget_seconds=9.0
    )
    assert {result.status for result in measured.results} == {Status.SKIPPED}
    assert [result.required for result in measured.results] == [False, False, True, True]


def test_dtype_that_the_user_names_is_not_reported_as_left_out(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> None:
    emulated = Precision("bf16", kernels=False, slower=90.0)
    monkeypatch.setattr(
        dtype_support, "probe", lambda *_, **__: dtype_support.DtypeSupport("cpu", (emulated,), lanes=8)
    )
    measured = run(PLAIN, suite="quick", changes=("dtype=bf16", "size=64"))
    assert {result.case.dtype for result in measured.results} == {"bf16"}
    assert measured.notes == tuple(line.strip() for line in progress.lines[:1])
    assert measured.notes[0].startswith("sizes are chosen")


def test_budget_flag_also_limits_required_cases(run: Callable[..., Run], tmp_path: Path) -> None:
    measured = run(PLAIN, suite=suite_in(tmp_path, TWO_KINDS), budget_seconds=1.0)
    assert {result.status for result in measured.results} == {Status.SKIPPED}
    assert measured.verdict.state.value == "could not judge"


def test_images_of_an_interleaved_pair_alternate_in_both_orders(run: Callable[..., Run]) -> None:
    measured = run(PACED_PAIR, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",), budget_seconds=30.0)
    assert measured.interleaved
    assert [result.case.dtype for result in measured.results] == ["fp32", "bf16"]
    turns = Path("turns").read_text().split()
    assert turns[:8] == ["fp32", "bf16", "bf16", "fp32"] * 2
    assert len(turns) >= 12
    assert len(measured.results[0].samples) == len(measured.results[1].samples) == len(turns) // 2
    (row,) = compare.compare_pairs(measured).rows
    assert row.state == compare.SLOWER
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(1.1)


def test_cases_that_interleave_turns_into_the_same_pair_are_measured_once(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    axes = 'dtype = ["fp32", "bf16"]\nscheduler = "ddim"\ncpu = {size = 16, steps = 2}\n'
    measured = run(PACED_PAIR, suite=suite_in(tmp_path, axes), interleave=("dtype=fp32", "dtype=bf16"))
    assert [result.case.dtype for result in measured.results] == ["fp32", "bf16"]


def test_interleaved_pair_ends_if_its_second_worker_dies(run: Callable[..., Run]) -> None:
    program = "if case.dtype == 'bf16': sys.exit(3)\n" + PACED_PAIR
    measured = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",))
    assert [result.status for result in measured.results] == [Status.SKIPPED, Status.ERROR]
    assert measured.results[0].reason == "its partner could not be measured"
    assert "exit code 3" in (measured.results[1].reason or "")


def test_second_worker_of_an_interleaved_pair_does_not_start_if_the_first_dies(run: Callable[..., Run]) -> None:
    program = "if case.dtype == 'fp32': sys.exit(3)\n" + PACED_PAIR
    measured = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",))
    assert [result.status for result in measured.results] == [Status.ERROR, Status.SKIPPED]
    assert len(logged_requests()) == 1


def test_interleaved_run_with_time_for_one_pair_of_images_ends_in_time_and_is_not_judged(
    run: Callable[..., Run],
) -> None:
    # The images report 30 s each, so there is time for one pair only.
    program = "seconds = 30.0\n" + PACED_IMAGES
    measured = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",), budget_seconds=60.0)
    assert [len(result.samples) for result in measured.results] == [1, 1]
    (row,) = compare.compare_pairs(measured).rows
    assert row.state == compare.NOT_JUDGED
    assert row.reason == "1 pairs are too few: the median needs at least 6"


def test_interleaved_pair_with_noise_makes_more_than_the_fewest_images(run: Callable[..., Run]) -> None:
    noisy = PACED_IMAGES.replace(
        "    image()\n", "    seconds = 1.0 + 0.2 * (len(samples) % 2) * (case.dtype == 'bf16')\n    image()\n"
    )
    measured = run(noisy, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",), budget_seconds=60.0)
    assert len(measured.results[0].samples) > 6


def test_disturbed_interleaved_pair_is_repeated(run: Callable[..., Run]) -> None:
    program = "if turn <= 2: host = replace(host, wait_share=0.4)\n" + PACED_PAIR
    measured = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",))
    assert [result.trust.state for result in measured.results if result.trust] == ["clean", "clean"]
    assert len(logged_requests()) == 4


def test_interleaved_pair_leaves_time_for_the_start_of_later_pairs(run: Callable[..., Run], tmp_path: Path) -> None:
    run(PACED_PAIR, interleave=("dtype=fp32", "dtype=bf16"), budget_seconds=60.0)
    first = logged_requests()[0]
    assert first["limit_seconds"] == 60.0 - 2 * 6.0
    assert first["share_seconds"] == 30.0


def test_disturbed_case_with_wrong_numbers_is_not_repeated(run: Callable[..., Run]) -> None:
    # A repetition makes no comparison with fp32. It would replace the failed result and seem correct.
    wrong = "for _ in range(6): image()\nend(Status.ERROR, 'one evaluation is 0.9 from fp32')\n"
    measured = run(f"host = replace(host, wait_share=0.4)\n{wrong}")
    assert {result.status for result in measured.results} == {Status.ERROR}
    assert {result.attempts for result in measured.results} == {1}


def test_setting_whose_comparison_with_fp32_failed_is_compared_again_in_the_next_case(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    suite = suite_in(tmp_path, 'dtype = "bf16"\nscheduler = ["ddim", "ddpm"]\ncpu = {size = 16, steps = 4}\n')
    run("for _ in range(6): image()\nend(Status.ERROR, 'one evaluation is 0.9 from fp32')\n", suite=suite)
    assert [logged["compare"] for logged in logged_requests()] == [True, True]


def test_repeated_case_keeps_the_comparison_with_fp32_of_its_first_attempt(run: Callable[..., Run]) -> None:
    measured = run("if turn == 1: host = replace(host, wait_share=0.4)\n" + PLAIN)
    assert measured.results[0].attempts == 2
    assert measured.results[0].numerics is not None
    assert measured.results[0].numerics.forward_error == 0.001


def test_each_batch_size_is_compared_with_fp32(run: Callable[..., Run], tmp_path: Path) -> None:
    suite = suite_in(tmp_path, 'dtype = "bf16"\nscheduler = "ddim"\ncpu = {size = 16, steps = 4, batch = [1, 2]}\n')
    run(PLAIN, suite=suite)
    assert [logged["compare"] for logged in logged_requests()] == [True, True]


@pytest.mark.parametrize("flag", ["find_max", "in_process"])
def test_interleave_with_find_max_or_in_process_is_rejected(run: Callable[..., Run], flag: str) -> None:
    with pytest.raises(SpecError, match=f"--{flag.replace('_', '-')} cannot be combined with --interleave"):
        run(PACED_PAIR, interleave=("dtype=fp32", "dtype=bf16"), **{flag: True})


def test_interleaved_pair_without_time_for_its_start_is_skipped(run: Callable[..., Run]) -> None:
    measured = run(PACED_PAIR, interleave=("dtype=fp32", "dtype=bf16"), budget_seconds=10.0)
    assert {result.status for result in measured.results} == {Status.SKIPPED}
    assert "starting a pair takes 12 s" in (measured.results[0].reason or "")


def test_interleaved_pair_can_differ_in_the_interpreter(run: Callable[..., Run], tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho other >> {tmp_path}/started\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    measured = run(PACED_PAIR, interleave=(f"python={sys.executable}", f"python={other}"), models=("tiny-ddpm",))
    assert (tmp_path / "started").read_text() == "other\n"
    assert measured.results[0].case == measured.results[1].case


def test_changes_of_the_request_apply_to_all_cases(run: Callable[..., Run]) -> None:
    measured = run(PLAIN, changes=("steps=7", "layout=channels_last"))
    assert {(result.case.steps, result.case.layout) for result in measured.results} == {(7, "channels_last")}


def test_find_max_of_the_request_is_passed_to_all_cases(run: Callable[..., Run]) -> None:
    run(PLAIN, find_max=True)
    assert [logged["find_max"] for logged in logged_requests()] == [True, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", {}), ("dtype=bf16", {"dtype": "bf16"}), (" dtype = bf16 , batch=2", {"dtype": "bf16", "batch": "2"})],
)
def test_settings_text_is_parsed_into_axes_and_values(text: str, expected: dict[str, str]) -> None:
    assert suite_run.settings(text) == expected


@pytest.mark.parametrize("text", ["dtype", "=bf16", "dtype=", "dtype=fp32,batch"])
def test_invalid_settings_text_is_rejected(text: str) -> None:
    with pytest.raises(SpecError, match="Write AXIS=VALUE"):
        suite_run.settings(text)


def test_in_process_with_an_interpreter_of_another_version_is_a_blocked_error(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '2.7 /nowhere'\n")
    python.chmod(0o755)
    request = CaseRequest(a_case(), time.time(), 1.0, 1.0, {}, None)
    with pytest.raises(BlockedError, match=r"interpreter is Python 2\.7, but this process is Python 3"):
        in_process.run_in_process(request, python)


@pytest.mark.worker
def test_in_process_measures_a_case_with_real_torch(measured_python: Path) -> None:
    # The test uses a child process, so that torch is not imported here.
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from bench.launch import in_process; from bench.core.result import Case\n"
        "from bench.worker import timing; timing._LEAST_SECONDS = 0.0\n"
        "from bench.core.worker_requests import CaseRequest\n"
        "case = Case('tiny-ddpm', 'cpu', 'fp32', 'ddim', 2, 1, 16, 16)\n"
        "result = in_process.run_in_process(CaseRequest(case, time.time(), 0.0, 60.0, {}, None), Path(sys.argv[2]))\n"
        "print(result.status.value, len(result.samples) + len(result.warmups), result.reason)\n"
    )
    import subprocess

    argv = [sys.executable, "-c", script, str(CHECKOUT), str(measured_python)]
    measured = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert measured.stdout == "ok 3 None\n", measured.stderr[-2000:]


def logged_requests() -> list[dict[str, Any]]:
    """Return the requests that the program has received, in order."""
    import json

    return [json.loads(line) for line in Path("requests").read_text().splitlines()]


def test_outcome_of_a_result_is_its_status_and_the_first_line_of_its_reason() -> None:
    assert case_outcome.text(Result(a_case(), Status.OOM, "no memory\nmore")) == "oom: no memory"


def test_run_uses_the_hub_of_the_home_beside_that_of_another_home(tmp_path: Path, home: Path) -> None:
    host = tmp_path / "host.toml"
    host.write_text("relocate = []\n")
    (tmp_path / "cache/huggingface/hub").mkdir(parents=True)
    root = suite_run.find_root(replace(request_in(tmp_path, 1), host=host))
    assert root.hub_in_use == home / ".cache/huggingface/hub"
    host.write_text('relocate = ["huggingface"]\n')
    root = suite_run.find_root(replace(request_in(tmp_path, 1), host=host))
    assert root.hub_in_use == tmp_path / "cache/huggingface/hub"
