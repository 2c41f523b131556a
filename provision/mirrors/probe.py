"""Asks every mirror at once whether it answers, whether it holds the locked files, and how fast: a few MB, seconds."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from provision.core.hashing import content_hash
from provision.core.redact import redact
from provision.mirrors import index_page
from provision.net.urls import host_of, is_near, same_site

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from provision.mirrors.probe_files import ProbeFile

# Seconds. When nobody has sent a status by then, there is no way out; and when all of it ends.
_FIRST_WORD, _ALL = 2.5, 9.0
_CONNECT, _SILENCE = 2.0, 2.5
_RATE_BYTES, _RATE_SECONDS = 2 << 20, 1.0
_RATES_AT_ONCE = 6
_PAGE_BYTES = 32 << 20
_REPODATA_BYTES = 1024
_MAGIC = (b"{", b"\x28\xb5\x2f\xfd")  # JSON, or zstd's frame


@dataclass(frozen=True)
class ProbeTarget:
    """One mirror, or the official source, of one tool.

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


def ranked(found: Sequence[ProbeResult]) -> list[ProbeResult]:
    """Those that can be used, the best first: by completeness, then by rate; equals in the order of the catalogue."""
    usable = [each for each in found if each.error is None and each.held]
    return sorted(usable, key=lambda each: (-each.held / each.asked, -(each.megabytes_per_second or 0.0)))


def probe(
    every: Sequence[ProbeTarget],
    probe_files: Mapping[str, Sequence[ProbeFile]],
    session: Callable[[], requests.Session],
) -> list[ProbeResult]:
    """Ask all of them at once, each on one connection; it ends within ten seconds, whatever they do.

    Args:
        every: whom to ask; the answers come in this order.
        probe_files: {tool: the locked files by which its mirrors are judged}.
        session: makes one for each; no token is sent with it.
    """
    looks = [_Prober(each, probe_files.get(each.tool, ()), session()) for each in every]
    started = time.monotonic()
    shared = _Shared(started + _ALL)
    for look in looks:
        look.shared = shared
        # A name that does not resolve holds its thread longer than we wait: as a daemon it ends with us.
        threading.Thread(target=look.run, daemon=True).start()
    with shared.changed:
        shared.changed.wait_for(lambda: shared.ended == len(looks) or shared.first_word, _FIRST_WORD)
        if shared.first_word:
            shared.changed.wait_for(lambda: shared.ended == len(looks), started + _ALL - time.monotonic())
    seconds = time.monotonic() - started
    return [look.result or look.unfinished(seconds) for look in looks]


@dataclass
class _Shared:
    """What the looks have in common: the end, how many have ended, whether anybody answered, who measures now."""

    deadline: float
    ended: int = 0
    first_word: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    measuring: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_RATES_AT_ONCE))


class _UnusableError(Exception):
    """Why this mirror cannot be used."""


@dataclass
class _Answer:
    status: int
    headers: Mapping[str, str]
    url: str
    content: bytes
    seconds: float


