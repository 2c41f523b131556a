"""Runs the checks of `bench validate` for checks/test_run.py: real torch, correct devices, and simulated faults."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bench.core import worker_events
from bench.core.codec import plain
from bench.core.errors import SkipError
from bench.core.validation_records import Reading
from bench.core.worker_requests import Examination
from bench.worker import components
from bench.worker.checks import compute, copies, interconnect, memory_patterns, run, sampling_speed
from bench.worker.checks import device as checked_device
from tests.clock import Processor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.core.worker_events import WorkerEvent

CLOCK = Processor()
FILL = components.Model._fill
BLANK = Reading("probe", "name", "cpu", "FLOP/s", None)
TINY = (
    sampling_speed.Kind("tiny-ddpm", "fp32", "ddim", 16),
    sampling_speed.Kind("tiny-sd", "bf16", "dpmpp-karras", 64),
)
MEMORY = 64 << 20
# The index of the 8-byte word whose bit `flipped` changes, and the number of that bit.
WORD, BIT = (1 << 20) + 7, 17


class Changed(checked_device.Cpu):
    """Simulates a CPU whose matrix products `change` alters: all of them, or, used as a context, every third burst."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__(torch)
        self._change, self._bursts, self.is_well = change, 0, False

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        result = super().product(dtype, left, right)
        return result if self.is_well else self._change(result)

    def __enter__(self) -> None:
        self._bursts += 1
        self.is_well = self._bursts % 3 != 0

    def __exit__(self, *_: object) -> None:
        self.is_well = True


class Small(checked_device.Cpu):
    """Simulates a CPU with `free` bytes of free memory; None: the amount is unknown."""

    def __init__(self, free: int | None) -> None:
        super().__init__(torch)
        self._free = free

    def free_bytes(self) -> int | None:
        return self._free


class Counted(checked_device.Cpu):
    """Simulates a CPU on which a timed call takes as many seconds as it returns, while no real time passes."""

    def __init__(self) -> None:
        super().__init__(torch)
        self.seconds_of_calls: list[float] = []

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        seconds = float(call())  # type: ignore[arg-type]  # the calls of this test return seconds
        self.seconds_of_calls.append(seconds)
        return seconds

    def free_bytes(self) -> int | None:
        return 1000


def one_off(result: Any) -> Any:
    """Change one number of a result by 32, the typical size of these numbers, as a flipped exponent bit does."""
    result[3, 5] += 32.0 * (1 if result[3, 5] > 0 else -1)
    return result


def no_number(result: Any) -> Any:
    """Replace one number of a result by NaN."""
    result[3, 5] = float("nan")
    return result


def last_bit(result: Any) -> Any:
    """Flip the lowest bit of one number of a result."""
    result.view(torch.int32)[0, 0] ^= 1
    return result


def all_of(readings: Iterator[Reading]) -> list[Any]:
    """Return the readings as dicts and lists, as JSON has them."""
    return [plain(reading) for reading in readings]


def deadline(seconds: float = 600.0) -> float:
    """Return the value of time.perf_counter in this many seconds, as a deadline."""
    return time.perf_counter() + seconds


def numbers() -> dict[str, Any]:
    """Check the arithmetic of a correct CPU, and of simulated CPUs with each kind of error."""
    readings = {"well": all_of(compute.numerics(checked_device.access(torch, "cpu"), deadline()))}
    for name, change in (("one off", one_off), ("NaN", no_number), ("all off", lambda reading: reading * 1.05)):
        readings[name] = [
            reading for reading in all_of(compute.numerics(Changed(change), deadline())) if "product" in reading["name"]
        ]
    fp8 = Reading("numerics", "matrix product fp8", "cpu", "", None)
    readings["fp8"] = plain(compute._numerics_of_product(checked_device.access(torch, "cpu"), "fp8", fp8))
    return readings


def flipped(_: Any, chunks: Any) -> None:
    """Flip one bit of one word in the first block, after any pattern was written."""
    chunks[0][WORD] ^= 1 << BIT


