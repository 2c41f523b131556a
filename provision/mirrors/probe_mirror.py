"""Probes one mirror over one connection: its responses, the locked files that it has, and its speed."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from provision.core.hashing import content_hash
from provision.core.redact import redact
from provision.mirrors.chosen_mirrors import OFFICIAL
from provision.net.urls import host_of, is_private, same_site

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from provision.mirrors.probe_files import ProbeFile

_CONNECT_SECONDS, _READ_SECONDS = 2.0, 2.5
# The download that measures the speed ends when one of these two limits is reached.
_RATE_BYTES, _RATE_SECONDS = 2 << 20, 1.0
_RATES_AT_ONCE = 6  # speed measurements at the same time


@dataclass(frozen=True)
class ProbeTarget:
    """Describe what is probed: one mirror, or the official source, of one tool.

    `tool`: the name of the tool. `name`: the name of the mirror, or "official". `url`: its URL.
    `kind`: the layout of a torch mirror, "index" or "find-links"; it is "index" for the other tools.
    `channels`: {conda channel: its URL}.
    `redirects`: the mirror may redirect or link to other hosts.
    `reach`: the only network whose hosts can use the mirror, as text; None if every host can.
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
    """Hold the result of one probe.

    `reachable`: the target has sent a response.
    `held`: the number of probe files that the target has. `asked`: the number of probe files.
    `megabytes_per_second`: the measured speed; None if it was not measured.
    `final_host`: the host that has sent the largest file, after redirects.
    `error`: why the target cannot be used, as the end of a sentence whose subject is the target; None if it can.
    `missing`: a text for each probe file that the target does not have.
    `kind`: the layout of the torch mirror that the probe has detected.
    """

    target: ProbeTarget
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
        """Return whether the target can be used and has every probe file."""
        return self.error is None and self.held == self.asked > 0

    def to_dict(self) -> dict[str, object]:
        """Return the result for JSON output, without a password in the URL."""
        return {
            "name": self.target.name,
            "url": redact(self.target.url),
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
    """Hold the state that the probers of one run share.

    `deadline`: the end of the run, by `time.monotonic()`. `ended`: the number of finished probers.
    `has_response`: at least one mirror has sent a response status.
    `changed`: notified when `ended` or `has_response` changes.
    `measuring`: limits the number of speed measurements at the same time.
    """

    deadline: float
    ended: int = 0
    has_response: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    measuring: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_RATES_AT_ONCE))


class UnusableError(Exception):
    """Report that a mirror cannot be used; the message is the end of a sentence whose subject is the mirror."""


@dataclass
class Response:
    """Hold one response.

    `status`: the HTTP status. `url`: the URL after redirects.
    `content`: the received part of the body, which may be only its beginning.
    `seconds`: the duration of the request with the reading of `content`.
    """

    status: int
    headers: Mapping[str, str]
    url: str
    content: bytes
    seconds: float


