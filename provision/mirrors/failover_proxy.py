"""Runs the failover proxy, a local HTTP server through which uv and rattler download from several sources.

uv and rattler use a single URL and end when it fails. So they send their requests to this server. It tries the sources
one after another, resumes a partial file from the next source, verifies the checksum, and then sends the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from provision.core.errors import FirstlightError
from provision.lockfiles.requirements import normal
from provision.mirrors import index_page
from provision.net import download, urls
from provision.net.page import PageError, read_page
from provision.net.resumable_request import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import requests
    from typing_extensions import Self

    from provision.lockfiles.conda_lock import CondaPackage
    from provision.mirrors.chosen_mirrors import MirrorSource
    from provision.net.source_health import SourceHealth

# The URL of the index for uv. Its host name never resolves (RFC 2606): uv uses this server as the HTTP proxy for it. uv
# caches files by the URL of the index. Since this URL never changes, the cache is valid offline and for each mirror.
INDEX = "http://firstlight.invalid/simple"
_PAGE_TIMEOUTS = (3.0, 4.0)  # seconds to connect, seconds without data
_DOWNLOADS_AT_ONCE = 8


class FailoverProxy:
    """Serves the files that lock files pin; a `with` block starts and stops the server.

    Args:
        session: the HTTP session for the requests to the sources.
        store: the folder for downloads. Complete files in the folder are used, and partial files are resumed. `finish`
            removes the folder.
        health: the failures and deliveries of the sources in this run.
        progress: called with (bytes received since the last call, bytes that are expected in total).
    """

    def __init__(
        self, session: requests.Session, store: Path, health: SourceHealth, progress: Callable[[int, int], None]
    ) -> None:
        """Store the arguments, without starting the server."""
        self.session = session
        self.store = store
        self.health = health
        self.failures: dict[str, str] = {}
        self._progress = progress
        self._total = 0
        self._hashes: dict[str, tuple[str, frozenset[str]]] = {}
        self._sources: Sequence[MirrorSource] = ()
        self._page_cache: dict[tuple[str, str], list[index_page.IndexFile]] = {}
        self._conda: dict[str, CondaPackage] = {}
        self._conda_sources: Sequence[MirrorSource] = ()
        self._locks: dict[str, threading.Lock] = {}
        self._locks_guard = threading.Lock()
        self._slots = threading.Semaphore(_DOWNLOADS_AT_ONCE)
        self._server: ThreadingHTTPServer | None = None

    def wheels(self, hashes: Mapping[str, tuple[str, frozenset[str]]], sources: Sequence[MirrorSource]) -> None:
        """Set the packages of a pip lock file to serve, and their sources.

        Args:
            hashes: {normalized name of a package: (version, sha256 digests of its files)}.
            sources: the indexes and the pages with links, the best first.
        """
        self._hashes = dict(hashes)
        self._sources = sources
        self.failures.clear()

    def conda(self, packages: Sequence[CondaPackage], sources: Sequence[MirrorSource]) -> dict[str, str]:
        """Set the conda packages to serve, and their sources.

        Args:
            packages: the packages.
            sources: the sources, the best first; their `channels` have the URLs.

        Returns:
            {URL of a host with channels: URL of this server}, the mirrors for rattler.
        """
        self._conda = {urlsplit(package.url).path.lstrip("/"): package for package in packages}
        self._conda_sources = sources
        hosts = {urlsplit(package.url)._replace(path="/", query="", fragment="").geturl() for package in packages}
        return dict.fromkeys(hosts, f"{self.url}/conda/")

    @property
    def url(self) -> str:
        """Return the URL of this server, without a trailing slash."""
        assert self._server is not None  # noqa: S101 (only for the type)
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the environment variables with which uv uses this server as its index.

        Other sources in the host's settings, such as a folder for find-links, are used as before.
        """
        env = cached_only(environ)
        plain = re.findall(r"http://([^/\s,]+)", f"{env.get('UV_FIND_LINKS', '')} {env.get('UV_INDEX', '')}")
        excluded = {part for name in ("NO_PROXY", "no_proxy") for part in env.get(name, "").split(",") if part.strip()}
        if "*" in excluded:
            # "*" would exclude this server too. Instead the other proxy variables are removed, so that no other host is
            # reached through a proxy.
            excluded = {"localhost"}
            for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
                env.pop(name, None)
        hosts = ",".join(sorted(excluded | {host.rpartition("@")[2].partition(":")[0] for host in plain}))
        env |= {"NO_PROXY": hosts, "no_proxy": hosts, "HTTP_PROXY": self.url, "http_proxy": self.url}
        # This server sends nothing until a file is complete, which may take long. It has timeouts and retries itself.
        return env | {"UV_HTTP_TIMEOUT": "86400", "UV_HTTP_RETRIES": "0"}

    def __enter__(self) -> Self:
        """Start the server on a free port of the loopback address."""
        self.store.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server; downloaded and partial files are kept for the next run."""
        assert self._server is not None  # noqa: S101 (only for the type)
        self._server.shutdown()
        self._server.server_close()

    def finish(self) -> None:
        """Remove the folder with the downloads, after the installation has succeeded."""
        shutil.rmtree(self.store, ignore_errors=True)

    def page(self, package: str) -> tuple[bytes, bool] | None:
        """Return (the index page of one package in JSON (PEP 691), whether it lists every locked file).

        None if the package is not in the lock file, or if no source lists one of its files.
        """
        package = normal(package)
        _, locked = self._hashes.get(package, ("", frozenset()))
        files = list(self._files(package, locked)) if locked else []
        if not files:
            self.failures[package] = f"no source lists {package}" if locked else f"{package} is not locked"
            return None
        rows = [
            {
                "filename": file.name,
                "url": f"/files/{package}/{file.name}",
                "hashes": {"sha256": file.sha256} if file.sha256 else {},
            }
            for file in files
        ]
        content = {"meta": {"api-version": "1.0"}, "name": package, "files": rows}
        return json.dumps(content).encode(), {file.sha256 for file in files} >= locked

    def tag(self, package: str) -> str:
        """Return the ETag of a package's index page: a hash of the checksums in the lock file.

        A page that lists every locked file depends only on these checksums.
        """
        _, locked = self._hashes.get(normal(package), ("", frozenset()))
        return hashlib.sha256("".join(sorted(locked)).encode()).hexdigest()[:32]

    def wheel(self, package: str, name: str) -> Path | None:
        """Return the path of a downloaded and verified file of a package; None if no source delivers the file."""
        if not index_page.PLAIN_NAME.fullmatch(name):
            return None  # any local program can send a request, and a name such as ../x would be outside of the store
        _, locked = self._hashes.get(package, ("", frozenset()))
        sizes = [file.size for file in self._cached_files(package) if file.name == name and file.size]

        def sources() -> Iterator[Source]:
            for source in self._in_order():
                for file in self._list(source, package):
                    if file.name == name and (file.sha256 is None or file.sha256 in locked):
                        yield Source(source.name, file.url)

        # A page may lie about the size, so it is for the progress alone.
        return self._fetch(name, sources, locked, None, shown_size=sizes[0] if sizes else 0)

    def conda_package(self, path: str) -> Path | None:
        """Return the path of a downloaded and verified conda package; None if no source delivers the package.

        Args:
            path: the path in the official URL of the package, such as "conda-forge/noarch/NAME.conda".
        """
        package = self._conda.get(path)
        if package is None:
            return None
        channel, _, rest = path.partition("/")

        def sources() -> Iterator[Source]:
            for source in self._conda_sources:
                if source.is_official:
                    yield Source(source.name, package.url)
                elif channel in source.channels:
                    yield Source(source.name, f"{source.channels[channel]}/{rest}")

        size, hashes = package.size, frozenset({package.sha256})
        return self._fetch(path.rpartition("/")[2], sources, hashes, size, shown_size=size or 0)

    def _fetch(
        self,
        name: str,
        sources: Callable[[], Iterator[Source]],
        hashes: frozenset[str],
        size: int | None,
        *,
        shown_size: int,
    ) -> Path | None:
        """Download a file into the store, unless the store has it, and return its path.

        If the download fails, the reason is added to `failures`, and None is returned.

        Args:
            name: the name of the file.
            sources: returns the sources of the file, the best first.
            hashes: the allowed sha256 digests.
            size: the pinned size in bytes; None if no size is pinned.
            shown_size: the size in bytes for the progress; 0 if no page gives one.
        """
        with self._locks_guard:
            lock = self._locks.setdefault(name, threading.Lock())
        target = self.store / name
        with lock, self._slots:
            if target.exists():
                return target
            self._total += shown_size

            def add_progress(count: int) -> None:
                self._progress(count, self._total)

            part = target.with_name(f"{name}.part")
            pins = {"sha256": hashes}
            try:
                download.download(
                    self.session,
                    sources,
                    part,
                    size=size,
                    pins=pins,
                    health=self.health,
                    progress=add_progress,
                    name=name,
                )
            except FirstlightError as error:
                self.failures[name] = str(error)
                return None
            except OSError as error:
                self.failures[name] = f"{part}: {os.strerror(error.errno) if error.errno else error}"
                return None
            part.replace(target)
            return target

    def _in_order(self) -> list[MirrorSource]:
        """Return the sources that are not banned; those that have failed in this run come last."""
        order = self.health.order(source.name for source in self._sources)
        usable = (source for source in self._sources if source.name in order)
        return sorted(usable, key=lambda source: order.index(source.name))

    def _files(self, package: str, locked: frozenset[str]) -> Iterator[index_page.IndexFile]:
        """Yield each locked file of a package once, from the pages of the sources.

        The page of a further source is read only if files are still missing. Once a file was found, the pages of failed
        sources are not read.
        """
        files: dict[str, index_page.IndexFile] = {}
        for source in self._in_order():
            if {file.sha256 for file in files.values()} >= locked:
                break
            if files and source.name in self.health.failed:
                break
            for file in self._list(source, package):
                if file.sha256 is None or file.sha256 in locked:
                    earlier = files.get(file.name)
                    files[file.name] = file if earlier is None or earlier.sha256 is None else earlier
        yield from files.values()

    def _cached_files(self, package: str) -> Iterator[index_page.IndexFile]:
        for (_, page_package), files in list(self._page_cache.items()):
            if page_package == package:
                yield from files

    def _list(self, source: MirrorSource, package: str) -> list[index_page.IndexFile]:
        """Return the files of a package that a source lists; the result is cached for each source and package."""
        is_flat = source.kind == "find-links"
        key = (source.name, package)
        if key not in self._page_cache:
            url = source.url if is_flat else f"{source.url.rstrip('/')}/{package}/"
            files = self._read_page(source, url)
            self._page_cache[key] = [
                file
                for file in files
                if normal(re.split(r"-\d", file.name)[0]) == package and urls.is_allowed(file.url)
            ]
        return self._page_cache[key]

    def _read_page(self, source: MirrorSource, url: str) -> list[index_page.IndexFile]:
        import requests
        import urllib3

        try:
            with self.session.get(
                url, headers={"Accept": index_page.ACCEPT}, timeout=_PAGE_TIMEOUTS, stream=True
            ) as response:
                if not response.ok:
                    return []
                content = read_page(response, _PAGE_TIMEOUTS[1])
                return index_page.read(content, response.headers.get("Content-Type", ""), response.url)
        except index_page.NoIndexError:
            return []
        except PageError as error:
            self.health.mark_failed(source.name, str(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            self.health.mark_failed(source.name, f"its index page cannot be read ({type(error).__name__})")
        return []


def cached_only(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables for an offline run of uv, in which uv uses only files in its cache.

    With them, uv finds the files that earlier runs downloaded through the failover proxy.
    """
    return {key: value for key, value in environ.items() if key not in {"UV_INDEX_URL", "UV_EXTRA_INDEX_URL"}} | {
        "UV_DEFAULT_INDEX": INDEX
    }


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Print nothing, since an interrupted installer closes its connections, which is no error of this server."""


def _handler(proxy: FailoverProxy) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (one class, whose methods are counted together)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            kind, _, rest = unquote(urlsplit(self.path).path).strip("/").partition("/")
            if kind == "simple":
                self.page(rest)
            elif kind == "files":
                package, _, name = rest.partition("/")
                self.file(proxy.wheel(package, name))
            elif kind == "conda":
                self.file(proxy.conda_package(rest))
            else:
                self.reply(404, {})

        def page(self, package: str) -> None:
            tag = f'"{proxy.tag(package)}"'
            headers = {"ETag": tag, "Cache-Control": "max-age=0"}
            if self.headers.get("If-None-Match") == tag:
                self.reply(304, headers)
                return
            page = proxy.page(package)
            if page is None:
                self.reply(404, {})
                return
            content, is_complete = page
            headers = headers if is_complete else {"Cache-Control": "no-store"}
            self.reply(200, headers | {"Content-Type": "application/vnd.pypi.simple.v1+json"}, content)

        def file(self, path: Path | None) -> None:
            if path is None:
                self.reply(404, {})
                return
            with path.open("rb") as file:
                self.send_response(200)
                self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Cache-Control", "max-age=31536000, immutable")
                self.end_headers()
                shutil.copyfileobj(file, self.wfile, 1 << 20)
            with suppress(OSError):
                path.unlink()  # the installer has the file in its cache, so a second copy would waste space

        def reply(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
