"""Questions about what lies between devices: all of them summing at once, and copies from card to card."""

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

    from bench.core.protocol import Linking
    from bench.core.worker_events import Emit
    from bench.worker.checks.device import Device

# Each rank is a process of its own that sees this package alone, as the worker does.
_RANK = """
import sys, types
sys.path[:] = [entry for entry in sys.path if entry]
sys.modules["bench"] = types.ModuleType("bench")
sys.modules["bench"].__path__ = [sys.argv[1]]
from bench.worker.checks import interconnect
interconnect.rank()
"""
_CARD_SIZES = (1 << 20, 16 << 20, 64 << 20, 256 << 20)
_HOST_SIZES = (1 << 20, 16 << 20, 64 << 20)
_PEER_BYTES = 256 << 20
_MOST_TIMES = 20
_GRACE_SECONDS = 15.0  # beyond its time, before a rank that hangs is ended
_CYCLE = 97  # the numbers that are summed: up to 590 ranks fp32 holds their sums exactly


@dataclass(frozen=True)
class RankTask:
    """What one rank is told. `meeting`: a file by which the ranks find each other."""

    rank: int
    devices: tuple[str, ...]
    meeting: str
    seconds: float


def run(request: Linking, emit: Emit) -> None:
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
    """What each device passes on a second while all of them sum what they have: the best of several sizes.

    The bandwidth is that of the bus: bytes * 2 (n - 1) / n over the seconds, which does not hang on the number of ranks
    (source: NVIDIA/nccl-tests, doc/PERFORMANCE.md).

    Args:
        devices: a rank each; NCCL where all are cards, else gloo over the loopback.
        seconds: that all of it may take.
    """
    blank = Reading("links", f"all-reduce of {len(devices)}", devices[0], "B/s", None)
    return checked_device.asked(blank, partial(_all_reduce, devices, seconds))


def _all_reduce(devices: Sequence[str], seconds: float) -> Reading:
    if len(devices) < 2:
        raise SkipError("there is one device alone")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ranks = []
        for number in range(len(devices)):
            part = RankTask(number, tuple(devices), str(Path(folder) / "meeting"), seconds)
            ranks.append(_Rank(part, Path(folder) / f"answer-{number}"))
            stack.callback(ranks[-1].end)
        _wait(ranks, seconds + _GRACE_SECONDS)
        answers = [rank.answer() for rank in ranks]
    told = [each for each in answers if each is not None]
    # Whatever one of them found wrong counts for all, and explains why others were ended.
    wrong = [each for each in told if each.fault is not None] or [each for each in told if each.value is None]
    if not wrong and len(told) < len(ranks):
        missing = answers.index(None)
        raise SkipError(f"rank {missing} ended with exit {ranks[missing].process.returncode} and without an answer")
    return (wrong or told)[0]  # the rates are agreed on


