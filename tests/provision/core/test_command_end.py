"""Tests the end of a command: one message, one exit code and, with --json, one object, whatever its streams do."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import filelock
import pytest
import typer

from provision.cli import common
from provision.core import command_end
from provision.core.errors import BlockedError, Exit, FirstlightError, SpecError
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = f"hf_{'s' * 20}"


def run(program: str, *words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)} | (env or {})
    argv = [sys.executable, "-m", program, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, timeout=600)


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
    assert command_end.next_of(message) == ((sentence if told is None else told) or None)


def test_an_errors_own_word_for_kind_and_next_act_wins() -> None:
    fault = command_end.fault_of(BlockedError("it is held. Wait.", kind="locked", next_act="provision setup --wait 60"))
    assert (fault.kind, fault.next, fault.exit) == ("locked", "provision setup --wait 60", Exit.BLOCKED)


def test_a_message_that_names_what_there_is_has_a_next_act_too() -> None:
    fault = command_end.fault_of(SpecError("unknown device tpu; there is: auto, cpu, cuda."))
    assert (fault.kind, fault.next) == ("usage", command_end.CORRECTED)
    assert command_end.fault_of(BlockedError("it is held")).next is None
    assert command_end.fault_of(SpecError("no")).kind == "usage"
    assert command_end.fault_of(FirstlightError("no")).kind == "failed"
    assert command_end.fault_of(OSError(28, "No space left on device", "/data/x")).kind == "no-space"


def test_every_advice_of_the_code_begins_with_a_known_word() -> None:
    """A sentence with a command in backquotes that comes last in an error is found as the next act."""
    for file in sorted(CHECKOUT.glob("provision/*.py")):
        for text in re.findall(r"Error\(\s*f?\"([^\"]*`[^\"]*)\"\s*\)", file.read_text(encoding="utf-8")):
            if re.search(r"[.:] [A-Z][^.]*`[^`]*`\.?$", text):
                assert command_end.next_of(text), f"{file.name}: {text}"


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
    assert command_end.command_of(argv) == (name, is_json)


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

    @pytest.mark.parametrize(
        ("words", "known"),
        [
            (["setup", "--json", "--nonsense"], "setup"),
            (["nonsense", "--json"], ""),
            (["env", "nonsense", "--json"], "env"),
            (["env", "create", "--json", "--variant"], "env create"),
        ],
    )
    def test_what_comes_next_can_be_typed(self, words: list[str], known: str) -> None:
        whole = object_of(run("provision", *words))
        program, *rest = shlex.split(whole["error"]["next"])
        assert program.endswith("provision")
        assert run("provision", *rest).returncode == 0
        assert " ".join(rest) == f"{known} --help".strip()

    def test_ctrl_d_at_a_question_is_an_interrupt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def ask(_: str) -> bool:
            raise typer.Abort

        monkeypatch.setattr(typer, "confirm", ask)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        assert (
            command_end.run(
                lambda: common.confirmed("Remove it?", "this removes it", yes=False, json=False), json=False
            )
            == 130
        )

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
        flags_typed = shlex.join(["setup", *map(str, flags), "--json", "--wait", "600"])
        assert whole["error"]["next"].endswith(f"provision {flags_typed}"), "not of another root"
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
        assert command_end.run(act, json=True) == 1
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
        assert command_end.run(act, json=True) == 4
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
from provision.core import command_end as ending; from provision.core import streams
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
        "from provision.core import command_end as ending\nsys.exit(ending.interrupted_early())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert object_of(done)["error"]["kind"] == "interrupted"
