"""Records which sources delivered files and which failed in one run; all downloads of the run share the record."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# The limit for the sum of all waits of a run for busy sources.
MOST_WAITING_SECONDS = 1200.0
_REPORTED_FROM_SECONDS = 5.0  # a shorter wait is not reported to the user


@dataclass
class SourceHealth:
    """Records the delivered files, and the failed and banned sources of one run.

    `delivered`: (name of file, name of source, size in bytes) of each downloaded file.
    `fallbacks`: {name of file: text for the user} of each file that a source delivered after another one had failed.
    `banned`: {name of source: reason}; these sources are not used again in this run.
    `failed`: {name of source: reason}; these sources are tried last.
    `tell`: called with a text for the user before each wait of 5 s or more.
    `stopped`: an event; when it is set, every wait ends.
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
        """Return the names of the sources that are not banned, each once, in the given order; failed ones come last."""
        with self._lock:
            usable = [name for name in dict.fromkeys(sources) if name not in self.banned]
            return sorted(usable, key=lambda name: name in self.failed)

    def wait(self, seconds: float, reason: str, *, is_requested: bool = True) -> bool:
        """Wait before a retry, if the total of all waits stays within the limit of the run (1200 s).

        Waits of several files at the same time count once.

        Args:
            seconds: the length of the wait.
            reason: the text for the user, such as "FILE from SOURCE".
            is_requested: the source has requested this wait with Retry-After.

        Returns:
            True after the full wait. False if the wait would exceed the limit of the run (then there is no wait), or
            if `stopped` was set meanwhile.
        """
        with self._lock:
            now = time.monotonic()
            more = max(0.0, now + seconds - max(self._waits_until, now))
            if self._waited + more > MOST_WAITING_SECONDS:
                return False
            self._waited += more
            self._waits_until = max(self._waits_until, now + seconds)
        if seconds >= _REPORTED_FROM_SECONDS:
            self.tell(f"{reason}: waiting {seconds:.0f} s{', as Retry-After requests' if is_requested else ''}")
        return not self.stopped.wait(seconds)

    def ban(self, source: str, reason: str) -> None:
        """Exclude a source from the rest of the run, because it sent wrong content."""
        with self._lock:
            self.banned.setdefault(source, reason)

    def mark_failed(self, source: str, reason: str) -> None:
        """Record a failure of a source; from now on `order` puts it after the sources that have not failed."""
        with self._lock:
            self.failed.setdefault(source, reason)

    def deliver(self, file: str, source: str, size: int, failures: Mapping[str, str]) -> None:
        """Record that a source has delivered a complete and verified file.

        Args:
            file: the name of the file.
            source: the source that delivered it.
            size: its size in bytes.
            failures: {name of source: reason} of the sources that were tried for this file before and failed.
        """
        with self._lock:
            self.delivered.append((file, source, size))
            if failures:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
                self.fallbacks[file] = f"{file} from {source} ({reasons})"

    def summary(self) -> str:
        """Return the number of files of each source as text, such as "61 files from tuna, 1 file from official"."""
        counts: dict[str, int] = {}
        for _, source, _ in self.delivered:
            counts[source] = counts.get(source, 0) + 1
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{count} {'file' if count == 1 else 'files'} from {name}" for name, count in ordered)

    def warnings(self) -> list[str]:
        """Return the warnings of the run: each banned source, and up to three files that came after a failure."""
        bans = [f"{name} is not used again in this run: {reason}" for name, reason in self.banned.items()]
        fallbacks = list(self.fallbacks.values())
        more = [f"and {len(fallbacks) - 3} more files from a fallback source"] if len(fallbacks) > 3 else []
        return [*bans, *fallbacks[:3], *more]