class _Rank:
    """The process of one rank."""

    def __init__(self, part: RankTask, answer: Path) -> None:
        """Start it."""
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
            # It stays open: its end tells the rank that we have ended.
            self.process.stdin.write(dumps(part).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> Reading | None:
        """What it found; None where it has said nothing."""
        text = self._answer.read_text(encoding="utf-8")
        return record(json.loads(text), Reading, "reading") if text.endswith("\n") else None

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None  # noqa: S101 (opened as a pipe)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _wait(ranks: Sequence[_Rank], seconds: float) -> None:
    """Until all have ended, or one has failed (the others would wait for it), or the time is over."""
    until = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
        waiting = {pool.submit(rank.process.wait) for rank in ranks}
        try:
            while waiting:
                left = until - time.monotonic()
                first = concurrent.futures.FIRST_COMPLETED
                done, waiting = concurrent.futures.wait(waiting, max(0.0, left), return_when=first)
                if not done or any(each.result() for each in done):
                    return
        finally:
            for rank in ranks:
                rank.process.kill()  # else the pool would wait for what hangs


def rank() -> None:
    """The life of one rank: it reads a Part, sums with the others, and prints its reading."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    part: RankTask = record(json.loads(sys.stdin.readline()), RankTask, "part")
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    import torch

    torch.set_grad_enabled(False)
    blank = Reading("links", f"all-reduce of {len(part.devices)}", part.devices[0], "B/s", None)
    reading = checked_device.asked(blank, partial(_sum, torch, part, blank))
    answers.write(dumps(reading) + "\n")
    answers.flush()
    os._exit(0 if reading.value is not None else 1)  # a library's teardown must not turn a good answer into a crash


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _sum(torch: Any, part: RankTask, blank: Reading) -> Reading:
    import torch.distributed as world

    until = time.perf_counter() + part.seconds
    device = checked_device.of(torch, part.devices[part.rank])
    if not device.is_card:
        torch.set_num_threads(1)
    are_cards = all(each.startswith("cuda") for each in part.devices)
    try:
        world.init_process_group(
            "nccl" if are_cards else "gloo",
            init_method=Path(part.meeting).as_uri(),
            rank=part.rank,
            world_size=len(part.devices),
            timeout=timedelta(seconds=part.seconds + _GRACE_SECONDS),
        )
        return _sums(device, world, part, blank, until)
    except world.DistError as error:  # no network, no shared memory: what lies between them is not set up
        raise SkipError(" ".join(str(error).split())[:300]) from None


def _sums(device: Device, world: Any, part: RankTask, blank: Reading, until: float) -> Reading:
    ranks, best = len(part.devices), blank
    for size in _CARD_SIZES if device.is_card else _HOST_SIZES:
        numbers = device.torch.arange(size // 4, device=device.name) % _CYCLE
        mine = numbers.float() * (part.rank + 1)
        call = partial(world.all_reduce, mine.clone())
        device.timed(call)  # the first makes their connections
        # All of them go by the slowest rank's time, and by how late it is where it is latest: below 0, time is left.
        once, late = _agreed(device, world, [device.timed(call), time.perf_counter() - until])
        times = max(1, min(_MOST_TIMES, int(-late / 4 / once)))
        seconds = _agreed(device, world, [device.timed(call) for _ in range(times)])
        world.all_reduce(mine)
        if not is_sum(device.torch, mine, numbers, ranks):
            figures = {"bytes": float(size), "ranks": float(ranks)}
            return replace(blank, fault=f"the sum over {ranks} ranks is wrong, of {size} bytes each", figures=figures)
        rates = tuple(size * 2 * (ranks - 1) / ranks / each for each in seconds)
        if best.value is None or max(rates) > best.value:
            best = replace(best, value=max(rates), samples=rates, figures={"bytes": float(size), "ranks": float(ranks)})
        if -late < once * _MOST_TIMES:  # the next size takes several times as long
            break
    return best


def _agreed(device: Device, world: Any, numbers: Sequence[float]) -> list[float]:
    """The largest that any rank has, of each number."""
    told = device.torch.tensor(numbers, device=device.name, dtype=device.torch.float64)
    world.all_reduce(told, op=world.ReduceOp.MAX)
    return [float(each) for each in told.cpu()]


def is_sum(torch: Any, found: Any, numbers: Any, ranks: int) -> bool:
    """Whether that is what ranks have in sum where the first has the numbers, the second twice each, and so on."""
    return bool(torch.equal(found, numbers.float() * (ranks * (ranks + 1) // 2)))


def peers(torch: Any, devices: Sequence[str], until: float) -> Iterator[Reading]:
    """What a copy from each card to each other one moves a second, and whether it arrives."""
    pairs = [(one, two) for one in devices for two in devices if one != two]
    for number, (one, two) in enumerate(pairs):
        now = time.perf_counter()
        blank = Reading("links", f"peer {one} to {two}", one, "B/s", None)
        yield checked_device.asked(
            blank, partial(_peer, torch, (one, two), now + (until - now) / (len(pairs) - number), blank)
        )


def _peer(torch: Any, pair: tuple[str, str], until: float, blank: Reading) -> Reading:
    if time.perf_counter() >= until:
        raise SkipError(checked_device.NO_TIME)
    other, device = checked_device.of(torch, pair[1]), checked_device.of(torch, pair[0])
    source, right = (torch.arange(_PEER_BYTES // 8, device=name) for name in pair)
    target = torch.zeros_like(right)

    def copy() -> None:
        target.copy_(source)
        other.wait()

    device.timed(copy)
    rates: tuple[float, ...] = ()
    while not rates or (len(rates) < _MOST_TIMES and time.perf_counter() < until):
        rates += (_PEER_BYTES / device.timed(copy),)
    direct = torch.cuda.can_device_access_peer(*pair)
    figures = {"bytes": float(_PEER_BYTES), "direct": float(direct)}
    fault = None if torch.equal(target, right) else "what arrived is not what was sent"
    return replace(blank, value=max(rates), samples=rates, figures=figures, fault=fault)
