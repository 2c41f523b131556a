"""Records the failures and deliveries of each source in one run; all downloads of the run share the record."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# The limit for the sum of all waits of a run.
MOST_WAITING_SECONDS = 1200.0
_REPORTED_FROM_SECONDS = 5.0  # a shorter wait is not reported to the user


@dataclass
class SourceHealth:
    """Holds the deliveries, the failed sources, which are tried last, and the banned ones, which are not used.

    `delivered` has (file, source, bytes) of each file. `fallbacks` has a text for each file that another source than
    the first delivered. `banned` and `failed` have the reason for each source. `tell` is called with the text of each
    long wait. `stopped` ends every wait.
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
        """Return the sources that are not banned, each once; failed ones come last."""
        with self._lock:
            usable = [name for name in dict.fromkeys(sources) if name not in self.banned]
            return sorted(usable, key=lambda name: name in self.failed)

    def wait(self, seconds: float, reason: str, *, is_requested: bool = True) -> bool:
        """Wait, if the total of all waits stays within the limit of the run.

        Waits of several files at the same time count once.

        Args:
            seconds: the length of the wait.
            reason: the text that is shown to the user.
            is_requested: the source has requested this wait with Retry-After.

        Returns:
            True after the full wait; False if the limit of the run would be exceeded, or the run was stopped.
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
        """Record a failure of a source; the other sources come first from now on."""
        with self._lock:
            self.failed.setdefault(source, reason)

    def deliver(self, file: str, source: str, size: int, failures: Mapping[str, str]) -> None:
        """Record a complete and verified file.

        Args:
            file: the name of the file.
            source: the source that delivered it.
            size: its size in bytes.
            failures: {source: reason} of the sources that were tried before and failed.
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
        """Return the warnings of the run: each banned source, and up to three files from a fallback source."""
        bans = [f"{name} is not used again in this run: {reason}" for name, reason in self.banned.items()]
        fallbacks = list(self.fallbacks.values())
        more = [f"and {len(fallbacks) - 3} more files from a fallback source"] if len(fallbacks) > 3 else []
        return [*bans, *fallbacks[:3], *more]
