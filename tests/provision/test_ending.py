"""Tests the end of a command: one message, one exit code and, with --json, one object, whatever its streams do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import filelock
import pytest

from provision import ending
from provision.errors import BlockedError, Exit, FirstlightError, SpecError
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = f"hf_{'s' * 20}"


def run(program: str, *words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)} | (env or {})
    argv = [sys.executable, "-m", program, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, timeout=600)


@pytest.fixture
def flags(tmp_path: Path, envs: Path) -> list[object]:
    (tmp_path / "host.toml").write_text("models = []\nrelocate = []\n")
    return ["--root", tmp_path / "root", "--envs", envs, "--host", tmp_path / "host.toml"]


def object_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one object of a command that failed."""
    assert "Traceback" not in done.stdout
    whole = json.loads(done.stdout)
    assert list(whole) == ["schema", "command", "error", "exit"]
    assert list(whole["error"]) == ["kind", "message", "next"]
    assert whole["exit"] == done.returncode
    assert done.stderr, "the message stays on stderr"
    return dict(whole)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/data is not mounted (no marker). Mount it, then run `make repair`.", "make repair"),
        ("it is not mounted. Mount it and run `make repair`, or run `make setup`.", None),
        ("/x: no space left. Free some, or give another --root, then run again.", None),
        ("/x is ours no more. Look at it: ls -la /x; move it away.", None),
        ("unknown model 'x'; there is: a, b", ""),
        ("uv failed (exit 2):\nhint: Run `pip cache purge`.", ""),
        ("there is no run 7; `provision undo --list` shows them.", "provision undo --list"),
        ("it is too large. To build it: provision models pull --stand-in m", "provision models pull --stand-in m"),
    ],
)
def test_the_next_act_is_read_from_the_last_advice_of_the_message(message: str, told: str | None) -> None:
    sentence = message.partition(". ")[2].rstrip(".")
    assert ending.next_of(message) == ((sentence if told is None else told) or None)


def test_an_errors_own_word_for_kind_and_next_act_wins() -> None:
    fault = ending.fault_of(BlockedError("it is held. Wait.", kind="locked", next_act="provision setup --wait 60"))
    assert (fault.kind, fault.next, fault.exit) == ("locked", "provision setup --wait 60", Exit.BLOCKED)


def test_a_message_that_names_what_there_is_has_a_next_act_too() -> None:
    fault = ending.fault_of(SpecError("unknown device tpu; there is: auto, cpu, cuda."))
    assert (fault.kind, fault.next) == ("usage", ending.CORRECTED)
    assert ending.fault_of(BlockedError("it is held")).next is None
    assert ending.fault_of(SpecError("no")).kind == "usage"
    assert ending.fault_of(FirstlightError("no")).kind == "failed"
    assert ending.fault_of(OSError(28, "No space left on device", "/data/x")).kind == "no-space"


def test_every_advice_of_the_code_begins_with_a_known_word() -> None:
    """A sentence with a command in backquotes that comes last in an error is found as the next act."""
    for file in sorted(CHECKOUT.glob("provision/*.py")):
        for text in re.findall(r"Error\(\s*f?\"([^\"]*`[^\"]*)\"\s*\)", file.read_text(encoding="utf-8")):
            if re.search(r"[.:] [A-Z][^.]*`[^`]*`\.?$", text):
                assert ending.next_of(text), f"{file.name}: {text}"


@pytest.mark.parametrize(
    ("argv", "name", "is_json"),
    [
        (["env", "create", "--json"], "env create", True),
        (["setup", "--root", "x"], "setup", False),
        (["env", "run", "--", "python", "--json"], "env run", False),
        (["--json"], "", True),
        ([], "", False),
    ],
)
def test_the_command_is_named_by_its_words(argv: list[str], name: str, is_json: bool) -> None:
    assert ending.command_of(argv) == (name, is_json)


