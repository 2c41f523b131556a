"""Tests commands in an ASCII locale, with names that are not UTF-8, with closed streams, and with closed pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import CHECKOUT
from tests.provision.core.test_command_end import run

if TYPE_CHECKING:
    from pathlib import Path

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class TestStreams:
    def test_every_command_works_in_an_ascii_locale_with_a_non_ascii_root(
        self, tmp_path: Path, flags: list[object]
    ) -> None:
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

    @pytest.mark.parametrize("locale", [{}, ASCII], ids=["default locale", "ASCII locale"])
    def test_setup_rejects_a_root_whose_name_is_not_utf8_and_other_commands_print_it(
        self, tmp_path: Path, flags: list[object], locale: dict[str, str]
    ) -> None:
        root = os.fsdecode(os.fsencode(tmp_path / "raum") + b"\xff")
        code, stdout, stderr = run_bytes("setup", "--root", root, *flags[2:], env=locale)
        assert (code, b"Traceback" in stderr) == (1, False)
        assert b"not valid UTF-8" in stdout, "uv makes no environment in a folder whose name is not UTF-8"
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

    def test_commands_work_in_a_home_whose_name_is_not_utf8(self, tmp_path: Path, flags: list[object]) -> None:
        home = os.fsdecode(os.fsencode(tmp_path / "hom") + b"\xe9")
        os.mkdir(home)  # noqa: PTH102 (its name is bytes)
        (tmp_path / "host.toml").write_text('models = []\nrelocate = ["huggingface", "pip"]\nlogin = true\n')
        environment = ASCII | {"HOME": home}
        for words in (["setup"], ["status"], ["repair"], ["status", "--json"]):
            code, stdout, stderr = run_bytes(*words, *flags, env=environment)
            assert code == 0, (words, stdout, stderr)

    @pytest.mark.parametrize("closed", ["0", "1", "2", "1 2", "0 1 2"])
    def test_plan_works_with_any_of_stdin_stdout_and_stderr_closed(self, flags: list[object], closed: str) -> None:
        def close() -> None:
            for number in closed.split():
                os.close(int(number))

        environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
        argv = [sys.executable, "-m", "provision", "plan", *map(str, flags)]
        # Only preexec_fn can close a standard stream of a child process before its program starts.
        completed = subprocess.run(
            argv, capture_output=True, env=environment, check=False, timeout=600, preexec_fn=close
        )
        assert completed.returncode == 3, completed.stderr
        assert b"Traceback" not in completed.stderr + completed.stdout

    def test_setup_completes_if_stderr_is_a_file_on_a_full_disk(self, tmp_path: Path, flags: list[object]) -> None:
        environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
        argv = [sys.executable, "-m", "provision", "setup", "--verbose", *map(str, flags)]
        with open("/dev/full", "wb") as full:  # noqa: PTH123 (a device)
            completed = subprocess.run(
                argv, stdout=subprocess.PIPE, stderr=full, env=environment, check=False, timeout=600
            )
        assert completed.returncode == 0
        assert b"ready" in completed.stdout

    def test_plan_reports_no_space_left_if_stdout_is_a_file_on_a_full_disk(self, flags: list[object]) -> None:
        environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
        for form in ([], ["--json"]):
            argv = [sys.executable, "-m", "provision", "plan", *form, *map(str, flags)]
            with open("/dev/full", "wb") as full:  # noqa: PTH123 (a device)
                completed = subprocess.run(
                    argv, stdout=full, stderr=subprocess.PIPE, env=environment, check=False, timeout=600
                )
            assert completed.returncode == 4, completed.stderr
            assert b"no space left" in completed.stderr
            assert b"Traceback" not in completed.stderr
            assert b"Exception ignored" not in completed.stderr


def test_error_of_a_command_whose_stdout_pipe_is_closed_is_reported_on_stderr_only(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text("nonsense = 1\n")
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "provision", "status", "--json", "--host", str(tmp_path / "host.toml")]
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    try:
        completed = subprocess.run(
            argv, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False, timeout=600
        )
    finally:
        os.close(writer)
    assert completed.returncode == 2
    assert b"nonsense" in completed.stderr
    assert b"BrokenPipe" not in completed.stderr


def run_bytes(*words: object, env: dict[str, str]) -> tuple[int, bytes, bytes]:
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)} | env
    argv = [sys.executable, "-m", "provision", *map(str, words)]
    completed = subprocess.run(argv, capture_output=True, env=environment, check=False, timeout=600)
    return completed.returncode, completed.stdout, completed.stderr


@pytest.mark.parametrize("closed", ["the terminal", "the readers of both streams"])
def test_setup_completes_after_its_terminal_or_the_reader_of_its_output_has_closed(
    tmp_path: Path, flags: list[object], closed: str
) -> None:
    """Ignore SIGHUP as nohup does: every write to the closed terminal or pipe fails, and setup still succeeds."""
    reader, writer = os.openpty() if closed == "the terminal" else os.pipe()
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    stdout: Any = writer if closed == "the terminal" else subprocess.DEVNULL
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
