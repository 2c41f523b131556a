"""The pipe of a worker: read without spinning, with its process looked at meanwhile."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import TYPE_CHECKING

from bench.launch import pipe
from tests.clock import Ticking

if TYPE_CHECKING:
    import pytest


def test_a_process_that_says_much_is_looked_at_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of a card come quicker than twice a second, and its clock and heat are asked for meanwhile."""
    monkeypatch.setattr(pipe, "time", Ticking(0.1))
    heard: list[bytes] = []
    looks: list[int] = []
    echo = [sys.executable, "-u", "-c", "import sys\nfor line in sys.stdin: print(line, end='')"]
    with subprocess.Popen(echo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None

        def hear(line: bytes) -> None:
            heard.append(line)
            process.stdin.write(b"another\n")  # type: ignore[union-attr]

        process.stdin.write(b"one\n")
        pipe.listen(process, math.inf, b"", hear, lambda: len(heard) >= 20, lambda: looks.append(len(heard)))
        pipe.end(process)
    assert any(looks)
