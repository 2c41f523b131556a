"""What lies between devices: real ranks that sum over the loopback, and one that cannot take part."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from bench.core.codec import record
from bench.core.validation_records import Reading
from bench.launch import worker_process

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

pytestmark = pytest.mark.worker


def linked(python: Path, folder: Path, *devices: str, seconds: float = 600.0) -> list[Any]:
    request = {"links": {"devices": devices, "asked_at": time.time(), "budget_seconds": seconds}}
    done = subprocess.run(
        worker_process.worker_command(python),
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_two_ranks_sum_over_the_loopback(measured_python: Path, tmp_path: Path) -> None:
    first, told, last = linked(measured_python, tmp_path, "cpu", "cpu")
    assert first == {"phase": "links"}
    reading: Reading = record(told["reading"], Reading, "reading")
    assert (reading.probe, reading.name, reading.device, reading.unit) == ("links", "all-reduce of 2", "cpu", "B/s")
    assert (reading.fault, reading.why_not) == (None, None)
    assert reading.value == max(reading.samples)
    assert 1e6 < reading.value < 1e12
    assert reading.figures["ranks"] == 2
    assert reading.figures["bytes"] in {1 << 20, 16 << 20, 64 << 20}
    assert last["examined"]["seconds"]["links"] > 0


def test_a_device_alone_has_nobody_to_sum_with(measured_python: Path, tmp_path: Path) -> None:
    reading = linked(measured_python, tmp_path, "cpu")[1]["reading"]
    assert (reading["value"], reading["why_not"]) == (None, "there is one device alone")


def test_a_rank_that_fails_ends_the_others(measured_python: Path, tmp_path: Path) -> None:
    """It does not hang until its deadline of an hour, and tells the reason of the one that failed."""
    reading = linked(measured_python, tmp_path, "cpu", "cuda:7", seconds=3600.0)[1]["reading"]
    assert reading["value"] is None
    assert "cuda" in (reading["why_not"] or reading["fault"]).lower()
