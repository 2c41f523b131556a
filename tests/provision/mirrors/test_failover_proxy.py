"""Failover while packages are fetched: real uv and real rattler through played mirrors."""

from __future__ import annotations

import hashlib
import json
import os
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
from provision.mirrors.record import MirrorSource
from provision.net.source_health import SourceHealth
from tests.provision.conftest import lock_text, write_wheel
from tests.provision.http_server import PORTAL, Fault, Played, index

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def fleet(wheels_folder: Path) -> dict[str, bytes]:
    """What a whole index holds: ten packages."""
    return index(sorted(wheels_folder.glob("*.whl")))


@pytest.fixture
def wheels_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ten"
    folder.mkdir()
    for number in range(10):
        write_wheel(folder, f"part{number}", "1.0", {f"part{number}.py": f"x = {number}\n" * 2000})
    return folder


class Installed:
    """An environment into which real uv installs through a relay."""

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
        with failover_proxy.FailoverProxy(session, self.store, self.health, lambda _, __: None) as running:
            running.wheels(requirements.hashes(self.lock), self.mirrors)
            try:
                process.run(argv, env=running.environment(uv.environment), stdin=self.lock)
            finally:
                self.failures = dict(running.failures)
        return self.names

    @property
    def names(self) -> list[str]:
        return sorted(path.stem for path in self.prefix.glob("lib/*/site-packages/part*.py"))


def named(*servers: Played) -> list[MirrorSource]:
    return [MirrorSource(f"m{number}", f"{server.url}/simple") for number, server in enumerate(servers)]


EVERY = [f"part{number}" for number in range(10)]


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
            "lies",
            "breaks off",
            "stalls",
            "redirects away",
            "lacks a page",
            "portal",
            "403",
            "stalls at once",
        ],
    )
    def test_an_install_ends_whatever_its_first_mirror_does(
        self, play: Any, tmp_path: Path, wheels_folder: Path, fleet: dict[str, bytes], fault: Fault
    ) -> None:
        bad, good = play(fleet, fault), play(fleet)
        installed = Installed(tmp_path, lock_text(*sorted(wheels_folder.glob("*.whl"))), named(bad, good))
        assert installed.run() == EVERY
        assert {source for _, source, _ in installed.health.delivered} >= {"m1"}
        assert bool(installed.health.banned) == fault.flip
        if fault.after:
            assert sum(source == "m0" for _, source, _ in installed.health.delivered) >= 5 - fault.flip * 5

    @pytest.mark.parametrize("as_json", [True, False], ids=["json", "html"])
    @pytest.mark.parametrize("hashes", [True, False], ids=["hashes", "no hashes"])
    def test_every_kind_of_page_is_read(
        self, play: Any, tmp_path: Path, wheels_folder: Path, *, as_json: bool, hashes: bool
    ) -> None:
        files = sorted(wheels_folder.glob("*.whl"))
        installed = Installed(tmp_path, lock_text(*files), named(play(index(files, hashes=hashes, as_json=as_json))))
        assert installed.run() == EVERY

    def test_a_page_that_links_every_file_serves_too(self, play: Any, tmp_path: Path, wheels_folder: Path) -> None:
        files = sorted(wheels_folder.glob("*.whl"))
        content = index(files)
        links = "".join(f'<a href="/files/{file.name}">{file.name}</a>' for file in files)
        flat = play(content | {"/all": links.encode()})
        installed = Installed(tmp_path, lock_text(*files), [MirrorSource("flat", f"{flat.url}/all", "find-links")])
        assert installed.run() == EVERY

    def test_what_is_cached_needs_no_mirror_again_whichever_it_was(
        self, play: Any, tmp_path: Path, wheels_folder: Path, fleet: dict[str, bytes]
    ) -> None:
        lock = lock_text(*sorted(wheels_folder.glob("*.whl")))
        Installed(tmp_path, lock, named(play(fleet))).run()
        other = play(fleet)
        again = Installed(tmp_path, lock, named(other))
        assert again.run() == EVERY
        assert not other.seen, "the page is a function of the lock"
        assert Installed(tmp_path, lock, []).run(offline=True) == EVERY

    def test_when_nobody_serves_it_the_reason_is_ours(
        self, play: Any, tmp_path: Path, wheels_folder: Path, fleet: dict[str, bytes]
    ) -> None:
        liar = play(fleet, Fault("/files/part3", flip=True))
        installed = Installed(tmp_path, lock_text(*sorted(wheels_folder.glob("*.whl"))), named(liar))
        with pytest.raises(process.CommandError):
            installed.run()
        assert "pinned is" in installed.failures["part3-1.0-py3-none-any.whl"]

    def test_what_arrived_before_a_kill_is_used(
        self, play: Any, tmp_path: Path, wheels_folder: Path, fleet: dict[str, bytes]
    ) -> None:
        installed = Installed(tmp_path, lock_text(*sorted(wheels_folder.glob("*.whl"))), named(play(fleet)))
        whole = fleet["/files/part2-1.0-py3-none-any.whl"]
        installed.store.mkdir()
        (installed.store / "part2-1.0-py3-none-any.whl.part").write_bytes(whole[:400])
        assert installed.run() == EVERY
        served: Any = installed.health.delivered
        assert len(served) == 10
        assert not list(installed.store.iterdir()), "what uv has is not kept a second time"

    def test_a_proxy_for_everything_else_stays(self, tmp_path: Path) -> None:
        with failover_proxy.FailoverProxy(requests.Session(), tmp_path, SourceHealth(), lambda _, __: None) as running:
            found = running.environment(
                {"https_proxy": "http://p:1", "NO_PROXY": "corp", "UV_FIND_LINKS": "http://h:8/x"}
            )
            assert (found["https_proxy"], found["http_proxy"]) == ("http://p:1", running.url)
            assert found["NO_PROXY"] == found["no_proxy"] == "corp,h"
            assert "https_proxy" not in running.environment({"https_proxy": "http://p:1", "no_proxy": "*"})


