"""One file from several sources: the next one goes on, and no answer costs what is here already."""

from __future__ import annotations

import hashlib
import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import FirstlightError
from provision.net import download, fetch, session
from provision.net.fetch import Source
from provision.net.source_health import SourceHealth
from tests.clock import Standing, Ticking
from tests.provision.http_server import PORTAL, Fault, Played, Raw
from tests.provision.model_pulls import quick

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

CONTENT = bytes(range(256)) * 4096
RIGHT = hashlib.sha256(CONTENT).hexdigest()


def fetched(
    part: Path,
    *servers: Played | Raw,
    health: SourceHealth | None = None,
    size: int | None = len(CONTENT),
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[str, SourceHealth]:
    health = health or SourceHealth()
    giver = download.fetch(
        session.Session(),
        lambda: [Source(f"m{number}", f"{server.url}/f") for number, server in enumerate(servers)],
        part,
        size=size,
        pins={"sha256": {RIGHT}},
        health=health,
        progress=progress,
        name="f",
    )
    assert part.read_bytes() == CONTENT
    return giver, health


def six_seconds_later() -> SimpleNamespace:
    """A clock that is read when an answer begins; from its first block on, six seconds have passed."""
    readings = itertools.chain([0.0], itertools.repeat(6.0))
    return SimpleNamespace(monotonic=lambda: next(readings))


class TestOneFile:
    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            (Fault(status=404), "404"),
            (Fault(status=403), "403"),
            (Fault(status=429, headers={"Retry-After": "20"}), "429"),
            (Fault(stall=True), "fell silent"),
            (Fault(stall_at=500_000), "fell silent"),
            (Fault(cut=500_000), "broke off"),
            (Fault(body=b"<html>log in</html>"), "bytes"),
        ],
        ids=["404", "403", "429", "stalls", "stalls half-way", "dies half-way", "another file"],
    )
    def test_the_next_source_goes_on(self, play: Any, tmp_path: Path, fault: Fault, why: str) -> None:
        bad, good = play({"/f": CONTENT}, fault), play({"/f": CONTENT})
        giver, health = fetched(tmp_path / "part", bad, good)
        assert giver == "m1"
        assert why in health.fallbacks["f"]
        if fault.cut or fault.stall_at:
            assert good.seen[0][1]["Range"] == "bytes=500000-", "what came stays"

    def test_a_dead_source_is_asked_last_from_then_on(self, play: Any, tmp_path: Path) -> None:
        bad, good = play({"/f": CONTENT}), play({"/f": CONTENT})
        bad.close()
        _, health = fetched(tmp_path / "part", bad, good)
        assert health.order(["m0", "m1"]) == ["m1", "m0"]

    def test_wrong_content_bans_its_source_for_the_run(self, play: Any, tmp_path: Path) -> None:
        bad, good = play({"/f": CONTENT}, Fault(flip=True)), play({"/f": CONTENT})
        _, health = fetched(tmp_path / "part", bad, good)
        assert health.order(["m0", "m1"]) == ["m1"]
        assert "m0 is not asked again in this run: of f it sent content with sha256" in health.warnings()[0]
        fetched(tmp_path / "other", bad, good, health=health)
        assert len(bad.seen) == 1

    def test_nobody_is_banned_for_what_another_began(self, play: Any, tmp_path: Path) -> None:
        liar, good = play({"/f": CONTENT}, Fault(flip=True, cut=300_000)), play({"/f": CONTENT})
        giver, health = fetched(tmp_path / "part", liar, good)
        assert (giver, health.banned) == ("m1", {})

    def test_one_alone_is_asked_again_while_it_brings_more(self, play: Any, tmp_path: Path) -> None:
        only = play({"/f": CONTENT}, Fault(cut=150_000))
        fetched(tmp_path / "part", only)
        assert len(only.seen) == 7

    def test_a_busy_one_alone_is_waited_for(self, play: Any, tmp_path: Path) -> None:
        only = play({"/f": CONTENT})
        only.faults = [Fault(status=429, headers={"Retry-After": "0"}, times=1)]
        fetched(tmp_path / "part", only)
        assert len(only.seen) == 2

    def test_a_crawling_source_is_left_for_another(
        self, play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetch, "time", six_seconds_later())
        slow, good = play({"/f": CONTENT}, Fault(crawl_at=20_000)), play({"/f": CONTENT})
        giver, health = fetched(tmp_path / "part", slow, good)
        assert giver == "m1"
        assert "kB a second" in health.fallbacks["f"]

    def test_all_fail_with_every_reason(self, play: Any, tmp_path: Path) -> None:
        servers = [play({"/f": CONTENT}, Fault(status=404)), play({"/f": CONTENT}, Fault(status=403))]
        with pytest.raises(download.DownloadError, match=r"m0: it answers 404.*; m1: it answers 403"):
            fetched(tmp_path / "part", *servers)
        assert [len(server.seen) for server in servers] == [1, 1], "what is not there is not asked for again"

    def test_only_wrong_content_is_an_error_of_its_own(self, play: Any, tmp_path: Path) -> None:
        with pytest.raises(download.WrongContentError, match="pinned is"):
            fetched(tmp_path / "part", play({"/f": CONTENT}, Fault(flip=True)))
        assert not (tmp_path / "part").exists()

    def test_a_stored_partial_is_gone_on_with(self, play: Any, tmp_path: Path) -> None:
        (tmp_path / "part").write_bytes(CONTENT[:700_000])
        only = play({"/f": CONTENT})
        fetched(tmp_path / "part", only)
        assert [headers.get("Range") for _, headers in only.seen] == ["bytes=700000-"]

    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size known", "size unknown"])
    def test_a_whole_partial_of_a_killed_run_is_taken_by_its_hash(
        self, play: Any, tmp_path: Path, size: int | None
    ) -> None:
        (tmp_path / "part").write_bytes(CONTENT)
        only = play({"/f": CONTENT})
        fetched(tmp_path / "part", only, size=size)
        assert not only.seen

    def test_a_partial_that_is_too_long_is_begun_again(self, play: Any, tmp_path: Path) -> None:
        (tmp_path / "part").write_bytes(CONTENT + b"more")
        fetched(tmp_path / "part", play({"/f": CONTENT}), size=None)

    def test_a_rubbish_partial_is_begun_again(self, play: Any, tmp_path: Path) -> None:
        (tmp_path / "part").write_bytes(b"rubbish" * 1000)
        _, health = fetched(tmp_path / "part", play({"/f": CONTENT}))
        assert health.banned == {}


