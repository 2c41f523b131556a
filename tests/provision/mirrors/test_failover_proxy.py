"""Tests the failover proxy: real uv installs through the proxy from mirrors with faults."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable  # noqa: TC003 (the annotation of a variable)
from contextlib import closing
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import requests

from provision.core import process
from provision.installers import pip_settings
from provision.installers import uv as uv_installer
from provision.lockfiles import requirements
from provision.mirrors import failover_proxy
from provision.mirrors.chosen_mirrors import MirrorSource
from provision.net import page as net_page
from provision.net.source_health import SourceHealth
from tests.provision import silent_server
from tests.provision.conftest import lock_text, write_wheel
from tests.provision.http_server import PORTAL, Fault, RawServer, Server, index

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def index_content(wheels_folder: Path) -> dict[str, bytes]:
    """Return {URL path: content} of an index with ten packages."""
    return index(sorted(wheels_folder.glob("*.whl")))


@pytest.fixture
def wheels_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ten"
    folder.mkdir()
    for number in range(10):
        write_wheel(folder, f"part{number}", "1.0", {f"part{number}.py": f"x = {number}\n" * 2000})
    return folder


class ProxyInstallation:
    """Installs the packages of a lock with real uv through a failover proxy into a new environment."""

    def __init__(self, tmp_path: Path, lock: str, mirrors: list[MirrorSource]) -> None:
        self.lock, self.mirrors = lock, mirrors
        self.store = tmp_path / "arriving"
        self.cache = tmp_path / "uv-cache"
        self.prefix = tmp_path / "env"
        self.health = SourceHealth()
        self.failures: dict[str, str] = {}
        process.run([uv_installer.uv_binary(), "venv", "--quiet", "--clear", self.prefix])

    def run(self, *, offline: bool = False) -> list[str]:
        uv = uv_installer.for_uv(os.environ, self.cache, offline=offline)
        argv: list[str | Path] = [
            uv_installer.uv_binary(),
            "pip",
            "install",
            "--no-deps",
            "--require-hashes",
            "-r",
            "-",
            "--python",
            self.prefix,
        ]
        if offline:
            process.run(argv, env=failover_proxy.cached_only(uv.environment), stdin=self.lock)
            return self.names
        session = pip_settings.session(os.environ, {})
        with failover_proxy.FailoverProxy(session, self.store, self.health, lambda _, __: None) as proxy:
            proxy.wheels(requirements.hashes(self.lock), self.mirrors)
            try:
                process.run(argv, env=proxy.environment(uv.environment), stdin=self.lock)
            finally:
                self.failures = dict(proxy.failures)
        return self.names

    @property
    def names(self) -> list[str]:
        return sorted(path.stem for path in self.prefix.glob("lib/*/site-packages/part*.py"))


def sources_of(*servers: Server) -> list[MirrorSource]:
    """Return the servers as sources with the names m0, m1, …"""
    return [MirrorSource(f"m{number}", f"{server.url}/simple") for number, server in enumerate(servers)]


ALL_PACKAGES = [f"part{number}" for number in range(10)]


class TestUv:
    @pytest.mark.parametrize(
        "fault",
        [
            Fault("/files/", status=404, after=5),
            Fault("/files/", status=429, headers={"Retry-After": "60"}, after=5),
            Fault("/files/", flip=True, after=5),
            Fault("/files/", cut=500, after=5),
            Fault("/files/", stall=True, after=5),
            Fault("/files/part7", status=302, headers={"Location": "http://127.0.0.1:9/gone"}),
            Fault("/simple/part7", status=404),
            Fault("", body=PORTAL),
            Fault("", status=403),
            Fault("", stall=True),
        ],
        ids=[
            "404",
            "429",
            "wrong content",
            "connection closed early",
            "stalled files",
            "redirect to a closed port",
            "one page missing",
            "login page",
            "403",
            "all requests stalled",
        ],
    )
    def test_installation_completes_from_the_second_mirror_when_the_first_fails(
        self, serve: Any, tmp_path: Path, wheels_folder: Path, index_content: dict[str, bytes], fault: Fault
    ) -> None:
        bad, good = serve(index_content, fault), serve(index_content)
        installation = ProxyInstallation(
            tmp_path, lock_text(*sorted(wheels_folder.glob("*.whl"))), sources_of(bad, good)
        )
        assert installation.run() == ALL_PACKAGES
        assert {source for _, source, _ in installation.health.delivered} >= {"m1"}
        assert bool(installation.health.banned) == fault.flip
        if fault.after:
            assert sum(source == "m0" for _, source, _ in installation.health.delivered) >= 5 - fault.flip * 5

    @pytest.mark.parametrize("as_json", [True, False], ids=["json", "html"])
    @pytest.mark.parametrize("hashes", [True, False], ids=["checksums", "no checksums"])
    def test_installation_works_with_index_pages_in_json_or_html_and_with_or_without_checksums(
        self, serve: Any, tmp_path: Path, wheels_folder: Path, *, as_json: bool, hashes: bool
    ) -> None:
        files = sorted(wheels_folder.glob("*.whl"))
        mirror = serve(index(files, hashes=hashes, as_json=as_json))
        assert ProxyInstallation(tmp_path, lock_text(*files), sources_of(mirror)).run() == ALL_PACKAGES

    def test_installation_works_with_a_find_links_page_as_the_mirror(
        self, serve: Any, tmp_path: Path, wheels_folder: Path
    ) -> None:
        files = sorted(wheels_folder.glob("*.whl"))
        content = index(files)
        links = "".join(f'<a href="/files/{file.name}">{file.name}</a>' for file in files)
        flat = serve(content | {"/all": links.encode()})
        source = MirrorSource("flat", f"{flat.url}/all", "find-links")
        assert ProxyInstallation(tmp_path, lock_text(*files), [source]).run() == ALL_PACKAGES

    def test_cached_packages_are_installed_without_a_request_from_another_mirror_or_offline(
        self, serve: Any, tmp_path: Path, wheels_folder: Path, index_content: dict[str, bytes]
    ) -> None:
        lock = lock_text(*sorted(wheels_folder.glob("*.whl")))
        ProxyInstallation(tmp_path, lock, sources_of(serve(index_content))).run()
        other = serve(index_content)
        again = ProxyInstallation(tmp_path, lock, sources_of(other))
        assert again.run() == ALL_PACKAGES
        assert not other.seen, "the ETag of a page depends only on the lock"
        assert ProxyInstallation(tmp_path, lock, []).run(offline=True) == ALL_PACKAGES

    def test_wrong_content_of_the_only_mirror_is_reported_by_the_proxy_for_the_file(
        self, serve: Any, tmp_path: Path, wheels_folder: Path, index_content: dict[str, bytes]
    ) -> None:
        wrong = serve(index_content, Fault("/files/part3", flip=True))
        installation = ProxyInstallation(tmp_path, lock_text(*sorted(wheels_folder.glob("*.whl"))), sources_of(wrong))
        with pytest.raises(process.CommandError):
            installation.run()
        assert "but the pinned sha256 is" in installation.failures["part3-1.0-py3-none-any.whl"]

    def test_installation_with_a_partial_file_of_a_killed_run_succeeds_and_empties_the_store(
        self, serve: Any, tmp_path: Path, wheels_folder: Path, index_content: dict[str, bytes]
    ) -> None:
        lock = lock_text(*sorted(wheels_folder.glob("*.whl")))
        installation = ProxyInstallation(tmp_path, lock, sources_of(serve(index_content)))
        content = index_content["/files/part2-1.0-py3-none-any.whl"]
        installation.store.mkdir()
        (installation.store / "part2-1.0-py3-none-any.whl.part").write_bytes(content[:400])
        assert installation.run() == ALL_PACKAGES
        deliveries: Any = installation.health.delivered
        assert len(deliveries) == 10
        assert not list(installation.store.iterdir()), "the store is empty after uv has installed every file"

    def test_proxy_for_http_is_the_failover_proxy_and_the_users_proxy_for_https_stays(self, tmp_path: Path) -> None:
        with failover_proxy.FailoverProxy(requests.Session(), tmp_path, SourceHealth(), lambda _, __: None) as proxy:
            environment = proxy.environment(
                {"https_proxy": "http://p:1", "NO_PROXY": "corp", "UV_FIND_LINKS": "http://h:8/x"}
            )
            assert (environment["https_proxy"], environment["http_proxy"]) == ("http://p:1", proxy.url)
            assert environment["NO_PROXY"] == environment["no_proxy"] == "corp,h"
            assert "https_proxy" not in proxy.environment({"https_proxy": "http://p:1", "no_proxy": "*"})


def test_request_for_a_path_outside_of_the_proxys_store_or_a_partial_file_gets_404(tmp_path: Path) -> None:
    (tmp_path / "secret.whl").write_bytes(b"mine")
    store = tmp_path / "store"
    with failover_proxy.FailoverProxy(requests.Session(), store, SourceHealth(), lambda _, __: None) as proxy:
        (store / "half-1.whl.part").write_bytes(b"not verified")
        for name in ("..%2Fsecret.whl", "../secret.whl", f"{tmp_path}/secret.whl", "half-1.whl.part"):
            with closing(HTTPConnection(urlsplit(proxy.url).netloc)) as connection:
                connection.request("GET", f"/files/x/{name}")
                assert connection.getresponse().status == 404


class TestPages:
    """Tests that an index page of the proxy lists the locked files only."""

    def page(self, tmp_path: Path, locked: set[str], mirrors: list[MirrorSource]) -> list[str]:
        """Return the names of the files on the proxy's index page of the package part3; `locked` has its hashes."""
        with failover_proxy.FailoverProxy(
            requests.Session(), tmp_path / "store", SourceHealth(), lambda _, __: None
        ) as proxy:
            proxy.wheels({"part3": ("1.0", frozenset(locked))}, mirrors)
            page = proxy.page("part3")
            return [row["filename"] for row in json.loads(page[0])["files"]] if page else []

    def test_index_page_combines_mirrors_until_all_locked_files_are_listed(
        self, serve: Any, tmp_path: Path, wheels_folder: Path
    ) -> None:
        wheel = wheels_folder / "part3-1.0-py3-none-any.whl"
        other = wheels_folder / "part3-1.0-cp27-none-any.whl"
        other.write_bytes(b"for another python")
        locked = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (wheel, other)}
        incomplete, complete = serve(index([other])), serve(index([wheel, other]))
        assert set(self.page(tmp_path, locked, sources_of(incomplete, complete))) == {wheel.name, other.name}
        incomplete.seen.clear()
        complete.seen.clear()
        self.page(tmp_path, locked, sources_of(complete, incomplete))
        assert not incomplete.seen, "one complete mirror is enough"

    def test_files_that_are_not_locked_are_not_on_the_index_page(
        self, serve: Any, tmp_path: Path, wheels_folder: Path
    ) -> None:
        wheel = wheels_folder / "part3-1.0-py3-none-any.whl"
        assert self.page(tmp_path, {"0" * 64}, sources_of(serve(index([wheel])))) == []


