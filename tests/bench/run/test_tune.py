"""The search for the fastest setting, with a program in the worker's place that knows how fast each one is."""

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
from bench.run import request, session, store, suite_run, tune
from provision.core.errors import FirstlightError, SpecError
from tests.bench import processor_clocks
from tests.bench.conftest import environment
from tests.bench.fake_workers import AT_A_WORD, WORKER, Quiet
from tests.clock import Standing

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.run.tune import TuneResult

# fp16 has no kernels here, flash is fast and wrong, compiling costs too much, and two images at once are the best.
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
GO = """
if request["paced"]:
"""
GO += "".join(f"    {line}\n" for line in AT_A_WORD.strip().splitlines())
GO += """    sys.exit()
for _ in range(6): image()
end(*((Status.ERROR, "one evaluation is 0.3 from fp32's") if case.attention == "flash" else ()))
"""


def searched(folder: Path, patch: pytest.MonkeyPatch, program: str = "", *, go: str = GO, **changes: Any) -> TuneResult:
    """A search whose budget stands still; runner and pipes keep the real clock, to end a worker that hangs."""
    file = folder / "program.py"
    file.write_text(SPEEDS + program + go)
    patch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
    clock = Standing()
    patch.setattr(suite_run, "time", clock)
    patch.setattr(session, "time", clock)
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
    return tune.tune(replace(run_request, **changes), Quiet())


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TuneResult]:
    return partial(searched, tmp_path, monkeypatch)


@dataclass(frozen=True)
class Usual:
    """What a search without changes has found, and the folder in which it ran."""

    found: TuneResult
    folder: Path

    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "asked").read_text().splitlines()]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Usual:
    folder = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Usual(searched(folder, patch), folder)


def settings(found: TuneResult) -> list[str]:
    return ["/".join(each.case.settings) for each in found.tries]


