"""Tests the commands list, run and report in real processes; the tests marked `worker` use the real worker."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.core import axes
from bench.core.codec import dumps, loads
from bench.core.result import Run
from bench.report import tables
from bench.run import cases
from provision.host import facts
from tests.bench import processor_clocks
from tests.bench.conftest import a_run, command, environment
from tests.clock import GUARD_SECONDS
from tests.conftest import TEST_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

# Replaces the interpreter with torch: it answers each request of the command at once, with invented samples.
QUICK_PYTHON = """\
#!{python}
import json, sys
from pathlib import Path
from bench.core.codec import plain, record
from bench.core.result import Case, Host, Numerics, Result, Sample, Status

request = json.loads(sys.stdin.read())
if request == {{"query": True}}:
    answer = {{"query": {{"torch": "9.9+cpu", "cuda": None, "available": False, "devices": [], "mps": False}}}}
else:
    case = record(request["case"], Case, "case")
    samples = (Sample(2.0, (0.5,) * case.steps, 3.9),) * 3
    host = Host(threads=2, cpu_share=0.98, steal_share=0.0, load_average=1.0)
    answer = {{"result": plain(Result(case, Status.OK, weights="random", samples=samples, host=host))}}
print(json.dumps(answer))
"""


def bench(*words: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), capture_output=True, text=True, env=environment(**changes), check=False, timeout=GUARD_SECONDS
    )


@pytest.fixture
def quick(tmp_path: Path) -> list[object]:
    """Return the flags with which `bench run` uses QUICK_PYTHON as interpreter, and an empty root."""
    python = tmp_path / "quick-python"
    python.write_text(QUICK_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return ["--root", tmp_path / "root", "--python", python]


def test_list_prints_all_suites_models_dtypes_schedulers_and_devices() -> None:
    done = bench("list")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines if line[0] == "suite"] == cases.suites()
    assert [line[1] for line in lines if line[0] == "model"] == axes.models()
    for name in (*axes.DTYPES, *axes.SCHEDULERS, "cuda:N"):
        assert name in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "unknown", "listed"),
    [
        (["quikc"], "suite 'quikc'", cases.suites()),
        (["tiny", "--model", "dalle"], "model 'dalle'", axes.models()),
        (["tiny", "--dtype", "fp8"], "dtype 'fp8'", list(axes.DTYPES)),
        (["tiny", "--device", "gpu"], "device 'gpu'", ["auto", "cpu", "cuda", "cuda:N", "mps"]),
    ],
)
def test_unknown_suite_model_dtype_or_device_is_rejected_with_the_valid_names(
    quick: list[object], words: list[str], unknown: str, listed: list[str]
) -> None:
    done = bench("run", *words, *quick)
    assert done.returncode == 2
    assert f"error: unknown {unknown}" in done.stderr
    for name in listed:
        assert name in done.stderr
    assert done.stdout == ""
    assert not Path("results").exists()


def test_unknown_name_is_rejected_even_without_an_interpreter(tmp_path: Path) -> None:
    # The root has no interpreter, which would be exit code 4.
    for words in (["quikc"], ["tiny", "--model", "dalle"], ["tiny", "--device", "gpu"]):
        assert bench("run", *words, "--root", tmp_path).returncode == 2, words


@pytest.mark.parametrize("words", [["run", "--budget", "0"], ["run", "--budget", "soon"], ["run", "--fast"], ["walk"]])
def test_invalid_flag_value_flag_or_command_exits_with_2_without_a_traceback(words: list[str]) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_run_without_an_interpreter_exits_with_4_and_names_make_setup(tmp_path: Path) -> None:
    done = bench("run", "tiny", "--root", tmp_path / "root")
    assert done.returncode == 4
    assert f"there is no interpreter {tmp_path / 'root' / 'envs' / 'diffusers' / 'bin' / 'python'}." in done.stderr
    assert "make setup" in done.stderr
    done = bench("run", "tiny", "--python", tmp_path / "absent")
    assert done.returncode == 4
    assert f"there is no interpreter {tmp_path / 'absent'}." in done.stderr


def test_each_case_is_an_error_under_an_interpreter_without_torch(tmp_path: Path) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--root", tmp_path, "--python", sys.executable, "--json")
    assert done.returncode == 5, "no case has shown wrong numbers, which would be exit code 3"
    run = loads(done.stdout, Run)
    assert [result.status.value for result in run.results] == ["error", "error"]
    assert all("No module named" in (result.reason or "") for result in run.results)


def test_invalid_host_file_is_rejected_with_line_and_key(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text('rooot = "/data"\n')
    done = bench("run", "tiny", "--host", tmp_path / "host.toml")
    assert done.returncode == 2
    assert f"{tmp_path / 'host.toml'}, line 1, key rooot" in done.stderr


@pytest.mark.worker
@pytest.mark.skipif(facts.probe().nvidia_driver is not None, reason="this machine has an NVIDIA driver")
def test_run_on_cuda_without_a_driver_exits_with_4(measured_python: Path) -> None:
    done = bench("run", "tiny", "--device", "cuda", "--root", TEST_ROOT)
    assert done.returncode == 4
    assert "driver is loaded" in done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def whole_run(
    measured_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run `bench run tiny --json` with the real worker once; return its working folder and its output."""
    folder = tmp_path_factory.mktemp("whole")
    # The budget is so large that no case ends because of it.
    done = subprocess.run(
        processor_clocks.command("run", "tiny", "--device", "cpu", "--root", TEST_ROOT, "--budget", 600, "--json"),
        capture_output=True,
        text=True,
        env=environment(HOME=str(folder)),
        cwd=folder,
        check=False,
        timeout=GUARD_SECONDS,
    )
    return folder, done