PART3 = "part3-1.0-py3-none-any.whl"


def json_page(digest: str, **changes: object) -> bytes:
    """Return the JSON page of part3 with some values of its only row changed."""
    row = {"filename": PART3, "url": f"/files/{PART3}", "hashes": {"sha256": digest}, "size": 1}
    return json.dumps({"files": [row | changes]}).encode()


def gzip_of(start: bytes, repeated: bytes, count: int, end: bytes) -> bytes:
    """Return the compressed form of a large body, made without holding the body."""
    packer = zlib.compressobj(1, wbits=31)
    parts = [packer.compress(start), *(packer.compress(repeated * 10_000) for _ in range(count // 10_000))]
    return b"".join([*parts, packer.compress(end), packer.flush()])


LYING_PAGES: dict[str, Callable[[str], bytes]] = {
    "wrong size": lambda digest: json_page(digest, size=12345),
    "negative size": lambda digest: json_page(digest, size=-1),
    "infinite size": lambda digest: json_page(digest, size=float("inf")),
    "size as text": lambda digest: json_page(digest, size="9" * 5000),
    "list as hash": lambda digest: json_page(digest, hashes={"sha256": [digest]}),
    "table as hash": lambda digest: json_page(digest, hashes={"sha256": {"a": digest}}),
    "number as hash": lambda digest: json_page(digest, hashes={"sha256": 5}),
    "text as hashes": lambda digest: json_page(digest, hashes="x"),
    "invalid address": lambda digest: json_page(digest, url="http://[::1/x"),
    "address of a file": lambda digest: json_page(digest, url="file:///etc/passwd"),
    "name with a path": lambda digest: json_page(digest, filename=f"../{PART3}"),
    "table as files": lambda _: b'{"files": {"a": 1}}',
    "number as page": lambda _: b"5",
    "deep JSON": lambda _: b'{"files":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "no UTF-8": lambda _: b'{"files": "\xff"}',
    "invalid address in HTML": lambda digest: f'<a href="http://[::1/{PART3}#sha256={digest}">x</a>'.encode(),
    "five million tags": lambda _: b"<a href='x'>" * 5_000_000,
    "half a tag": lambda _: b"<a href='" + b"x" * 1_000_000,
}
PACKED_PAGES: dict[str, Callable[[], bytes]] = {
    "packed lists": lambda: gzip_of(b'{"files":[', b"[],", 20_000_000, b"{}]}"),
    "packed rows": lambda: gzip_of(b'{"files":[', b'{"filename":"a-1.whl","url":"u"},', 1_600_000, b"{}]}"),
    "packed spaces": lambda: gzip_of(b"", b" ", 1 << 30, b"{}"),
    "no gzip": lambda: b"not compressed",
}


class TestLyingPages:
    """Check that the page of one mirror, whatever it holds, does not keep the next mirror from delivering."""

    @pytest.mark.parametrize("kind", [*LYING_PAGES, *PACKED_PAGES])
    def test_package_comes_from_the_honest_mirror(
        self, serve: Any, tmp_path: Path, wheels_folder: Path, index_content: dict[str, bytes], kind: str
    ) -> None:
        wheel = wheels_folder / PART3
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        page = LYING_PAGES[kind](digest) if kind in LYING_PAGES else PACKED_PAGES[kind]()
        liar = serve(index_content | {"/simple/part3/": page} | {f"/files/{PART3}": b"wrong content"})
        if kind in PACKED_PAGES:
            headers = {"Content-Type": "application/vnd.pypi.simple.v1+json", "Content-Encoding": "gzip"}
            liar.headers["/simple/part3/"] = headers
        self.check_delivery(tmp_path, wheel, sources_of(liar, serve(index_content)))

    @pytest.mark.parametrize("chunked", [False, True], ids=["declared length", "chunked"])
    def test_page_that_arrives_byte_by_byte_is_abandoned(
        self,
        serve: Any,
        tmp_path: Path,
        wheels_folder: Path,
        index_content: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
        chunked: bool,
    ) -> None:
        silent_server.replace_read_timeout(monkeypatch)
        monkeypatch.setattr(net_page, "time", silent_server.CLOCK)
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000000"

        def script(server: RawServer, line: Any) -> None:
            server.send(line, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length + b"\r\n\r\n")
            server.drip(line, b"1\r\n \r\n" if chunked else b" ")

        with closing(RawServer(script)) as dripping:
            slow = MirrorSource("slow", f"{dripping.url}/simple")
            honest = sources_of(serve(index_content))
            self.check_delivery(tmp_path, wheels_folder / PART3, [slow, *honest])

    def check_delivery(self, tmp_path: Path, wheel: Path, mirrors: list[MirrorSource]) -> None:
        """Assert that part3 is on its page, and comes with the locked content."""
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        store = tmp_path / "store"
        with failover_proxy.FailoverProxy(requests.Session(), store, SourceHealth(), lambda _, __: None) as proxy:
            proxy.wheels({"part3": ("1.0", frozenset({digest}))}, mirrors)
            page = proxy.page("part3")
            assert page is not None
            assert [row["filename"] for row in json.loads(page[0])["files"]] == [PART3]
            path = proxy.wheel("part3", PART3)
            assert path is not None, proxy.failures
            assert path.read_bytes() == wheel.read_bytes()
