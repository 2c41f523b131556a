"""Tests that the events of a worker keep the JSON form of the golden files, which an earlier version has written."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest

from bench.core import worker_events
from bench.core.codec import record
from bench.core.result import Host, Phases, Result, Sample, Work
from bench.core.validation_records import UNABLE, Reading
from bench.core.worker_events import (
    CapabilitiesRead,
    CardOpened,
    CaseMeasured,
    DeviceCapabilities,
    DeviceExamined,
    ExaminationReport,
    PhaseEntered,
    PhasesTimed,
    PrecisionProbe,
    PrecisionProbed,
    ReadingTaken,
    SampleTaken,
    TorchDescribed,
    WorkerEvent,
    WorkPredicted,
)
from tests.conftest import CHECKOUT

GOLDEN = CHECKOUT / "tests" / "data" / "worker_events"
CARD = CardOpened("GPU-00000000-0000-0000-0000-000000000090")


def lines(name: str) -> list[str]:
    """Return the lines of a golden file."""
    return (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def content(name: str, number: int, key: str) -> Any:
    """Return the value of a key in one line of a golden file, parsed by the json module."""
    return json.loads(lines(name)[number])[key]


def reading(name: str, number: int) -> ReadingTaken:
    return ReadingTaken(record(content(name, number, "reading"), Reading, "reading"))


def expected(name: str) -> list[WorkerEvent]:
    """Return the events that the lines of a golden file must decode to, in order."""
    if name == "query":
        return [TorchDescribed(content(name, number, "query")) for number in (0, 1)]
    if name == "precisions":
        failed = PrecisionProbe("fp16", kernels=False, fault="\"conv2d\" not implemented for 'Half'", unsupported=True)
        return [
            CapabilitiesRead(DeviceCapabilities(lanes=16, threads=2)),
            PhaseEntered("fp32"),
            PrecisionProbed(PrecisionProbe("fp32", kernels=True)),
            PrecisionProbed(PrecisionProbe("fp32", kernels=True, rate=130373505835.08086)),
            CapabilitiesRead(DeviceCapabilities(tf32=0)),
            PrecisionProbed(PrecisionProbe("bf16", kernels=None)),
            PrecisionProbed(failed),
        ]
    if name == "links":
        done = DeviceExamined(ExaminationReport(seconds={"links": 5.114849603000039}))
        return [PhaseEntered("links"), reading(name, 1), done, reading(name, 3)]
    if name == "examine":
        report = ExaminationReport(
            Host(threads=2, cpu_share=None, steal_share=None, load_average=5.31),
            {"python": "3.11.7", "torch": "2.13.0+cpu", "diffusers": "0.42.1", "cpu": "AVX512"},
            {"imports": 1.977555274963379, "product": 5.144468901000437, "copy": 0.909786731001077},
        )
        unable = Reading(
            "product",
            "product fp8",
            "cuda:0",
            "FLOP/s",
            None,
            why_not="no kernels — a naïve line",
            figures={UNABLE: 1.0},
        )
        return [PhaseEntered("imports"), reading(name, 1), DeviceExamined(report), CARD, ReadingTaken(unable)]
    work = Work(34459648, 68919296, 161183343118.53732, 0.00021379161973739255, evaluations=2)
    sample = Sample(0.665553214999818, (0.03693526999995811, 0.6284062009999616), 0.4995556590000003)
    return [
        PhaseEntered("imports"),
        WorkPredicted(work),
        PhasesTimed(Phases(3.063957392998418, 0.03226472399910563, 2.041113248998954)),
        SampleTaken(sample),
        CaseMeasured(record(content(name, 4, "result"), Result, "result")),
        CARD,
    ]


FILES = ("query", "precisions", "links", "examine", "case")


@pytest.mark.parametrize("name", FILES)
def test_golden_lines_decode_to_the_expected_events(name: str) -> None:
    assert [worker_events.decode(line) for line in lines(name)] == expected(name)


@pytest.mark.parametrize("name", FILES)
def test_events_encode_to_the_golden_lines(name: str) -> None:
    assert [worker_events.encode(event) for event in expected(name)] == lines(name)


def test_golden_files_hold_an_event_of_every_kind() -> None:
    kinds = {type(event) for name in FILES for event in expected(name)}
    assert kinds == set(typing.get_args(WorkerEvent))


@pytest.mark.parametrize(
    "line",
    [
        b"hello",
        b"\xff\xfe\xfa",
        b"",
        b"3",
        b"[1]",
        b'"phase"',
        b"{}",
        b'{"colour": "red"}',
        b'{"phase": 3}',
        b'{"sample": {"seconds": "fast"}}',
        b'{"sample": {"seconds": NaN, "step_seconds": [], "cpu_seconds": 1.0}}',
        b'{"phases": 3}',
        b'{"precision": {"dtype": "fp32"}}',
        b'{"precision": {"dtype": "fp32", "kernels": true, "colour": 1}}',
        b'{"query": 1}',
        b'{"result": {}}',
        b'{"result": {"case": 1}}',
        b"[" * 60_000,
    ],
)
def test_line_that_is_no_event_is_rejected(line: bytes) -> None:
    with pytest.raises(ValueError):
        worker_events.decode(line)
