"""Tests that nothing outside of the measured environment has an effect on a worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.launch import in_process, worker_process
from bench.worker.checks import interconnect

OWN_PYTHON = Path(sys.executable)


def test_worker_ignores_a_torch_py_outside_of_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The working folder and the folder on PYTHONPATH have such a file.
    for folder in (Path.cwd(), tmp_path / "path"):
        folder.mkdir(exist_ok=True)
        (folder / "torch.py").write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    assert "No module named 'torch'" in worker_process.query(OWN_PYTHON)["error"]


@pytest.mark.parametrize(
    "program",
    [worker_process._BOOTSTRAP, in_process._LOCATE_PACKAGES, interconnect._RANK],
    ids=["worker", "in-process", "rank"],
)
def test_modules_of_the_working_folder_do_not_run_in_a_child(tmp_path: Path, program: str) -> None:
    ran = tmp_path / "ran"
    for name in sys.stdlib_module_names:
        Path(f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})\n")
    argv: list[str | Path] = [OWN_PYTHON, "-c", program, worker_process._PACKAGE, "bench.worker"]
    subprocess.run(argv, check=False, capture_output=True, stdin=subprocess.DEVNULL)
    assert not ran.exists(), ran.read_text()


@pytest.mark.parametrize(
    "name",
    ["NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONHOME"],
)
def test_worker_does_not_inherit_variables_that_change_torch_or_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # These variables could turn tf32 into fp32, or make a warning in torch's import an error.
    monkeypatch.setenv(name, "0")
    file = tmp_path / "program.py"
    file.write_text(f"import json, os; print(json.dumps({{'query': {{'is': os.environ.get({name!r}, 'unset')}}}}))")
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
    assert worker_process.query(OWN_PYTHON) == {"is": "unset"}
