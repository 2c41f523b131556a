"""The commands that look at a host, as a person runs them: `validate` with a real worker on this CPU, and `history`."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.cli import host
from bench.core.codec import loads
from bench.core.result import Run
from bench.core.validation_records import Verdict, VerdictState
from bench.run import store
from bench.validate import history
from bench.validate import host as host_validation
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
def test_this_cpu_from_the_command_to_its_history(measured_python: Path, tmp_path: Path) -> None:
    root = ["--root", tmp_path / "root"]
    words = ["validate", "--device", "cpu", "--budget", "30", "--python", measured_python]
    done = started(tmp_path, processor_clocks.command(*words, *root))
    # Other tests may disturb it: then that is what it says.
    assert done.returncode in {0, 5}, done.stderr + done.stdout
    shown = " ".join(done.stdout.split())
    for said in ("product fp32", "GFLOP/s", "matrix product bf16", "off by", "GB free, no error", "seconds a phase: "):
        assert said in shown, said
    (file,) = (tmp_path / "results").glob("*/run.json")
    run = loads(file.read_text(), Run)
    assert run.validation is not None
    assert run.verdict.state in {VerdictState.PASS, VerdictState.NOT_JUDGED}
    assert not [each for each in run.validation.readings if each.fault is not None]
    assert set(run.validation.seconds) >= {"numerics", "product", "copy", "memory", "sustained", "threads", "loop"}
    assert run.validation.software["torch"]
    page = file.with_name("report.html").read_text()
    assert "<h2>Readings</h2>" in page
    assert "matrix product bf16" in page
    told = json.loads(bench(tmp_path, "history", "--json", *root).stdout)
    (line,) = told["lines"]
    assert (line["run"], line["device"]) == (run.id, "cpu")
    assert run.started[:10] in bench(tmp_path, "history", *root).stdout
    assert "nothing to report" in bench(tmp_path, "report", "--format", "ticket").stdout


@pytest.mark.parametrize(("state", "code"), [(VerdictState.PASS, 130), (VerdictState.FAIL, 3)])
def test_what_is_proven_stays_so_whenever_a_soak_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: VerdictState, code: int
) -> None:
    run = replace(validated(2), verdict=Verdict(state))
    (tmp_path / run.id).mkdir()
    found = host_validation.HostValidation(run, (run,), interrupted=True)
    monkeypatch.setattr(host_validation, "validate", lambda *_, **__: found)
    with pytest.raises(SystemExit) as ended:
        host.validate(out=tmp_path, quiet=True)
    assert ended.value.code == code


def test_the_last_run_is_the_last_of_its_kind(tmp_path: Path) -> None:
    """A ticket is of a validation, a comparison of cases, whatever came after them."""
    cases = [a_run(id=f"2026010{day}T030405Z-tiny-abcdef") for day in (1, 2, 4)]
    for each in (*cases[:2], validated(3), cases[2]):
        store.keep(each, tmp_path / "results" / each.id)
    assert "nothing to report" in bench(tmp_path, "report", "--format", "ticket").stdout
    store.keep(replace(validated(5), id="20260105T030405Z-validate-abcdef"), tmp_path / "results" / "last-validate-one")
    done = bench(tmp_path, "compare", cases[0].id)
    assert "no case in common" not in done.stdout, done.stderr
    assert "kept: " in bench(tmp_path, "keep", "before").stdout
    assert loads((tmp_path / "results" / "baselines" / "before.json").read_text(), Run) == cases[2]


def test_without_a_validation_there_is_no_ticket(tmp_path: Path) -> None:
    store.keep(a_run(), tmp_path / "results" / a_run().id)
    done = bench(tmp_path, "report", "--format", "ticket")
    assert done.returncode == 1
    assert "no validation is kept in results. Run `bench validate` first." in done.stderr


def test_without_a_validation_the_next_command_is_said(tmp_path: Path) -> None:
    done = bench(tmp_path, "history", "--root", tmp_path)
    assert done.returncode == 0
    assert "Run `bench validate` first" in done.stdout


def test_other_hosts_are_shown_where_all_are_asked_for(tmp_path: Path) -> None:
    kept = tmp_path / ".firstlight" / "validations"
    history.keep(validated(2), kept)
    (kept / "half.json").write_text("{")
    own = bench(tmp_path, "history", "--root", tmp_path).stdout
    assert "of other hosts 1 (--all)" in own
    assert "passed over: " in own
    everything = bench(tmp_path, "history", "--all", "--root", tmp_path).stdout
    assert "2026-01-02" in everything
    assert "half.json" in everything


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--soak", "soon"], 2, "such as 30m"),
        (["--budget", "5"], 2, "--budget"),
        (["--device", "npu"], 2, "unknown device 'npu'"),
        (["--device", "cuda"], 4, "--device cpu"),
        (["--python", "/nowhere/python"], 4, "is not there"),
    ],
)
def test_what_cannot_be_is_told_at_once(
    measured_python: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    python = [] if "--python" in words else ["--python", measured_python]
    done = bench(tmp_path, "validate", "--root", tmp_path, *python, *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stderr
    assert not (tmp_path / "results").exists()
