"""Tests that the parent of a worker keeps calling its poll function while the worker's pipe is never empty."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from bench.launch import child_process
from tests.clock import Ticking

if TYPE_CHECKING:
    import pytest


def test_poll_function_is_called_while_the_process_writes_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a fast GPU, lines may arrive more often than twice a second. The poll function must still read its clocks.
    clock = Ticking(0.1)
    monkeypatch.setattr(child_process, "time", clock)
    polls: list[None] = []
    reader, writer = os.pipe()

    def answer(_line: bytes) -> None:
        os.write(writer, b"another\n")  # so that the pipe is never empty

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