WholeRun = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.mark.worker
def test_run_with_json_prints_one_json_object_and_stores_the_same_one(whole_run: WholeRun) -> None:
    folder, done = whole_run
    # Exit code 5: a busy machine can disturb the cases too much for a verdict.
    assert done.returncode in {0, 5}, done.stderr
    run = loads(done.stdout, Run)
    assert done.stdout.count("\n") == 1
    kept = folder / "results" / run.id / "run.json"
    assert json.loads(kept.read_text()) == json.loads(done.stdout)
    assert not list(folder.rglob("*.part"))


@pytest.mark.worker
def test_run_has_a_successful_result_with_a_picture_for_each_case(whole_run: WholeRun) -> None:
    folder, done = whole_run
    run = loads(done.stdout, Run)
    assert [result.case for result in run.results] == [
        cell.case for cell in cases.unroll(cases.load_suite("tiny"), "cpu")
    ]
    assert run.suite == "tiny"
    assert run.machine == facts.probe().to_dict() | {"gpus": run.machine["gpus"]}
    for result in run.results:
        assert result.status.value == "ok", result.reason
        assert len(result.samples) >= 3
        assert result.numerics is not None
        assert result.numerics.image is not None
        assert (folder / "results" / run.id / result.numerics.image).is_file()


@pytest.mark.worker
def test_progress_in_a_pipe_has_one_result_line_for_each_case(whole_run: WholeRun) -> None:
    _, done = whole_run
    assert "\x1b" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "s/step over" in line and "again]" not in line]
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]


@pytest.mark.worker
def test_run_writes_only_into_the_results_folder(whole_run: WholeRun) -> None:
    folder, _ = whole_run
    assert [path.name for path in folder.iterdir()] == ["results"]


@pytest.mark.worker
def test_report_finds_a_run_by_its_id_folder_or_file(whole_run: WholeRun) -> None:
    folder, done = whole_run
    run = loads(done.stdout, Run)
    kept = folder / "results" / run.id
    shown = [bench("report", name, "--out", folder / "results") for name in (run.id, "", kept, kept / "run.json")]
    assert {done.returncode for done in shown} == {0}
    assert len({done.stdout for done in shown}) == 1
    assert shown[0].stdout.startswith(f"# tiny: {run.id}\n")
    for result in run.results:
        assert f"| {tables.label(result.case)} |" in shown[0].stdout
    again = bench("report", run.id, "--out", folder / "results", "--json")
    assert again.stdout == done.stdout


def test_report_of_an_unknown_run_fails_and_lists_the_known_runs(tmp_path: Path) -> None:
    keep(tmp_path, a_run())
    done = bench("report", "nonsense", "--out", tmp_path)
    assert done.returncode == 1
    assert "there is no run 'nonsense'" in done.stderr
    assert a_run().id in done.stderr
    assert done.stdout == ""


def test_report_without_any_run_fails_and_names_make_bench(tmp_path: Path) -> None:
    done = bench("report", "--out", tmp_path)
    assert done.returncode == 1
    assert "make bench" in done.stderr


def test_report_without_a_name_shows_the_newest_run(tmp_path: Path) -> None:
    for day in ("01", "03", "02"):
        keep(tmp_path, a_run(id=f"202601{day}T000000Z-tiny-abcdef"))
    assert bench("report", "--out", tmp_path).stdout.startswith("# tiny: 20260103T000000Z-tiny-abcdef\n")


def test_report_against_another_run_compares_the_html_page_and_rejects_other_formats(tmp_path: Path) -> None:
    keep(tmp_path, a_run(id="20260101T000000Z-tiny-abcdef"))
    keep(tmp_path, a_run())
    page = bench("report", "--out", tmp_path, "--format", "html", "--against", "20260101T000000Z-tiny-abcdef")
    assert page.returncode == 0, page.stderr
    assert "<h2>Compared with 20260101T000000Z-tiny-abcdef</h2>" in page.stdout
    other = bench("report", "--out", tmp_path, "--against", "before")
    assert other.returncode == 2
    assert "To compare the figures: bench compare before" in other.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a run that this version can read"),
        ('{"schema": 1}', "missing"),
        ("\xff", "not a run that this version can read"),
        ("next schema", "schema 4"),
    ],
)
def test_report_of_an_unreadable_run_file_fails_with_file_and_reason(tmp_path: Path, text: str, message: str) -> None:
    file = keep(tmp_path, a_run(schema=4))
    if text != "next schema":
        file.write_text(text, encoding="latin-1")
    done = bench("report", file)
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def keep(out: Path, run: Run) -> Path:
    folder = out / run.id
    folder.mkdir()
    (folder / "run.json").write_text(dumps(run))
    return folder / "run.json"