class TestOneObject:
    def test_a_wrong_flag(self, flags: list[object]) -> None:
        for words in (
            ["setup", "--nonsense", "--json"],
            ["env", "create", "--json", "--variant"],
            ["nonsense", "--json"],
        ):
            whole = object_of(run("provision", *words))
            assert (whole["error"]["kind"], whole["exit"]) == ("usage", 2)
        assert object_of(run("provision", "relocate", "--json"))["command"] == "relocate"

    def test_without_json_stdout_stays_empty(self) -> None:
        done = run("provision", "setup", "--nonsense")
        assert (done.returncode, done.stdout) == (2, "")

    @pytest.mark.parametrize(
        "words",
        [
            ["status"],
            ["mirrors", "list"],
            ["models", "show", "m"],
            ["models", "lock", "m"],
            ["env", "where"],
            ["undo"],
            ["gc"],
        ],
    )
    def test_a_file_that_a_person_wrote_is_wrong(self, tmp_path: Path, flags: list[object], words: list[str]) -> None:
        (tmp_path / "host.toml").write_text("nonsense = 1\n")
        whole = object_of(run("provision", *words, "--json", "--host", tmp_path / "host.toml"))
        assert (whole["command"], whole["exit"]) == (" ".join(words[:2] if words[1:] else words).replace(" m", ""), 2)
        assert "host.toml, line 1, key nonsense" in whole["error"]["message"]

    def test_another_run_holds_the_lock(self, tmp_path: Path, flags: list[object]) -> None:
        (tmp_path / "root/.firstlight").mkdir(parents=True)
        with filelock.FileLock(tmp_path / "root/.firstlight/lock"):
            whole = object_of(run("provision", "setup", *flags, "--json"))
        assert (whole["error"]["kind"], whole["exit"]) == ("locked", 4)
        assert whole["error"]["next"]

    def test_no_volume(self, flags: list[object]) -> None:
        whole = object_of(run("provision", "repair", *flags, "--json"))
        assert (whole["error"]["kind"], whole["exit"]) == ("not-mounted", 4)

    def test_what_would_be_asked_is_refused(self, tmp_path: Path, flags: list[object]) -> None:
        assert run("provision", "setup", *flags).returncode == 0
        place = ["--root", tmp_path / "root", "--host", tmp_path / "host.toml"]
        whole = object_of(run("provision", "env", "remove", "diffusers", *place, "--json"))
        assert (whole["error"]["kind"], whole["error"]["next"]) == ("usage", "Pass --yes to confirm")
        removed = run("provision", "env", "remove", "diffusers", *place, "--json", "--yes")
        assert json.loads(removed.stdout)["prefix"] == str(tmp_path / "root/envs/diffusers")

    def test_secrets_are_taken_out(self, tmp_path: Path, flags: list[object]) -> None:
        done = run("provision", "env", "create", "--interpreter", TOKEN, *flags, "--json")
        assert TOKEN not in done.stdout + done.stderr
        assert "hf_…" in object_of(done)["error"]["message"]

    def test_outcomes_with_an_error_are_the_one_object(self, tmp_path: Path, flags: list[object], wheels: Path) -> None:
        next(wheels.glob("diffusers*")).unlink()
        done = run("provision", "setup", *flags, "--json")
        whole = json.loads(done.stdout)
        assert (done.returncode, whole["exit"], "error" in whole) == (1, 1, False)
        assert any(row["error"] for row in whole["outcomes"])

    def test_a_fault_of_ours_shows_its_trace_on_stderr_alone(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def act() -> int:
            print("a first half")
            raise RuntimeError(f"with {TOKEN}")

        monkeypatch.setattr(sys, "argv", ["provision", "env", "list", "--json"])
        assert ending.run(act, json=True) == 1
        said = capsys.readouterr()
        whole = json.loads(said.out)
        assert (whole["command"], whole["error"]["kind"]) == ("env list", "internal")
        assert "Traceback" in said.err
        assert TOKEN not in said.out + said.err

    def test_a_failure_after_the_object_leaves_one_object(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def act() -> int:
            print('{"exit": 0}')
            raise OSError(28, "No space left on device", "/data/journal")

        monkeypatch.setattr(sys, "argv", ["provision", "undo", "--json"])
        assert ending.run(act, json=True) == 4
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "no-space"

    @pytest.mark.parametrize(
        ("words", "kind"),
        [
            (["run", "nonsense"], "usage"),
            (["report", "nonsense"], "failed"),
            (["compare", "nonsense"], "failed"),
            (["keep", "n", "nonsense"], "failed"),
        ],
    )
    def test_bench_too(self, words: list[str], kind: str) -> None:
        whole = object_of(run("bench", *words, "--json"))
        assert (whole["command"], whole["error"]["kind"]) == (words[0], kind)

    def test_a_wrong_flag_of_bench(self) -> None:
        whole = object_of(run("bench", "validate", "--nonsense", "--json"))
        assert (whole["command"], whole["error"]["kind"]) == ("validate", "usage")

    def test_bench_list_has_a_form_for_programs(self) -> None:
        assert "quick" in json.loads(run("bench", "list", "--json").stdout)["suites"]


# A command that holds still where it is to be ended: the pipe's other end is the event.
HOLDS = """
import os, sys
sys.argv = ["provision", "setup", "--json"]
from provision import ending, streams
streams.prepare()
def act():
    print("a first half")
    os.write({ready}, b"x")
    os.read({never}, 1)
    return 0
sys.exit(ending.run(act, json=True))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_one_object_and_130(sent: signal.Signals) -> None:
    ready, ready_end = os.pipe()
    never_end, never = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS.format(ready=ready_end, never=never_end)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(ready_end, never_end),
    )
    os.read(ready, 1)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=600)
    for each in (ready, ready_end, never_end, never):
        os.close(each)
    whole = object_of(subprocess.CompletedProcess([], process.returncode, stdout, stderr))
    assert (whole["error"]["kind"], whole["exit"], whole["command"]) == ("interrupted", 130, "setup")


def test_an_interrupt_before_the_command_is_known_is_an_object() -> None:
    code = (
        "import sys; sys.argv = ['provision', 'status', '--json']\n"
        "from provision import ending\nsys.exit(ending.interrupted_early())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert object_of(done)["error"]["kind"] == "interrupted"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class TestStreams:
    def test_every_command_speaks_in_any_locale(self, tmp_path: Path, flags: list[object]) -> None:
        root = tmp_path / "räum 根"
        assert run_bytes("setup", "--root", root, *flags[2:], env=ASCII)[0] == 0
        for words in (
            ["plan"],
            ["status"],
            ["verify"],
            ["doctor"],
            ["env", "list"],
            ["env", "where"],
            ["undo", "--list"],
            ["models", "list"],
            ["mirrors", "list"],
            ["mirrors", "probe", "--tool", "pip"],
        ):
            envs = [] if words[0] in {"env", "undo"} else flags[2:4]
            for form in ([], ["--json"]):
                code, stdout, stderr = run_bytes(*words, *form, "--root", root, *envs, *flags[4:], env=ASCII)
                assert code == 0, (words, stdout, stderr)
                assert b"Traceback" not in stderr
                if form:
                    json.loads(stdout.decode("ascii"))
        code, stdout, stderr = run_bytes("env", "list", *flags[4:], env={"PYTHONIOENCODING": "ascii:strict"})
        assert (code, stderr) == (0, b"")

    @pytest.mark.parametrize("locale", [{}, ASCII])
    def test_a_root_whose_name_is_no_text(self, tmp_path: Path, flags: list[object], locale: dict[str, str]) -> None:
        root = os.fsdecode(os.fsencode(tmp_path / "raum") + b"\xff")
        code, stdout, stderr = run_bytes("setup", "--root", root, *flags[2:], env=locale)
        assert (code, b"Traceback" in stderr) == (1, False)
        assert b"not valid UTF-8" in stdout, "uv makes no environment there"
        assert b"raum\xff" in stdout
        assert run_bytes("env", "where", "--root", root, *flags[4:], env=locale)[1].endswith(
            b"raum\xff/envs/diffusers\n"
        )
        for words, expected in ((["plan"], 3), (["status"], 3), (["env", "list"], 0), (["doctor"], 0)):
            envs = [] if words[0] == "env" else flags[2:4]
            for form in ([], ["--json"]):
                code, stdout, stderr = run_bytes(*words, *form, "--root", root, *envs, *flags[4:], env=locale)
                assert (code, b"Traceback" in stderr) == (expected, False), (words, stdout, stderr)
                if form:
                    json.loads(stdout.decode("ascii"))
        code, stdout, _ = run_bytes("repair", "--json", "--root", f"{root}/none", *flags[2:], env=locale)
        assert (code, json.loads(stdout.decode("ascii"))["error"]["kind"]) == (4, "not-mounted")

    def test_a_home_whose_name_is_no_text(self, tmp_path: Path, flags: list[object]) -> None:
        home = os.fsdecode(os.fsencode(tmp_path / "hom") + b"\xe9")
        os.mkdir(home)  # noqa: PTH102 (its name is bytes)
        (tmp_path / "host.toml").write_text('models = []\nrelocate = ["huggingface", "pip"]\nlogin = true\n')
        environment = ASCII | {"HOME": home}
        for words in (["setup"], ["status"], ["repair"], ["status", "--json"]):
            code, stdout, stderr = run_bytes(*words, *flags, env=environment)
            assert code == 0, (words, stdout, stderr)

    @pytest.mark.parametrize("closed", ["0", "1", "2", "1 2", "0 1 2"])
    def test_closed_streams_are_no_fault(self, flags: list[object], closed: str) -> None:
        def close() -> None:
            for number in closed.split():
                os.close(int(number))

        environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
        argv = [sys.executable, "-m", "provision", "plan", *map(str, flags)]
        # preexec_fn: nothing else gives a child a closed stream.
        done = subprocess.run(argv, capture_output=True, env=environment, check=False, timeout=600, preexec_fn=close)
        assert done.returncode == 3, done.stderr
        assert b"Traceback" not in done.stderr + done.stdout

    def test_a_full_disk_under_stderr_ends_no_work(self, tmp_path: Path, flags: list[object]) -> None:
        environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
        argv = [sys.executable, "-m", "provision", "setup", "--verbose", *map(str, flags)]
        with open("/dev/full", "wb") as full:  # noqa: PTH123 (a device)
            done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=full, env=environment, check=False, timeout=600)
        assert done.returncode == 0
        assert b"ready" in done.stdout

    def test_a_full_disk_under_stdout_is_told(self, flags: list[object]) -> None:
        environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
        for form in ([], ["--json"]):
            argv = [sys.executable, "-m", "provision", "plan", *form, *map(str, flags)]
            with open("/dev/full", "wb") as full:  # noqa: PTH123 (a device)
                done = subprocess.run(
                    argv, stdout=full, stderr=subprocess.PIPE, env=environment, check=False, timeout=600
                )
            assert done.returncode == 4, done.stderr
            assert b"no space left" in done.stderr
            assert b"Traceback" not in done.stderr
            assert b"Exception ignored" not in done.stderr


def test_a_reader_that_has_gone_gets_no_object(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text("nonsense = 1\n")
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "provision", "status", "--json", "--host", str(tmp_path / "host.toml")]
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    try:
        done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False, timeout=600)
    finally:
        os.close(writer)
    assert done.returncode == 2
    assert b"nonsense" in done.stderr
    assert b"BrokenPipe" not in done.stderr


def run_bytes(*words: object, env: dict[str, str]) -> tuple[int, bytes, bytes]:
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)} | env
    argv = [sys.executable, "-m", "provision", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, env=environment, check=False, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("closes", ["the terminal", "the readers of both streams"])
def test_work_goes_on_when_the_terminal_goes_away(tmp_path: Path, flags: list[object], closes: str) -> None:
    """SIGHUP is ignored, as nohup does it: then every write to the terminal fails, and the run still ends well."""
    reader, writer = os.openpty() if closes == "the terminal" else os.pipe()
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    stdout: Any = writer if closes == "the terminal" else subprocess.DEVNULL
    script = "import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    script += "sys.argv[0] = 'provision'; sys.stdin.readline(); runpy.run_module('provision', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "setup", "--verbose", *map(str, flags)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=writer,
        env=environment,
    )
    os.close(writer)
    os.close(reader)
    process.communicate(b"go\n", timeout=600)
    assert process.returncode == 0
    assert run("provision", "status", *flags).returncode == 0
