"""The failover proxy: a local server through which uv and rattler download, with several sources and verification.

uv and rattler use one address and end when it fails. The proxy takes their requests instead. It tries the sources one
after another, resumes a partial file from the next source, verifies the checksum, and only then sends the file.
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

# A host name that never resolves (RFC 2606); uv reaches it through this server as its HTTP proxy. uv keys its cache by
# the index's address. With this constant address the cache stays valid offline and after a change of the mirror.
INDEX = "http://firstlight.invalid/simple"
_PAGE_TIMEOUTS = (3.0, 4.0)  # seconds to connect, seconds without data
_DOWNLOADS_AT_ONCE = 8


class FailoverProxy:
    """Serve the files that locks pin; `with` starts and stops the server.

    Args:
        session: sends the requests to the sources.
        store: the folder for downloads. Complete files in it are used and partial files are resumed. `finish` removes
            the folder.
        health: the failures and deliveries of the sources in this run.
        progress: called with the number of bytes that have just arrived, and the total number that is expected.
    """

    def __init__(
        self, session: requests.Session, store: Path, health: SourceHealth, progress: Callable[[int, int], None]
    ) -> None:
        """Store the arguments; start nothing."""
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
        """Serve the packages of a pip lock from these sources.

        Args:
            hashes: {package: (version, sha256 sums of its files)}.
            sources: the indexes and pages of links, the first one preferred.
        """
        self._hashes = dict(hashes)
        self._sources = sources
        self.failures.clear()

    def conda(self, packages: Sequence[CondaPackage], sources: Sequence[MirrorSource]) -> dict[str, str]:
        """Serve conda packages from the `channels` of these sources.

        Returns:
            {address of a channel host: address of this server}, the form in which rattler takes mirrors.
        """
        self._conda = {urlsplit(package.url).path.lstrip("/"): package for package in packages}
        self._conda_sources = sources
        hosts = {urlsplit(package.url)._replace(path="/", query="", fragment="").geturl() for package in packages}
        return dict.fromkeys(hosts, f"{self.url}/conda/")

    @property
    def url(self) -> str:
        """Return the address of this server, without a trailing slash."""
        assert self._server is not None  # noqa: S101 (only for the type)
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return uv's environment with this server as its index; all other sources of the machine keep working."""
        env = cached_only(environ)
        plain = re.findall(r"http://([^/\s,]+)", f"{env.get('UV_FIND_LINKS', '')} {env.get('UV_INDEX', '')}")
        excluded = {part for name in ("NO_PROXY", "no_proxy") for part in env.get(name, "").split(",") if part.strip()}
        if "*" in excluded:
            # "*" would exclude this server too. Without the other proxy variables, all other hosts stay excluded.
            excluded = {"localhost"}
            for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
                env.pop(name, None)
        hosts = ",".join(sorted(excluded | {host.rpartition("@")[2].partition(":")[0] for host in plain}))
        env |= {"NO_PROXY": hosts, "no_proxy": hosts, "HTTP_PROXY": self.url, "http_proxy": self.url}
        # This server sends nothing until a file is complete, which may take long. It does its own timeouts and retries.
        return env | {"UV_HTTP_TIMEOUT": "86400", "UV_HTTP_RETRIES": "0"}

    def __enter__(self) -> Self:
        """Start to listen on loopback."""
        self.store.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening; downloaded and partial files stay for the next run."""
        assert self._server is not None  # noqa: S101 (only for the type)
        self._server.shutdown()
        self._server.server_close()

    def finish(self) -> None:
        """Remove the stored files; call it when the installation has succeeded."""
        shutil.rmtree(self.store, ignore_errors=True)

    def page(self, package: str) -> tuple[bytes, bool] | None:
        """Return the index page of one package in JSON (PEP 691), and whether it lists every locked file.

        Return None where the package is not locked or no source lists a file of it.
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
        """Return the ETag of a package's page, a hash of the locked checksums, on which a complete page depends."""
        _, locked = self._hashes.get(normal(package), ("", frozenset()))
        return hashlib.sha256("".join(sorted(locked)).encode()).hexdigest()[:32]

    def wheel(self, package: str, name: str) -> Path | None:
        """Return the path of a package's file, complete and verified; None where no source delivers it."""
        if not index_page.PLAIN_NAME.fullmatch(name):
            return None  # any local program can send requests here, and a name with a path would leave the store
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
        """Return the path of a conda package, complete and verified; None where no source delivers it.

        Args:
            path: the package's path on the host of its channel.
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

        size = package.size
        return self._fetch(path.rpartition("/")[2], sources, frozenset({package.sha256}), size, shown_size=size or 0)

    def _fetch(
        self,
        name: str,
        sources: Callable[[], Iterator[Source]],
        hashes: frozenset[str],
        size: int | None,
        *,
        shown_size: int,
    ) -> Path | None:
        """Download a file into the store, unless it is there; return None and store the reason where that fails."""
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
        """Return the sources that may be used; those that have failed in this run come last."""
        order = self.health.order(source.name for source in self._sources)
        usable = (source for source in self._sources if source.name in order)
        return sorted(usable, key=lambda source: order.index(source.name))

    def _files(self, package: str, locked: frozenset[str]) -> Iterator[index_page.IndexFile]:
        """Yield every locked file of a package once; read the page of a further source while files are missing."""
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
        """Return the files of a package that a source lists; each page is requested once for each package."""
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
            return []
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            self.health.mark_failed(source.name, f"its index page cannot be read ({type(error).__name__})")
            return []


def cached_only(environ: Mapping[str, str]) -> dict[str, str]:
    """Return uv's environment for an offline run that uses files which earlier runs got through the proxy."""
    return {key: value for key, value in environ.items() if key not in {"UV_INDEX_URL", "UV_EXTRA_INDEX_URL"}} | {
        "UV_DEFAULT_INDEX": INDEX
    }


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Print nothing: an interrupted installer closes its connections, which is no error here."""


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
                path.unlink()  # the installer caches the file, so a second copy on the volume would waste space

        def reply(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