def test_run_prints_a_table_with_the_verdict_and_the_stored_path(quick: list[object], tmp_path: Path) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--quiet", "--out", tmp_path / "kept", *quick, FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    (kept,) = (tmp_path / "kept").glob("*/run.json")
    assert f"kept: {kept}\n" in done.stdout
    for result in loads(kept.read_text(), Run).results:
        assert tables.label(result.case) in done.stdout
    assert "verdict: pass" in done.stdout


def test_run_measures_only_the_selected_models_and_dtypes(quick: list[object]) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--model", "tiny-sd", "--dtype", "bf16", "--json", *quick)
    assert [result.case.model for result in loads(done.stdout, Run).results] == ["tiny-sd"]


def test_run_measures_the_cases_of_a_suite_file(quick: list[object], tmp_path: Path) -> None:
    text = (cases.SUITES / "tiny.toml").read_text().replace('dtype = ["fp32"]', 'dtype = ["fp32", "fp16"]')
    (tmp_path / "mine.toml").write_text(text)
    done = bench("run", tmp_path / "mine.toml", "--device", "cpu", "--json", *quick)
    run = loads(done.stdout, Run)
    assert run.suite == "mine"
    assert [result.case.dtype for result in run.results] == ["fp32", "fp16", "bf16"]


def test_run_with_too_small_a_budget_skips_all_cases_and_exits_with_5(quick: list[object]) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--budget", "2", "--json", *quick)
    assert done.returncode == 5
    for result in loads(done.stdout, Run).results:
        assert result.status.value == "skipped"
        assert re.match(r"the budget leaves \d+ s, but starting a case takes 6 s", result.reason or "")


def test_output_folder_below_a_file_is_an_error_without_a_traceback(quick: list[object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = bench("run", "tiny", "--device", "cpu", "--out", tmp_path / "file" / "results", *quick)
    assert done.returncode in {1, 4}
    assert f"\nerror: {tmp_path / 'file' / 'results'}" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


def mounted(folder: Path, options: str) -> bool:
    """Mount a file system in memory at a folder, and return whether that was possible."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield the mount point of a file system of 64 KiB; skip the test without the right to mount it."""
    folder = tmp_path / "disk"
    if os.geteuid() != 0 or not mounted(folder, "size=64k"):
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_run_on_a_full_disk_exits_with_4_and_path_and_needed_bytes(quick: list[object], small_disk: Path) -> None:
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    done = bench("run", "tiny", "--device", "cpu", "--out", small_disk, *quick)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "no space left" in done.stderr
    assert "bytes are needed" in done.stderr
    assert str(small_disk) in done.stderr
    assert "--out" in done.stderr, "the flag that chooses another folder"


def test_run_on_a_read_only_disk_exits_with_4_and_path_and_needed_bytes(quick: list[object], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = bench("run", "tiny", "--device", "cpu", "--out", small_disk, *quick)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "read-only" in done.stderr
    assert "bytes are needed" in done.stderr
    assert str(small_disk) in done.stderr


def test_help_imports_no_slow_package() -> None:
    # Importing bench.cli is all that --help needs.
    code = "import sys, bench.cli; print({'torch', 'pydantic', 'rich', 'bench.runner'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "set()"


def test_progress_on_a_terminal_shows_each_case_twice_as_running_and_as_measured(
    quick: list[object], tmp_path: Path
) -> None:
    controller, device = pty.openpty()
    words = command("run", "tiny", "--device", "cpu", "--json", "--out", tmp_path / "kept", *quick)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=device, env=environment(TERM="xterm"))
    os.close(device)
    shown = b""
    with suppress(OSError):  # Linux raises EIO at the end of a terminal's output
        while block := os.read(controller, 4096):
            shown += block
    os.close(controller)
    assert process.wait() == 0
    first, second = (name.encode() for name in ("[1/2] tiny-ddpm", "[2/2] tiny-sd"))
    assert all(shown.count(name) >= 2 for name in (first, second)), "once while the case runs, and once with its result"
    assert "…\r\x1b[K  [1/2]".encode() in shown


def test_command_with_a_closed_stdout_exits_with_1_without_a_traceback() -> None:
    # `| head` closes the pipe before the command has written all lines.
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command("list"), stdout=writer, stderr=subprocess.PIPE, env=environment(), check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
