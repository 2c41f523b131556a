"""Looks at one mirror on one connection: what it answers, which locked files it holds, and how fast."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from provision.core.hashing import content_hash
from provision.core.redact import redact
from provision.mirrors.record import OFFICIAL
from provision.net.urls import host_of, is_private, same_site

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from provision.mirrors.probe_files import ProbeFile

# Seconds.
_CONNECT, _SILENCE = 2.0, 2.5
_RATE_BYTES, _RATE_SECONDS = 2 << 20, 1.0
_RATES_AT_ONCE = 6


@dataclass(frozen=True)
class ProbeTarget:
    """One mirror, or the official source, of one tool, which goes by its name.

    `kind`: of a torch mirror. `channels`: where conda's channels lie. `redirects`: it may lead to another host.
    """

    tool: str
    name: str
    url: str
    kind: str = "index"
    channels: Mapping[str, str] = field(default_factory=dict)
    redirects: bool = False
    reach: str | None = None


@dataclass(frozen=True)
class ProbeResult:
    """What was found of one: `held` of `asked` locked files.

    `error`: why it cannot be used. `missing`: what it lacks.
    """

    asked_of: ProbeTarget
    reachable: bool = False
    held: int = 0
    asked: int = 0
    megabytes_per_second: float | None = None
    final_host: str | None = None
    error: str | None = None
    missing: tuple[str, ...] = ()
    kind: str = "index"

    @property
    def is_complete(self) -> bool:
        """Whether it holds every file that was asked for."""
        return self.error is None and self.held == self.asked > 0

    def to_dict(self) -> dict[str, object]:
        """As plain JSON types."""
        return {
            "name": self.asked_of.name,
            "url": redact(self.asked_of.url),
            "reachable": self.reachable,
            "has_locked_files": self.is_complete,
            "held": self.held,
            "asked": self.asked,
            "missing": list(self.missing),
            "megabytes_per_second": self.megabytes_per_second,
            "final_host": self.final_host,
            "error": self.error,
        }


@dataclass
class ProbeRun:
    """Hold what the probers of one run share.

    `deadline` is a time of the monotonic clock. `ended` counts the probers that are done. `first_word` is set when the
    first mirror answers. `measuring` limits how many rates are measured at once.
    """

    deadline: float
    ended: int = 0
    first_word: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    measuring: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_RATES_AT_ONCE))


class UnusableError(Exception):
    """Give the reason why a mirror cannot be used."""


@dataclass
class Answer:
    """Hold a response, of which `content` may be the beginning alone."""

    status: int
    headers: Mapping[str, str]
    url: str
    content: bytes
    seconds: float


class Prober:
    """Look at one mirror on one connection, without a second try. Its tool says which addresses are asked.

    `findings` is the result so far, `result` the final one.
    """

    shared: ProbeRun

    def __init__(self, target: ProbeTarget, probe_files: Sequence[ProbeFile], session: requests.Session) -> None:
        self.target = target
        self.probe_files = probe_files
        self.session = session
        self.reachable = False
        self.result: ProbeResult | None = None
        self.findings = ProbeResult(target, asked=len(probe_files), kind=target.kind)

    def run(self, probe: Callable[[Prober], None]) -> None:
        """Call `probe` (see `Tool.probe`) on this mirror, and leave the result. It never raises."""
        import requests
        import urllib3

        try:
            probe(self)
            self._must_hold_something()
        except UnusableError as error:
            self.keep(error=str(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            self.keep(error=self._why(error))
        except Exception as error:  # whatever a server sends, one mirror's answer ends no probe
            self.keep(error=f"its answer makes no sense ({type(error).__name__})")
        with self.shared.changed:
            self.result = replace(self.findings, reachable=self.reachable)
            self.shared.ended += 1
            self.shared.changed.notify_all()

    def _must_hold_something(self) -> None:
        if not self.findings.held:
            raise UnusableError("; ".join(self.findings.missing[:2]) or "holds none of the locked files")

    def unfinished(self, seconds: float) -> ProbeResult:
        """Return the findings of a mirror that is not done when the time is over."""
        why = f"is not done within {seconds:.1f} s" if self.reachable else f"does not answer within {seconds:.1f} s"
        return replace(self.findings, reachable=self.reachable, error=self._hint(why))

    def compare(self, url: str, probe_file: ProbeFile) -> str:
        """Fetch a small file, and return the reason why it is not there, or "".

        Raises:
            UnusableError: its content does not match the locked hash.
        """
        answer = self.get(url, limit=(probe_file.size or 0) + 1)
        if answer.status != 200:
            return f"answers {answer.status}"
        digest = content_hash(probe_file.kind, len(answer.content))
        digest.update(answer.content)
        if digest.hexdigest() not in probe_file.hashes:
            raise UnusableError(f"serves {probe_file} with a WRONG HASH")
        return ""

    def check_size(self, url: str, probe_file: ProbeFile) -> str:
        """Fetch one byte for the size of a file, and return the reason why it is not there, or ""."""
        return self._why_not(self.get(url, limit=1, first=0), probe_file)

    def measure(self, url: str, probe_file: ProbeFile | None) -> str:
        """Keep the rate of a ranged GET, and return the reason why the file is not there, or ""."""
        with self.shared.measuring:
            answer = self.get(url, limit=_RATE_BYTES, first=0, seconds=_RATE_SECONDS)
        reason = self._why_not(answer, probe_file)
        if reason:
            return reason
        rate = len(answer.content) / max(answer.seconds, 1e-6) / 1e6
        self.keep(megabytes_per_second=float(f"{rate:.3g}"), final_host=host_of(answer.url))
        return ""

    def _why_not(self, answer: Answer, probe_file: ProbeFile | None) -> str:
        if answer.status not in {200, 206}:
            return f"answers {answer.status}"
        whole = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
        size = whole.group(1) if whole else answer.headers.get("Content-Length", "")
        if probe_file is not None and probe_file.size is not None and size.isdecimal() and int(size) != probe_file.size:
            return f"its file has {int(size):,} bytes, locked are {probe_file.size:,}"
        return ""

    def get(
        self,
        url: str,
        *,
        limit: int,
        first: int | None = None,
        seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one GET, which reads at most `limit` bytes for at most `seconds`.

        Raises:
            UnusableError: it leads to another site, or the time of the run is over.
        """
        left = self.shared.deadline - time.monotonic()
        if left <= 0:
            raise UnusableError("is not done in time")
        asked = dict(headers or {"Accept-Encoding": "identity"})
        if first is not None:
            asked["Range"] = f"bytes={first}-{first + limit - 1}"
        started = time.monotonic()
        until = min(self.shared.deadline, started + (seconds or left))
        timeout = (min(_CONNECT, left), min(_SILENCE, left))
        with self.session.get(url, headers=asked, timeout=timeout, stream=True) as answer:
            self._heard()
            self._stays([*(each.url for each in answer.history), answer.url])
            content = bytearray()
            while len(content) < limit and time.monotonic() < until:
                block = answer.raw.read1(min(1 << 16, limit - len(content)), decode_content=True)
                if not block:
                    break
                content += block
            return Answer(answer.status_code, answer.headers, answer.url, bytes(content), time.monotonic() - started)

    def _heard(self) -> None:
        if not self.reachable:
            self.reachable = True
            with self.shared.changed:
                self.shared.first_word = True
                self.shared.changed.notify_all()

    def _stays(self, hops: Sequence[str]) -> None:
        for hop in hops:
            if urlsplit(hop).scheme == "http" and not is_private(urlsplit(hop).hostname or ""):
                raise UnusableError(f"leads to plain http ({host_of(hop)})")
        free = self.target.redirects or self.target.name == OFFICIAL
        if not free and not same_site(host_of(hops[-1]), host_of(self.target.url)):
            raise UnusableError(f"leads to {host_of(hops[-1])}")

    def keep(self, **changes: object) -> None:
        """Put values into the findings, each by its field's name."""
        self.findings = replace(self.findings, **changes)  # type: ignore[arg-type]  # each by its field's name

    def _why(self, error: Exception) -> str:
        import requests
        import urllib3

        if isinstance(error, urllib3.exceptions.ProtocolError | requests.exceptions.ChunkedEncodingError):
            return "breaks off"
        if isinstance(error, requests.exceptions.SSLError):
            return "its certificate is not trusted"
        if isinstance(error, requests.exceptions.ProxyError):
            return "does not answer: the proxy of this machine does not lead there"
        if isinstance(error, requests.TooManyRedirects):
            return "leads in a circle"
        if self.reachable or isinstance(error, requests.ReadTimeout):
            return self._hint("fell silent")
        return self._hint(f"does not answer ({type(error).__name__})")

    def _hint(self, why: str) -> str:
        return f"{why}; it answers in {self.target.reach} alone" if self.target.reach else why
