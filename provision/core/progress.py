"""Shows what is at work, how much of it is done and how long it will take: words for a display, and a line each ten s.

A step reports (count, total, unit) while it works. Bytes give the rate and the time left; other units ("files",
"mirrors") are counted. What reports nothing shows the seconds so far, and an installer that runs as a child the bytes
that it has written.
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
_LOOK_SECONDS = 1.0
_RATE_SECONDS = 30.0  # the rate is that of the last so many seconds
_BYTES = "bytes"
_SIZES = (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000))


class Progress(Protocol):
    """Report progress: the count since the last call, the total (0: not known), and the unit."""

    def __call__(self, count: int, total: int, unit: str = "bytes", /) -> None:
        """Take it."""


def no_progress(_count: int, _total: int, _unit: str = "bytes", /) -> None:
    """Report nothing."""


class Meter:
    """Measure the progress of the step at work. Threads may report to it."""

    def __init__(self, what: str, now: float, written: Callable[[], int] | None = None) -> None:
        """Take its name, the clock's time, and what counts the bytes that its children write, where it reports none."""
        self.what = what
        self._began = now
        self._written = written
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._marks: deque[tuple[float, int]] = deque()

    def add(self, count: int, total: int = 0, unit: str = _BYTES) -> None:
        """Take what is done since the last call, and how much there is in all (0: not known)."""
        with self._lock:
            self._done[unit] = self._done.get(unit, 0) + count
            if total:
                self._total[unit] = total

    def look(self, now: float) -> None:
        """Note how far it is, so that the rate is that of the last seconds."""
        with self._lock:
            reported = self._done.get(_BYTES, 0)
        size = reported if reported or self._written is None else self._written()
        self._marks.append((now, size))
        while len(self._marks) > 2 and now - self._marks[0][0] > _RATE_SECONDS:
            self._marks.popleft()

    def share(self) -> float | None:
        """The part that is done, from 0 to 1; None where the total is not known."""
        with self._lock:
            for unit in (_BYTES, *self._total):
                if self._total.get(unit) and self._done.get(unit):
                    return min(1.0, self._done[unit] / self._total[unit])
        return None

    def words(self, now: float) -> str:
        """Return how much is done, how fast and how long it will take, else how long it has taken."""
        with self._lock:
            done, total = dict(self._done), dict(self._total)
        reports = bool(done.pop(_BYTES, 0))
        whole = total.pop(_BYTES, 0)
        size = self._marks[-1][1] if self._marks else 0
        parts = [_counted(unit, count, total.get(unit, 0)) for unit, count in done.items()]
        rate = self._rate(now)
        if size:
            parts.append(_counted("bytes" if reports else "bytes written", size, whole))
            if rate:
                parts.append(f"{size_words(rate)}/s")
        left = (whole - size) / rate if rate and whole > size else self._left(done, total, now)
        parts.append(f"{span_words(now - self._began)} so far" if left is None else f"about {span_words(left)} left")
        return ", ".join(parts)

    def _rate(self, now: float) -> float:
        """Bytes a second, of late."""
        first = self._marks[0] if len(self._marks) > 1 else (self._began, 0)
        last = self._marks[-1] if self._marks else (now, 0)
        return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def _left(self, done: dict[str, int], total: dict[str, int], now: float) -> float | None:
        """Seconds that what is counted will take, at the pace so far."""
        for unit, count in done.items():
            if count and total.get(unit, 0) > count:
                return (now - self._began) * (total[unit] - count) / count
        return None


class Ticker:
    """Looks at a meter from a thread while `with` lasts, and says its words whenever nothing was said for a while.

    Args:
        meter: what is at work.
        say: told the words.
        each: the seconds of silence.
        clock: the seconds; tests have their own.
        pause: waits so many seconds, and returns True when it is over; tests have their own.
    """

    def __init__(
        self,
        meter: Meter,
        say: Callable[[str], None],
        *,
        each: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        """Begin nothing yet."""
        self._meter = meter
        self._say = say
        self._each = each
        self._clock = clock
        self._over = threading.Event()
        self._pause = pause or self._over.wait
        self._said = clock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._meter.look(self._clock())  # what is done already has no rate
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it: nothing is said any more."""
        self._over.set()
        self._thread.join()

    def heard(self) -> None:
        """Something else has been said: the silence begins anew."""
        self._said = self._clock()

    def _run(self) -> None:
        while not self._pause(min(self._each, _LOOK_SECONDS)):
            now = self._clock()
            self._meter.look(now)
            if now - self._said >= self._each:
                self._said = now
                with contextlib.suppress(OSError, ValueError):  # a stream that is gone ends no work
                    self._say(self._meter.words(now))


class ChildWrites:
    """The bytes that our children have written to files, as the system counts them; 0 where it does not."""

    def __init__(self) -> None:
        """Know no child yet."""
        self._known: dict[tuple[int, float], int] = {}

    def __call__(self) -> int:
        """Look at those that run now; what has ended keeps what it was last seen with."""
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, AttributeError, OSError):  # macOS counts none
                counters = child.io_counters()
                count = getattr(counters, "write_chars", counters.write_bytes)
                self._known[child.pid, child.create_time()] = count
        return sum(self._known.values())


def size_words(count: float) -> str:
    """Bytes as people read them: 812 MB, 2.9 GB."""
    for name, unit in _SIZES:
        if count >= unit:
            shown = count / unit
            return f"{shown:.1f} {name}" if shown < 9.95 else f"{shown:.0f} {name}"
    return f"{count:.0f} B"


def span_words(seconds: float) -> str:
    """A time as people read it: 45 s, 2 min 30 s, 1 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(whole / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _counted(unit: str, count: int, total: int) -> str:
    """So many of so many; a total that is less than what is done was a guess, and is left out."""
    is_bytes = unit.partition(" ")[0] == _BYTES
    done, whole = (size_words(count), size_words(total)) if is_bytes else (f"{count:,}", f"{total:,}")
    said = f"{done} of {whole}" if total >= count > 0 else done
    name = unit.removeprefix(_BYTES).strip() if is_bytes else unit
    return f"{said} {name}".rstrip()
