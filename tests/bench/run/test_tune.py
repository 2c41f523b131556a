"""Tests `bench tune`, with a program in place of the worker that gives each setting a fixed speed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.errors import Exit
from bench.core.result import Status
from bench.launch import worker_process
from bench.report import tables
from bench.run import measure_cases, request, store, suite_run, tune
from provision.core.errors import FirstlightError, SpecError
from tests.bench import processor_clocks
from tests.bench.conftest import environment
from tests.bench.fake_workers import PACED_IMAGES, WORKER, RecordedProgress
from tests.clock import Standing

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.run.tune import TuneResult

# In this program, fp16 is skipped as too slow, flash is fast but wrong, compiling takes too long, and a batch of 2 is
# the fastest.
SPEEDS = (
    WORKER
    + """
seconds *= {"fp32": 1.0, "bf16": 0.6, "fp16": 0.1}[case.dtype] * {"contiguous": 1.0, "channels_last": 0.8}[case.layout]
seconds *= {"sdpa": 1.0, "flash": 0.5, "eager": 0.99}[case.attention]
seconds *= {1: 1.0, 2: 1.8, 4: 3.6}[case.batch]
if case.dtype == "fp16": end(Status.SKIPPED, "predicted 9 s a step"); sys.exit()
if case.compile != "eager": end(Status.SKIPPED, "predicted 83 s to compile"); sys.exit()
"""
)
IMAGES = """
if request["paced"]:
"""
IMAGES += "".join(f"    {line}\n" for line in PACED_IMAGES.strip().splitlines())
IMAGES += """    sys.exit()
for _ in range(6): image()
end(*((Status.ERROR, "one evaluation is 0.3 from fp32's") if case.attention == "flash" else ()))
"""


def run_search(
    folder: Path, patch: pytest.MonkeyPatch, program: str = "", *, images: str = IMAGES, **changes: Any
) -> TuneResult:
    """Run a search in a folder, with SPEEDS, `program` and `images` in place of the worker.

    The clock of the budget stands still; the parent's wait for the worker keeps the real clock. `changes` replace
    fields of the request.
    """
    file = folder / "program.py"
    file.write_text(SPEEDS + program + images)
    patch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
    clock = Standing()
    patch.setattr(suite_run, "time", clock)
    patch.setattr(measure_cases, "time", clock)
    patch.setattr(tune, "time", clock)
    patch.setattr(worker_process, "_GRACE_SECONDS", 600.0)
    run_request = request.RunRequest(
        suite="tune",
        device="cpu",
        models=("tiny-ddpm",),
        python=Path(sys.executable),
        root=str(folder),
        out=folder / "out",
        budget_seconds=120.0,
        changes=("steps=3",),
    )
    return tune.tune(replace(run_request, **changes), RecordedProgress())


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TuneResult]:
    return partial(run_search, tmp_path, monkeypatch)


@dataclass(frozen=True)
class DefaultSearch:
    """Holds the result of a search with the unchanged program, and its folder."""

    result: TuneResult
    folder: Path

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "requests").read_text().splitlines()]


@pytest.fixture(scope="module")
def default_search(tmp_path_factory: pytest.TempPathFactory) -> DefaultSearch:
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return DefaultSearch(run_search(folder, patch), folder)


def settings(result: TuneResult) -> list[str]:
    return ["/".join(attempt.case.settings) for attempt in result.tries]


def test_tune_finds_the_fastest_correct_setting_and_confirms_its_gain(default_search: DefaultSearch) -> None:
    tuned = default_search.result
    assert settings(tuned) == [
        "fp32/batch 1",
        "fp32/batch 1/channels_last",
        "bf16/batch 1",
        "bf16/batch 1/channels_last",
        "fp16/batch 1",
        "bf16/batch 1/channels_last/attention-flash",
        "bf16/batch 1/channels_last/attention-eager",
        "bf16/batch 1/channels_last/compiled",
        "bf16/batch 2/channels_last",
        "bf16/batch 4/channels_last",
    ]
    assert tuned.best.case.settings == ["bf16", "batch 2", "channels_last"]
    assert tuned.tuning.gain is not None
    assert tuned.tuning.gain == pytest.approx(1 / (0.6 * 0.8 * 0.9))
    assert tuned.exit is Exit.GOOD
    assert len((default_search.folder / "turns").read_text().split()) >= 12, (
        "default and best setting were measured again, in alternating images"
    )
    assert "    dtype=torch.bfloat16," in tuned.tuning.code
    assert "torch.channels_last" in tuned.tuning.code


def test_tune_stores_all_tried_settings_as_a_run_with_the_verdict_pass(default_search: DefaultSearch) -> None:
    kept = store.load("", default_search.folder / "out")
    assert kept == default_search.result.run
    assert kept.verdict.state.value == "pass"
    assert len({result.case for result in kept.results}) == len(kept.results) == 10
    assert {result.case.steps for result in kept.results} == {3}


def test_tune_does_not_vary_an_axis_that_the_user_has_set(search: Callable[..., TuneResult]) -> None:
    tuned = search(changes=("dtype=fp32", "batch=2", "attention=sdpa", "compile=eager"))
    assert settings(tuned) == ["fp32/batch 2", "fp32/batch 2/channels_last"]


def test_tune_keeps_the_default_if_no_setting_is_three_percent_faster(search: Callable[..., TuneResult]) -> None:
    tuned = search("seconds = 2.0 * case.batch * (1 - 0.02 * (case.dtype == 'bf16'))\n")
    assert tuned.tuning.gain is None
    assert tuned.best is tuned.default
    table = tables.tuning_table(tuned, color=False, width=100)
    assert "the default is the fastest setting: fp32, batch 1" in table


def test_tune_fails_if_the_default_setting_cannot_be_measured(search: Callable[..., TuneResult]) -> None:
    with pytest.raises(FirstlightError, match=r"the default setting cannot be measured \(oom: too big") as caught:
        search("end(Status.OOM, 'too big'); sys.exit()\n")
    assert caught.value.exit == 1


def test_tune_repeats_a_disturbed_confirmation_once_and_then_doubts_the_gain(search: Callable[..., TuneResult]) -> None:
    tuned = search("if request['paced']: host = replace(host, wait_share=0.4)\n")
    assert tuned.exit is Exit.NOT_JUDGED
    assert tuned.tuning.doubt == "its threads waited 40% of the time for a core"
    paced = [line for line in Path("requests").read_text().splitlines() if json.loads(line)["paced"]]
    assert len(paced) == 4
    assert "not reliable: its threads waited" in tables.tuning_table(tuned, color=False, width=100)


def test_tune_reports_no_gain_if_the_confirmation_fails(search: Callable[..., TuneResult]) -> None:
    tuned = search("if request['paced'] and case.dtype == 'bf16': sys.exit(3)\n")
    assert tuned.tuning.gain is None
    assert tuned.exit is Exit.NOT_JUDGED
    assert (tuned.tuning.doubt or "").startswith("the best setting could not be confirmed: error: the worker ended")


def test_tune_does_not_try_a_batch_that_does_not_fit_in_memory(search: Callable[..., TuneResult]) -> None:
    tuned = search("memory = Memory(host_run_peak_bytes=1 << 50)\n")
    assert {attempt.case.batch for attempt in tuned.tries} == {1}


def test_tune_skips_the_settings_for_which_the_budget_leaves_no_time(search: Callable[..., TuneResult]) -> None:
    tuned = search(budget_seconds=14.0)
    late = [attempt.reason for attempt in tuned.tries if attempt.reason and "the budget leaves" in attempt.reason]
    assert late
    assert tuned.default.status is Status.OK


def test_default_setting_on_a_gpu_is_tf32_unless_the_user_sets_the_dtype() -> None:
    assert tune._default("stable-diffusion-v1-5", "cuda:0", {}).dtype == "tf32"
    assert tune._default("stable-diffusion-xl", "cuda:0", {"dtype": "fp16"}).dtype == "fp16"
    assert tune._default("ddpm-cat-256", "cpu", {"size": "32"}).height == 32


def test_tune_json_has_the_best_setting_the_gain_and_all_tries(default_search: DefaultSearch) -> None:
    content = json.loads(json.dumps(tune.to_json(default_search.result)))
    assert content["best"]["batch"] == 2
    assert content["gain"] == pytest.approx(2.3148, rel=1e-3)
    assert content["tries"][4] == {
        "case": content["tries"][4]["case"],
        "status": "skipped",
        "reason": "predicted 9 s a step",
        "image_seconds": None,
        "gain": None,
        "forward_error": None,
    } | {"forward_error": content["tries"][4]["forward_error"]}
    assert content["exit"] == 0


def test_tune_table_lists_the_fastest_setting_first_and_wrong_ones_last(default_search: DefaultSearch) -> None:
    lines = tables.tuning_table(default_search.result, color=False, width=160).splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert "bf16, batch 2, channels_last" in rows[0]
    assert "2.31" in rows[0]
    assert "attention-flash" in rows[-3], "fast, but wrong"
    assert "bf16, batch 1, channels_last, attention-flash: error: one evaluation is 0.3 from fp32's" in lines
    assert any("predicted 83 s to compile" in line for line in lines)


def test_tune_recommends_the_default_if_the_best_setting_is_slower_in_the_confirmation(
    search: Callable[..., TuneResult],
) -> None:
    tuned = search("if request['paced'] and case.dtype == 'bf16': seconds = 3.0 * case.batch\n")
    assert tuned.tuning.best == tuned.tuning.default
    assert tuned.tuning.gain is None
    assert tuned.exit is Exit.GOOD
    assert tuned.tuning.notes == (
        "bf16, batch 2, channels_last looked faster, but measured in turns with the default it was not",
    )
    assert "dtype=torch.float32" in tuned.tuning.code


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ("forward_error=None, not_compared='the time is over'", "not compared with fp32: the time is over"),
        ("forward_error=0.001, repeats=False", "a second image with the same seed has different"),
    ],
)
def test_tune_excludes_a_setting_whose_numbers_were_not_verified(
    search: Callable[..., TuneResult], numbers: str, reason: str
) -> None:
    tuned = search(f"if case.dtype == 'bf16': numerics = Numerics(True, None, '0' * 64, {numbers})\n")
    assert tuned.tuning.best.dtype == "fp32"
    assert reason in tables.tuning_table(tuned, color=False, width=160)


def test_best_setting_keeps_its_comparison_with_fp32_after_the_confirmation(default_search: DefaultSearch) -> None:
    assert default_search.result.best.numerics is not None
    assert default_search.result.best.numerics.forward_error == 0.001


def test_tune_on_a_disturbed_machine_could_not_judge_that_the_default_is_fastest(
    search: Callable[..., TuneResult],
) -> None:
    tuned = search("seconds = 2.0 * case.batch\nhost = replace(host, wait_share=0.4)\n")
    assert tuned.tuning.best == tuned.tuning.default
    assert tuned.exit is Exit.NOT_JUDGED
    assert tuned.run.verdict.state.value == "could not judge"


def test_second_confirmation_that_fails_does_not_replace_the_first(search: Callable[..., TuneResult]) -> None:
    program = "if request['paced']:\n    host = replace(host, wait_share=0.4)\n"
    program += "    if sum(json.loads(line)['paced'] for line in log.read_text().splitlines()) > 2: sys.exit(3)\n"
    tuned = search(program)
    assert tuned.tuning.gain == pytest.approx(1 / (0.6 * 0.8 * 0.9))
    assert tuned.tuning.doubt == "its threads waited 40% of the time for a core"


def test_tune_doubts_a_gain_confirmed_with_fewer_than_six_pairs_of_images(search: Callable[..., TuneResult]) -> None:
    tuned = search("if request['paced']: seconds *= 40\n")
    assert tuned.tuning.gain is not None
    assert tuned.tuning.doubt is not None
    assert "pairs are too few: the median needs at least 6" in tuned.tuning.doubt
    assert tuned.exit is Exit.NOT_JUDGED


def test_try_of_a_compiled_setting_leaves_time_to_compile_again_for_the_confirmation(
    default_search: DefaultSearch,
) -> None:
    requests = default_search.requests()
    compiled = next(number for number, logged in enumerate(requests) if logged["case"]["compile"] != "eager")
    before, now = requests[compiled - 1]["limit_seconds"], requests[compiled]["limit_seconds"]
    assert now == pytest.approx(before / 2, abs=2.0)


def test_try_of_a_setting_leaves_time_for_the_confirmation(default_search: DefaultSearch) -> None:
    # The confirmation needs nine pairs of images of the default and the best setting, and the start of two workers.
    second = default_search.requests()[1]
    assert second["limit_seconds"] == pytest.approx(120 - 9 * (2.0 + 2.0), abs=3.0)


def test_tune_tries_a_larger_batch_only_if_its_predicted_memory_is_free(
    search: Callable[..., TuneResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    free = SimpleNamespace(available=1_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    tuned = search("memory = Memory(host_run_peak_bytes=400_000_000 * case.batch)\n")
    assert {attempt.case.batch for attempt in tuned.tries} == {1, 2}, "two take 0.8 GB, four would take 1.6"


def test_tune_keeps_the_default_if_the_gain_is_within_the_noise(search: Callable[..., TuneResult]) -> None:
    noisy = IMAGES.replace(
        "for _ in range(6): image()\n", "for n in range(6):\n    seconds = base * (1, 1.3)[n % 2]\n    image()\n"
    )
    tuned = search("base = 2.0 * case.batch * (0.92 if case.dtype == 'bf16' else 1.0)\n", images=noisy)
    assert tuned.tuning.best == tuned.tuning.default


SLOWER_ONCE = """\
work = Work(copy_bytes_per_second=(50e9,))
if not request['paced'] and case.layout == 'channels_last':
    seconds *= 1.35
