"""Measures the progress of a step of setup and reports it as text, at most every ten seconds.

A step calls a progress callback with (count, total, unit) while it works. From bytes the rate and the time left are
computed; other units ("files", "mirrors") are only counted. For a step without calls the text has the elapsed seconds.
For an installer in a child process the text has the bytes that the child has written.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

LINE_SECONDS = 10.0
_SAMPLE_SECONDS = 1.0  # the interval between two samples of the meter
_RATE_SECONDS = 30.0  # the rate is the mean over this many last seconds
_BYTES = "bytes"
_SIZES = (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000))


class Progress(Protocol):
    """Describe a progress callback: (count since the last call, total or 0 if it is not known, unit)."""

    def __call__(self, count: int, total: int, unit: str = "bytes", /) -> None:
        """Receive one progress report."""


def no_progress(_count: int, _total: int, _unit: str = "bytes", /) -> None:
    """Receive a progress report and do nothing; the default where no progress is shown."""


class Meter:
    """Measures the progress of the current step; several threads may report progress at once.

    Args:
        name: the name of the step.
        now: the current time of the clock, in seconds.
        written: returns the bytes that child processes of the step have written; used if the step reports no bytes.
    """

    def __init__(self, name: str, now: float, written: Callable[[], int] | None = None) -> None:
        """Start the measurement at zero."""
        self.name = name
        self._began = now
        self._written = written
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, count: int, total: int = 0, unit: str = _BYTES) -> None:
        """Add the count since the last call, and note the total (0: not known)."""
        with self._lock:
            self._done[unit] = self._done.get(unit, 0) + count
            if total:
                self._total[unit] = total

    def sample(self, now: float) -> None:
        """Record the byte count at the time `now`; the rate is computed from the records of the last 30 s."""
        with self._lock:
            reported = self._done.get(_BYTES, 0)
        size = reported if reported or self._written is None else self._written()
        self._samples.append((now, size))
        while len(self._samples) > 2 and now - self._samples[0][0] > _RATE_SECONDS:
            self._samples.popleft()

    def share(self) -> float | None:
        """Return the finished fraction of the work, from 0 to 1; None if no total is known."""
        with self._lock:
            for unit in (_BYTES, *self._total):
                if self._total.get(unit) and self._done.get(unit):
                    return min(1.0, self._done[unit] / self._total[unit])
        return None

    def text(self, now: float) -> str:
        """Return the counts, the rate and the time left as text; without a known total, the elapsed time instead."""
        with self._lock:
            done, total = dict(self._done), dict(self._total)
        reports_bytes = bool(done.pop(_BYTES, 0))
        total_bytes = total.pop(_BYTES, 0)
        size = self._samples[-1][1] if self._samples else 0
        parts = [_count_text(unit, count, total.get(unit, 0)) for unit, count in done.items()]
        rate = self._rate(now)
        if size:
            parts.append(_count_text("bytes" if reports_bytes else "bytes written", size, total_bytes))
            if rate:
                parts.append(f"{format_bytes(rate)}/s")
        left = (total_bytes - size) / rate if rate and total_bytes > size else self._seconds_left(done, total, now)
        elapsed = f"{format_duration(now - self._began)} so far"
        parts.append(elapsed if left is None else f"about {format_duration(left)} left")
        return ", ".join(parts)

    def _rate(self, now: float) -> float:
        """Return the mean rate over the last 30 s, in bytes per second."""
        first = self._samples[0] if len(self._samples) > 1 else (self._began, 0)
        last = self._samples[-1] if self._samples else (now, 0)
        return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def _seconds_left(self, done: dict[str, int], total: dict[str, int], now: float) -> float | None:
        """Return the seconds left for the first counted unit, at the mean rate so far; None without a known total."""
        for unit, count in done.items():
            if count and total.get(unit, 0) > count:
                return (now - self._began) * (total[unit] - count) / count
        return None


class Ticker:
    """Samples a meter in a thread during a `with` block, and emits the meter's text when no output came for a while.

    Args:
        meter: the meter of the current step.
        emit: called with the text.
        interval: the seconds without other output after which the text is emitted.
        clock: returns the time in seconds; tests replace it.
        pause: waits for the given seconds and returns True once the `with` block has ended; tests replace it.
    """

    def __init__(
        self,
        meter: Meter,
        emit: Callable[[str], None],
        *,
        interval: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        """Prepare the thread without starting it."""
        self._meter = meter
        self._emit = emit
        self._interval = interval
        self._clock = clock
        self._ended = threading.Event()
        self._pause = pause or self._ended.wait
        self._last_output = clock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._meter.sample(self._clock())  # work done before this sample does not count for the rate
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread; no text is emitted afterwards."""
        self._ended.set()
        self._thread.join()

    def reset(self) -> None:
        """Start the interval again, because the caller has just shown another line to the user."""
        self._last_output = self._clock()

    def _run(self) -> None:
        while not self._pause(min(self._interval, _SAMPLE_SECONDS)):
            now = self._clock()
            self._meter.sample(now)
            if now - self._last_output >= self._interval:
                self._last_output = now
                with contextlib.suppress(OSError, ValueError):  # a closed stream must not end the work
                    self._emit(self._meter.text(now))


class ChildWrites:
    """Counts the bytes that the child processes have written, by the system's counters; 0 on macOS, which has none."""

    def __init__(self) -> None:
        """Start with no counted process."""
        self._written: dict[tuple[int, float], int] = {}

    def __call__(self) -> int:
        """Return the bytes that all child processes have written so far; an ended process keeps its last count."""
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, AttributeError, OSError):  # macOS has no counters
                counters = child.io_counters()
                count = getattr(counters, "write_chars", counters.write_bytes)
                self._written[child.pid, child.create_time()] = count
        return sum(self._written.values())


def format_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, such as "812 MB" or "2.9 GB"."""
    for name, unit in _SIZES:
        if count >= unit:
            scaled = count / unit
            return f"{scaled:.1f} {name}" if scaled < 9.95 else f"{scaled:.0f} {name}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """Return a duration with its units, such as "45 s", "2 min 30 s" or "1 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(whole / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _count_text(unit: str, count: int, total: int) -> str:
    """Return "COUNT of TOTAL UNIT", or "COUNT UNIT" if the total is below the count, because it was an estimate."""
    is_bytes = unit.partition(" ")[0] == _BYTES
    done_text, total_text = (format_bytes(count), format_bytes(total)) if is_bytes else (f"{count:,}", f"{total:,}")
    text = f"{done_text} of {total_text}" if total >= count > 0 else done_text
    name = unit.removeprefix(_BYTES).strip() if is_bytes else unit
    return f"{text} {name}".rstrip()
