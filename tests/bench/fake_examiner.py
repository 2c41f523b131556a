"""Holds a program that replaces the worker of an examination, and reports the readings of a healthy H100."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.core.verdict import VerdictState
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from bench.core.verdict import Judgement
    from bench.validate.examine_host import HostValidation

PASS, WARN, FAIL, OPEN = VerdictState.PASS, VerdictState.WARN, VerdictState.FAIL, VerdictState.NOT_JUDGED
TWO = "COUNT = 2\n"

UUID = "GPU-00000000-0000-0000-0000-000000000090"  # of tests/data/cards/h100.json
# A test can append a function `before(phase, turn, values)`, which changes the values of a phase. `turn` counts the
# runs of the phase on this device from 1, over all workers of the test. The global `device` is the examined device.
EXAMINER = f"""
import json, os, signal, sys
sys.path.insert(0, {str(CHECKOUT)!r})
from pathlib import Path
from bench.core.codec import dumps, plain
from bench.core.validation_records import Reading
from bench.core.result import Host

T, GB = 1e12, 1e9
HOST = Host(threads=2, cpu_share=1.0, steal_share=0.0, load_average=0.0, wait_share=0.0)
COUNT, NAME, UUID = 1, "NVIDIA H100 80GB HBM3", {UUID!r}
FOUND = {{"torch": "2.13.0", "cuda": "13.0", "available": True, "architectures": ["sm_90"], "mps": False}}

def emit(event):
    print(dumps(event), flush=True)

def read(probe, name, unit, value, **more):
    samples = (value,) if value is not None else ()
    emit({{"reading": plain(Reading(probe, name, device, unit, value, samples, **more))}})

def run_phases(phases):
    for phase in phases:
        emit({{"phase": phase}})
        with Path("phases").open("a") as file: file.write(f"{{device}} {{phase}}\\n")
        turn = Path("phases").read_text().split("\\n").count(f"{{device}} {{phase}}")
        values = {{"error": 1e-3, "product": 780 * T, "copy": 2900 * GB, "pinned": 50 * GB, "step": 0.02}}
        values["fault"] = None
        before(phase, turn, values)
        if phase == "numerics": read(phase, "matrix product bf16", "", values["error"], limit=5e-3)
        if phase == "product": read(phase, "product bf16", "FLOP/s", values["product"])
        if phase == "copy": read(phase, "copy", "B/s", values["copy"])
        if phase == "pinned": read(phase, "host to device", "B/s", values["pinned"])
        sizes = {{"tested_bytes": 70e9, "free_bytes": 80e9}}
        quarters = {{"first_quarter": 710 * T, "last_quarter": 700 * T}}
        if phase == "memory": read(phase, "memory", "", 0.88, fault=values["fault"], figures=sizes)
        if phase == "sustained": read(phase, "sustained bf16", "FLOP/s", 700 * T, figures=quarters)
        if phase == "loop": read(phase, "loop ddpm-cat-256 fp16 batch 4", "s", values["step"])

def before(phase, turn, values): pass

def links(): emit({{"reading": plain(Reading("links", "all-reduce of 2", "cuda:0", "B/s", 200 * GB))}})

def main():
    global device
    request = json.loads(sys.stdin.readline())
    if "query" in request:
        devices = [{{"name": NAME, "capability": "9.0", "uuid": UUID}}] * COUNT
        emit({{"query": FOUND | {{"devices": devices}}}})
        return
    if "links" in request:
        links()
        emit({{"examined": {{}}}})
        return
    device = request["examine"]["device"]
    emit({{"card": UUID}})
    whole = ["numerics", "product", "copy", "pinned", "memory", "sustained", "loop"]
    phases = request["examine"]["probes"] or whole
    while True:
        run_phases(phases)
        emit({{"examined": {{"host": plain(HOST), "software": {{"torch": "2.13.0"}}, "seconds": {{"product": 1.0}}}}}})
        emit({{"phase": "waiting"}})
        word, *rest = sys.stdin.readline().split() or [""]
        if word != "again": return
        phases = rest[1:]
"""
END = "\nmain()\n"


def changed_in(phase: str, change: str, *, turns: str = "True") -> str:
    """Return code for the program that runs the statement `change` in a phase, at the turns for which `turns` holds."""
    return f"def before(phase, turn, values):\n    if phase == {phase!r} and ({turns}): {change}\n"


def judgements_of(validation: HostValidation, rule: str) -> list[Judgement]:
    """Return the judgements of one rule, such as "product"."""
    assert validation.run.validation is not None
    return [judgement for judgement in validation.run.validation.judgements if judgement.rule == rule]


def logged_phases() -> list[str]:
    """Return "DEVICE PHASE" for each phase that the program has run, in order."""
    return Path("phases").read_text().splitlines()