def test_nobody_is_led_out_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "secret.whl").write_bytes(b"mine")
    store = tmp_path / "store"
    with failover_proxy.FailoverProxy(requests.Session(), store, SourceHealth(), lambda _, __: None) as running:
        (store / "half-1.whl.part").write_bytes(b"not verified")
        for name in ("..%2Fsecret.whl", "../secret.whl", f"{tmp_path}/secret.whl", "half-1.whl.part"):
            with closing(HTTPConnection(urlsplit(running.url).netloc)) as line:
                line.request("GET", f"/files/x/{name}")
                assert line.getresponse().status == 404


class TestPages:
    """What a page holds is decided by the lock, not by a mirror."""

    def page(self, tmp_path: Path, right: set[str], mirrors: list[MirrorSource]) -> list[str]:
        with failover_proxy.FailoverProxy(
            requests.Session(), tmp_path / "store", SourceHealth(), lambda _, __: None
        ) as running:
            running.wheels({"part3": ("1.0", frozenset(right))}, mirrors)
            found = running.page("part3")
            return [row["filename"] for row in json.loads(found[0])["files"]] if found else []

    def test_what_one_mirror_lacks_the_next_one_lists(self, play: Any, tmp_path: Path, wheels_folder: Path) -> None:
        wheel = wheels_folder / "part3-1.0-py3-none-any.whl"
        other = wheels_folder / "part3-1.0-cp27-none-any.whl"
        other.write_bytes(b"for another python")
        right = {hashlib.sha256(each.read_bytes()).hexdigest() for each in (wheel, other)}
        half, whole = play(index([other])), play(index([wheel, other]))
        assert set(self.page(tmp_path, right, named(half, whole))) == {wheel.name, other.name}
        half.seen.clear()
        whole.seen.clear()
        self.page(tmp_path, right, named(whole, half))
        assert not half.seen, "who lists all of it is enough"

    def test_what_is_not_locked_is_not_offered(self, play: Any, tmp_path: Path, wheels_folder: Path) -> None:
        wheel = wheels_folder / "part3-1.0-py3-none-any.whl"
        assert self.page(tmp_path, {"0" * 64}, named(play(index([wheel])))) == []
