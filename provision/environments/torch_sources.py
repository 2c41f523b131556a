"""Asks the sources of packages which of them has a pinned wheel for this machine, and whether it serves it."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from provision.core import hashing
from provision.core.redact import redact
from provision.installers import pip_settings, uv_settings
from provision.mirrors import index_page
from provision.net import urls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from provision.installers.uv import UvSources

_CONNECT = 4.0
_LARGEST_PAGE = 64 << 20
_NOT_TOLD = {401, 403, 407, 429}  # the page is not shown to us; an installer may know a password that we do not


@dataclass(frozen=True)
class TorchSource:
    """One source of packages; `name` is what messages call it, `kind` is "index" or "find-links"."""

    name: str
    url: str
    kind: str = "index"


@dataclass(frozen=True)
class PinnedPackage:
    """A package as a lock pins it, for one version of Python such as "3.11.7"."""

    name: str
    version: str
    hashes: frozenset[str]
    python: str

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class SourceAnswer:
    """Hold the answer of one source. `has` is None where it is not known; `reason` says why it is not True.

    `is_unclear`: a server answered and did not tell (busy, or it wants a password that an installer may know).
    """

    place: TorchSource
    has: bool | None
    reason: str = ""
    is_unclear: bool = False


def own_places(uv: UvSources) -> list[TorchSource]:
    """Return the sources that uv is given, folders and pages of files first."""
    env = uv.environment
    links = [each for each in env.get("UV_FIND_LINKS", "").split(",") if each] + uv_settings.find_links(uv.config)
    found = [TorchSource(f"find-links {redact(each)}", each, "find-links") for each in links]
    rows, forbidden = uv_settings.indexes(uv.config)
    if forbidden or "--no-index" in uv.flags:
        return found
    named = [_row(word) for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL") for word in env.get(name, "").split()]
    rows = [*named, *rows]
    first = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")
    default = _row(first) if first else next((row for row in rows if row.get("default")), None)
    rows = [row for row in rows if not row.get("default")]
    rows.append(default or {"url": pip_settings.official_index()})
    places = []
    for row in rows:
        kind = "find-links" if row.get("format") == "flat" else "index"
        places.append(TorchSource(f"index {redact(row['url'])}", _with_password(row, env), kind))
    return [*found, *dict.fromkeys(places)]


def ask(
    places: Sequence[TorchSource],
    pinned: PinnedPackage,
    session: Callable[[], requests.Session],
    seconds: float,
    insecure: str = "",
) -> list[SourceAnswer]:
    """Ask all places at once; the answers come in the order of the places, after `seconds` at the latest.

    Args:
        places: the sources.
        pinned: the package.
        session: makes one for each place.
        seconds: a place that has not answered by then is not known.
        insecure: the hosts whose certificate is not verified, as UV_INSECURE_HOST has them.
    """
    looks = [_IndexQuery(place, pinned, session, time.monotonic() + seconds, insecure.split()) for place in places]
    threads = [threading.Thread(target=look.run, daemon=True) for look in looks]
    for thread in threads:
        thread.start()
    for thread, look in zip(threads, looks, strict=True):
        thread.join(max(0.0, look.deadline - time.monotonic()))
    return [look.answer or SourceAnswer(look.place, None, f"does not answer within {seconds:g} s") for look in looks]


class _PassedOverError(Exception):
    """Raised where a source does not have the file; the text says why."""


class _UnknownError(Exception):
    """Raised where it is not known whether a source has the file; the text says why."""


@dataclass
class _IndexQuery:
    """One place, asked in a thread of its own."""

    place: TorchSource
    pinned: PinnedPackage
    session: Callable[[], requests.Session]
    deadline: float
    insecure: Sequence[str]
    answer: SourceAnswer | None = field(default=None)

    def run(self) -> None:
        """Leave the answer; never raises."""
        import requests
        import urllib3

        try:
            self._judge(self._files())
            self.answer = SourceAnswer(self.place, has=True)
        except _PassedOverError as error:
            self.answer = SourceAnswer(self.place, False, str(error))
        except _UnknownError as error:
            self.answer = SourceAnswer(self.place, None, str(error), is_unclear=True)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            self.answer = SourceAnswer(self.place, None, f"does not answer ({type(error).__name__})")
        except Exception as error:  # whatever a server sends, the other places still count
            self.answer = SourceAnswer(self.place, None, f"cannot be read ({type(error).__name__})")

    def _files(self) -> list[index_page.IndexFile]:
        url = self.place.url
        if self.place.kind == "index":
            url = f"{url.rstrip('/')}/{self.pinned.name}/"
        folder = _local(url)
        if folder is None:
            return self._page(url)
        if folder.is_dir() and self.place.kind == "find-links":
            return [index_page.IndexFile(each.name, str(each)) for each in folder.iterdir() if each.suffix == ".whl"]
        page = folder / "index.html" if folder.is_dir() else folder
        try:
            return index_page.read(page.read_bytes(), "text/html", page.absolute().as_uri())
        except OSError as error:
            if self.place.kind == "index" and self.place.url != url and not page.exists():
                raise _PassedOverError(f"does not have {self.pinned.name}") from None
            raise _PassedOverError(f"cannot be read: {error.strerror}") from None
        except index_page.NoIndexError:
            raise _PassedOverError("links no file") from None

    def _page(self, url: str) -> list[index_page.IndexFile]:
        with self._get(url, {"Accept": index_page.ACCEPT}) as response:
            if response.status_code in _NOT_TOLD or response.status_code >= 500:
                raise _UnknownError(f"answers {response.status_code}")
            if response.status_code == 404:
                raise _PassedOverError(f"does not have {self.pinned.name}" if self.place.kind == "index" else "is 404")
            if not response.ok:
                raise _PassedOverError(f"answers {response.status_code}")
            content = response.raw.read(_LARGEST_PAGE, decode_content=True)
            try:
                return index_page.read(content, response.headers.get("Content-Type", ""), response.url)
            except index_page.NoIndexError as error:
                raise _PassedOverError(str(error)) from None

    def _judge(self, files: Sequence[index_page.IndexFile]) -> None:
        from packaging.utils import InvalidWheelFilename, parse_wheel_filename
        from packaging.version import Version

        version = Version(self.pinned.version)
        listed = []
        for file in files:
            try:
                name, there, _, tags = parse_wheel_filename(file.name)
            except InvalidWheelFilename:
                continue
            if name == self.pinned.name and there == version:
                listed.append((file, tags))
        if not listed:
            raise _PassedOverError(f"does not list {self.pinned}")
        ours = _tags(self.pinned.python)
        fitting = [file for file, tags in listed if tags & ours]
        if not fitting:
            minor = self.pinned.python.rpartition(".")[0]
            raise _PassedOverError(f"has {self.pinned}, but no file of it for Python {minor} on this system")
        self._serves([(file, self._hash(file)) for file in fitting])

    def _serves(self, files: Sequence[tuple[index_page.IndexFile, str | None]]) -> None:
        right = [file for file, digest in files if digest in self.pinned.hashes]
        usable = right or [file for file, digest in files if digest is None]
        if not usable:
            file, digest = files[0]
            raise _PassedOverError(f"has {file.name} with another hash ({str(digest)[:12]}…) than the pinned one")
        file = usable[0]
        if _local(file.url) is not None:
            return
        # One byte tells whether the file is there; a server without ranges sends its head, and is left.
        headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with self._get(file.url, headers) as response:
            if response.status_code in _NOT_TOLD:
                raise _UnknownError(f"answers {response.status_code} for {file.name}")
            if response.status_code not in {200, 206}:
                raise _PassedOverError(f"lists {file.name} and does not serve it (status {response.status_code})")

    def _hash(self, file: index_page.IndexFile) -> str | None:
        """Return the hash that the page lists; that of a file on this machine is computed."""
        path = _local(file.url)
        if path is None:
            return file.sha256
        try:
            return hashing.hash_file(path, "sha256")
        except OSError:
            raise _PassedOverError(f"lists {file.name}, and it cannot be read") from None

    def _get(self, url: str, headers: dict[str, str]) -> requests.Response:
        import urllib3

        left = max(0.1, self.deadline - time.monotonic())
        timeout = (min(_CONNECT, left), left)
        if not {urls.host_of(url), urlsplit(url).hostname} & set(self.insecure):
            return self.session().get(url, headers=headers, timeout=timeout, stream=True)
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return self.session().get(url, headers=headers, timeout=timeout, stream=True, verify=False)


def _tags(python: str) -> frozenset[object]:
    """Return the tags of wheels that run here under a version of Python."""
    from packaging import tags

    major, minor = (int(part) for part in python.split(".")[:2])
    interpreter = f"cp{major}{minor}"
    return frozenset([*tags.cpython_tags((major, minor)), *tags.compatible_tags((major, minor), interpreter)])


def _local(url: str) -> Path | None:
    """Return the path that an address names, or None for one of the network."""
    if "://" not in url:
        return Path(url).expanduser()
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _row(word: str) -> dict[str, str]:
    """Return an index that a variable names, as URL or NAME=URL."""
    named = re.match(r"([\w.-]+)=(.+)$", word)
    return {"name": named.group(1), "url": named.group(2)} if named else {"url": word}


def _with_password(row: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Return the index's address with what UV_INDEX_NAME_USERNAME and _PASSWORD say."""
    name = re.sub(r"\W", "_", row.get("name", "")).upper()
    user, password = (environ.get(f"UV_INDEX_{name}_{what}", "") for what in ("USERNAME", "PASSWORD"))
    parts = urlsplit(row["url"])
    if not name or not (user or password) or "@" in parts.netloc:
        return row["url"]
    return urlunsplit(parts._replace(netloc=f"{quote(user, '')}:{quote(password, '')}@{parts.netloc}"))