def part_of(tmp_path: Path, content: bytes = CONTENT[:700_000]) -> Path:
    part = tmp_path / "part"
    part.write_bytes(content)
    return part


class TestWhatIsHereStays:
    """Nothing that a source says makes a partial go that is the beginning of the pinned file."""

    LIES = (
        Fault(no_range=True, cut=10),
        Fault(no_range=True, flip=True),
        Fault(status=206, headers={"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}, body=CONTENT),
        Fault(status=206, body=CONTENT[700_000:]),
        Fault(status=416),
        Fault(chunked=1 << 16),
        Fault(chunked=1 << 26),
        Fault(body=PORTAL),
        Fault(status=206, headers={"Content-Range": "bytes 700000-700009/700010"}, body=bytes(10)),
        Fault(status=200, body=CONTENT[:700_000]),
        Fault(status=200, body=CONTENT[:700_000] + bytes(20)),
    )
    NAMES = (
        "breaks off",
        "another file",
        "another range",
        "no range",
        "no such range",
        "short without a length",
        "endless",
        "portal",
        "a shorter file",
        "what is here",
        "what is here and more",
    )

    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size pinned", "not pinned"])
    @pytest.mark.parametrize("fault", LIES, ids=NAMES)
    def test_whatever_the_first_one_sends_the_next_one_goes_on(
        self, play: Any, tmp_path: Path, fault: Fault, size: int | None
    ) -> None:
        bad, good = play({"/f": CONTENT}, fault), play({"/f": CONTENT})
        arrived: list[int] = []
        giver, _ = fetched(part_of(tmp_path), bad, good, size=size, progress=arrived.append)
        assert giver == "m1"
        assert [headers.get("Range") for _, headers in good.seen] == ["bytes=700000-"]

    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size pinned", "not pinned"])
    @pytest.mark.parametrize("fault", LIES, ids=NAMES)
    def test_whatever_one_alone_sends(self, play: Any, tmp_path: Path, fault: Fault, size: int | None) -> None:
        part = part_of(tmp_path)
        with pytest.raises(FirstlightError):
            fetched(part, play({"/f": CONTENT}, fault), size=size)
        assert part.read_bytes() == CONTENT[:700_000]

    @pytest.mark.parametrize("no_range", [False, True], ids=["ranges", "no ranges"])
    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size pinned", "not pinned"])
    @pytest.mark.parametrize(
        "content", [bytes(700_000), CONTENT + b"more", bytes(len(CONTENT))], ids=["rubbish", "too long", "as long"]
    )
    def test_what_is_proven_wrong_goes(
        self, play: Any, tmp_path: Path, content: bytes, size: int | None, no_range: bool
    ) -> None:
        part = part_of(tmp_path, content)
        _, health = fetched(part, play({"/f": CONTENT}, Fault(no_range=no_range)), size=size)
        assert health.banned == {}

    def test_one_that_ignores_ranges_and_tells_no_length_goes_on_too(self, raw: Any, tmp_path: Path) -> None:
        def script(server: Raw, line: socket.socket) -> None:
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            server.send(line, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT))

        arrived: list[int] = []
        fetched(part_of(tmp_path), raw(script), progress=arrived.append)
        assert sum(arrived) == len(CONTENT) - 700_000

    def test_what_has_no_end_is_left_at_half_of_what_is_free(
        self, play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4_000_000))
        endless, good = play({"/f": CONTENT}, Fault(chunked=1 << 26)), play({"/f": CONTENT})
        arrived: list[int] = []
        giver, health = fetched(tmp_path / "part", endless, good, size=None, progress=arrived.append)
        assert giver == "m1"
        assert "it sends more than the 2,000,000 bytes that may come" in health.fallbacks["f"]
        assert sum(arrived) <= 2_000_000 + len(CONTENT)
        assert "Range" not in good.seen[0][1], "what came of it is no beginning of anything"


