"""The command as a person runs it: a real process, and a real worker where that is the point."""

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

# Stands in for an interpreter with torch, where a test is about the command alone: it answers at once.
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
    """The flags that measure with an interpreter that answers at once."""
    python = tmp_path / "quick-python"
    python.write_text(QUICK_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return ["--root", tmp_path / "root", "--python", python]


def test_list_names_everything_that_there_is() -> None:
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
def test_an_unknown_name_lists_what_there_is(
    quick: list[object], words: list[str], unknown: str, listed: list[str]
) -> None:
    done = bench("run", *words, *quick)
    assert done.returncode == 2
    assert f"error: unknown {unknown}" in done.stderr
    for name in listed:
        assert name in done.stderr
    assert done.stdout == ""
    assert not Path("results").exists()


def test_a_wrong_name_is_told_before_anything_is_started(tmp_path: Path) -> None:
    # The interpreter is not even there: that a name is wrong needs nobody to say so.
    for words in (["quikc"], ["tiny", "--model", "dalle"], ["tiny", "--device", "gpu"]):
        assert bench("run", *words, "--root", tmp_path).returncode == 2, words


@pytest.mark.parametrize("words", [["run", "--budget", "0"], ["run", "--budget", "soon"], ["run", "--fast"], ["walk"]])
def test_wrong_usage_is_told(words: list[str]) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_interpreter_that_is_not_there_blocks(tmp_path: Path) -> None:
    done = bench("run", "tiny", "--root", tmp_path / "root")
    assert done.returncode == 4
    assert f"{tmp_path / 'root' / 'envs' / 'diffusers' / 'bin' / 'python'} is not there" in done.stderr
    assert "make setup" in done.stderr
    done = bench("run", "tiny", "--python", tmp_path / "absent")
    assert done.returncode == 4
    assert f"{tmp_path / 'absent'} is not there" in done.stderr


def test_an_interpreter_without_torch_fails_case_by_case(tmp_path: Path) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--root", tmp_path, "--python", sys.executable, "--json")
    assert done.returncode == 5, "nothing is known to be wrong"
    run = loads(done.stdout, Run)
    assert [result.status.value for result in run.results] == ["error", "error"]
    assert all("No module named" in (result.reason or "") for result in run.results)


def test_a_host_file_that_is_wrong_is_told(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text('rooot = "/data"\n')
    done = bench("run", "tiny", "--host", tmp_path / "host.toml")
    assert done.returncode == 2
    assert f"{tmp_path / 'host.toml'}, line 1, key rooot" in done.stderr


@pytest.mark.worker
@pytest.mark.skipif(facts.probe().nvidia_driver is not None, reason="this machine has an NVIDIA driver")
def test_a_card_is_asked_for_where_there_is_none(measured_python: Path) -> None:
    done = bench("run", "tiny", "--device", "cuda", "--root", TEST_ROOT)
    assert done.returncode == 4
    assert "driver is loaded" in done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def whole_run(
    measured_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """`bench run tiny --json` through the real worker, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("whole")
    # A budget of which nothing is used up: a case ends when its median is known, or after so many images.
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
def test_a_run_prints_one_object_and_keeps_it(whole_run: WholeRun) -> None:
    folder, done = whole_run
    # A shared machine can be too disturbed for a verdict; nothing may fail.
    assert done.returncode in {0, 5}, done.stderr
    run = loads(done.stdout, Run)
    assert done.stdout.count("\n") == 1
    kept = folder / "results" / run.id / "run.json"
    assert json.loads(kept.read_text()) == json.loads(done.stdout)
    assert not list(folder.rglob("*.part"))


@pytest.mark.worker
def test_a_run_holds_every_case_of_its_suite(whole_run: WholeRun) -> None:
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
def test_progress_goes_to_stderr_line_by_line(whole_run: WholeRun) -> None:
    _, done = whole_run
    assert "\x1b" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "s/step over" in line and "again]" not in line]
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]


@pytest.mark.worker
def test_nothing_is_written_beside_the_results(whole_run: WholeRun) -> None:
    folder, _ = whole_run
    assert [path.name for path in folder.iterdir()] == ["results"]


@pytest.mark.worker
def test_a_kept_run_is_shown_by_its_id_folder_or_file(whole_run: WholeRun) -> None:
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


def test_a_run_that_is_not_kept_lists_those_that_are(tmp_path: Path) -> None:
    keep(tmp_path, a_run())
    done = bench("report", "nonsense", "--out", tmp_path)
    assert done.returncode == 1
    assert "no run 'nonsense'" in done.stderr
    assert a_run().id in done.stderr
    assert done.stdout == ""


def test_where_no_run_is_kept_the_next_command_is_named(tmp_path: Path) -> None:
    done = bench("report", "--out", tmp_path)
    assert done.returncode == 1
    assert "make bench" in done.stderr


def test_the_last_run_is_shown_where_none_is_named(tmp_path: Path) -> None:
    for day in ("01", "03", "02"):
        keep(tmp_path, a_run(id=f"202601{day}T000000Z-tiny-abcdef"))
    assert bench("report", "--out", tmp_path).stdout.startswith("# tiny: 20260103T000000Z-tiny-abcdef\n")


def test_a_page_is_drawn_against_a_kept_run(tmp_path: Path) -> None:
    keep(tmp_path, a_run(id="20260101T000000Z-tiny-abcdef"))
    keep(tmp_path, a_run())
    drawn = bench("report", "--out", tmp_path, "--format", "html", "--against", "20260101T000000Z-tiny-abcdef")
    assert drawn.returncode == 0, drawn.stderr
    assert "<h2>Compared with 20260101T000000Z-tiny-abcdef</h2>" in drawn.stdout
    other = bench("report", "--out", tmp_path, "--against", "before")
    assert other.returncode == 2
    assert "for the figures: bench compare before" in other.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not a run that this version can read"),
        ('{"schema": 1}', "missing"),
        ("\xff", "not a run that this version can read"),
        ("next schema", "schema 4"),
    ],
)
def test_a_kept_run_that_cannot_be_read_is_told(tmp_path: Path, text: str, told: str) -> None:
    file = keep(tmp_path, a_run(schema=4))
    if text != "next schema":
        file.write_text(text, encoding="latin-1")
    done = bench("report", file)
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def keep(out: Path, run: Run) -> Path:
    folder = out / run.id
    folder.mkdir()
    (folder / "run.json").write_text(dumps(run))
    return folder / "run.json"


def test_a_table_is_printed_and_the_place_named(quick: list[object], tmp_path: Path) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--quiet", "--out", tmp_path / "kept", *quick, FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    (kept,) = (tmp_path / "kept").glob("*/run.json")
    assert f"kept: {kept}\n" in done.stdout
    for result in loads(kept.read_text(), Run).results:
        assert tables.label(result.case) in done.stdout
    assert "verdict: pass" in done.stdout


def test_models_and_dtypes_can_be_picked(quick: list[object]) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--model", "tiny-sd", "--dtype", "bf16", "--json", *quick)
    assert [result.case.model for result in loads(done.stdout, Run).results] == ["tiny-sd"]


def test_a_suite_of_ones_own_is_run(quick: list[object], tmp_path: Path) -> None:
    text = (cases.SUITES / "tiny.toml").read_text().replace('dtype = ["fp32"]', 'dtype = ["fp32", "fp16"]')
    (tmp_path / "mine.toml").write_text(text)
    done = bench("run", tmp_path / "mine.toml", "--device", "cpu", "--json", *quick)
    run = loads(done.stdout, Run)
    assert run.suite == "mine"
    assert [result.case.dtype for result in run.results] == ["fp32", "fp16", "bf16"]


def test_a_budget_too_small_skips_with_its_reason(quick: list[object]) -> None:
    done = bench("run", "tiny", "--device", "cpu", "--budget", "2", "--json", *quick)
    assert done.returncode == 5
    for result in loads(done.stdout, Run).results:
        assert result.status.value == "skipped"
        assert re.match(r"the budget leaves \d+ s, and starting a case takes 6 s", result.reason or "")


def test_a_place_below_a_file_is_told_without_a_trace(quick: list[object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = bench("run", "tiny", "--device", "cpu", "--out", tmp_path / "file" / "results", *quick)
    assert done.returncode in {1, 4}
    assert f"\nerror: {tmp_path / 'file' / 'results'}" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB."""
    folder = tmp_path / "disk"
    if os.geteuid() != 0 or not mounted(folder, "size=64k"):
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_with_its_place_and_the_bytes(quick: list[object], small_disk: Path) -> None:
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    done = bench("run", "tiny", "--device", "cpu", "--out", small_disk, *quick)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "no space left" in done.stderr
    assert "bytes are needed" in done.stderr
    assert str(small_disk) in done.stderr
    assert "--out" in done.stderr, "the flag that names the place"


def test_a_read_only_disk_is_told_with_its_place_and_the_bytes(quick: list[object], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = bench("run", "tiny", "--device", "cpu", "--out", small_disk, *quick)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "read-only" in done.stderr
    assert "bytes are needed" in done.stderr
    assert str(small_disk) in done.stderr


def test_help_is_quick_to_import() -> None:
    # What takes long is torch and its like: none of it may be needed to say what there is.
    code = "import sys, bench.cli; print({'torch', 'pydantic', 'rich', 'bench.runner'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "set()"


def test_a_terminal_shows_the_case_at_work(quick: list[object], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = command("run", "tiny", "--device", "cpu", "--json", "--out", tmp_path / "kept", *quick)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs, env=environment(TERM="xterm"))
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # how a terminal ends
        while block := os.read(ours, 4096):
            shown += block
    os.close(ours)
    assert process.wait() == 0
    first, second = (name.encode() for name in ("[1/2] tiny-ddpm", "[2/2] tiny-sd"))
    assert all(shown.count(name) >= 2 for name in (first, second)), "at work, and with its figure"
    assert "…\r\x1b[K  [1/2]".encode() in shown


def test_a_reader_that_has_enough_is_no_fault() -> None:
    """`| head` closes the pipe: nothing more is said, and nothing comes up as a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command("list"), stdout=writer, stderr=subprocess.PIPE, env=environment(), check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
