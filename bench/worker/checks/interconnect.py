"""Measure the links between devices: sums over all of them, and copies from card to card."""

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

# Each rank is a process of its own that can import only this package, like the worker.
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
_GRACE_SECONDS = 15.0  # the grace period after which a hanging rank is killed
_CYCLE = 97  # the summed numbers are below this; fp32 holds the sums of up to 590 ranks exactly


@dataclass(frozen=True)
class RankTask:
    """Describe the task of one rank. `meeting`: the file through which the ranks connect."""

    rank: int
    devices: tuple[str, ...]
    meeting: str
    seconds: float


def run(request: LinkTest, emit: Emit) -> None:
    """Measure the links between the devices, and emit a reading of each."""
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
    """Return the bus bandwidth of each device while all of them compute a sum: the best of several sizes.

    The bandwidth is bytes * 2 (n - 1) / n over the seconds, which does not depend on the number of ranks (source:
    NVIDIA/nccl-tests, doc/PERFORMANCE.md).

    Args:
        devices: one rank each; NCCL where all are CUDA devices, else gloo over the loopback interface.
        seconds: the time for all of it.
    """
    blank = Reading("links", f"all-reduce of {len(devices)}", devices[0], "B/s", None)
    return checked_device.guarded(blank, partial(_all_reduce, devices, seconds))


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
    # The fault of one rank counts for all, and is the reason why others were killed.
    failures = [reading for reading in readings if reading.fault is not None] or [
        reading for reading in readings if reading.value is None
    ]
    if not failures and len(readings) < len(ranks):
        missing = answers.index(None)
        raise SkipError(f"rank {missing} ended with exit code {ranks[missing].process.returncode} and gave no reading")
    return (failures or readings)[0]  # all ranks report the same rates


class _Rank:
    """Run the process of one rank."""

    def __init__(self, task: RankTask, answer: Path) -> None:
        """Start the process."""
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
            # stdin stays open; its end of file shows the rank that this process has ended.
            self.process.stdin.write(dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> Reading | None:
        """Return the reading of the rank; None where it has printed none."""
        text = self._answer.read_text(encoding="utf-8")
        return record(json.loads(text), Reading, "reading") if text.endswith("\n") else None

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None  # noqa: S101 (opened as a pipe)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _wait(ranks: Sequence[_Rank], seconds: float) -> None:
    """Wait until all ranks have ended, one has failed (the others would wait for it), or the time is over."""
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
                rank.process.kill()  # else the pool would wait for a hanging rank


def rank() -> None:
    """Run one rank: read a RankTask from stdin, compute the sums with the others, and print the reading."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task: RankTask = record(json.loads(sys.stdin.readline()), RankTask, "part")
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    import torch

    torch.set_grad_enabled(False)
    blank = Reading("links", f"all-reduce of {len(task.devices)}", task.devices[0], "B/s", None)
    reading = checked_device.guarded(blank, partial(_sum, torch, task, blank))
    answers.write(dumps(reading) + "\n")
    answers.flush()
    os._exit(0 if reading.value is not None else 1)  # a library's teardown must not turn a good reading into a crash


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _sum(torch: Any, task: RankTask, blank: Reading) -> Reading:
    import torch.distributed as world

    until = time.perf_counter() + task.seconds
    device = checked_device.of(torch, task.devices[task.rank])
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
        # All ranks use the time of the slowest one, and the largest lateness; below 0, time is left.
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
        if -lateness < call_seconds * _MAX_TIMES:  # the next size takes several times as long
            break
    return best


def _maxima_over_ranks(device: Device, world: Any, numbers: Sequence[float]) -> list[float]:
    """Return the maximum over all ranks of each number."""
    maxima = device.torch.tensor(numbers, device=device.name, dtype=device.torch.float64)
    world.all_reduce(maxima, op=world.ReduceOp.MAX)
    return [float(number) for number in maxima.cpu()]


def is_sum(torch: Any, result: Any, numbers: Any, ranks: int) -> bool:
    """Return whether the result equals the sum over ranks, where rank r contributes r + 1 times the numbers."""
    return bool(torch.equal(result, numbers.float() * (ranks * (ranks + 1) // 2)))


def peers(torch: Any, devices: Sequence[str], until: float) -> Iterator[Reading]:
    """Yield the rate of a copy from each card to each other card, and check that the bytes arrive."""
    pairs = [(one, two) for one in devices for two in devices if one != two]
    for number, (one, two) in enumerate(pairs):
        now = time.perf_counter()
        blank = Reading("links", f"peer {one} to {two}", one, "B/s", None)
        yield checked_device.guarded(
            blank, partial(_peer, torch, (one, two), now + (until - now) / (len(pairs) - number), blank)
        )


def _peer(torch: Any, pair: tuple[str, str], until: float, blank: Reading) -> Reading:
    if time.perf_counter() >= until:
        raise SkipError(checked_device.NO_TIME)
    other, device = checked_device.of(torch, pair[1]), checked_device.of(torch, pair[0])
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
