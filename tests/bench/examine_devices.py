"""What test_probe.py asks of the probes with real torch, in one process: also of devices that are not well."""

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
from bench.core.protocol import Examination
from bench.core.validation_records import Reading
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
# A word of the second block, and a bit of it.
WORD, BIT = (1 << 20) + 7, 17


class Changed(checked_device.Cpu):
    """A CPU whose products are changed: all, or those of every third burst."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__(torch)
        self._change, self._bursts, self.is_well = change, 0, False

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        found = super().product(dtype, left, right)
        return found if self.is_well else self._change(found)

    def __enter__(self) -> None:
        self._bursts += 1
        self.is_well = self._bursts % 3 != 0

    def __exit__(self, *_: object) -> None:
        self.is_well = True


class Small(checked_device.Cpu):
    """A CPU that says how much memory is free."""

    def __init__(self, free: int | None) -> None:
        super().__init__(torch)
        self._free = free

    def free_bytes(self) -> int | None:
        return self._free


class Counted(checked_device.Cpu):
    """A CPU on which a call takes a second for each number of a tensor, and nothing takes time."""

    def __init__(self) -> None:
        super().__init__(torch)
        self.asked: list[float] = []

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        seconds = float(call())  # type: ignore[arg-type]  # the test's own
        self.asked.append(seconds)
        return seconds

    def free_bytes(self) -> int | None:
        return 1000


def one_off(found: Any) -> Any:
    """One number is off by its usual size: a flipped bit of its exponent."""
    found[3, 5] += 32.0 * (1 if found[3, 5] > 0 else -1)
    return found


def no_number(found: Any) -> Any:
    found[3, 5] = float("nan")
    return found


def last_bit(found: Any) -> Any:
    found.view(torch.int32)[0, 0] ^= 1
    return found


def all_of(readings: Iterator[Reading]) -> list[Any]:
    return [plain(reading) for reading in readings]


def soon(seconds: float = 600.0) -> float:
    return time.perf_counter() + seconds


def numbers() -> dict[str, Any]:
    """What is right, and each way in which it may be wrong."""
    found = {"well": all_of(compute.numerics(checked_device.of(torch, "cpu"), soon()))}
    for name, change in (("one off", one_off), ("NaN", no_number), ("all off", lambda each: each * 1.05)):
        found[name] = [each for each in all_of(compute.numerics(Changed(change), soon())) if "product" in each["name"]]
    fp8 = Reading("numerics", "matrix product fp8", "cpu", "", None)
    found["fp8"] = plain(compute._numerics_of_product(checked_device.of(torch, "cpu"), "fp8", fp8))
    return found


def flipped(_: Any, chunks: Any) -> None:
    chunks[0][WORD] ^= 1 << BIT


def flipped_in_one(pattern: str, chunks: Any) -> None:
    if pattern == "0xAA":
        chunks[0][3] ^= -(1 << 63)


def aliased(_: str, chunks: Any) -> None:
    """An address line is stuck: what was meant for one half of a block lies in the other as well."""
    half = 1 << 19
    chunks[0][:half] = chunks[0][half : 2 * half]


def memories() -> dict[str, Any]:
    device, written = Small(MEMORY), []

    def seen(name: str, chunks: Any) -> None:
        written.append((name, len({int(word) for word in chunks[0][:1000]}), sum(map(len, chunks))))

    found = {
        "well": all_of(memory_patterns.memory(device, soon(), seen)),
        "flipped": all_of(memory_patterns.memory(device, soon(), flipped)),
        "flipped in one": all_of(memory_patterns.memory(device, soon(), flipped_in_one)),
        "aliased": all_of(memory_patterns.memory(device, soon(), aliased)),
        "small": all_of(memory_patterns.memory(Small(1 << 20), soon())),
        "untold": all_of(memory_patterns.memory(Small(None), soon())),
        "late": all_of(memory_patterns.memory(device, soon(0.0))),
    }

    def late(pattern: str, _: object) -> None:
        if pattern == "own address inverted":
            CLOCK.added += 3600  # it takes more time than there is

    found["slow"] = all_of(memory_patterns.memory(Small(MEMORY // 4), soon(), late))
    return found | {"written": written}


def ways() -> dict[str, Any]:
    """What is tried of several ways, where their time and room are the test's own."""

    def way(amount: float, seconds: float, room: int = 0) -> checked_device.Variant:
        return checked_device.Variant(amount, {"amount": amount}, room, lambda: lambda: seconds)

    device, found = Counted(), {}
    for name, given in {
        "second": [way(10, 2.0), way(100, 10.0), way(400, 50.0)],
        "third has no room": [way(10, 2.0), way(100, 10.0), way(400, 20.0, 251)],
        "it grows no more": [way(10, 1.0), way(100, 9.8), way(400, 20.0, 251)],
        "second has no time": [way(10, 2.0), way(1e6, 1.0)],
        "no room": [way(10, 1.0, 251)],
    }.items():
        found[name] = plain(checked_device.timed_best(BLANK, device, given, soon()))
    asked = len(device.asked)
    found["no time"] = plain(checked_device.timed_best(BLANK, device, [way(10, 1.0)], soon(0.0)))
    return found | {"asked in no time": len(device.asked) - asked}