"""


@pytest.mark.parametrize(
    "change", ["work = Work(copy_bytes_per_second=(32e9,))", "host = replace(host, steal_share=0.3)"]
)
def test_tune_measures_a_setting_again_if_the_machine_changed_during_its_try(
    search: Callable[..., TuneResult], change: str
) -> None:
    # The machine was slower during the try of channels_last. In alternation with the best setting, it is faster.
    program = SLOWER_ONCE + f"    {change}\n"
    assert search(program, budget_seconds=1200.0).best.case.settings == ["bf16", "batch 2", "channels_last"]


def test_tune_does_not_measure_a_setting_again_without_a_sign_that_the_machine_changed(
    search: Callable[..., TuneResult],
) -> None:
    # The test before differs only in the sign: another copy rate, or steal time.
    assert search(SLOWER_ONCE, budget_seconds=1200.0).best.case.layout == "contiguous"


def test_tune_rejects_a_setting_that_was_faster_only_because_the_machine_was(search: Callable[..., TuneResult]) -> None:
    # bf16 seems faster in its tries, during which the copy rate of the machine is higher too.
    program = "work = Work(copy_bytes_per_second=(32e9,))\nseconds = 2.0 * case.batch\n"
    program += "if not request['paced'] and case.dtype == 'bf16':\n"
    program += "    seconds /= 1.3\n    work = Work(copy_bytes_per_second=(50e9,))\n"
    tuned = search(program, budget_seconds=1200.0)
    assert tuned.tuning.best == tuned.tuning.default
    assert tuned.tuning.notes == (), "no confirmation was needed"


@pytest.mark.parametrize("axis", ["model", "device"])
def test_tune_rejects_set_for_an_axis_that_has_a_flag(search: Callable[..., TuneResult], axis: str) -> None:
    with pytest.raises(SpecError, match=f"Use --{axis} instead"):
        search(changes=(f"{axis}=cpu",))


def test_tune_rejects_an_unknown_model(search: Callable[..., TuneResult]) -> None:
    with pytest.raises(SpecError, match="unknown model"):
        search(models=("nothing",))


@pytest.mark.worker
def test_tune_command_finds_a_setting_with_the_real_worker(measured_python: Path, tmp_path: Path) -> None:
    argv = processor_clocks.command(
        "tune", "--model", "tiny-ddpm", "--device", "cpu", "--python", measured_python, "--root", tmp_path
    )
    fixed = ["--set", "attention=sdpa", "--set", "compile=eager", "--set", "batch=1", "--set", "layout=contiguous"]
    fixed += ["--set", "size=16", "--set", "steps=2"]
    done = subprocess.run(
        [*argv, *fixed, "--budget", "600", "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode in {0, 5}, done.stderr
    content = json.loads(done.stdout)
    assert [attempt["case"]["dtype"] for attempt in content["tries"]] == ["fp32", "bf16", "fp16"]
    assert content["default"]["dtype"] == "fp32"
    (best,) = [attempt for attempt in content["tries"] if attempt["case"] == content["best"]]
    assert best["status"] == "ok"
    assert best["forward_error"] is not None or best["case"]["dtype"] == "fp32"
    compile(content["code"], "recipe", "exec")
    assert (tmp_path / "results" / content["run"] / "run.json").exists()
