"""Tests the probe of mirrors: completeness, checksums, rate and failures, with servers on loopback."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any

import pytest
import requests

from provision.config import models, toml
from provision.config.torch import Variant
from provision.lockfiles import conda_lock, requirements
from provision.mirrors import probe_all, probe_mirror
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_mirror import ProbeResult, ProbeTarget
from provision.mirrors.probe_needs import ProbeNeeds
from provision.mirrors.selection import rank
from provision.mirrors.tools.conda import Conda
from provision.mirrors.tools.hf import Hf
from provision.mirrors.tools.pip import Pip
from tests.clock import Standing
from tests.conftest import CHECKOUT
from tests.provision.conftest import write_wheel
from tests.provision.fake_hub import git_sha1
from tests.provision.http_server import PORTAL, Fault, Server, index

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def _long_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all time limits so long that only the servers decide the result, also on a slow machine."""
    for name in ("_FIRST_RESPONSE_SECONDS", "_TOTAL_SECONDS"):
        monkeypatch.setattr(probe_all, name, 600.0)
    for name in ("_CONNECT_SECONDS", "_READ_SECONDS", "_RATE_SECONDS"):
        monkeypatch.setattr(probe_mirror, name, 600.0)


class ThreadClock(threading.local):
    """Replaces the module `time` by a clock for each thread; each mirror is probed in its own thread."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class TimedSession(requests.Session):
    """Adds one second to the thread's clock for each request of the largest file from a slow server."""

    def __init__(self, clock: ThreadClock, *slow: Server) -> None:
        super().__init__()
        self._clock, self._slow = clock, tuple(f"{server.url}/files/big" for server in slow)

    def get(self, url: str | bytes, **options: Any) -> requests.Response:
        response = super().get(url, **options)
        self._clock.now += 1.0 if str(url).startswith(self._slow) else 0.001
        return response


def session() -> requests.Session:
    http = requests.Session()
    http.headers["User-Agent"] = "firstlight"
    return http


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "locked"
    folder.mkdir()
    big = write_wheel(folder, "big", "2.0", {"big.py": "x" * 3_000_000})
    return [
        big,
        write_wheel(folder, "small", "1.0", {"small.py": ""}),
        write_wheel(folder, "new", "9.0", {"new.py": ""}),
    ]


def probe_file_of(wheel: Path) -> ProbeFile:
    name, version = wheel.name.split("-")[:2]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return ProbeFile(name, version, "locked", frozenset({digest}), wheel.stat().st_size)


def probe_indexes(
    files: list[Path],
    servers: dict[str, Server],
    new_session: Callable[[], requests.Session] = session,
    **options: Any,
) -> dict[str, ProbeResult]:
    """Probe servers as indexes with these wheels as probe files; return {name of the server: result}."""
    targets = [ProbeTarget("pip", name, f"{server.url}/simple", **options) for name, server in servers.items()]
    results = probe_all.probe(targets, {"pip": [probe_file_of(file) for file in files]}, new_session)
    return {result.target.name: result for result in results}


