"""Tests the end of a command: one message, one exit code and, with --json, one JSON object."""

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


def object_of(completed: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON object that a failed command printed, after a check of its keys and its exit code."""
    assert "Traceback" not in completed.stdout
    report = json.loads(completed.stdout)
    assert list(report) == ["schema", "command", "error", "exit"]
    assert list(report["error"]) == ["kind", "message", "next"]
    assert report["exit"] == completed.returncode
    assert completed.stderr, "the message is also on stderr"
    return dict(report)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("/data is not mounted (no marker). Mount it, then run `make repair`.", "make repair"),
        ("it is not mounted. Mount it and run `make repair`, or run `make setup`.", None),
        ("/x: no space left. Free some space, or give another --root, then run again.", None),
        ("/x is ours no more. Look at it: ls -la /x; move it away.", None),
        ("unknown model 'x'; available: a, b", ""),
        ("uv failed (exit 2):\nhint: Run `pip cache purge`.", ""),
        ("there is no run 7; `provision undo --list` shows them.", "provision undo --list"),
        ("it is too large. To build it: provision models pull --stand-in m", "provision models pull --stand-in m"),
    ],
)
def test_field_next_of_an_error_is_the_last_advice_in_its_message_or_none(message: str, advice: str | None) -> None:
    sentence = message.partition(". ")[2].rstrip(".")
    assert command_end.next_of(message) == ((sentence if advice is None else advice) or None)


def test_kind_and_next_field_that_an_error_was_given_are_reported() -> None:
    fault = command_end.fault_of(BlockedError("it is held. Wait.", kind="locked", next_act="provision setup --wait 60"))
    assert (fault.kind, fault.next, fault.exit) == ("locked", "provision setup --wait 60", Exit.BLOCKED)


def test_usage_error_without_advice_in_its_message_gets_default_advice() -> None:
    fault = command_end.fault_of(SpecError("unknown device tpu; available: auto, cpu, cuda."))
    assert (fault.kind, fault.next) == ("usage", command_end.CORRECTED)
    assert command_end.fault_of(BlockedError("it is held")).next is None
    assert command_end.fault_of(SpecError("no")).kind == "usage"
    assert command_end.fault_of(FirstlightError("no")).kind == "failed"
    assert command_end.fault_of(OSError(28, "No space left on device", "/data/x")).kind == "no-space"


def test_advice_in_every_error_message_of_the_source_code_is_recognized() -> None:
    """Check each error message whose last sentence contains a command in backquotes."""
    for file in sorted(CHECKOUT.glob("provision/**/*.py")):
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
def test_command_name_in_json_is_the_words_before_the_first_flag(argv: list[str], name: str, is_json: bool) -> None:
    assert command_end.command_of(argv) == (name, is_json)


class TestOneObject:
    def test_wrong_flag_or_command_with_json_prints_an_error_of_kind_usage(self, flags: list[object]) -> None:
        for words in (
            ["setup", "--nonsense", "--json"],
            ["env", "create", "--json", "--variant"],
            ["nonsense", "--json"],
        ):
            report = object_of(run("provision", *words))
            assert (report["error"]["kind"], report["exit"]) == ("usage", 2)
        assert object_of(run("provision", "relocate", "--json"))["command"] == "relocate"

    @pytest.mark.parametrize(
        ("words", "parsed"),
        [
            (["setup", "--json", "--nonsense"], "setup"),
            (["nonsense", "--json"], ""),
            (["env", "nonsense", "--json"], "env"),
            (["env", "create", "--json", "--variant"], "env create"),
        ],
        ids=["wrong flag", "wrong command", "wrong subcommand", "flag without a value"],
    )
    def test_advice_after_a_wrong_flag_or_command_is_a_help_command_that_works(
        self, words: list[str], parsed: str
    ) -> None:
        report = object_of(run("provision", *words))
        program, *rest = shlex.split(report["error"]["next"])
        assert program.endswith("provision")
        assert run("provision", *rest).returncode == 0
        assert " ".join(rest) == f"{parsed} --help".strip()

    def test_ctrl_d_at_a_prompt_ends_the_command_with_exit_code_130(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def abort(_: str) -> bool:
            raise typer.Abort

        monkeypatch.setattr(typer, "confirm", abort)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        assert (
            command_end.run(
                lambda: common.confirmed("Remove it?", "this removes it", yes=False, json=False), json=False
            )
            == 130
        )

    def test_wrong_flag_without_json_leaves_stdout_empty(self) -> None:
        completed = run("provision", "setup", "--nonsense")
        assert (completed.returncode, completed.stdout) == (2, "")

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
        ids=" ".join,
    )
    def test_error_in_host_toml_is_reported_with_its_line_and_exit_code_2(
        self, tmp_path: Path, flags: list[object], words: list[str]
    ) -> None:
        (tmp_path / "host.toml").write_text("nonsense = 1\n")
        report = object_of(run("provision", *words, "--json", "--host", tmp_path / "host.toml"))
        assert (report["command"], report["exit"]) == (" ".join(words[:2] if words[1:] else words).replace(" m", ""), 2)
        assert "host.toml, line 1, key nonsense" in report["error"]["message"]

    def test_setup_while_another_run_holds_the_lock_fails_and_suggests_the_flag_wait(
        self, tmp_path: Path, flags: list[object]
    ) -> None:
        (tmp_path / "root/.firstlight").mkdir(parents=True)
        with filelock.FileLock(tmp_path / "root/.firstlight/lock"):
            report = object_of(run("provision", "setup", *flags, "--json"))
        assert (report["error"]["kind"], report["exit"]) == ("locked", 4)
        flags_typed = shlex.join(["setup", *map(str, flags), "--json", "--wait", "600"])
        assert report["error"]["next"].endswith(f"provision {flags_typed}"), "the advice has the same flags"
        assert report["error"]["next"]

    def test_repair_without_a_volume_is_blocked(self, flags: list[object]) -> None:
        report = object_of(run("provision", "repair", *flags, "--json"))
        assert (report["error"]["kind"], report["exit"]) == ("not-mounted", 4)

    def test_env_remove_with_json_is_rejected_without_the_flag_yes(self, tmp_path: Path, flags: list[object]) -> None:
        assert run("provision", "setup", *flags).returncode == 0
        root_flags = ["--root", tmp_path / "root", "--host", tmp_path / "host.toml"]
        report = object_of(run("provision", "env", "remove", "diffusers", *root_flags, "--json"))
        assert (report["error"]["kind"], report["error"]["next"]) == ("usage", "Pass --yes to confirm")
        removed = run("provision", "env", "remove", "diffusers", *root_flags, "--json", "--yes")
        assert json.loads(removed.stdout)["prefix"] == str(tmp_path / "root/envs/diffusers")

    def test_token_in_an_argument_is_removed_from_the_json_error(self, tmp_path: Path, flags: list[object]) -> None:
        completed = run("provision", "env", "create", "--interpreter", TOKEN, *flags, "--json")
        assert TOKEN not in completed.stdout + completed.stderr
        assert "hf_…" in object_of(completed)["error"]["message"]

    def test_failed_setup_with_json_prints_its_outcomes_instead_of_an_error_object(
        self, tmp_path: Path, flags: list[object], wheels: Path
    ) -> None:
        next(wheels.glob("diffusers*")).unlink()
        completed = run("provision", "setup", *flags, "--json")
        report = json.loads(completed.stdout)
        assert (completed.returncode, report["exit"], "error" in report) == (1, 1, False)
        assert any(row["error"] for row in report["outcomes"])

    def test_traceback_of_an_internal_error_goes_to_stderr_only(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def act() -> int:
            print("partial output")
            raise RuntimeError(f"with {TOKEN}")

        monkeypatch.setattr(sys, "argv", ["provision", "env", "list", "--json"])
        assert command_end.run(act, json=True) == 1
        output = capsys.readouterr()
        report = json.loads(output.out)
        assert (report["command"], report["error"]["kind"]) == ("env list", "internal")
        assert "Traceback" in output.err
        assert TOKEN not in output.out + output.err

    def test_failure_after_the_json_output_prints_only_the_error_object(
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
        ids=[
            "run",
            "report",
            "compare",
            "keep",
        ],
    )
    def test_bench_reports_an_error_with_the_same_json_object_as_provision(self, words: list[str], kind: str) -> None:
        report = object_of(run("bench", *words, "--json"))
        assert (report["command"], report["error"]["kind"]) == (words[0], kind)

    def test_wrong_flag_of_bench_prints_an_error_of_kind_usage(self) -> None:
        report = object_of(run("bench", "validate", "--nonsense", "--json"))
        assert (report["command"], report["error"]["kind"]) == ("validate", "usage")

    def test_bench_list_with_json_prints_the_suites_as_json(self) -> None:
        assert "quick" in json.loads(run("bench", "list", "--json").stdout)["suites"]


# A command that writes a byte to one pipe, then blocks on a read from another, where the test sends it a signal.
WAITING = """
import os, sys
sys.argv = ["provision", "setup", "--json"]
from provision.core import command_end as ending; from provision.core import streams
streams.prepare()
def act():
    print("partial output")
    os.write({ready}, b"x")
    os.read({never}, 1)
    return 0
sys.exit(ending.run(act, json=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_command_with_one_json_object_and_exit_code_130(number: signal.Signals) -> None:
    ready, ready_end = os.pipe()
    never_end, never = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(ready=ready_end, never=never_end)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(ready_end, never_end),
    )
    os.read(ready, 1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=600)
    for descriptor in (ready, ready_end, never_end, never):
        os.close(descriptor)
    report = object_of(subprocess.CompletedProcess([], process.returncode, stdout, stderr))
    assert (report["error"]["kind"], report["exit"], report["command"]) == ("interrupted", 130, "setup")


def test_interrupt_before_the_command_starts_prints_a_json_error_of_kind_interrupted() -> None:
    code = (
        "import sys; sys.argv = ['provision', 'status', '--json']\n"
        "from provision.core import command_end as ending\nsys.exit(ending.interrupted_early())"
    )
    completed = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert object_of(completed)["error"]["kind"] == "interrupted"