class TestWaiting:
    def test_a_busy_one_is_waited_for_beside_one_that_is_dead(self, play: Any, tmp_path: Path) -> None:
        busy = play({"/f": CONTENT}, Fault(status=429, headers={"Retry-After": "20"}, times=2))
        dead = play({})
        dead.close()
        health = SourceHealth()
        _, slept = quick(health)
        giver, _ = fetched(tmp_path / "part", busy, dead, health=health)
        assert giver == "m0"
        assert [round(each) for each in slept] == [20, 20]

    def test_the_first_that_is_free_is_waited_for(self, play: Any, tmp_path: Path) -> None:
        long, short = (
            play({"/f": CONTENT}, Fault(status=429, headers={"Retry-After": wait}, times=1)) for wait in ("300", "20")
        )
        health = SourceHealth()
        _, slept = quick(health)
        giver, _ = fetched(tmp_path / "part", long, short, health=health)
        assert giver == "m1"
        assert [round(each) for each in slept] == [20]

    def test_who_asks_for_no_time_is_given_twice_as_much_each_time(
        self, play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only = play({"/f": CONTENT}, Fault(status=503, headers={"Retry-After": "0"}, times=4))
        health = SourceHealth()
        _, slept = quick(health)
        monkeypatch.setattr(download, "time", Standing())
        fetched(tmp_path / "part", only, health=health)
        assert slept == pytest.approx([0.2, 0.4, 0.8, 1.6])

    @pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}, {"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}])
    def test_a_fault_for_ever_is_not_sat_out_for_ever(self, play: Any, tmp_path: Path, headers: dict[str, str]) -> None:
        only = play({"/f": CONTENT}, Fault(status=500, headers=headers))
        health = SourceHealth()
        told, slept = quick(health)
        with pytest.raises(download.DownloadError, match="answers 500"):
            fetched(tmp_path / "part", only, health=health)
        assert sum(slept) < 40
        assert len(only.seen) <= 9
        assert told
        assert not any("asked" in text for text in told)

    @pytest.mark.parametrize("year", ["99999999999999999999", "9999", "0000"])
    def test_a_date_that_no_clock_has_is_no_fault_of_ours(self, play: Any, tmp_path: Path, year: str) -> None:
        headers = {"Retry-After": f"Mon, 01 Jan {year} 00:00:00 GMT"}
        bad, good = play({"/f": CONTENT}, Fault(status=503, headers=headers)), play({"/f": CONTENT})
        assert fetched(tmp_path / "part", bad, good)[0] == "m1"

    def test_a_crawling_source_is_left_for_one_that_was_busy(
        self, play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetch, "time", six_seconds_later())
        monkeypatch.setattr(download, "time", Ticking(1.0))
        slow = play({"/f": CONTENT}, Fault(crawl_at=40_000))
        busy = play({"/f": CONTENT}, Fault(status=503, headers={"Retry-After": "0"}, times=1))
        giver, health = fetched(tmp_path / "part", slow, busy)
        assert giver == "m1"
        assert "kB a second" in health.fallbacks["f"]

    def test_a_crawling_source_is_not_left_for_one_that_is_busy_still(
        self, play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetch, "time", Ticking(6.0))
        monkeypatch.setattr(fetch, "_SLOWEST_BYTES", 1 << 30)
        slow = play({"/f": CONTENT}, Fault(cut=10_000, times=1))
        busy = play({"/f": CONTENT}, Fault(status=503, headers={"Retry-After": "300"}))
        assert fetched(tmp_path / "part", busy, slow)[0] == "m1"
        assert len(slow.seen) == 2


class TestHolding:
    """What would hold a worker for ever: every byte is an answer, and none of them says anything."""

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(CONTENT)

    def header(self, line: socket.socket, server: Raw) -> None:
        server.send(line, self.HEAD)
        server.send(line, b"X-Long: ")
        server.drip(line, b"x")
        server.send(line, b"\r\n\r\n" + CONTENT)

    def not_yet(self, line: socket.socket, server: Raw) -> None:
        server.drip(line, b"HTTP/1.1 100 Continue\r\n\r\n")
        server.send(line, self.HEAD + b"\r\n" + CONTENT)

    def chunk(self, line: socket.socket, server: Raw) -> None:
        server.send(line, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        server.send(line, b"%x;" % len(CONTENT))
        server.drip(line, b"x")
        server.send(line, b"\r\n" + CONTENT + b"\r\n0\r\n\r\n")

    @pytest.mark.parametrize("way", ["header", "not_yet", "chunk"])
    def test_it_is_left_for_the_next(
        self, raw: Any, play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
    ) -> None:
        monkeypatch.setattr(download, "_IMPATIENT", (3.0, 0.5))
        slow = raw(lambda server, line: getattr(self, way)(line, server))
        giver, health = fetched(tmp_path / "part", slow, play({"/f": CONTENT}))
        assert giver == "m1"
        assert "m0: it fell silent" in health.fallbacks["f"]

    @pytest.mark.parametrize("length", [b"Transfer-Encoding: chunked", b"Content-Length: 67108864"])
    def test_the_body_of_a_redirect_is_not_read(self, raw: Any, play: Any, tmp_path: Path, length: bytes) -> None:
        far = play({"/g": CONTENT})

        def script(server: Raw, line: socket.socket) -> None:
            server.send(line, b"HTTP/1.1 302 Found\r\nLocation: %b/g\r\n%b\r\n\r\n" % (far.url.encode(), length))
            for _ in range(64):
                server.send(line, b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            server.send(line, b"0\r\n\r\n")

        near = raw(script)
        fetched(tmp_path / "part", near)
        assert near.sent < 32 << 20

    def test_a_redirect_of_a_line_costs_no_connection(
        self, play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        played = play({"/g": CONTENT}, Fault("/f", status=302, headers={"Location": "/g"}, body=b"Found"))
        lines: list[Any] = []
        begin = played.server.process_request

        def count(*line: Any) -> None:
            lines.append(line)
            begin(*line)

        monkeypatch.setattr(played.server, "process_request", count)
        fetched(tmp_path / "part", played)
        assert len(lines) == 1

    def test_redirects_have_an_end(self, play: Any, tmp_path: Path) -> None:
        played = play({}, Fault("/f", status=302, headers={"Location": "/f"}))
        with pytest.raises(download.DownloadError, match="TooManyRedirects"):
            fetched(tmp_path / "part", played)
