"""Which mirror is taken: judged by what it holds, then by its rate; played mirrors on loopback."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any

import pytest
import requests

from provision.config import models, toml
from provision.config.torch import Variant
from provision.lockfiles import conda_lock, requirements
from provision.mirrors import probe, prober
from provision.mirrors.probe import ranked
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_needs import ProbeNeeds
from provision.mirrors.prober import ProbeResult, ProbeTarget
from provision.mirrors.tools.conda import Conda
from provision.mirrors.tools.hf import Hf
from provision.mirrors.tools.pip import Pip
from tests.clock import Standing
from tests.conftest import CHECKOUT
from tests.provision.conftest import git_sha1, write_wheel
from tests.provision.http_server import PORTAL, Fault, Played, index

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a mirror is no worse: no look ends but by what its server does."""
    for name in ("_FIRST_WORD", "_ALL"):
        monkeypatch.setattr(probe, name, 600.0)
    for name in ("_CONNECT", "_SILENCE", "_RATE_SECONDS"):
        monkeypatch.setattr(prober, name, 600.0)


class Own(threading.local):
    """Stands in for the module `time`: each look, a thread of its own, has its own clock."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Timed(requests.Session):
    """Reads from some servers take a second by the clock of the thread that reads."""

    def __init__(self, clock: Own, *slow: Played) -> None:
        super().__init__()
        self._clock, self._slow = clock, tuple(f"{server.url}/files/big" for server in slow)

    def get(self, url: str | bytes, **named: Any) -> requests.Response:
        answer = super().get(url, **named)
        self._clock.now += 1.0 if str(url).startswith(self._slow) else 0.001
        return answer


def session() -> requests.Session:
    asking = requests.Session()
    asking.headers["User-Agent"] = "firstlight"
    return asking


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


def of_wheel(wheel: Path) -> ProbeFile:
    name, version = wheel.name.split("-")[:2]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return ProbeFile(name, version, "locked", frozenset({digest}), wheel.stat().st_size)


def ask(
    files: list[Path], servers: dict[str, Played], make: Callable[[], requests.Session] = session, **more: Any
) -> dict[str, ProbeResult]:
    every = [ProbeTarget("pip", name, f"{server.url}/simple", **more) for name, server in servers.items()]
    found = probe.probe(every, {"pip": [of_wheel(file) for file in files]}, make)
    return {each.asked_of.name: each for each in found}


class TestPip:
    def test_a_whole_mirror_holds_all_and_has_a_rate(self, play: Any, files: list[Path]) -> None:
        server = play(index(files))
        found = ask(files, {"full": server})["full"]
        assert (found.held, found.asked, found.error, found.is_complete) == (3, 3, None, True)
        assert (found.megabytes_per_second or 0) > 0
        assert found.final_host == server.url.removeprefix("http://")
        assert all("firstlight" in headers["User-Agent"] for _, headers in server.seen)
        assert len(server.seen) == len(set(server.paths)), "nothing is asked twice"

    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            (Fault(status=404), "lacks big 2.0"),
            (Fault(status=403), "answers 403"),
            (Fault(status=500), "answers 500"),
            (Fault(body=PORTAL), "links no file ('Campus Network Login')"),
            (Fault(status=302, headers={"Location": "http://127.0.0.1:9/login"}), "does not answer"),
            (Fault("/simple/", stall=True), "fell silent"),
            (Fault("/files/small", flip=True), "serves small 1.0 with a WRONG HASH"),
            (Fault("/simple/", cut=10), "breaks off"),
        ],
        ids=["404", "403", "500", "portal", "away to nowhere", "stalls after headers", "tamperer", "dies"],
    )
    def test_what_cannot_be_used_says_why(self, play: Any, files: list[Path], fault: Fault, why: str) -> None:
        found = ask(files, {"bad": play(index(files), fault)})["bad"]
        assert why in (found.error or "")
        assert not found.is_complete

    def test_a_redirect_to_another_host_is_a_failure_unless_it_is_its_trade(self, play: Any, files: list[Path]) -> None:
        other = play(index(files))
        content = index(files)
        for name in ("big", "small", "new"):
            del content[f"/simple/{name}/"]
        faults = [
            Fault(f"/simple/{name}/", status=302, headers={"Location": f"{other.url}/simple/{name}/"})
            for name in ("big", "small", "new")
        ]
        assert "leads to 127.0.0.1" in (ask(files, {"r": play(content, *faults)})["r"].error or "")
        trade = ask(files, {"r": play(content, *faults)}, redirects=True)["r"]
        assert (trade.is_complete, trade.final_host) == (True, other.url.removeprefix("http://"))

    def test_files_on_another_host_are_one_too(self, play: Any, files: list[Path]) -> None:
        other = play(index(files))
        content = {
            path: body.replace(b"../../files/", f"{other.url}/files/".encode()) for path, body in index(files).items()
        }
        assert "leads to" in (ask(files, {"r": play(content)})["r"].error or "")

    def test_a_server_that_wants_a_user_agent_gets_ours(self, play: Any, files: list[Path]) -> None:
        assert ask(files, {"m": play(index(files), Fault(status=403, without_agent=True))})["m"].is_complete

    def test_a_stale_index_is_told_with_its_newest(self, play: Any, files: list[Path], tmp_path: Path) -> None:
        old = tmp_path / "old"
        old.mkdir()
        stale = [*files[:2], write_wheel(old, "new", "8.5", {})]
        found = ask(files, {"stale": play(index(stale))})["stale"]
        assert (found.held, found.missing) == (2, ("lacks new 9.0; its newest is 8.5",))

    def test_the_whole_one_goes_before_the_faster_one(
        self, play: Any, files: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Own()
        for module in (probe, prober):
            monkeypatch.setattr(module, "time", clock)
        servers = {
            "fast, lacks one": play(index(files[:2])),
            "slow": play(index(files)),
            "fast": play(index(files)),
        }
        found = ask(files, servers, lambda: Timed(clock, servers["slow"]))
        assert [each.asked_of.name for each in ranked(list(found.values()))] == ["fast", "slow", "fast, lacks one"]

    def test_nothing_is_read_beyond_a_few_megabytes(self, play: Any, files: list[Path]) -> None:
        server = play(index(files))
        ask(files, {"m": server})
        ranges = [headers.get("Range") for path, headers in server.seen if "big" in path and path.startswith("/files")]
        assert ranges == ["bytes=0-2097151"]

    def test_half_of_them_stalling_hide_none_of_the_others(self, play: Any, files: list[Path]) -> None:
        content = index(files)
        every = []
        for number in range(37):
            faults = [Fault(stall=True)] if number % 2 else []
            every.append(ProbeTarget("pip", f"m{number}", f"{play(content, *faults).url}/simple"))
        found = probe.probe(every, {"pip": [of_wheel(file) for file in files]}, session)
        assert [each.error for each in found[1::2]] == ["fell silent"] * 18
        assert len(ranked(found)) == 19

    def test_when_nobody_answers_it_is_over_at_once(self, files: list[Path], play: Any) -> None:
        dead = [play({}) for _ in range(20)]
        for each in dead:
            each.close()
        found = ask(files, {f"m{number}": each for number, each in enumerate(dead)})
        assert {each.reachable for each in found.values()} == {False}

    def test_what_hangs_in_its_name_holds_nobody(
        self, files: list[Path], monkeypatch: pytest.MonkeyPatch, play: Any
    ) -> None:
        def hangs(*_: object, **__: object) -> None:
            play_over.wait()

        play_over = threading.Event()
        monkeypatch.setattr(requests.Session, "get", hangs)
        monkeypatch.setattr(probe, "_FIRST_WORD", 0.1)
        for module in (probe, prober):
            monkeypatch.setattr(module, "time", Standing())
        found = ask(files, {"m": play({})})["m"]
        play_over.set()
        assert "does not answer within" in (found.error or "")


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
            (Fault("repodata", body=PORTAL), "something else than its list of packages", ()),
            (Fault("p.conda", status=404), None, ("lacks python 3: answers 404",)),
            (Fault("p.conda", body=b"<html>"), None, ("lacks python 3: its file has 6 bytes, locked are 500,000",)),
            (Fault("tz.conda", flip=True), "serves tz 1 with a WRONG HASH", ()),
        ],
    )
    def test_a_channel(self, play: Any, fault: Fault | None, error: str | None, missing: tuple[str, ...]) -> None:
        big, small = b"p" * 500_000, b"tz"
        content = {
            "/c/noarch/repodata.json": b'{"info": {}}' + b" " * 5000,
            "/c/linux-64/p.conda": big,
            "/c/noarch/tz.conda": small,
        }
        server = play(content, *([fault] if fault else []))
        asked = ProbeTarget("conda", "m", f"{server.url}", channels={"conda-forge": f"{server.url}/c"})
        (found,) = probe.probe([asked], {"conda": self.probe_files(big, small)}, session)
        assert (found.error or "").endswith(error or "")
        assert (found.error is None) == (error is None)
        assert found.missing == missing
        assert sum(path.endswith("repodata.json") for path in server.paths) == 1


def test_a_hub_is_judged_by_pinned_files_and_its_final_host_is_told(play: Any) -> None:
    weights, config = b"w" * 400_000, b"{}"
    data = play({"/blob": weights})
    path = "/o/m/resolve/abc/w.safetensors"
    hub = play(
        {path: weights, "/o/m/resolve/abc/c.json": config},
        Fault(path, status=302, headers={"Location": f"{data.url}/blob"}),
    )
    known = [
        ProbeFile("w", "", "pinned", frozenset({"0" * 64}), len(weights), path[1:]),
        ProbeFile("c", "", "pinned", frozenset({git_sha1(config)}), 2, "o/m/resolve/abc/c.json", "git_sha1"),
    ]
    (found,) = probe.probe([ProbeTarget("hf", "m", hub.url, redirects=True)], {"hf": known}, session)
    assert (found.is_complete, found.final_host) == (True, data.url.removeprefix("http://"))
    assert "Authorization" not in str(hub.seen)


@pytest.mark.parametrize("kind", ["index", "find-links"])
@pytest.mark.parametrize("shape", ["index", "find-links"])
def test_both_shapes_of_a_torch_mirror_are_tried(play: Any, tmp_path: Path, kind: str, shape: str) -> None:
    wheel = write_wheel(tmp_path, "torch", "9.9+cpu", {})
    link = f'<a href="/files/{wheel.name.replace("+", "%2B")}">x</a>'.encode()
    page = "/whl/torch/" if shape == "index" else "/whl/"
    server = play({page: link, f"/files/{wheel.name.replace('+', '%2B')}": wheel.read_bytes()})
    asked = ProbeTarget("torch", "m", f"{server.url}/whl", kind)
    (found,) = probe.probe([asked], {"torch": [of_wheel(wheel)]}, session)
    assert (found.error, found.kind, found.held) == (None, shape, 1)


def test_the_shipped_probe_files_are_of_the_shipped_locks() -> None:
    """The largest among them; for every lock there is one that is fetched whole, so that its hash is compared."""
    folder = CHECKOUT / "envs/diffusers"
    manifest = list(toml.load_tables(CHECKOUT / "envs/models.toml", models.ModelSpec).values())
    for lock in folder.glob("*.lock"):
        needs = ProbeNeeds(folder, Variant(name=lock.stem), requirements.hashes(lock.read_text()), None, [], manifest)
        found = Pip().probe_files(needs)
        assert {"largest", "newest"} <= {each.why for each in found}, lock
        assert any(each.is_small for each in found), lock
        assert len(Hf().probe_files(needs)) == 2
    for platform in ("linux-64", "osx-64", "osx-arm64", "win-64"):
        locked = conda_lock.read_lock(folder / "conda-lock.yml", platform)
        found = Conda().probe_files(ProbeNeeds(folder, Variant(name="cpu"), {}, platform, locked, []))
        assert {each.why for each in found} >= {"largest", "newest"}
