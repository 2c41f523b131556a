"""Tests the commands `validate`, with a real worker on this CPU, and `history`, as a user runs them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.cli import host
from bench.core.codec import loads
from bench.core.result import Run
from bench.core.verdict import Verdict, VerdictState
from bench.run import store
from bench.validate import examine_host, history
from tests.bench import processor_clocks
from tests.bench.conftest import a_run, command, environment
from tests.bench.validation_samples import validated

if TYPE_CHECKING:
    from pathlib import Path


def bench(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return started(folder, command(*words))


def started(folder: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=600, cwd=folder, env=environment())


@pytest.mark.worker
def test_validation_of_this_cpu_is_printed_and_stored_and_listed_in_the_history(
    measured_python: Path, tmp_path: Path
) -> None:
    root = ["--root", tmp_path / "root"]
    words = ["validate", "--device", "cpu", "--budget", "30", "--python", measured_python]
    done = started(tmp_path, processor_clocks.command(*words, *root))
    # Other tests may disturb the validation; then its verdict is "could not judge".
    assert done.returncode in {0, 5}, done.stderr + done.stdout
    shown = " ".join(done.stdout.split())
    for text in ("product fp32", "GFLOP/s", "matrix product bf16", "off by", "GB free, no error", "seconds a phase: "):
        assert text in shown, text
    (file,) = (tmp_path / "results").glob("*/run.json")
    run = loads(file.read_text(), Run)
    assert run.validation is not None
    assert run.verdict.state in {VerdictState.PASS, VerdictState.NOT_JUDGED}
    assert not [reading for reading in run.validation.readings if reading.fault is not None]
    assert set(run.validation.seconds) >= {"numerics", "product", "copy", "memory", "sustained", "threads", "loop"}
    assert run.validation.software["torch"]
    page = file.with_name("report.html").read_text()
    assert "<h2>Readings</h2>" in page
    assert "matrix product bf16" in page
    history_json = json.loads(bench(tmp_path, "history", "--json", *root).stdout)
    (line,) = history_json["lines"]
    assert (line["run"], line["device"]) == (run.id, "cpu")
    assert run.started[:10] in bench(tmp_path, "history", *root).stdout
    assert "nothing to report" in bench(tmp_path, "report", "--format", "ticket").stdout


@pytest.mark.parametrize(("state", "code"), [(VerdictState.PASS, 130), (VerdictState.FAIL, 3)])
def test_interrupted_soak_exits_with_130_unless_its_verdict_is_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: VerdictState, code: int
) -> None:
    run = replace(validated(2), verdict=Verdict(state))
    (tmp_path / run.id).mkdir()
    validation = examine_host.HostValidation(run, (run,), interrupted=True)
    monkeypatch.setattr(examine_host, "validate", lambda *_, **__: validation)
    with pytest.raises(SystemExit) as exit_info:
        host.validate(out=tmp_path, quiet=True)
    assert exit_info.value.code == code


def test_ticket_uses_the_newest_validation_while_compare_and_keep_use_the_newest_suite_run(tmp_path: Path) -> None:
    # Each command skips newer runs of the other kind.
    cases = [a_run(id=f"2026010{day}T030405Z-tiny-abcdef") for day in (1, 2, 4)]
    for run in (*cases[:2], validated(3), cases[2]):
        store.keep(run, tmp_path / "results" / run.id)
    assert "nothing to report" in bench(tmp_path, "report", "--format", "ticket").stdout
    store.keep(replace(validated(5), id="20260105T030405Z-validate-abcdef"), tmp_path / "results" / "last-validate-one")
    done = bench(tmp_path, "compare", cases[0].id)
    assert "no case in common" not in done.stdout, done.stderr
    assert "kept: " in bench(tmp_path, "keep", "before").stdout
    assert loads((tmp_path / "results" / "baselines" / "before.json").read_text(), Run) == cases[2]


def test_ticket_without_a_stored_validation_fails_and_names_bench_validate(tmp_path: Path) -> None:
    store.keep(a_run(), tmp_path / "results" / a_run().id)
    done = bench(tmp_path, "report", "--format", "ticket")
    assert done.returncode == 1
    assert "results has no validation. Run `bench validate` first." in done.stderr


def test_history_without_a_stored_validation_names_bench_validate(tmp_path: Path) -> None:
    done = bench(tmp_path, "history", "--root", tmp_path)
    assert done.returncode == 0
    assert "Run `bench validate` first" in done.stdout


def test_history_lists_validations_of_other_hosts_only_with_all(tmp_path: Path) -> None:
    kept = tmp_path / ".firstlight" / "validations"
    history.keep(validated(2), kept)
    (kept / "half.json").write_text("{")
    own = bench(tmp_path, "history", "--root", tmp_path).stdout
    assert "(1 of other hosts; --all shows them)" in own
    assert "skipped: " in own
    everything = bench(tmp_path, "history", "--all", "--root", tmp_path).stdout
    assert "2026-01-02" in everything
    assert "half.json" in everything


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--soak", "soon"], 2, "such as 30m"),
        (["--budget", "5"], 2, "--budget"),
        (["--device", "npu"], 2, "unknown device 'npu'"),
        (["--device", "cuda"], 4, "--device cpu"),
        (["--python", "/nowhere/python"], 4, "there is no interpreter"),
    ],
)
def test_validate_with_an_invalid_flag_ends_before_it_stores_anything(
    measured_python: Path, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    python = [] if "--python" in words else ["--python", measured_python]
    done = bench(tmp_path, "validate", "--root", tmp_path, *python, *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    assert not (tmp_path / "results").exists()
