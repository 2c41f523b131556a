"""Tests that the pipe of a worker is read without busy waiting, and that the worker is polled meanwhile."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from bench.launch import child_process
from tests.clock import Ticking

if TYPE_CHECKING:
    import pytest


def test_process_that_writes_all_the_time_is_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU may generate images faster than twice a second; its clock and temperature must still be read.
    clock = Ticking(0.1)
    monkeypatch.setattr(child_process, "time", clock)
    polls: list[None] = []
    reader, writer = os.pipe()

    def answer(_line: bytes) -> None:
        os.write(writer, b"another\n")  # the pipe is never empty

    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True) as process:
        process.stdout = os.fdopen(reader, "rb", buffering=0)
        os.write(writer, b"one\n")
        end, _ = child_process.listen(
            process,
            clock.now + 100,
            b"",
            answer,
            lambda: len(polls) >= 3,
            lambda: polls.append(None),
        )
        child_process.end(process)
    os.close(writer)
    assert end == child_process.DONE
