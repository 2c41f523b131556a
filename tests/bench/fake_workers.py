"""Holds programs that replace the worker: their common beginning, and one that reports images at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable

PRELUDE = f"""
import json, os, signal, subprocess, sys
sys.path.insert(0, {str(CHECKOUT)!r})
from dataclasses import replace
from pathlib import Path
from bench.core.codec import dumps, plain, record
from bench.core.result import Case, Host, Memory, Numerics, Phases, Result, Sample, Status, Work

def emit(event):
    print(dumps(event), flush=True)

request = json.loads(sys.stdin.readline())
case = record(request["case"], Case, "case")
"""
# A test can append code that changes the values. The program appends its request to a file; `turn` is the number of
# requests in it, so it counts the runs of the program from 1.
WORKER = (
    PRELUDE
    + """
log = Path("requests")
with log.open("a") as file:
    file.write(json.dumps(request) + "\\n")
turn = len(log.read_text().splitlines())
samples = []
seconds = 2.0
host = Host(threads=2, cpu_share=1.0, steal_share=0.0, load_average=0.0, wait_share=0.0)
numerics = Numerics(True, None, "0" * 64, forward_error=0.001 if request["compare"] else None)
memory = Memory()
work = Work()

def image():
    samples.append(Sample(seconds, (seconds / 4,) * 4, seconds))
    emit({"phase": "samples"})
    emit({"sample": plain(samples[-1])})

def end(status=Status.OK, reason=None):
    if not samples and status is Status.OK: status, reason = Status.SKIPPED, "its partner could not be measured"
    parts = dict(samples=tuple(samples), host=host, numerics=numerics, memory=memory, work=work)
    emit({"result": plain(Result(case, status, reason, **parts))})
"""
)
PLAIN = "for _ in range(6): image()\nend()\n"
# Reports one image for each line "go" on stdin.
PACED_IMAGES = """
emit({"phase": "samples"})
turns = Path("turns")
while sys.stdin.readline().strip() == "go":
    with turns.open("a") as file: file.write(case.dtype + " ")
    image()
end()
"""


class RecordedProgress:
    """Stores the progress instead of showing it: reported lines in `lines`, redrawn ones in `updates`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.updates: list[str] = []

    def begin(self, line: str) -> None: ...

    def update(self, line: Callable[[], str]) -> None:
        self.updates.append(line())

    def report(self, line: str) -> None:
        self.lines.append(line)