class _Prober:
    """One mirror, looked at on one connection, without a second try."""

    shared: _Shared

    def __init__(self, asked: ProbeTarget, probe_files: Sequence[ProbeFile], session: requests.Session) -> None:
        self.asked = asked
        self.probe_files = probe_files
        self.session = session
        self.reachable = False
        self.result: ProbeResult | None = None
        self._found = ProbeResult(asked, asked=len(probe_files), kind=asked.kind)

    def run(self) -> None:
        """Look, and leave the result; never raises."""
        import requests
        import urllib3

        try:
            {"pip": self._pip, "torch": self._torch, "conda": self._conda, "hf": self._hub}[self.asked.tool]()
            self._must_hold_something()
        except _UnusableError as error:
            self._keep(error=str(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            self._keep(error=self._why(error))
        except Exception as error:  # whatever a server sends, one mirror's answer ends no probe
            self._keep(error=f"its answer makes no sense ({type(error).__name__})")
        with self.shared.changed:
            self.result = replace(self._found, reachable=self.reachable)
            self.shared.ended += 1
            self.shared.changed.notify_all()

    def _must_hold_something(self) -> None:
        if not self._found.held:
            raise _UnusableError("; ".join(self._found.missing[:2]) or "holds none of the locked files")

    def unfinished(self, seconds: float) -> ProbeResult:
        """What is known when the time is over."""
        why = f"is not done within {seconds:.1f} s" if self.reachable else f"does not answer within {seconds:.1f} s"
        return replace(self._found, reachable=self.reachable, error=self._hint(why))

    def _pip(self) -> None:
        base = self.asked.url.rstrip("/")
        files = {each: self._list(f"{base}/{each.name}/", each) for each in self.probe_files}
        self._judge(files)

    def _torch(self) -> None:
        """One page links every file, or there is a page a package: what its catalogue says first, then the other."""
        as_index, as_page = (f"{self.asked.url.rstrip('/')}/{end}" for end in ("torch/", ""))
        shapes = [("index", as_index), ("find-links", as_page)]
        shapes = shapes if self.asked.kind == "index" else shapes[::-1]
        for kind, url in shapes:
            try:
                files = {each: self._list(url, each) for each in self.probe_files}
            except _UnusableError:
                if kind == shapes[-1][0]:
                    raise
                continue
            if any(files.values()) or kind == shapes[-1][0]:
                self._keep(kind=kind)
                self._judge(files)
                return

    def _list(self, url: str, witness: ProbeFile) -> list[index_page.IndexFile]:
        """The locked files of a package that a page links."""
        answer = self._get(url, limit=_PAGE_BYTES, headers={"Accept": index_page.ACCEPT})
        if answer.status == 404 and self._found.asked > 1:
            return []
        if answer.status != 200:
            raise _UnusableError(f"answers {answer.status}")
        try:
            files = index_page.read(answer.content, answer.headers.get("Content-Type", ""), answer.url)
        except index_page.NoIndexError as error:
            raise _UnusableError(str(error)) from None
        right = [file for file in files if file.sha256 in witness.hashes]
        if right or any(file.sha256 for file in files):
            if not right and (newest := _newest(files)):
                self._keep(missing=(*self._found.missing, f"lacks {witness}; its newest is {newest}"))
            return right
        return [file for file in files if f"-{witness.version}-" in file.name]  # its pages tell no hashes

    def _judge(self, files: Mapping[ProbeFile, list[index_page.IndexFile]]) -> None:
        """Count what it holds, compare a small file's hash, and measure with the largest."""
        held = {witness: listed for witness, listed in files.items() if listed}
        told = " ".join(self._found.missing)
        lacks = [f"lacks {each}" for each, listed in files.items() if not listed and f"lacks {each}" not in told]
        self._keep(held=len(held), missing=(*self._found.missing, *lacks))
        small = next((each for each in held if each.is_small), None)
        if small is not None:
            self._compare(held[small][0].url, small)
        if held:
            largest = max(held, key=lambda each: each.size or 0)
            self._measure(held[largest][0].url, None if small is largest else largest)

    def _conda(self) -> None:
        for name, base in self.asked.channels.items():
            answer = self._get(f"{base}/noarch/repodata.json", limit=_REPODATA_BYTES, first=0)
            if answer.status not in {200, 206}:
                raise _UnusableError(f"answers {answer.status} for the channel {name}")
            if not answer.content.startswith(_MAGIC):
                raise _UnusableError(f"answers for the channel {name} with something else than its list of packages")
        self._of_paths({each: self._channel_url(each) for each in self.probe_files})

    def _channel_url(self, witness: ProbeFile) -> str | None:
        channel, _, rest = urlsplit(witness.path or "").path.lstrip("/").partition("/")
        return f"{self.asked.channels[channel]}/{rest}" if channel in self.asked.channels else None

    def _hub(self) -> None:
        base = self.asked.url.rstrip("/")
        self._of_paths({each: f"{base}/{each.path}" for each in self.probe_files})

    def _of_paths(self, urls: Mapping[ProbeFile, str | None]) -> None:
        """Small files whole, for their hash; of a larger one a byte, for its size; the largest for the rate."""
        largest = max(urls, key=lambda each: each.size or 0, default=None)
        for witness, url in urls.items():
            reason = "its channel is not there"
            if url is not None and witness.is_small:
                reason = self._compare(url, witness)
            elif url is not None:
                reason = self._measure(url, witness) if witness is largest else self._sized(url, witness)
            if reason:
                self._keep(missing=(*self._found.missing, f"lacks {witness}: {reason}"))
            else:
                self._keep(held=self._found.held + 1)

    def _compare(self, url: str, witness: ProbeFile) -> str:
        """Why a small file is not there, or ""; wrong content makes the whole mirror useless."""
        answer = self._get(url, limit=(witness.size or 0) + 1)
        if answer.status != 200:
            return f"answers {answer.status}"
        digest = content_hash(witness.kind, len(answer.content))
        digest.update(answer.content)
        if digest.hexdigest() not in witness.hashes:
            raise _UnusableError(f"serves {witness} with a WRONG HASH")
        return ""

    def _sized(self, url: str, witness: ProbeFile) -> str:
        return self._why_not(self._get(url, limit=1, first=0), witness)

    def _measure(self, url: str, witness: ProbeFile | None) -> str:
        """The rate of a ranged GET; why the file is not there, or ""."""
        with self.shared.measuring:
            answer = self._get(url, limit=_RATE_BYTES, first=0, seconds=_RATE_SECONDS)
        reason = self._why_not(answer, witness)
        if reason:
            return reason
        rate = len(answer.content) / max(answer.seconds, 1e-6) / 1e6
        self._keep(megabytes_per_second=float(f"{rate:.3g}"), final_host=host_of(answer.url))
        return ""

    def _why_not(self, answer: _Answer, witness: ProbeFile | None) -> str:
        if answer.status not in {200, 206}:
            return f"answers {answer.status}"
        whole = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
        size = whole.group(1) if whole else answer.headers.get("Content-Length", "")
        if witness is not None and witness.size is not None and size.isdecimal() and int(size) != witness.size:
            return f"its file has {int(size):,} bytes, locked are {witness.size:,}"
        return ""

    def _get(
        self,
        url: str,
        *,
        limit: int,
        first: int | None = None,
        seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Answer:
        """One GET that reads at most `limit` bytes for at most `seconds`, and follows no way to somebody else."""
        left = self.shared.deadline - time.monotonic()
        if left <= 0:
            raise _UnusableError("is not done in time")
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
            return _Answer(answer.status_code, answer.headers, answer.url, bytes(content), time.monotonic() - started)

    def _heard(self) -> None:
        if not self.reachable:
            self.reachable = True
            with self.shared.changed:
                self.shared.first_word = True
                self.shared.changed.notify_all()

    def _stays(self, hops: Sequence[str]) -> None:
        for hop in hops:
            if urlsplit(hop).scheme == "http" and not is_near(urlsplit(hop).hostname or ""):
                raise _UnusableError(f"leads to plain http ({host_of(hop)})")
        free = self.asked.redirects or self.asked.name == "official"
        if not free and not same_site(host_of(hops[-1]), host_of(self.asked.url)):
            raise _UnusableError(f"leads to {host_of(hops[-1])}")

    def _keep(self, **changes: object) -> None:
        self._found = replace(self._found, **changes)  # type: ignore[arg-type]  # each by its field's name

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
        return f"{why}; it answers in {self.asked.reach} alone" if self.asked.reach else why


def _newest(files: Sequence[index_page.IndexFile]) -> str | None:
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    versions = []
    for file in files:
        try:
            versions.append(parse_wheel_filename(file.name)[1])
        except InvalidWheelFilename:
            continue
    return str(max(versions)) if versions else None
