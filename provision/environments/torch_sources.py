"""Queries package sources for a pinned package: whether a source lists a wheel for this host, and serves its file."""

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
from provision.net.page import PageError, read_page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from provision.installers.uv import UvSources

_CONNECT_SECONDS = 4.0
# These statuses do not show whether the source has the file. uv may have a password that this module does not have.
_UNCLEAR_STATUSES = {401, 403, 407, 429}


@dataclass(frozen=True)
class TorchSource:
    """Describe one source of packages.

    `name`: its name in messages. `url`: its URL or path. `kind`: "index", or "find-links" for a folder or a page with
    links to files.
    """

    name: str
    url: str
    kind: str = "index"


@dataclass(frozen=True)
class PinnedPackage:
    """Describe a package in a lock file.

    `hashes`: the sha256 digests of its files, in hex. `python`: the version of the environment's Python, such as
    "3.11.7".
    """

    name: str
    version: str
    hashes: frozenset[str]
    python: str

    def __str__(self) -> str:
        """Return the name and the version, for messages."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class SourceAnswer:
    """Hold the result of one query.

    `has`: True if the source has the file, False if not, None if the query has not shown it.
    `reason`: the end of a sentence whose subject is the source, such as "answers 404"; "" if `has` is True.
    `is_unclear`: the server was busy or requested a password, so an installation may still succeed.
    """

    source: TorchSource
    has: bool | None
    reason: str = ""
    is_unclear: bool = False


def own_sources(uv: UvSources) -> list[TorchSource]:
    """Return the sources in uv's environment variables and settings.

    Folders and pages of the option find-links come first, the default index last.
    """
    env = uv.environment
    links = [link for link in env.get("UV_FIND_LINKS", "").split(",") if link] + uv_settings.find_links(uv.config)
    pages = [TorchSource(f"find-links {redact(link)}", link, "find-links") for link in links]
    rows, forbidden = uv_settings.indexes(uv.config)
    if forbidden or "--no-index" in uv.flags:
        return pages
    variables = [_row(word) for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL") for word in env.get(name, "").split()]
    rows = [*variables, *rows]
    default_url = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")
    default = _row(default_url) if default_url else next((row for row in rows if row.get("default")), None)
    rows = [row for row in rows if not row.get("default")]
    rows.append(default or {"url": pip_settings.official_index()})
    indexes = []
    for row in rows:
        kind = "find-links" if row.get("format") == "flat" else "index"
        indexes.append(TorchSource(f"index {redact(row['url'])}", _with_password(row, env), kind))
    return [*pages, *dict.fromkeys(indexes)]


def query_all(
    sources: Sequence[TorchSource],
    pinned: PinnedPackage,
    session: Callable[[], requests.Session],
    seconds: float,
    insecure: str = "",
) -> list[SourceAnswer]:
    """Query all sources at the same time, and return their answers in the order of the sources.

    Args:
        sources: the sources.
        pinned: the package.
        session: a function that returns a new HTTP session for each request.
        seconds: the timeout of the query; in the answer of a source without a response by then, `has` is None.
        insecure: the hosts whose certificates are not verified, separated by spaces as in UV_INSECURE_HOST.
    """
    queries = [_IndexQuery(source, pinned, session, time.monotonic() + seconds, insecure.split()) for source in sources]
    threads = [threading.Thread(target=query.run, daemon=True) for query in queries]
    for thread in threads:
        thread.start()
    for thread, query in zip(threads, queries, strict=True):
        thread.join(max(0.0, query.deadline - time.monotonic()))
    timeout = f"does not answer within {seconds:g} s"
    return [query.answer or SourceAnswer(query.source, None, timeout) for query in queries]


class _NotServedError(Exception):
    """Report that a source does not have the file; the message is the end of a sentence about the source."""


class _UnclearError(Exception):
    """Report that a response does not show whether the source has the file; the message is as in _NotServedError."""


@dataclass
class _IndexQuery:
    """Queries one source in a thread of its own.

    `deadline`: the end of the query, by `time.monotonic()`. `insecure`: the hosts whose certificates are not verified.
    `answer`: the result; None until the query has ended.
    """

    source: TorchSource
    pinned: PinnedPackage
    session: Callable[[], requests.Session]
    deadline: float
    insecure: Sequence[str]
    answer: SourceAnswer | None = field(default=None)

    def run(self) -> None:
        """Query the source and set `answer`; every exception is caught and becomes an answer."""
        import requests
        import urllib3

        try:
            self._check_listed(self._files())
            self.answer = SourceAnswer(self.source, has=True)
        except _NotServedError as error:
            self.answer = SourceAnswer(self.source, False, str(error))
        except _UnclearError as error:
            self.answer = SourceAnswer(self.source, None, str(error), is_unclear=True)
        except PageError as error:
            self.answer = SourceAnswer(self.source, None, str(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            self.answer = SourceAnswer(self.source, None, f"does not answer ({type(error).__name__})")
        except Exception as error:  # an invalid response of one server must not end the thread without an answer
            self.answer = SourceAnswer(self.source, None, f"cannot be read ({type(error).__name__})")

    def _files(self) -> list[index_page.IndexFile]:
        url = self.source.url
        if self.source.kind == "index":
            url = f"{url.rstrip('/')}/{self.pinned.name}/"
        folder = _local(url)
        if folder is None:
            return self._page(url)
        if folder.is_dir() and self.source.kind == "find-links":
            return [index_page.IndexFile(file.name, str(file)) for file in folder.iterdir() if file.suffix == ".whl"]
        page = folder / "index.html" if folder.is_dir() else folder
        try:
            return index_page.read(page.read_bytes(), "text/html", page.absolute().as_uri())
        except OSError as error:
            if self.source.kind == "index" and self.source.url != url and not page.exists():
                raise _NotServedError(f"does not have {self.pinned.name}") from None
            raise _NotServedError(f"cannot be read: {error.strerror}") from None
        except index_page.NoIndexError:
            raise _NotServedError("has no link to a file") from None

    def _page(self, url: str) -> list[index_page.IndexFile]:
        with self._get(url, {"Accept": index_page.ACCEPT}) as response:
            if response.status_code in _UNCLEAR_STATUSES or response.status_code >= 500:
                raise _UnclearError(f"answers {response.status_code}")
            if response.status_code == 404 and self.source.kind == "index":
                raise _NotServedError(f"does not have {self.pinned.name}")
            if not response.ok:
                raise _NotServedError(f"answers {response.status_code}")
            content = read_page(response, max(0.1, self.deadline - time.monotonic()))
            try:
                return index_page.read(content, response.headers.get("Content-Type", ""), response.url)
            except index_page.NoIndexError as error:
                raise _NotServedError(str(error)) from None

    def _check_listed(self, files: Sequence[index_page.IndexFile]) -> None:
        """Check that the files have a wheel of the package for this host, with a pinned hash, and that it is served.

        Raises:
            _NotServedError: they have no such wheel, or the source does not serve it.
            _UnclearError: the response does not show whether the source has the wheel.
        """
        from packaging.utils import InvalidWheelFilename, parse_wheel_filename
        from packaging.version import Version

        version = Version(self.pinned.version)
        wheels = []
        for file in files:
            try:
                name, listed_version, _, tags = parse_wheel_filename(file.name)
            except InvalidWheelFilename:
                continue
            if name == self.pinned.name and listed_version == version:
                wheels.append((file, tags))
        if not wheels:
            raise _NotServedError(f"does not list {self.pinned}")
        supported = _tags(self.pinned.python)
        usable = [file for file, tags in wheels if tags & supported]
        if not usable:
            minor = self.pinned.python.rpartition(".")[0]
            raise _NotServedError(f"has {self.pinned}, but no wheel for Python {minor} on this system")
        self._check_served([(file, self._hash(file)) for file in usable])

    def _check_served(self, files: Sequence[tuple[index_page.IndexFile, str | None]]) -> None:
        """Request one byte of the first (file, sha256) with a pinned hash, else of the first with an unknown hash."""
        matching = [file for file, digest in files if digest in self.pinned.hashes]
        usable = matching or [file for file, digest in files if digest is None]
        if not usable:
            file, digest = files[0]
            raise _NotServedError(f"has {file.name} with another hash ({str(digest)[:12]}…) than the pinned one")
        file = usable[0]
        if _local(file.url) is not None:
            return
        # One byte shows that the file exists. A server without range requests starts to send the whole file, but the
        # connection is closed after the headers.
        headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with self._get(file.url, headers) as response:
            if response.status_code in _UNCLEAR_STATUSES:
                raise _UnclearError(f"answers {response.status_code} for {file.name}")
            if response.status_code not in {200, 206}:
                raise _NotServedError(f"lists {file.name}, but answers {response.status_code} for it")

    def _hash(self, file: index_page.IndexFile) -> str | None:
        """Return the sha256 of a listed file in hex.

        It is computed for a local file. Otherwise it is the one on the page, or None if the page has no hash.
        """
        path = _local(file.url)
        if path is None:
            return file.sha256
        try:
            return hashing.hash_file(path, "sha256")
        except OSError:
            raise _NotServedError(f"lists {file.name}, which cannot be read") from None

    def _get(self, url: str, headers: dict[str, str]) -> requests.Response:
        import urllib3

        seconds = max(0.1, self.deadline - time.monotonic())
        timeout = (min(_CONNECT_SECONDS, seconds), seconds)
        if not {urls.host_of(url), urlsplit(url).hostname} & set(self.insecure):
            return self.session().get(url, headers=headers, timeout=timeout, stream=True)
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return self.session().get(url, headers=headers, timeout=timeout, stream=True, verify=False)


def _tags(python: str) -> frozenset[object]:
    """Return the wheel tags that a version of Python supports on this host, as `packaging.tags.Tag`."""
    from packaging import tags

    major, minor = (int(part) for part in python.split(".")[:2])
    interpreter = f"cp{major}{minor}"
    return frozenset([*tags.cpython_tags((major, minor)), *tags.compatible_tags((major, minor), interpreter)])


def _local(url: str) -> Path | None:
    """Return the local path for a path or a file: URL; None for another URL."""
    if "://" not in url:
        return Path(url).expanduser()
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _row(word: str) -> dict[str, str]:
    """Return {"name", "url"} of an index for a word NAME=URL in a variable of uv, or {"url"} for a word URL."""
    match = re.match(r"([\w.-]+)=(.+)$", word)
    return {"name": match.group(1), "url": match.group(2)} if match else {"url": word}


def _with_password(row: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Return the URL of an index, with the user and password of UV_INDEX_NAME_USERNAME and UV_INDEX_NAME_PASSWORD.

    Args:
        row: the "url" of the index, and perhaps its "name".
        environ: the environment variables.
    """
    name = re.sub(r"\W", "_", row.get("name", "")).upper()
    user, password = (environ.get(f"UV_INDEX_{name}_{part}", "") for part in ("USERNAME", "PASSWORD"))
    parts = urlsplit(row["url"])
    if not name or not (user or password) or "@" in parts.netloc:
        return row["url"]
    return urlunsplit(parts._replace(netloc=f"{quote(user, '')}:{quote(password, '')}@{parts.netloc}"))