def flipped_in_one(pattern: str, chunks: Any) -> None:
    """Flip one bit after one of the patterns was written, and none after the others."""
    if pattern == "0xAA":
        chunks[0][3] ^= -(1 << 63)


def aliased(_: str, chunks: Any) -> None:
    """Copy one half of a block over the other, as a stuck address line does."""
    half = 1 << 19
    chunks[0][:half] = chunks[0][half : 2 * half]


def memories() -> dict[str, Any]:
    """Test the memory of simulated CPUs: without errors, with each kind of error, with too little memory or time."""
    device, written = Small(MEMORY), []

    def seen(name: str, chunks: Any) -> None:
        written.append((name, len({int(word) for word in chunks[0][:1000]}), sum(map(len, chunks))))

    readings = {
        "well": all_of(memory_patterns.memory(device, deadline(), seen)),
        "flipped": all_of(memory_patterns.memory(device, deadline(), flipped)),
        "flipped in one": all_of(memory_patterns.memory(device, deadline(), flipped_in_one)),
        "aliased": all_of(memory_patterns.memory(device, deadline(), aliased)),
        "small": all_of(memory_patterns.memory(Small(1 << 20), deadline())),
        "unknown": all_of(memory_patterns.memory(Small(None), deadline())),
        "late": all_of(memory_patterns.memory(device, deadline(0.0))),
    }

    def late(pattern: str, _: object) -> None:
        if pattern == "own address inverted":
            CLOCK.added += 3600  # now the time limit has passed

    readings["slow"] = all_of(memory_patterns.memory(Small(MEMORY // 4), deadline(), late))
    return readings | {"written": written}


def variants_of_a_rate() -> dict[str, Any]:
    """Measure the fastest of several variants whose times and memory needs are given."""

    def variant(amount: float, seconds: float, room: int = 0) -> checked_device.Variant:
        return checked_device.Variant(amount, {"amount": amount}, room, lambda: lambda: seconds)

    device, readings = Counted(), {}
    for name, variants in {
        "second": [variant(10, 2.0), variant(100, 10.0), variant(400, 50.0)],
        "third has no room": [variant(10, 2.0), variant(100, 10.0), variant(400, 20.0, 251)],
        "rate grows no more": [variant(10, 1.0), variant(100, 9.8), variant(400, 20.0, 251)],
        "second has no time": [variant(10, 2.0), variant(1e6, 1.0)],
        "no room": [variant(10, 1.0, 251)],
    }.items():
        readings[name] = plain(checked_device.timed_best(BLANK, device, variants, deadline()))
    calls_before = len(device.seconds_of_calls)
    readings["no time"] = plain(checked_device.timed_best(BLANK, device, [variant(10, 1.0)], deadline(0.0)))
    return readings | {"calls in no time": len(device.seconds_of_calls) - calls_before}


def burst() -> list[Any]:
    """Run the sustained load on a simulated CPU with one wrong bit in every third burst."""
    device = Changed(last_bit)
    device.is_well = True
    return all_of(compute.sustained(device, deadline(2.0), lambda: device))


def stopped() -> dict[str, Any]:
    """Return {kind of error: the reading that the error becomes}; real torch raises the errors where a CPU can."""

    def raised(error: Exception) -> Any:
        raise error

    device = checked_device.access(torch, "cpu")
    cases: dict[str, Callable[[], Any]] = {
        "no room": lambda: torch.empty(1 << 60),
        "no kernel": lambda: torch.mm(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)),
        "no time": lambda: raised(SkipError(checked_device.NO_TIME)),
        "no package": lambda: __import__("no_such_package"),
        "broken": lambda: raised(RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")),
        "wrong shape": lambda: device.product("fp32", torch.ones(2, 3), torch.ones(2, 3)),
    }
    return {name: plain(checked_device.reading_or_error(BLANK, case)) for name, case in cases.items()}


def looped() -> dict[str, Any]:
    """Measure sampling loops: with enough of all, without time, without memory, and with a NaN in the weights."""
    device = checked_device.access(torch, "cpu")
    readings = {
        "well": all_of(sampling_speed.loop(device, deadline(), TINY)),
        "late": all_of(sampling_speed.loop(device, deadline(0.0), TINY)),
        "no time": all_of(
            sampling_speed.loop(device, deadline(30.0), (sampling_speed.Kind("ddpm-cat-256", "fp32", "ddim", 4096),))
        ),
        "no room": all_of(sampling_speed.loop(Small(1000), deadline(), TINY[1:])),
    }

    def poisoned(self: components.Model, component: Any, device: str) -> Any:
        component = FILL(self, component, device)
        next(component.parameters()).view(-1)[0] = float("nan")
        return component

    components.Model._fill = poisoned  # type: ignore[method-assign]
    try:
        readings["poisoned"] = all_of(sampling_speed.loop(device, deadline(), TINY[:1]))
    finally:
        components.Model._fill = FILL  # type: ignore[method-assign]
    return readings


def sums() -> list[bool]:
    """Return the judgement of the link check on a right and on a wrong sum of two ranks."""
    numbers = torch.arange(1000)
    right = numbers.float() * 3
    wrong = right.clone()
    wrong[700] += 1
    return [interconnect.is_sum(torch, tensor, numbers, 2) for tensor in (right, wrong)]


def examined() -> dict[str, Any]:
    """Run whole examinations in this process: a complete one, a lost device, a wrong phase name, and a busy GPU."""
    events: list[WorkerEvent] = []
    request = Examination("cpu", time.time(), 3.0, ("copy", "numerics", "pinned"))
    run.examine(request, events.append, iter(["again 1.5 copy threads\n", "enough\n", "again 1 copy\n"]))
    broken = run.CHECKS["copy"]

    def lost(device: checked_device.Device, until: float) -> Iterator[Reading]:
        yield from copies.copy(device, until)
        raise RuntimeError("CUDA error: the device was lost")

    events_of_lost: list[WorkerEvent] = []
    run.CHECKS["copy"] = broken._replace(probe=lost)
    try:
        run.examine(replace(request, asked_at=time.time()), events_of_lost.append, iter([]))
    finally:
        run.CHECKS["copy"] = broken
    try:
        run.examine(replace(request, probes=("heat",)), events.append, iter([]))
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "events": lines(events),
        "lost": lines(events_of_lost),
        "refused": refused,
        "busy": lines(examine_busy_gpu(request)),
    }


def lines(events: list[WorkerEvent]) -> list[dict[str, Any]]:
    """Return the events as dicts, as a worker prints them in lines of JSON."""
    return [json.loads(worker_events.encode(event)) for event in events]


def examine_busy_gpu(request: Examination) -> list[WorkerEvent]:
    """Examine a GPU that raises the error of a card that another process uses exclusively."""
    events: list[WorkerEvent] = []
    original = checked_device.access

    def busy(torch: Any, name: str) -> checked_device.Device:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    checked_device.access = busy
    try:
        run.examine(request, events.append, iter(["again 1 copy\n"]))
    finally:
        checked_device.access = original
    return events


def main() -> None:
    """Run everything and print the results as one line of JSON."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    CLOCK.own()
    torch.set_grad_enabled(False)
    device = checked_device.access(torch, "cpu")
    results = {
        "numbers": numbers(),
        "memories": memories(),
        "variants": variants_of_a_rate(),
        "stopped": stopped(),
        "product": all_of(compute.product(device, deadline(1.5))),
        "convolution": all_of(compute.convolution(device, deadline(1.5))),
        "copy": all_of(copies.copy(device, deadline(0.5))),
        "sustained": all_of(compute.sustained(device, deadline(1.0))),
        "burst": burst(),
        "thread": all_of(compute.threads(device, deadline(1.0))),
    }
    torch.set_num_threads(2)
    results |= {
        "threads": all_of(compute.threads(device, deadline(1.0))),
        "threads after": torch.get_num_threads() == 2,
        "late": [
            all_of(probe(device, deadline(0.0))) for probe in (compute.numerics, compute.sustained, compute.threads)
        ],
    }
    torch.set_num_threads(1)
    results |= {"loops": looped(), "sums": sums(), "examined": examined()}
    out.write(json.dumps(results, allow_nan=False))
    out.flush()


if __name__ == "__main__":
    main()
