"""Every command in any locale, with names that are no text, with closed streams, and when its readers go away."""

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