class TestPip:
    def test_probe_of_a_complete_mirror_finds_all_files_and_measures_a_rate(
        self, serve: Any, files: list[Path]
    ) -> None:
        server = serve(index(files))
        result = probe_indexes(files, {"full": server})["full"]
        assert (result.held, result.asked, result.error, result.is_complete) == (3, 3, None, True)
        assert (result.megabytes_per_second or 0) > 0
        assert result.final_host == server.url.removeprefix("http://")
        assert all("firstlight" in headers["User-Agent"] for _, headers in server.seen)
        assert len(server.seen) == len(set(server.paths)), "no path is requested twice"

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (Fault(status=404), "lacks big 2.0"),
            (Fault(status=403), "answers 403"),
            (Fault(status=500), "answers 500"),
            (Fault(body=PORTAL), "has no link to a file ('Campus Network Login')"),
            (Fault(status=302, headers={"Location": "http://127.0.0.1:9/login"}), "does not answer"),
            (Fault("/simple/", stall=True), "stops sending data (timeout)"),
            (Fault("/files/small", flip=True), "serves small 1.0 with a WRONG HASH"),
            (Fault("/simple/", cut=10), "closes the connection in the middle of a response"),
        ],
        ids=[
            "404",
            "403",
            "500",
            "login page",
            "redirect to a closed port",
            "no data after the headers",
            "wrong content",
            "connection closed early",
        ],
    )
    def test_probe_of_an_unusable_mirror_has_the_reason_as_error(
        self, serve: Any, files: list[Path], fault: Fault, reason: str
    ) -> None:
        result = probe_indexes(files, {"bad": serve(index(files), fault)})["bad"]
        assert reason in (result.error or "")
        assert not result.is_complete

    def test_redirect_to_another_host_is_rejected_unless_the_mirror_allows_redirects(
        self, serve: Any, files: list[Path]
    ) -> None:
        other = serve(index(files))
        content = index(files)
        for name in ("big", "small", "new"):
            del content[f"/simple/{name}/"]
        faults = [
            Fault(f"/simple/{name}/", status=302, headers={"Location": f"{other.url}/simple/{name}/"})
            for name in ("big", "small", "new")
        ]
        rejected = probe_indexes(files, {"r": serve(content, *faults)})["r"]
        assert "redirects or links to another host, 127.0.0.1" in (rejected.error or "")
        allowed = probe_indexes(files, {"r": serve(content, *faults)}, redirects=True)["r"]
        assert (allowed.is_complete, allowed.final_host) == (True, other.url.removeprefix("http://"))

    def test_index_page_with_links_to_files_on_another_host_is_rejected(self, serve: Any, files: list[Path]) -> None:
        other = serve(index(files))
        content = {
            path: body.replace(b"../../files/", f"{other.url}/files/".encode()) for path, body in index(files).items()
        }
        assert "redirects or links to" in (probe_indexes(files, {"r": serve(content)})["r"].error or "")

    def test_requests_of_a_probe_have_the_user_agent_of_firstlight(self, serve: Any, files: list[Path]) -> None:
        server = serve(index(files), Fault(status=403, without_agent=True))
        assert probe_indexes(files, {"m": server})["m"].is_complete

    def test_file_that_a_mirror_lacks_is_reported_with_the_newest_version_in_its_index(
        self, serve: Any, files: list[Path], tmp_path: Path
    ) -> None:
        old = tmp_path / "old"
        old.mkdir()
        stale = [*files[:2], write_wheel(old, "new", "8.5", {})]
        result = probe_indexes(files, {"stale": serve(index(stale))})["stale"]
        assert (result.held, result.missing) == (2, ("lacks new 9.0; its newest version is 8.5",))

    def test_complete_mirror_ranks_before_a_faster_incomplete_one(
        self, serve: Any, files: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = ThreadClock()
        for module in (probe_all, probe_mirror):
            monkeypatch.setattr(module, "time", clock)
        servers = {
            "fast, lacks one": serve(index(files[:2])),
            "slow": serve(index(files)),
            "fast": serve(index(files)),
        }
        results = probe_indexes(files, servers, lambda: TimedSession(clock, servers["slow"]))
        names = [result.target.name for result in rank(list(results.values()))]
        assert names == ["fast", "slow", "fast, lacks one"]

    def test_only_the_first_two_megabytes_of_the_largest_file_are_requested(
        self, serve: Any, files: list[Path]
    ) -> None:
        server = serve(index(files))
        probe_indexes(files, {"m": server})
        ranges = [headers.get("Range") for path, headers in server.seen if "big" in path and path.startswith("/files")]
        assert ranges == ["bytes=0-2097151"]

    def test_probe_of_37_mirrors_of_which_18_stall_finds_the_other_19_usable(
        self, serve: Any, files: list[Path]
    ) -> None:
        content = index(files)
        targets = []
        for number in range(37):
            faults = [Fault(stall=True)] if number % 2 else []
            targets.append(ProbeTarget("pip", f"m{number}", f"{serve(content, *faults).url}/simple"))
        results = probe_all.probe(targets, {"pip": [probe_file_of(file) for file in files]}, session)
        assert [result.error for result in results[1::2]] == ["stops sending data (timeout)"] * 18
        assert len(rank(results)) == 19

    def test_probe_ends_when_no_mirror_is_reachable(self, files: list[Path], serve: Any) -> None:
        closed = [serve({}) for _ in range(20)]
        for server in closed:
            server.close()
        results = probe_indexes(files, {f"m{number}": server for number, server in enumerate(closed)})
        assert {result.reachable for result in results.values()} == {False}

    def test_probe_of_a_mirror_whose_name_lookup_never_ends_has_an_error_after_its_time_limit(
        self, files: list[Path], monkeypatch: pytest.MonkeyPatch, serve: Any
    ) -> None:
        def block(*_: object, **__: object) -> None:
            test_is_over.wait()

        test_is_over = threading.Event()
        monkeypatch.setattr(requests.Session, "get", block)
        monkeypatch.setattr(probe_all, "_FIRST_RESPONSE_SECONDS", 0.1)
        for module in (probe_all, probe_mirror):
            monkeypatch.setattr(module, "time", Standing())
        result = probe_indexes(files, {"m": serve({})})["m"]
        test_is_over.set()
        assert "does not answer within" in (result.error or "")


class TestConda:
    def probe_files(self, content: bytes, small: bytes) -> list[ProbeFile]:
        base = "https://conda.anaconda.org/conda-forge"
        return [
            ProbeFile(
                "python",
                "3",
                "largest",
                frozenset({hashlib.sha256(content).hexdigest()}),
                len(content),
                f"{base}/linux-64/p.conda",
            ),
            ProbeFile(
                "tz",
                "1",
                "smallest",
                frozenset({hashlib.sha256(small).hexdigest()}),
                len(small),
                f"{base}/noarch/tz.conda",
            ),
        ]

    @pytest.mark.parametrize(
        ("fault", "error", "missing"),
        [
            (None, None, ()),
            (Fault("repodata", status=404), "answers 404 for the channel conda-forge", ()),
            (Fault("repodata", body=PORTAL), "sends no repodata for the channel conda-forge", ()),
            (Fault("p.conda", status=404), None, ("lacks python 3: answers 404",)),
            (
                Fault("p.conda", body=b"<html>"),
                None,
                ("lacks python 3: its file has 6 bytes, but the size in the lock is 500,000 bytes",),
            ),
            (Fault("tz.conda", flip=True), "serves tz 1 with a WRONG HASH", ()),
        ],
        ids=["complete", "no repodata", "login page", "file missing", "file of another size", "wrong content"],
    )
    def test_probe_of_a_conda_channel_finds_it_usable_or_has_the_reason_as_error(
        self, serve: Any, fault: Fault | None, error: str | None, missing: tuple[str, ...]
    ) -> None:
        big, small = b"p" * 500_000, b"tz"
        content = {
            "/c/noarch/repodata.json": b'{"info": {}}' + b" " * 5000,
            "/c/linux-64/p.conda": big,
            "/c/noarch/tz.conda": small,
        }
        server = serve(content, *([fault] if fault else []))
        target = ProbeTarget("conda", "m", f"{server.url}", channels={"conda-forge": f"{server.url}/c"})
        (result,) = probe_all.probe([target], {"conda": self.probe_files(big, small)}, session)
        assert (result.error or "").endswith(error or "")
        assert (result.error is None) == (error is None)
        assert result.missing == missing
        assert sum(path.endswith("repodata.json") for path in server.paths) == 1


def test_probe_of_a_hub_uses_pinned_files_and_reports_the_host_of_the_redirect_target(serve: Any) -> None:
    weights, config = b"w" * 400_000, b"{}"
    data = serve({"/blob": weights})
    path = "/o/m/resolve/abc/w.safetensors"
    hub = serve(
        {path: weights, "/o/m/resolve/abc/c.json": config},
        Fault(path, status=302, headers={"Location": f"{data.url}/blob"}),
    )
    pinned = [
        ProbeFile("w", "", "pinned", frozenset({"0" * 64}), len(weights), path[1:]),
        ProbeFile("c", "", "pinned", frozenset({git_sha1(config)}), 2, "o/m/resolve/abc/c.json", "git_sha1"),
    ]
    (result,) = probe_all.probe([ProbeTarget("hf", "m", hub.url, redirects=True)], {"hf": pinned}, session)
    assert (result.is_complete, result.final_host) == (True, data.url.removeprefix("http://"))
    assert "Authorization" not in str(hub.seen)


@pytest.mark.parametrize("kind", ["index", "find-links"])
@pytest.mark.parametrize("actual_kind", ["index", "find-links"])
def test_probe_detects_whether_a_torch_mirror_is_an_index_or_a_find_links_page(
    serve: Any, tmp_path: Path, kind: str, actual_kind: str
) -> None:
    wheel = write_wheel(tmp_path, "torch", "9.9+cpu", {})
    link = f'<a href="/files/{wheel.name.replace("+", "%2B")}">x</a>'.encode()
    page = "/whl/torch/" if actual_kind == "index" else "/whl/"
    server = serve({page: link, f"/files/{wheel.name.replace('+', '%2B')}": wheel.read_bytes()})
    target = ProbeTarget("torch", "m", f"{server.url}/whl", kind)
    (result,) = probe_all.probe([target], {"torch": [probe_file_of(wheel)]}, session)
    assert (result.error, result.kind, result.held) == (None, actual_kind, 1)


def test_shipped_probe_files_match_the_shipped_locks() -> None:
    """Check that each lock's probe files have the largest file, the newest file, and one file that is hashed whole."""
    folder = CHECKOUT / "envs/diffusers"
    manifest = list(toml.load_tables(CHECKOUT / "envs/models.toml", models.ModelSpec).values())
    for lock in folder.glob("*.lock"):
        needs = ProbeNeeds(folder, Variant(name=lock.stem), requirements.hashes(lock.read_text()), None, [], manifest)
        files = Pip().probe_files(needs)
        assert {"largest", "newest"} <= {file.why for file in files}, lock
        assert any(file.is_small for file in files), lock
        assert len(Hf().probe_files(needs)) == 2
    for platform in ("linux-64", "osx-64", "osx-arm64", "win-64"):
        locked = conda_lock.read_lock(folder / "conda-lock.yml", platform)
        files = Conda().probe_files(ProbeNeeds(folder, Variant(name="cpu"), {}, platform, locked, []))
        assert {file.why for file in files} >= {"largest", "newest"}
