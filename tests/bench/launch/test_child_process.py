"""Tests that the pipe of a worker is read without busy waiting, and that the worker is polled meanwhile."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import TYPE_CHECKING

from bench.launch import child_process
from tests.clock import Ticking

if TYPE_CHECKING:
    import pytest


def test_process_that_writes_all_the_time_is_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU may generate images faster than twice a second; its clock and temperature must still be read.
    monkeypatch.setattr(child_process, "time", Ticking(0.1))
    lines: list[bytes] = []
    polls: list[int] = []
    echo = [sys.executable, "-u", "-c", "import sys\nfor line in sys.stdin: print(line, end='')"]
    with subprocess.Popen(echo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None

        def receive(line: bytes) -> None:
            lines.append(line)
            process.stdin.write(b"another\n")  # type: ignore[union-attr]

        process.stdin.write(b"one\n")
        child_process.listen(
            process, math.inf, b"", receive, lambda: len(lines) >= 20, lambda: polls.append(len(lines))
        )
        child_process.end(process)
    assert any(polls)