def burst() -> list[Any]:
    device = Changed(last_bit)
    device.is_well = True
    return all_of(compute.sustained(device, soon(2.0), lambda: device))


def stopped() -> dict[str, Any]:
    """What each error becomes: torch's own where that can be had on a CPU."""

    def raised(error: Exception) -> Any:
        raise error

    device = checked_device.of(torch, "cpu")
    cases: dict[str, Callable[[], Any]] = {
        "no room": lambda: torch.empty(1 << 60),
        "no kernel": lambda: torch.mm(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)),
        "no time": lambda: raised(SkipError(checked_device.NO_TIME)),
        "no package": lambda: __import__("no_such_package"),
        "broken": lambda: raised(RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")),
        "wrong shape": lambda: device.product("fp32", torch.ones(2, 3), torch.ones(2, 3)),
    }
    return {name: plain(checked_device.guarded(BLANK, case)) for name, case in cases.items()}


def looped() -> dict[str, Any]:
    device = checked_device.of(torch, "cpu")
    found = {
        "well": all_of(sampling_speed.loop(device, soon(), TINY)),
        "late": all_of(sampling_speed.loop(device, soon(0.0), TINY)),
        "no time": all_of(
            sampling_speed.loop(device, soon(30.0), (sampling_speed.Kind("ddpm-cat-256", "fp32", "ddim", 4096),))
        ),
        "no room": all_of(sampling_speed.loop(Small(1000), soon(), TINY[1:])),
    }

    def poisoned(self: components.Model, component: Any, device: str) -> Any:
        component = FILL(self, component, device)
        next(component.parameters()).view(-1)[0] = float("nan")
        return component

    components.Model._fill = poisoned  # type: ignore[method-assign]
    try:
        found["poisoned"] = all_of(sampling_speed.loop(device, soon(), TINY[:1]))
    finally:
        components.Model._fill = FILL  # type: ignore[method-assign]
    return found


def sums() -> list[bool]:
    """What two ranks have in sum, right and with one number wrong."""
    numbers = torch.arange(1000)
    right = numbers.float() * 3
    wrong = right.clone()
    wrong[700] += 1
    return [interconnect.is_sum(torch, each, numbers, 2) for each in (right, wrong)]


def examined() -> dict[str, Any]:
    """A whole examination, in this process."""
    events: list[WorkerEvent] = []
    request = Examination("cpu", time.time(), 3.0, ("copy", "numerics", "pinned"))
    run.examine(request, events.append, iter(["again 1.5 copy threads\n", "enough\n", "again 1 copy\n"]))
    broken = run.CHECKS["copy"]

    def lost(device: checked_device.Device, until: float) -> Iterator[Reading]:
        yield from copies.copy(device, until)
        raise RuntimeError("CUDA error: the device was lost")

    fallen: list[WorkerEvent] = []
    run.CHECKS["copy"] = broken._replace(probe=lost)
    try:
        run.examine(replace(request, asked_at=time.time()), fallen.append, iter([]))
    finally:
        run.CHECKS["copy"] = broken
    try:
        run.examine(replace(request, probes=("heat",)), events.append, iter([]))
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {"events": lines(events), "lost": lines(fallen), "refused": refused, "taken": lines(taken(request))}


def lines(events: list[WorkerEvent]) -> list[dict[str, Any]]:
    """Return the events as their lines have them."""
    return [json.loads(worker_events.encode(event)) for event in events]


def taken(request: Examination) -> list[WorkerEvent]:
    """An examination of a card that another process holds alone."""
    events: list[WorkerEvent] = []
    kept = checked_device.of

    def busy(torch: Any, name: str) -> checked_device.Device:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    checked_device.of = busy
    try:
        run.examine(request, events.append, iter(["again 1 copy\n"]))
    finally:
        checked_device.of = kept
    return events


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    CLOCK.own()
    torch.set_grad_enabled(False)
    device = checked_device.of(torch, "cpu")
    found = {
        "numbers": numbers(),
        "memories": memories(),
        "ways": ways(),
        "stopped": stopped(),
        "product": all_of(compute.product(device, soon(1.5))),
        "convolution": all_of(compute.convolution(device, soon(1.5))),
        "copy": all_of(copies.copy(device, soon(0.5))),
        "sustained": all_of(compute.sustained(device, soon(1.0))),
        "burst": burst(),
        "thread": all_of(compute.threads(device, soon(1.0))),
    }
    torch.set_num_threads(2)
    found |= {
        "threads": all_of(compute.threads(device, soon(1.0))),
        "threads after": torch.get_num_threads() == 2,
        "late": [all_of(probe(device, soon(0.0))) for probe in (compute.numerics, compute.sustained, compute.threads)],
    }
    torch.set_num_threads(1)
    found |= {"loops": looped(), "sums": sums(), "examined": examined()}
    out.write(json.dumps(found, allow_nan=False))
    out.flush()


if __name__ == "__main__":
    main()
