"""A whole run with a program in the worker's place: its pairs, its repeats, its budget, what it keeps."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.protocol import Request
from bench.core.result import Precision, Result, Run, Status
from bench.launch import in_process, worker_process
from bench.run import compare, dtype_support, request, session, store, suite_run
from provision.core.errors import BlockedError, SpecError
from tests.bench.conftest import a_case
from tests.bench.fake_workers import AT_A_WORD, PLAIN, WORKER, Quiet
from tests.clock import Standing
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable

PACED = "if case.dtype == 'bf16': seconds = 2.2\n" + AT_A_WORD


def wish_in(folder: Path, seconds: float) -> request.RunRequest:
    """The tiny suite on the CPU, all of it in one folder."""
    python = Path(sys.executable)
    return request.RunRequest(
        suite="tiny", device="cpu", python=python, root=str(folder), out=folder / "out", budget_seconds=seconds
    )


def suite_in(folder: Path, axes: str) -> str:
    """A suite of one block, by its path."""
    file = folder / "mine.toml"
    head = 'description = "d"\n[budget]\ncpu = 60\ncuda = 60\nmps = 60\n[[matrix]]\nmodel = "tiny-ddpm"\n'
    file.write_text(head + axes)
    return str(file)


@pytest.fixture
def progress() -> Quiet:
    return Quiet()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Quiet) -> Callable[..., Run]:
    def run_program(program: str, **changes: Any) -> Run:
        file = tmp_path / "program.py"
        file.write_text(WORKER + program)
        monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
        # Budgets stand still; runner and pipes keep the real clock, to end a worker that hangs.
        clock = Standing()
        monkeypatch.setattr(suite_run, "time", clock)
        monkeypatch.setattr(session, "time", clock)
        monkeypatch.setattr(worker_process, "_GRACE_SECONDS", 600.0)
        run_request = wish_in(tmp_path, 60.0)
        return suite_run.run(replace(run_request, **changes), progress)

    return run_program


def test_a_run_is_kept_with_what_repeats_it(run: Callable[..., Run], tmp_path: Path) -> None:
    done = run(PLAIN, command="bench run tiny")
    assert [result.status for result in done.results] == [Status.OK] * 2
    assert all(result.trust and result.trust.state == "clean" for result in done.results)
    assert store.load("", tmp_path / "out") == done
    assert done.command == "bench run tiny"


def test_one_evaluation_a_setting_is_held_against_fp32(run: Callable[..., Run], tmp_path: Path) -> None:
    suite = suite_in(tmp_path, 'dtype = ["fp32", "bf16"]\nscheduler = ["ddim", "ddpm"]\ncpu = {size = 16, steps = 4}\n')
    run(PLAIN, suite=suite)
    assert [each["compare"] for each in lines("asked")] == [True, False, True, False]


def test_what_a_dtype_reached_before_is_told_to_later_cases(run: Callable[..., Run], tmp_path: Path) -> None:
    """The best of it, not the last: a probe that was disturbed must not make a case too dear."""
    suite = suite_in(
        tmp_path, 'dtype = ["fp32", "bf16"]\nscheduler = ["ddim", "ddpm"]\ncpu = {size = 16, steps = [4, 5]}\n'
    )
    run("work = Work(probe_flops_per_second=8e9 / turn)\n" + PLAIN, suite=suite)
    assert [each["rate_known"] for each in lines("asked")] == [None, 8e9, 8e9, 8e9, None, 8e9 / 5, 8e9 / 5, 8e9 / 5]


def test_a_disturbed_case_is_measured_again_while_there_is_time(run: Callable[..., Run], progress: Quiet) -> None:
    done = run("if turn == 1: host = replace(host, wait_share=0.4)\n" + PLAIN)
    assert [result.attempts for result in done.results] == [2, 1]
    assert [result.trust.state for result in done.results if result.trust] == ["clean", "clean"]
    assert any("again" in line for line in progress.lines)


def test_a_case_that_stays_disturbed_keeps_its_first_figures(run: Callable[..., Run]) -> None:
    done = run("if case.model == 'tiny-ddpm': host = replace(host, wait_share=0.4); seconds = float(turn)\n" + PLAIN)
    first = done.results[0]
    assert (first.attempts, first.samples[0].seconds) == (2, 1.0)
    assert first.trust is not None
    assert first.trust.reasons == ("its threads waited 40% of the time for a core",)
    assert done.verdict.state.value == "warn"


TWO_KINDS = (
    'dtype = "fp32"\nscheduler = "ddpm"\ncpu = {size = 16, steps = 4}\n[[matrix]]\nrequired = true\n'
    'model = "tiny-ddpm"\ndtype = "fp32"\nscheduler = "ddim"\ncpu = {size = 16, steps = 4}\n'
)


def test_what_must_be_measured_comes_first_and_is_repeated_before_the_rest(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    disturbed = "if turn == 1: host = replace(host, wait_share=0.4)\n"
    done = run(disturbed + PLAIN, suite=suite_in(tmp_path, TWO_KINDS))
    assert [each["case"]["scheduler"] for each in lines("asked")] == ["ddim", "ddim", "ddpm"]
    assert [result.case.scheduler for result in done.results] == ["ddpm", "ddim"], "as the file has them"
    assert [(result.required, result.attempts) for result in done.results] == [(False, 1), (True, 2)]


def test_what_must_be_measured_may_take_more_than_the_budget(run: Callable[..., Run], tmp_path: Path) -> None:
    file = Path(suite_in(tmp_path, TWO_KINDS))
    file.write_text(file.read_text().replace("cpu = 60", "cpu = 1"))
    done = run(PLAIN, suite=str(file), budget_seconds=None)
    assert done.results[1].status is Status.OK
    first = lines("asked")[0]
    assert first["case"]["scheduler"] == "ddim"
    assert first["limit_seconds"] == 600.0
    assert first["checks_seconds"] <= 1.0


def test_one_of_a_pair_that_had_no_time_is_missed(run: Callable[..., Run], tmp_path: Path) -> None:
    done = run(PACED, suite=suite_in(tmp_path, TWO_KINDS), interleave=("dtype=fp32", "dtype=bf16"), budget_seconds=9.0)
    assert {result.status for result in done.results} == {Status.SKIPPED}
    assert [result.required for result in done.results] == [False, False, True, True]


def test_a_dtype_that_is_asked_for_is_not_said_to_be_left_out(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, progress: Quiet
) -> None:
    emulated = Precision("bf16", kernels=False, slower=90.0)
    monkeypatch.setattr(dtype_support, "ask", lambda *_, **__: dtype_support.DtypeSupport("cpu", (emulated,), lanes=8))
    done = run(PLAIN, suite="quick", changes=("dtype=bf16", "size=64"))
    assert {result.case.dtype for result in done.results} == {"bf16"}
    assert done.notes == tuple(line.strip() for line in progress.lines[:1])
    assert done.notes[0].startswith("sizes are chosen")


def test_a_budget_of_ones_own_holds_for_all(run: Callable[..., Run], tmp_path: Path) -> None:
    done = run(PLAIN, suite=suite_in(tmp_path, TWO_KINDS), budget_seconds=1.0)
    assert {result.status for result in done.results} == {Status.SKIPPED}
    assert done.verdict.state.value == "could not judge"


def test_pairs_are_made_in_turns_and_neither_comes_first(run: Callable[..., Run]) -> None:
    done = run(PACED, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",), budget_seconds=30.0)
    assert done.interleaved
    assert [result.case.dtype for result in done.results] == ["fp32", "bf16"]
    turns = Path("turns").read_text().split()
    assert turns[:8] == ["fp32", "bf16", "bf16", "fp32"] * 2
    assert len(turns) >= 12
    assert len(done.results[0].samples) == len(done.results[1].samples) == len(turns) // 2
    (row,) = compare.pairs(done).rows
    assert row.state == compare.SLOWER
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(1.1)


def test_cases_that_become_the_same_pair_are_measured_once(run: Callable[..., Run], tmp_path: Path) -> None:
    axes = 'dtype = ["fp32", "bf16"]\nscheduler = "ddim"\ncpu = {size = 16, steps = 2}\n'
    done = run(PACED, suite=suite_in(tmp_path, axes), interleave=("dtype=fp32", "dtype=bf16"))
    assert [result.case.dtype for result in done.results] == ["fp32", "bf16"]


def test_a_pair_of_which_one_dies_ends(run: Callable[..., Run]) -> None:
    program = "if case.dtype == 'bf16': sys.exit(3)\n" + PACED
    done = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",))
    assert [result.status for result in done.results] == [Status.SKIPPED, Status.ERROR]
    assert done.results[0].reason == "its partner could not be measured"
    assert "exit 3" in (done.results[1].reason or "")


def test_a_pair_whose_first_dies_does_not_start_the_second(run: Callable[..., Run]) -> None:
    program = "if case.dtype == 'fp32': sys.exit(3)\n" + PACED
    done = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",))
    assert [result.status for result in done.results] == [Status.ERROR, Status.SKIPPED]
    assert len(lines("asked")) == 1


def test_a_pair_ends_within_its_budget_and_too_few_pairs_are_not_judged(run: Callable[..., Run]) -> None:
    """Images that say that they take 30 s each: after the first pair there is no time for another."""
    program = "seconds = 30.0\n" + AT_A_WORD
    done = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",), budget_seconds=60.0)
    assert [len(result.samples) for result in done.results] == [1, 1]
    (row,) = compare.pairs(done).rows
    assert row.state == compare.NOT_JUDGED
    assert row.reason == "1 pairs, and the median of fewer than 6 is not known"


def test_a_noisy_pair_is_made_until_its_ratio_is_known(run: Callable[..., Run]) -> None:
    noisy = AT_A_WORD.replace(
        "    image()\n", "    seconds = 1.0 + 0.2 * (len(samples) % 2) * (case.dtype == 'bf16')\n    image()\n"
    )
    done = run(noisy, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",), budget_seconds=60.0)
    assert len(done.results[0].samples) > 6


def test_a_disturbed_pair_is_measured_again(run: Callable[..., Run]) -> None:
    program = "if turn <= 2: host = replace(host, wait_share=0.4)\n" + PACED
    done = run(program, interleave=("dtype=fp32", "dtype=bf16"), models=("tiny-ddpm",))
    assert [result.trust.state for result in done.results if result.trust] == ["clean", "clean"]
    assert len(lines("asked")) == 4


def test_what_every_pair_needs_to_start_is_kept_for_it(run: Callable[..., Run], tmp_path: Path) -> None:
    run(PACED, interleave=("dtype=fp32", "dtype=bf16"), budget_seconds=60.0)
    first = lines("asked")[0]
    assert first["limit_seconds"] == 60.0 - 2 * 6.0
    assert first["share_seconds"] == 30.0


def test_wrong_numbers_stay_wrong_when_a_case_was_disturbed(run: Callable[..., Run]) -> None:
    """It is not repeated without the comparison that it failed, nor is the next scheduler taken for right."""
    wrong = "for _ in range(6): image()\nend(Status.ERROR, 'one evaluation is 0.9 from fp32')\n"
    done = run(f"host = replace(host, wait_share=0.4)\n{wrong}")
    assert {result.status for result in done.results} == {Status.ERROR}
    assert {result.attempts for result in done.results} == {1}


def test_a_setting_that_failed_its_comparison_is_compared_again(run: Callable[..., Run], tmp_path: Path) -> None:
    suite = suite_in(tmp_path, 'dtype = "bf16"\nscheduler = ["ddim", "ddpm"]\ncpu = {size = 16, steps = 4}\n')
    run("for _ in range(6): image()\nend(Status.ERROR, 'one evaluation is 0.9 from fp32')\n", suite=suite)
    assert [each["compare"] for each in lines("asked")] == [True, True]


def test_what_was_compared_stands_when_only_the_times_are_new(run: Callable[..., Run]) -> None:
    done = run("if turn == 1: host = replace(host, wait_share=0.4)\n" + PLAIN)
    assert done.results[0].attempts == 2
    assert done.results[0].numerics is not None
    assert done.results[0].numerics.forward_error == 0.001


def test_two_batches_are_both_compared(run: Callable[..., Run], tmp_path: Path) -> None:
    suite = suite_in(tmp_path, 'dtype = "bf16"\nscheduler = "ddim"\ncpu = {size = 16, steps = 4, batch = [1, 2]}\n')
    run(PLAIN, suite=suite)
    assert [each["compare"] for each in lines("asked")] == [True, True]


@pytest.mark.parametrize("flag", ["find_max", "in_process"])
def test_what_a_pair_cannot_do_is_refused(run: Callable[..., Run], flag: str) -> None:
    with pytest.raises(SpecError, match=f"--{flag.replace('_', '-')} and --interleave"):
        run(PACED, interleave=("dtype=fp32", "dtype=bf16"), **{flag: True})


def test_a_pair_for_which_there_is_no_time_is_skipped(run: Callable[..., Run]) -> None:
    done = run(PACED, interleave=("dtype=fp32", "dtype=bf16"), budget_seconds=10.0)
    assert {result.status for result in done.results} == {Status.SKIPPED}
    assert "starting a pair takes 12 s" in (done.results[0].reason or "")


def test_another_interpreter_is_a_setting_of_a_pair(run: Callable[..., Run], tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho other >> {tmp_path}/started\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    done = run(PACED, interleave=(f"python={sys.executable}", f"python={other}"), models=("tiny-ddpm",))
    assert (tmp_path / "started").read_text() == "other\n"
    assert done.results[0].case == done.results[1].case


def test_every_case_can_be_changed(run: Callable[..., Run]) -> None:
    done = run(PLAIN, changes=("steps=7", "layout=channels_last"))
    assert {(result.case.steps, result.case.layout) for result in done.results} == {(7, "channels_last")}


def test_the_largest_that_fits_is_searched_where_it_is_asked_for(run: Callable[..., Run]) -> None:
    run(PLAIN, find_max=True)
    assert [each["find_max"] for each in lines("asked")] == [True, True]


@pytest.mark.parametrize(
    ("text", "found"),
    [("", {}), ("dtype=bf16", {"dtype": "bf16"}), (" dtype = bf16 , batch=2", {"dtype": "bf16", "batch": "2"})],
)
def test_settings_are_read(text: str, found: dict[str, str]) -> None:
    assert suite_run.settings(text) == found


@pytest.mark.parametrize("text", ["dtype", "=bf16", "dtype=", "dtype=fp32,batch"])
def test_what_is_no_setting_is_told(text: str) -> None:
    with pytest.raises(SpecError, match="write AXIS=VALUE"):
        suite_run.settings(text)


def test_in_this_process_only_an_interpreter_of_its_version_is_taken(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '2.7 /nowhere'\n")
    python.chmod(0o755)
    request = Request(a_case(), time.time(), 1.0, 1.0, {}, None)
    with pytest.raises(BlockedError, match=r"it is 2\.7, this is 3"):
        in_process.run_here(request, python)


@pytest.mark.worker
def test_in_this_process_a_case_is_measured_for_a_debugger(measured_python: Path) -> None:
    """In a process of its own all the same: torch stays out of the tests'."""
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from bench.launch import in_process; from bench.core.result import Case\n"
        "from bench.core.protocol import Request\n"
        "case = Case('tiny-ddpm', 'cpu', 'fp32', 'ddim', 2, 1, 16, 16)\n"
        "found = in_process.run_here(Request(case, time.time(), 0.0, 60.0, {}, None), Path(sys.argv[2]))\n"
        "print(found.status.value, len(found.samples) + len(found.warmups), found.reason)\n"
    )
    import subprocess

    argv = [sys.executable, "-c", script, str(CHECKOUT), str(measured_python)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout == "ok 3 None\n", done.stderr[-2000:]


def lines(name: str) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_the_outcome_of_a_case_in_a_few_words() -> None:
    assert session.outcome(Result(a_case(), Status.OOM, "no memory\nmore")) == "oom: no memory"
