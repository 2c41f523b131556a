"""Measure the links between GPUs: sums over all of them (all-reduce), and copies from card to card."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core.codec import dumps, record
from bench.core.errors import SkipError
from bench.core.validation_records import Reading
from bench.core.worker_events import DeviceExamined, ExaminationReport, PhaseEntered, ReadingTaken
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.worker_events import Emit
    from bench.core.worker_requests import LinkTest
    from bench.worker.checks.device import Device

# Each rank is a process of its own. Like a worker, it can import `bench` and the packages of the measured environment.
_RANK = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]  # no module of the working folder takes the place of another
import types
sys.modules["bench"] = types.ModuleType("bench")
sys.modules["bench"].__path__ = [sys.argv[1]]
from bench.worker.checks import interconnect
interconnect.rank()
"""
_CARD_SIZES = (1 << 20, 16 << 20, 64 << 20, 256 << 20)
_HOST_SIZES = (1 << 20, 16 << 20, 64 << 20)
_PEER_BYTES = 256 << 20
_MAX_TIMES = 20
_GRACE_SECONDS = 15.0  # a rank that hangs is killed this long after its time limit
_CYCLE = 97  # the numbers to sum are below this, so sums over up to 590 ranks are exact in fp32


@dataclass(frozen=True)
class RankTask:
    """Describe the task of one rank, which is one process per device in torch.distributed.

    `meeting`: the file through which the ranks connect. `seconds`: the time limit.
    """

    rank: int
    devices: tuple[str, ...]
    meeting: str
    seconds: float


def run(request: LinkTest, emit: Emit) -> None:
    """Measure the links between the devices, and emit their readings."""
    began = time.perf_counter()
    ends = began + request.budget_seconds - (time.time() - request.asked_at)
    are_cards = all(device.startswith("cuda") for device in request.devices)
    emit(PhaseEntered("links"))
    half = (ends - began) / (2 if are_cards else 1)
    emit(ReadingTaken(all_reduce(request.devices, half)))
    if are_cards:
        import torch

        for reading in peers(torch, request.devices, ends):
            emit(ReadingTaken(reading))
    emit(DeviceExamined(ExaminationReport(seconds={"links": time.perf_counter() - began})))


def all_reduce(devices: Sequence[str], seconds: float) -> Reading:
    """Return the bus bandwidth of an all-reduce over all devices, in bytes a second: the best of several sizes.

    The bandwidth is bytes * 2 (n - 1) / n over the seconds, which does not depend on the number n of ranks (source:
    NVIDIA/nccl-tests, doc/PERFORMANCE.md).

    Args:
        devices: one rank is started for each. If all are CUDA devices, they use NCCL, else gloo over the loopback
            interface.
        seconds: the time limit.
    """
    blank = Reading("links", f"all-reduce of {len(devices)}", devices[0], "B/s", None)
    return checked_device.reading_or_error(blank, partial(_all_reduce, devices, seconds))


def _all_reduce(devices: Sequence[str], seconds: float) -> Reading:
    if len(devices) < 2:
        raise SkipError("there is only one device")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ranks = []
        for number in range(len(devices)):
            task = RankTask(number, tuple(devices), str(Path(folder) / "meeting"), seconds)
            ranks.append(_Rank(task, Path(folder) / f"answer-{number}"))
            stack.callback(ranks[-1].end)
        _wait(ranks, seconds + _GRACE_SECONDS)
        answers = [rank.answer() for rank in ranks]
    readings = [reading for reading in answers if reading is not None]
    # The fault of one rank is the fault of the test, and the other ranks may have been killed because of it.
    failures = [reading for reading in readings if reading.fault is not None] or [
        reading for reading in readings if reading.value is None
    ]
    if not failures and len(readings) < len(ranks):
        missing = answers.index(None)
        raise SkipError(f"rank {missing} ended without a reading (exit code {ranks[missing].process.returncode})")
    return (failures or readings)[0]  # all ranks report the same rates


