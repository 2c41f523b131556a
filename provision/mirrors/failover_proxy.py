"""An index on loopback, alive while an installer works: each file from the first source that delivers it, verified.

uv and rattler ask one address and give up where it fails. Here they ask us; we ask the sources, one after another,
go on with the next where one dies in the middle, compare the hash, and only then hand the file over.
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
from provision.net.fetch import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import requests
    from typing_extensions import Self

    from provision.lockfiles.conda_lock import CondaPackage
    from provision.mirrors.record import MirrorSource
    from provision.net.source_health import SourceHealth

# A name that never resolves (RFC 2606), reached through us as its proxy: uv keys its cache by the index's address, so
# what is cached stays usable offline, and whichever mirror is chosen.
INDEX = "http://firstlight.invalid/simple"
_PAGE_SECONDS = (3.0, 4.0)
_LARGEST_PAGE = 64 << 20
_AT_ONCE = 8


class FailoverProxy:
    """Serves what locks pin; `with` starts and ends it.

    Args:
        session: how the sources are asked.
        store: where files arrive; what is whole in it is used, a partial is gone on with. Emptied by `finish`.
        health: what became of the sources.
        progress: told the bytes that arrive, and how many will.
    """

    def __init__(
        self, session: requests.Session, store: Path, health: SourceHealth, progress: Callable[[int, int], None]
    ) -> None:
        """Take what the class says."""
        self.session = session
        self.store = store
        self.health = health
        self.failures: dict[str, str] = {}
        self._progress = progress
        self._total = 0
        self._hashes: dict[str, tuple[str, frozenset[str]]] = {}
        self._sources: Sequence[MirrorSource] = ()
        self._listed: dict[tuple[str, str], list[index_page.IndexFile]] = {}
        self._conda: dict[str, CondaPackage] = {}
        self._conda_sources: Sequence[MirrorSource] = ()
        self._locks: dict[str, threading.Lock] = {}
        self._gate = threading.Lock()
        self._slots = threading.Semaphore(_AT_ONCE)
        self._server: ThreadingHTTPServer | None = None

    def wheels(self, hashes: Mapping[str, tuple[str, frozenset[str]]], sources: Sequence[MirrorSource]) -> None:
        """Serve the packages of a pip lock ({name: (version, sha256s)}) from these sources."""
        self._hashes = dict(hashes)
        self._sources = sources
        self.failures.clear()

    def conda(self, packages: Sequence[CondaPackage], sources: Sequence[MirrorSource]) -> dict[str, str]:
        """Serve conda packages from these sources' `channels`.

        Returns:
            {channel's own address: where it is served now}, as rattler takes its mirrors.
        """
        self._conda = {urlsplit(package.url).path.lstrip("/"): package for package in packages}
        self._conda_sources = sources
        hosts = {urlsplit(package.url)._replace(path="/", query="", fragment="").geturl() for package in packages}
        return dict.fromkeys(hosts, f"{self.url}/conda/")

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None  # noqa: S101 (for the type alone)
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Let uv ask us for its index, and whatever else the machine told it as before."""
        env = cached_only(environ)
        plain = re.findall(r"http://([^/\s,]+)", f"{env.get('UV_FIND_LINKS', '')} {env.get('UV_INDEX', '')}")
        spared = {part for name in ("NO_PROXY", "no_proxy") for part in env.get(name, "").split(",") if part.strip()}
        if "*" in spared:  # it would spare us as well: then no proxy is used for anything else either
            spared = {"localhost"}
            for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
                env.pop(name, None)
        hosts = ",".join(sorted(spared | {host.rpartition("@")[2].partition(":")[0] for host in plain}))
        env |= {"NO_PROXY": hosts, "no_proxy": hosts, "HTTP_PROXY": self.url, "http_proxy": self.url}
        # Silence is our business: a file comes at once when it is whole, however long that takes.
        return env | {"UV_HTTP_TIMEOUT": "86400", "UV_HTTP_RETRIES": "0"}

    def __enter__(self) -> Self:
        """Listen on loopback."""
        self.store.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening; what has arrived stays for the next run."""
        assert self._server is not None  # noqa: S101 (for the type alone)
        self._server.shutdown()
        self._server.server_close()

    def finish(self) -> None:
        """The installer has what it needs: drop what was kept for it."""
        shutil.rmtree(self.store, ignore_errors=True)

    def page(self, package: str) -> tuple[bytes, bool] | None:
        """The page of one package in JSON (PEP 691), and whether every locked file is on it; None where it has none."""
        package = normal(package)
        _, right = self._hashes.get(package, ("", frozenset()))
        files = list(self._files(package, right)) if right else []
        if not files:
            self.failures[package] = f"no source lists {package}" if right else f"{package} is not locked"
            return None
        rows = [
            {
                "filename": file.name,
                "url": f"/files/{package}/{file.name}",
                "hashes": {"sha256": file.sha256} if file.sha256 else {},
            }
            for file in files
        ]
        whole = {"meta": {"api-version": "1.0"}, "name": package, "files": rows}
        return json.dumps(whole).encode(), {file.sha256 for file in files} >= right

    def tag(self, package: str) -> str:
        """What changes when other files of a package are locked: its page is a function of that alone."""
        _, right = self._hashes.get(normal(package), ("", frozenset()))
        return hashlib.sha256("".join(sorted(right)).encode()).hexdigest()[:32]

    def wheel(self, package: str, name: str) -> Path | None:
        """The file of a package, whole and verified; None where no source delivers it."""
        if not index_page.PLAIN_NAME.fullmatch(name):
            return None  # whoever is on this machine can ask us: a path would lead out of the store
        _, right = self._hashes.get(package, ("", frozenset()))
        sizes = [file.size for file in self._known(package) if file.name == name and file.size]

        def candidates() -> Iterator[Source]:
            for source in self._in_order():
                for file in self._list(source, package):
                    if file.name == name and (file.sha256 is None or file.sha256 in right):
                        yield Source(source.name, file.url)

        return self._fetch(name, candidates, right, sizes[0] if sizes else None)

    def conda_package(self, path: str) -> Path | None:
        """A conda package by its path below the channels' host, whole and verified."""
        package = self._conda.get(path)
        if package is None:
            return None
        channel, _, rest = path.partition("/")

        def candidates() -> Iterator[Source]:
            for source in self._conda_sources:
                if source.is_official:
                    yield Source(source.name, package.url)
                elif channel in source.channels:
                    yield Source(source.name, f"{source.channels[channel]}/{rest}")

        return self._fetch(path.rpartition("/")[2], candidates, frozenset({package.sha256}), package.size)

    def _fetch(
        self, name: str, candidates: Callable[[], Iterator[Source]], right: frozenset[str], size: int | None
    ) -> Path | None:
        with self._gate:
            lock = self._locks.setdefault(name, threading.Lock())
        target = self.store / name
        with lock, self._slots:
            if target.exists():
                return target
            self._total += size or 0

            def arrived(count: int) -> None:
                self._progress(count, self._total)

            part = target.with_name(f"{name}.part")
            pins = {"sha256": right}
            try:
                download.fetch(
                    self.session,
                    candidates,
                    part,
                    size=size,
                    pins=pins,
                    health=self.health,
                    progress=arrived,
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
        order = self.health.order(source.name for source in self._sources)
        return sorted((each for each in self._sources if each.name in order), key=lambda each: order.index(each.name))

    def _files(self, package: str, right: frozenset[str]) -> Iterator[index_page.IndexFile]:
        """Every locked file of a package, each once; further sources are asked while some are missing."""
        found: dict[str, index_page.IndexFile] = {}
        for source in self._in_order():
            if {file.sha256 for file in found.values()} >= right:
                break
            if found and source.name in self.health.failed:
                break
            for file in self._list(source, package):
                if file.sha256 is None or file.sha256 in right:
                    known = found.get(file.name)
                    found[file.name] = file if known is None or known.sha256 is None else known
        yield from found.values()

    def _known(self, package: str) -> Iterator[index_page.IndexFile]:
        for (_, listed), files in list(self._listed.items()):
            if listed == package:
                yield from files

    def _list(self, source: MirrorSource, package: str) -> list[index_page.IndexFile]:
        """What a source lists of a package, asked once; a page that links everything is asked once for all."""
        flat = source.kind == "find-links"
        key = (source.name, package)
        if key not in self._listed:
            url = source.url if flat else f"{source.url.rstrip('/')}/{package}/"
            files = self._ask(source, url)
            self._listed[key] = [
                file
                for file in files
                if normal(re.split(r"-\d", file.name)[0]) == package and urls.is_allowed(file.url)
            ]
        return self._listed[key]

    def _ask(self, source: MirrorSource, url: str) -> list[index_page.IndexFile]:
        import requests
        import urllib3

        try:
            with self.session.get(
                url, headers={"Accept": index_page.ACCEPT}, timeout=_PAGE_SECONDS, stream=True
            ) as answer:
                if not answer.ok:
                    return []
                content = answer.raw.read(_LARGEST_PAGE, decode_content=True)
                return index_page.read(content, answer.headers.get("Content-Type", ""), answer.url)
        except index_page.NoIndexError:
            return []
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            self.health.mark_failed(source.name, f"its page does not come ({type(error).__name__})")
            return []


def cached_only(environ: Mapping[str, str]) -> dict[str, str]:
    """Uv's environment to use what earlier runs got through a relay."""
    return {key: value for key, value in environ.items() if key not in {"UV_INDEX_URL", "UV_EXTRA_INDEX_URL"}} | {
        "UV_DEFAULT_INDEX": INDEX
    }


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """An installer that was interrupted leaves its connections: nothing to say."""


def _handler(relay: FailoverProxy) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (one class, whose methods are counted together)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            kind, _, rest = unquote(urlsplit(self.path).path).strip("/").partition("/")
            if kind == "simple":
                self.page(rest)
            elif kind == "files":
                package, _, name = rest.partition("/")
                self.file(relay.wheel(package, name))
            elif kind == "conda":
                self.file(relay.conda_package(rest))
            else:
                self.reply(404, {})

        def page(self, package: str) -> None:
            tag = f'"{relay.tag(package)}"'
            headers = {"ETag": tag, "Cache-Control": "max-age=0"}
            if self.headers.get("If-None-Match") == tag:
                self.reply(304, headers)
                return
            found = relay.page(package)
            if found is None:
                self.reply(404, {})
                return
            content, whole = found
            headers = headers if whole else {"Cache-Control": "no-store"}
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
                path.unlink()  # the installer keeps it: a volume need not hold it twice

        def reply(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