def test_the_fastest_setting_whose_numbers_are_right_is_found_and_confirmed(usual: Usual) -> None:
    found = usual.found
    assert settings(found) == [
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
    assert found.best.case.settings == ["bf16", "batch 2", "channels_last"]
    assert found.tuning.gain is not None
    assert found.tuning.gain == pytest.approx(1 / (0.6 * 0.8 * 0.9))
    assert found.exit is Exit.GOOD
    assert len((usual.folder / "turns").read_text().split()) >= 12, "both were made again, in turns"
    assert "    dtype=torch.bfloat16," in found.tuning.code
    assert "torch.channels_last" in found.tuning.code


def test_the_search_is_kept_as_a_run_that_its_ruled_out_settings_do_not_fail(usual: Usual) -> None:
    kept = store.load("", usual.folder / "out")
    assert kept == usual.found.run
    assert kept.verdict.state.value == "pass"
    assert len({result.case for result in kept.results}) == len(kept.results) == 10
    assert {result.case.steps for result in kept.results} == {3}


def test_what_is_given_is_not_searched(search: Callable[..., TuneResult]) -> None:
    found = search(changes=("dtype=fp32", "batch=2", "attention=sdpa", "compile=eager"))
    assert settings(found) == ["fp32/batch 2", "fp32/batch 2/channels_last"]


def test_a_difference_that_noise_explains_changes_nothing(search: Callable[..., TuneResult]) -> None:
    found = search("seconds = 2.0 * case.batch * (1 - 0.02 * (case.dtype == 'bf16'))\n")
    assert found.tuning.gain is None
    assert found.best is found.default
    told = tables.tuning_table(found, color=False, width=100)
    assert "the default is the fastest setting: fp32, batch 1" in told


def test_a_model_that_cannot_be_measured_is_told(search: Callable[..., TuneResult]) -> None:
    with pytest.raises(FirstlightError, match=r"the default itself cannot be measured \(oom: too big") as told:
        search("end(Status.OOM, 'too big'); sys.exit()\n")
    assert told.value.exit == 1


def test_a_gain_on_a_disturbed_machine_is_measured_again_and_not_believed(search: Callable[..., TuneResult]) -> None:
    found = search("if request['paced']: host = replace(host, wait_share=0.4)\n")
    assert found.exit is Exit.NOT_JUDGED
    assert found.tuning.doubt == "its threads waited 40% of the time for a core"
    paced = [line for line in Path("asked").read_text().splitlines() if json.loads(line)["paced"]]
    assert len(paced) == 4
    assert "not reliable: its threads waited" in tables.tuning_table(found, color=False, width=100)


def test_a_best_that_dies_when_it_is_confirmed_is_told(search: Callable[..., TuneResult]) -> None:
    found = search("if request['paced'] and case.dtype == 'bf16': sys.exit(3)\n")
    assert found.tuning.gain is None
    assert found.exit is Exit.NOT_JUDGED
    assert (found.tuning.doubt or "").startswith("it could not be confirmed, error: the worker ended")


def test_a_batch_that_would_not_fit_the_memory_is_not_tried(search: Callable[..., TuneResult]) -> None:
    found = search("memory = Memory(host_run_peak_bytes=1 << 50)\n")
    assert {each.case.batch for each in found.tries} == {1}


def test_when_the_time_is_over_nothing_more_is_begun(search: Callable[..., TuneResult]) -> None:
    found = search(budget_seconds=14.0)
    late = [each.reason for each in found.tries if each.reason and "the budget leaves" in each.reason]
    assert late
    assert found.default.status is Status.OK


def test_a_cards_default_is_what_torch_does_by_itself() -> None:
    assert tune._default("stable-diffusion-v1-5", "cuda:0", {}).dtype == "tf32"
    assert tune._default("stable-diffusion-xl", "cuda:0", {"dtype": "fp16"}).dtype == "fp16"
    assert tune._default("ddpm-cat-256", "cpu", {"size": "32"}).height == 32


def test_what_was_found_as_json(usual: Usual) -> None:
    told = json.loads(json.dumps(tune.told(usual.found)))
    assert told["best"]["batch"] == 2
    assert told["gain"] == pytest.approx(2.3148, rel=1e-3)
    assert told["tries"][4] == {
        "case": told["tries"][4]["case"],
        "status": "skipped",
        "reason": "predicted 9 s a step",
        "image_seconds": None,
        "gain": None,
        "forward_error": None,
    } | {"forward_error": told["tries"][4]["forward_error"]}
    assert told["exit"] == 0


def test_the_table_has_the_fastest_first_and_what_was_ruled_out_last(usual: Usual) -> None:
    lines = tables.tuning_table(usual.found, color=False, width=160).splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert "bf16, batch 2, channels_last" in rows[0]
    assert "2.31" in rows[0]
    assert "attention-flash" in rows[-3], "it is fast, and wrong"
    assert "bf16, batch 1, channels_last, attention-flash: error: one evaluation is 0.3 from fp32's" in lines
    assert any("predicted 83 s to compile" in line for line in lines)


def test_a_best_that_is_slower_when_confirmed_is_not_recommended(search: Callable[..., TuneResult]) -> None:
    found = search("if request['paced'] and case.dtype == 'bf16': seconds = 3.0 * case.batch\n")
    assert found.tuning.best == found.tuning.default
    assert found.tuning.gain is None
    assert found.exit is Exit.GOOD
    assert found.tuning.notes == (
        "bf16, batch 2, channels_last seemed faster, and was not when both were made in turns",
    )
    assert "dtype=torch.float32" in found.tuning.code


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ("forward_error=None, not_compared='the budget is spent'", "not compared with fp32's: the budget is spent"),
        ("forward_error=0.001, repeats=False", "the same seed gave other numbers"),
    ],
)
def test_a_setting_whose_numbers_nobody_knows_is_ruled_out(
    search: Callable[..., TuneResult], numbers: str, why: str
) -> None:
    found = search(f"if case.dtype == 'bf16': numerics = Numerics(True, None, '0' * 64, {numbers})\n")
    assert found.tuning.best.dtype == "fp32"
    assert why in tables.tuning_table(found, color=False, width=160)


def test_what_was_compared_stands_beside_the_confirmed_times(usual: Usual) -> None:
    assert usual.found.best.numerics is not None
    assert usual.found.best.numerics.forward_error == 0.001


def test_on_a_disturbed_machine_the_default_is_not_called_the_fastest(search: Callable[..., TuneResult]) -> None:
    found = search("seconds = 2.0 * case.batch\nhost = replace(host, wait_share=0.4)\n")
    assert found.tuning.best == found.tuning.default
    assert found.exit is Exit.NOT_JUDGED
    assert found.run.verdict.state.value == "could not judge"


def test_a_second_pair_that_fails_does_not_replace_the_first(search: Callable[..., TuneResult]) -> None:
    program = "if request['paced']:\n    host = replace(host, wait_share=0.4)\n"
    program += "    if sum(json.loads(line)['paced'] for line in log.read_text().splitlines()) > 2: sys.exit(3)\n"
    found = search(program)
    assert found.tuning.gain == pytest.approx(1 / (0.6 * 0.8 * 0.9))
    assert found.tuning.doubt == "its threads waited 40% of the time for a core"


def test_a_confirmation_that_had_no_time_for_six_pairs_is_not_believed(search: Callable[..., TuneResult]) -> None:
    found = search("if request['paced']: seconds *= 40\n")
    assert found.tuning.gain is not None
    assert found.tuning.doubt is not None
    assert "pairs, and the median of fewer than 6 is not known" in found.tuning.doubt
    assert found.exit is Exit.NOT_JUDGED


