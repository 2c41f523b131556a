"""Test the links between devices: real ranks that sum over the loopback interface, and a rank that fails."""

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


def link_events(python: Path, folder: Path, *devices: str, seconds: float = 600.0) -> list[Any]:
    """Run a worker that measures the links between these devices; return its events."""
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
    first, event, last = link_events(measured_python, tmp_path, "cpu", "cpu")
    assert first == {"phase": "links"}
    reading: Reading = record(event["reading"], Reading, "reading")
    assert (reading.probe, reading.name, reading.device, reading.unit) == ("links", "all-reduce of 2", "cpu", "B/s")
    assert (reading.fault, reading.why_not) == (None, None)
    assert reading.value == max(reading.samples)
    assert 1e6 < reading.value < 1e12
    assert reading.figures["ranks"] == 2
    assert reading.figures["bytes"] in {1 << 20, 16 << 20, 64 << 20}
    assert last["examined"]["seconds"]["links"] > 0


def test_single_device_has_no_links(measured_python: Path, tmp_path: Path) -> None:
    reading = link_events(measured_python, tmp_path, "cpu")[1]["reading"]
    assert (reading["value"], reading["why_not"]) == (None, "there is only one device")


def test_failed_rank_ends_the_others(measured_python: Path, tmp_path: Path) -> None:
    """Check that the others end before their deadline of an hour, with the reason of the failed one."""
    reading = link_events(measured_python, tmp_path, "cpu", "cuda:7", seconds=3600.0)[1]["reading"]
    assert reading["value"] is None
    assert "cuda" in (reading["why_not"] or reading["fault"]).lower()