class _Rank:
    """Manage the process of one rank."""

    def __init__(self, task: RankTask, answer: Path) -> None:
        """Start the process; it writes its reading into the file `answer`."""
        self._answer = answer
        environment = dict(os.environ) | {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        with answer.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _RANK, str(Path(__file__).resolve().parent.parent.parent)],
                stdin=subprocess.PIPE,
                stdout=file,
                env=environment,
            )
        assert self.process.stdin is not None  # noqa: S101 (opened as a pipe)
        with contextlib.suppress(BrokenPipeError):
            # stdin stays open. A rank ends at its end of file, that is, when this process has ended.
            self.process.stdin.write(dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> Reading | None:
        """Return the reading of the rank; None if it has written none."""
        text = self._answer.read_text(encoding="utf-8")
        return record(json.loads(text), Reading, "reading") if text.endswith("\n") else None

    def end(self) -> None:
        """Kill the process, and wait for its end."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None  # noqa: S101 (opened as a pipe)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _wait(ranks: Sequence[_Rank], seconds: float) -> None:
    """Wait until all ranks have ended, one has failed, or the time is over; then kill all ranks.

    After a failure the other ranks would wait for the failed one.
    """
    until = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
        waiting = {pool.submit(rank.process.wait) for rank in ranks}
        try:
            while waiting:
                left = until - time.monotonic()
                first = concurrent.futures.FIRST_COMPLETED
                done, waiting = concurrent.futures.wait(waiting, max(0.0, left), return_when=first)
                if not done or any(process.result() for process in done):
                    return
        finally:
            for rank in ranks:
                rank.process.kill()  # otherwise the pool waits for a rank that hangs


def rank() -> None:
    """Run as the process of one rank: read a RankTask from stdin, sum with the other ranks, print the reading."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task: RankTask = record(json.loads(sys.stdin.readline()), RankTask, "part")
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    import torch

    torch.set_grad_enabled(False)
    blank = Reading("links", f"all-reduce of {len(task.devices)}", task.devices[0], "B/s", None)
    reading = checked_device.reading_or_error(blank, partial(_sum, torch, task, blank))
    answers.write(dumps(reading) + "\n")
    answers.flush()
    os._exit(0 if reading.value is not None else 1)  # a library that crashes at exit must not change the exit code


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _sum(torch: Any, task: RankTask, blank: Reading) -> Reading:
    import torch.distributed as world

    until = time.perf_counter() + task.seconds
    device = checked_device.access(torch, task.devices[task.rank])
    if not device.is_card:
        torch.set_num_threads(1)
    are_cards = all(device_name.startswith("cuda") for device_name in task.devices)
    try:
        world.init_process_group(
            "nccl" if are_cards else "gloo",
            init_method=Path(task.meeting).as_uri(),
            rank=task.rank,
            world_size=len(task.devices),
            timeout=timedelta(seconds=task.seconds + _GRACE_SECONDS),
        )
        return _sums(device, world, task, blank, until)
    except world.DistError as error:  # the ranks cannot connect: no network or no shared memory
        raise SkipError(" ".join(str(error).split())[:300]) from None


def _sums(device: Device, world: Any, task: RankTask, blank: Reading, until: float) -> Reading:
    ranks, best = len(task.devices), blank
    for size in _CARD_SIZES if device.is_card else _HOST_SIZES:
        numbers = device.torch.arange(size // 4, device=device.name) % _CYCLE
        own_numbers = numbers.float() * (task.rank + 1)
        call = partial(world.all_reduce, own_numbers.clone())
        device.timed(call)  # the first call opens the connections
        # All ranks use the seconds of the slowest one, and the time of the latest one past `until` (negative before).
        call_seconds, lateness = _maxima_over_ranks(device, world, [device.timed(call), time.perf_counter() - until])
        times = max(1, min(_MAX_TIMES, int(-lateness / 4 / call_seconds)))
        seconds = _maxima_over_ranks(device, world, [device.timed(call) for _ in range(times)])
        world.all_reduce(own_numbers)
        if not is_sum(device.torch, own_numbers, numbers, ranks):
            figures = {"bytes": float(size), "ranks": float(ranks)}
            return replace(blank, fault=f"the sum over {ranks} ranks is wrong ({size} bytes per rank)", figures=figures)
        rates = tuple(size * 2 * (ranks - 1) / ranks / duration for duration in seconds)
        if best.value is None or max(rates) > best.value:
            best = replace(best, value=max(rates), samples=rates, figures={"bytes": float(size), "ranks": float(ranks)})
        if -lateness < call_seconds * _MAX_TIMES:  # the next size takes several times as long, so time is too short
            break
    return best


def _maxima_over_ranks(device: Device, world: Any, numbers: Sequence[float]) -> list[float]:
    """Return, for each number, the maximum of the values that all ranks have for it."""
    maxima = device.torch.tensor(numbers, device=device.name, dtype=device.torch.float64)
    world.all_reduce(maxima, op=world.ReduceOp.MAX)
    return [float(number) for number in maxima.cpu()]


def is_sum(torch: Any, result: Any, numbers: Any, ranks: int) -> bool:
    """Return whether a result equals the sum over all ranks, where rank r contributes r + 1 times the numbers."""
    return bool(torch.equal(result, numbers.float() * (ranks * (ranks + 1) // 2)))


def peers(torch: Any, devices: Sequence[str], until: float) -> Iterator[Reading]:
    """Yield the rate of a copy from each card to each other card in bytes a second; bytes that differ are a fault."""
    pairs = [(one, two) for one in devices for two in devices if one != two]
    for number, (one, two) in enumerate(pairs):
        now = time.perf_counter()
        blank = Reading("links", f"peer {one} to {two}", one, "B/s", None)
        yield checked_device.reading_or_error(
            blank, partial(_peer, torch, (one, two), now + (until - now) / (len(pairs) - number), blank)
        )


def _peer(torch: Any, pair: tuple[str, str], until: float, blank: Reading) -> Reading:
    if time.perf_counter() >= until:
        raise SkipError(checked_device.NO_TIME)
    other, device = checked_device.access(torch, pair[1]), checked_device.access(torch, pair[0])
    source, expected = (torch.arange(_PEER_BYTES // 8, device=name) for name in pair)
    target = torch.zeros_like(expected)

    def copy() -> None:
        target.copy_(source)
        other.wait()

    device.timed(copy)
    rates: tuple[float, ...] = ()
    while not rates or (len(rates) < _MAX_TIMES and time.perf_counter() < until):
        rates += (_PEER_BYTES / device.timed(copy),)
    direct = torch.cuda.can_device_access_peer(*pair)
    figures = {"bytes": float(_PEER_BYTES), "direct": float(direct)}
    fault = None if torch.equal(target, expected) else "the received bytes differ from the sent ones"
    return replace(blank, value=max(rates), samples=rates, figures=figures, fault=fault)
