"""What became of the sources in one run; every download of the run shares it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# All waiting of a run together.
MOST_WAITING_SECONDS = 1200.0
_SAID_FROM_SECONDS = 5.0


@dataclass
class SourceHealth:
    """Who delivered what, who failed, and who is not asked again.

    `tell` is told what takes long; `stopped` ends every waiting.
    """

    delivered: list[tuple[str, str, int]] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)
    banned: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = field(default=lambda _: None)
    stopped: threading.Event = field(default_factory=threading.Event)
    _waited: float = 0.0
    _waits_until: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def order(self, sources: Iterable[str]) -> list[str]:
        """The sources that may be asked, those in trouble last."""
        with self._lock:
            usable = [name for name in dict.fromkeys(sources) if name not in self.banned]
            return sorted(usable, key=lambda name: name in self.failed)

    def wait(self, seconds: float, why: str, *, is_asked: bool = True) -> bool:
        """Wait, within the patience of the run; files that wait together wait once.

        Args:
            seconds: how long.
            why: what for, in words.
            is_asked: whether a source asks for it.

        Returns:
            Whether it did: not where the patience of the run is over, or the run is.
        """
        with self._lock:
            now = time.monotonic()
            more = max(0.0, now + seconds - max(self._waits_until, now))
            if self._waited + more > MOST_WAITING_SECONDS:
                return False
            self._waited += more
            self._waits_until = max(self._waits_until, now + seconds)
        if seconds >= _SAID_FROM_SECONDS:
            self.tell(f"{why}: waiting {seconds:.0f} s{', as it was asked to' if is_asked else ''}")
        return not self.stopped.wait(seconds)

    def ban(self, source: str, reason: str) -> None:
        """It sent wrong content: it is not asked again in this run."""
        with self._lock:
            self.banned.setdefault(source, reason)

    def mark_failed(self, source: str, reason: str) -> None:
        """It did not answer: the others are asked first from now on."""
        with self._lock:
            self.failed.setdefault(source, reason)

    def deliver(self, file: str, source: str, size: int, failures: Mapping[str, str]) -> None:
        """A file is here, whole and right; `failures` are of the sources that were asked before."""
        with self._lock:
            self.delivered.append((file, source, size))
            if failures:
                before = "; ".join(f"{name}: {why}" for name, why in failures.items())
                self.fallbacks[file] = f"{file} from {source} ({before})"

    def summary(self) -> str:
        """How many files came from where, such as "61 files from tuna, 1 from official"."""
        counts: dict[str, int] = {}
        for _, source, _ in self.delivered:
            counts[source] = counts.get(source, 0) + 1
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{count} {'file' if count == 1 else 'files'} from {name}" for name, count in ordered)

    def warnings(self) -> list[str]:
        """What its owner must know: who sent wrong content, and which files another source had to deliver."""
        said = [f"{name} is not asked again in this run: {reason}" for name, reason in self.banned.items()]
        others = list(self.fallbacks.values())
        more = [f"and {len(others) - 3} more files from another source than the first"] if len(others) > 3 else []
        return [*said, *others[:3], *more]