class Prober:
    """Probes one mirror over one connection, without retries; the requests are those of the mirror's tool.

    `shared`: the state that the probers of a run share.
    `findings`: the result so far. `result`: the final result; None until the probe has ended.
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
        """Call `probe`, the method `Tool.probe` of the mirror's tool, and set `result`; every exception is caught."""
        import requests
        import urllib3

        try:
            probe(self)
            self._require_a_file()
        except UnusableError as error:
            self.update(error=str(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            self.update(error=self._reason(error))
        except Exception as error:  # an invalid response of one mirror must not end its thread without a result
            self.update(error=f"sends an invalid response ({type(error).__name__})")
        with self.shared.changed:
            self.result = replace(self.findings, reachable=self.reachable)
            self.shared.ended += 1
            self.shared.changed.notify_all()

    def _require_a_file(self) -> None:
        if not self.findings.held:
            raise UnusableError("; ".join(self.findings.missing[:2]) or "has none of the locked files")

    def unfinished(self, seconds: float) -> ProbeResult:
        """Return the result so far of a probe that has not ended after `seconds`; its `error` is the timeout."""
        reason = (
            f"does not finish within {seconds:.1f} s" if self.reachable else f"does not answer within {seconds:.1f} s"
        )
        return replace(self.findings, reachable=self.reachable, error=self._with_reach(reason))

    def compare(self, url: str, probe_file: ProbeFile) -> str:
        """Download a small file, and compare its checksum with the lock file.

        Args:
            url: the URL of the file on the mirror.
            probe_file: the locked file.

        Returns:
            Why the mirror does not have the file, such as "answers 404"; "" if it has the file.

        Raises:
            UnusableError: the content does not have the locked checksum.
        """
        response = self.get(url, limit=(probe_file.size or 0) + 1)
        if response.status != 200:
            return f"answers {response.status}"
        digest = content_hash(probe_file.kind, len(response.content))
        digest.update(response.content)
        if digest.hexdigest() not in probe_file.hashes:
            raise UnusableError(f"serves {probe_file} with a WRONG HASH")
        return ""

    def check_size(self, url: str, probe_file: ProbeFile) -> str:
        """Request one byte of a file, and compare the size of the file with the lock file.

        Returns:
            Why the mirror does not have the file, or that it has another size, as text; "" if it has the file.
        """
        return self._missing_reason(self.get(url, limit=1, first=0), probe_file)

    def measure(self, url: str, probe_file: ProbeFile | None) -> str:
        """Measure the speed with the download of a part of a file, and store it in `findings` in MB/s.

        Args:
            url: the URL of a large file.
            probe_file: the locked file whose size is compared; None: compare no size.

        Returns:
            As `check_size`.
        """
        with self.shared.measuring:
            response = self.get(url, limit=_RATE_BYTES, first=0, seconds=_RATE_SECONDS)
        reason = self._missing_reason(response, probe_file)
        if reason:
            return reason
        rate = len(response.content) / max(response.seconds, 1e-6) / 1e6
        self.update(megabytes_per_second=float(f"{rate:.3g}"), final_host=host_of(response.url))
        return ""

    def _missing_reason(self, response: Response, probe_file: ProbeFile | None) -> str:
        if response.status not in {200, 206}:
            return f"answers {response.status}"
        total = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
        size = total.group(1) if total else response.headers.get("Content-Length", "")
        if probe_file is not None and probe_file.size is not None and size.isdecimal() and int(size) != probe_file.size:
            return f"its file has {int(size):,} bytes, but the size in the lock is {probe_file.size:,} bytes"
        return ""

    def get(
        self,
        url: str,
        *,
        limit: int,
        first: int | None = None,
        seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one GET request, and read at most `limit` bytes of the body in at most `seconds`.

        Args:
            url: the URL.
            limit: the largest number of bytes to read.
            first: the offset of the first byte of a range request; None: request the whole file.
            seconds: the longest time to read; None: read until the deadline of the run.
            headers: the request headers; None: request a body without compression.

        Raises:
            UnusableError: the request was redirected to a host that is not allowed, or the deadline of the run has
                passed.
        """
        left = self.shared.deadline - time.monotonic()
        if left <= 0:
            raise UnusableError("does not finish in time")
        request_headers = dict(headers or {"Accept-Encoding": "identity"})
        if first is not None:
            request_headers["Range"] = f"bytes={first}-{first + limit - 1}"
        started = time.monotonic()
        until = min(self.shared.deadline, started + (seconds or left))
        timeout = (min(_CONNECT_SECONDS, left), min(_READ_SECONDS, left))
        with self.session.get(url, headers=request_headers, timeout=timeout, stream=True) as response:
            self._mark_reachable()
            self._check_hosts([*(hop.url for hop in response.history), response.url])
            content = bytearray()
            while len(content) < limit and time.monotonic() < until:
                block = response.raw.read1(min(1 << 16, limit - len(content)), decode_content=True)
                if not block:
                    break
                content += block
            elapsed = time.monotonic() - started
            return Response(response.status_code, response.headers, response.url, bytes(content), elapsed)

    def _mark_reachable(self) -> None:
        if not self.reachable:
            self.reachable = True
            with self.shared.changed:
                self.shared.has_response = True
                self.shared.changed.notify_all()

    def _check_hosts(self, urls: Sequence[str]) -> None:
        """Check the URLs of a request and its redirects, in their order.

        Raises:
            UnusableError: a URL is http to a public host. Or the last URL has a host of another owner than the mirror,
                although the mirror is not known to redirect.
        """
        for url in urls:
            if urlsplit(url).scheme == "http" and not is_private(urlsplit(url).hostname or ""):
                raise UnusableError(f"redirects or links to plain http ({host_of(url)})")
        any_site = self.target.redirects or self.target.name == OFFICIAL
        if not any_site and not same_site(host_of(urls[-1]), host_of(self.target.url)):
            raise UnusableError(f"redirects or links to another host, {host_of(urls[-1])}")

    def update(self, **changes: object) -> None:
        """Set attributes of `findings`; each keyword is the name of an attribute of `ProbeResult`."""
        self.findings = replace(self.findings, **changes)  # type: ignore[arg-type]  # mypy cannot match the names

    def _reason(self, error: Exception) -> str:
        import requests
        import urllib3

        if isinstance(error, urllib3.exceptions.ProtocolError | requests.exceptions.ChunkedEncodingError):
            return "closes the connection in the middle of a response"
        if isinstance(error, requests.exceptions.SSLError):
            return "has a TLS certificate that this machine does not trust"
        if isinstance(error, requests.exceptions.ProxyError):
            return "does not answer: the HTTP proxy of this machine cannot reach the mirror"
        if isinstance(error, requests.TooManyRedirects):
            return "redirects in a loop"
        if self.reachable or isinstance(error, requests.ReadTimeout):
            return self._with_reach("stops sending data (timeout)")
        return self._with_reach(f"does not answer ({type(error).__name__})")

    def _with_reach(self, reason: str) -> str:
        return f"{reason}; the mirror answers only inside {self.target.reach}" if self.target.reach else reason