def test_a_compiled_try_leaves_the_confirmation_time_to_compile(usual: Usual) -> None:
    asked = usual.asked()
    compiled = next(number for number, each in enumerate(asked) if each["case"]["compile"] != "eager")
    before, now = asked[compiled - 1]["limit_seconds"], asked[compiled]["limit_seconds"]
    assert now == pytest.approx(before / 2, abs=2.0)


def test_every_try_leaves_time_for_the_confirmation(usual: Usual) -> None:
    """Nine pairs of the default and the best, and the start of both."""
    second = usual.asked()[1]
    assert second["limit_seconds"] == pytest.approx(120 - 9 * (2.0 + 2.0), abs=3.0)


def test_a_batch_is_tried_where_it_is_predicted_to_fit(
    search: Callable[..., TuneResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    free = SimpleNamespace(available=1_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    found = search("memory = Memory(host_run_peak_bytes=400_000_000 * case.batch)\n")
    assert {each.case.batch for each in found.tries} == {1, 2}, "two take 0.8 GB, four would take 1.6"


def test_noise_that_is_larger_than_the_difference_changes_nothing(search: Callable[..., TuneResult]) -> None:
    noisy = GO.replace(
        "for _ in range(6): image()\n", "for n in range(6):\n    seconds = base * (1, 1.3)[n % 2]\n    image()\n"
    )
    found = search("base = 2.0 * case.batch * (0.92 if case.dtype == 'bf16' else 1.0)\n", go=noisy)
    assert found.tuning.best == found.tuning.default


SLOWER_ONCE = """\
work = Work(copy_bytes_per_second=(50e9,))
if not request['paced'] and case.layout == 'channels_last':
    seconds *= 1.35
"""


@pytest.mark.parametrize(
    "change", ["work = Work(copy_bytes_per_second=(32e9,))", "host = replace(host, steal_share=0.3)"]
)
def test_a_machine_that_changed_between_two_tries_hides_no_setting(
    search: Callable[..., TuneResult], change: str
) -> None:
    """While channels_last was tried it took a third longer: beside the best, in turns, it is the faster one."""
    program = SLOWER_ONCE + f"    {change}\n"
    assert search(program, budget_seconds=1200.0).best.case.settings == ["bf16", "batch 2", "channels_last"]


def test_a_machine_that_changed_and_shows_nothing_of_it_hides_a_setting(search: Callable[..., TuneResult]) -> None:
    """So it is the change that is seen which brings channels_last back."""
    assert search(SLOWER_ONCE, budget_seconds=1200.0).best.case.layout == "contiguous"


def test_a_setting_that_is_slower_beside_the_best_is_not_taken(search: Callable[..., TuneResult]) -> None:
    """It seemed faster while the machine was: in turns it is not."""
    program = "work = Work(copy_bytes_per_second=(32e9,))\nseconds = 2.0 * case.batch\n"
    program += "if not request['paced'] and case.dtype == 'bf16':\n"
    program += "    seconds /= 1.3\n    work = Work(copy_bytes_per_second=(50e9,))\n"
    found = search(program, budget_seconds=1200.0)
    assert found.tuning.best == found.tuning.default
    assert found.tuning.notes == (), "it was not even confirmed"


@pytest.mark.parametrize("axis", ["model", "device"])
def test_what_has_a_flag_of_its_own_is_no_setting(search: Callable[..., TuneResult], axis: str) -> None:
    with pytest.raises(SpecError, match=f"the {axis} is named by --{axis}"):
        search(changes=(f"{axis}=cpu",))


def test_a_model_must_be_known(search: Callable[..., TuneResult]) -> None:
    with pytest.raises(SpecError, match="unknown model"):
        search(models=("nothing",))


@pytest.mark.worker
def test_a_real_search_from_the_command_line(measured_python: Path, tmp_path: Path) -> None:
    argv = processor_clocks.command(
        "tune", "--model", "tiny-ddpm", "--device", "cpu", "--python", measured_python, "--root", tmp_path
    )
    given = ["--set", "attention=sdpa", "--set", "compile=eager", "--set", "batch=1", "--set", "layout=contiguous"]
    given += ["--set", "size=16", "--set", "steps=2"]
    done = subprocess.run(
        [*argv, *given, "--budget", "600", "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode in {0, 5}, done.stderr
    told = json.loads(done.stdout)
    assert [each["case"]["dtype"] for each in told["tries"]] == ["fp32", "bf16", "fp16"]
    assert told["default"]["dtype"] == "fp32"
    (best,) = [each for each in told["tries"] if each["case"] == told["best"]]
    assert best["status"] == "ok"
    assert best["forward_error"] is not None or best["case"]["dtype"] == "fp32"
    compile(told["code"], "recipe", "exec")
    assert (tmp_path / "results" / told["run"] / "run.json").exists()
