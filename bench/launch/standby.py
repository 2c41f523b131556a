"""Starts several workers at the same time, which import their libraries and then wait for the request of a case."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from bench.core.worker_requests import Preparation
from bench.launch.worker_process import Worker

if TYPE_CHECKING:
    from pathlib import Path

    from provision.host.facts import HostFacts

_PREPARATION_SECONDS = 120.0
_MOST = 8
_CORES = 2  # cores of the host for each worker that imports at the same time
_BYTES = 4e9  # bytes of the host's memory for each of these workers: three times the need of an import


def fitting(machine: HostFacts) -> int:
    """Return the number of workers that can import at the same time, by the cores and the memory of the host."""
    cores = min(machine.cores, machine.cpu_quota or machine.cores)
    return int(min(_MOST, cores // _CORES, machine.memory_bytes // _BYTES))


class StandbyWorkers:
    """Hold prepared workers of one interpreter: they have imported their libraries and wait for a request.

    The import of torch, diffusers and transformers takes 9 of the 12 s that a case takes on an H100 besides its images
    (measured with torch 2.11 and diffusers 0.42). An import uses one core, so a host with many cores imports for
    several cases at once. A prepared worker uses neither the device nor a core, and each case still has its own
    process.
    """

    def __init__(self, python: Path, hub: Path, size: int) -> None:
        """Start without workers.

        Args:
            python: the interpreter of the workers.
            hub: the Hugging Face cache folder that the workers may read.
            size: the number of workers to start at once; with fewer than 2 no worker is ever prepared.
        """
        self._python, self._hub, self.size = python, hub, size
        self._workers: list[Worker] = []
        self.seconds_per_worker = 0.0

    @property
    def count(self) -> int:
        """Return the number of prepared workers."""
        return len(self._workers)

    def fill(self, needed: int) -> None:
        """Prepare workers if there are none, and wait until each of them has imported its libraries.

        Args:
            needed: the number of workers that the rest of the run needs. If it is 1, none is prepared.
        """
        count = min(self.size, needed)
        if self._workers or count < 2:
            return
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(Worker(Preparation(), self._python, self._hub)) for _ in range(count)]
            for worker in started:
                worker.listen(began + _PREPARATION_SECONDS, worker.is_prepared)
            stack.pop_all()
        self._workers = [worker for worker in started if worker.is_prepared()]
        for worker in started:
            if worker not in self._workers:  # it failed, so the worker of a case fails too and reports the reason
                worker.__exit__(None, None, None)
        self.seconds_per_worker = (time.monotonic() - began) / count

    def take(self, python: Path) -> Worker | None:
        """Return a prepared worker, which the caller has to end.

        None if there is no prepared worker of this interpreter.
        """
        return self._workers.pop() if self._workers and python == self._python else None

    def close(self) -> None:
        """End the prepared workers that were not taken."""
        while self._workers:
            self._workers.pop().__exit__(None, None, None)
