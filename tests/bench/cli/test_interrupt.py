"""Tests signals to `bench` in the middle of a run, and the end of the real worker after them."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.bench.conftest import command, environment
from tests.conftest import TEST_ROOT

if TYPE_CHECKING:
    from pathlib import Path

GUARD_SECONDS = 600  # ends a test that hangs


@pytest.mark.worker
@pytest.mark.usefixtures("_default_sigint")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigint_or_sigterm_ends_the_run_with_130_and_its_worker(measured_python: Path, number: signal.Signals) -> None:
    words = command("run", "tiny", "--device", "cpu", "--root", TEST_ROOT)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            worker = wait_for_worker(process)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=GUARD_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    # A process that has ended stays a zombie until its parent waits for it. So the command has waited for its worker.
    assert not worker.is_running()


def wait_for_worker(process: subprocess.Popen[str]) -> psutil.Process:
    """Wait until the command has started its worker, and return the worker; fail if there is none in time."""
    deadline = time.monotonic() + GUARD_SECONDS
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "bench.worker" in child.cmdline():
                    return child
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
            break
    pytest.fail("no worker was started")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process when its parent ends")
def test_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    # The parent cannot handle SIGKILL, and the worker's stdin stays open. So the kernel has to kill the worker.
    reading, writing = os.pipe()
    start = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-m', 'bench.worker']).pid, flush=True)"
    argv = [sys.executable, "-c", f"{start}; import signal; signal.pause()"]
    with subprocess.Popen(argv, stdin=reading, stdout=subprocess.PIPE, env=environment(), cwd=tmp_path) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        os.write(writing, b"{")
        while struct.unpack("i", fcntl.ioctl(writing, termios.FIONREAD, b"\0" * 4))[0]:
            select.select([], [], [], 0.01)  # until the worker has read the first byte
        parent.kill()
    psutil.wait_procs([worker], timeout=GUARD_SECONDS)
    assert not worker.is_running()
    os.close(reading)
    os.close(writing)


def test_command_keeps_sighup_ignored_if_nohup_ignores_it(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from bench.cli import main as cli; cli.app = lambda **_: None\ntry: cli.main()\nexcept SystemExit: pass\n"
        "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, callable(signal.getsignal(signal.SIGTERM)))\n"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment(), cwd=tmp_path)
    assert done.stdout == "True True\n"
