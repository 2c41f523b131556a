"""Tests the link check with real processes (ranks) that add numbers over the loopback interface."""

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
    """Run the real worker, which measures the links between these devices, and return its events as dicts."""
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


def test_link_check_of_two_devices_reports_the_rate_of_an_all_reduce(measured_python: Path, tmp_path: Path) -> None:
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


def test_link_check_of_a_single_device_has_no_value(measured_python: Path, tmp_path: Path) -> None:
    reading = link_events(measured_python, tmp_path, "cpu")[1]["reading"]
    assert (reading["value"], reading["why_not"]) == (None, "there is only one device")


def test_link_check_with_a_failed_rank_ends_at_once_with_its_error(measured_python: Path, tmp_path: Path) -> None:
    """Use a device that does not exist; the other rank would wait for an hour."""
    reading = link_events(measured_python, tmp_path, "cpu", "cuda:7", seconds=3600.0)[1]["reading"]
    assert reading["value"] is None
    assert "cuda" in (reading["why_not"] or reading["fault"]).lower()
