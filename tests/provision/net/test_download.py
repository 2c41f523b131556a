"""Tests the download of a file from several sources: the next source resumes the file, and received bytes are kept."""

from __future__ import annotations

import hashlib
import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import FirstlightError
from provision.net import download, resumable_request, session
from provision.net.resumable_request import Source
from provision.net.source_health import SourceHealth
from tests.clock import Standing, Ticking
from tests.provision.http_server import PORTAL, Fault, RawServer, Server
from tests.provision.model_pulls import skip_waits

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def download_from(
    part: Path,
    *servers: Server | RawServer,
    health: SourceHealth | None = None,
    size: int | None = len(CONTENT),
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[str, SourceHealth]:
    """Download the file from servers with the names m0, m1, …; return (name of the last source, source health)."""
    health = health or SourceHealth()
    source = download.download(
        session.Session(),
        lambda: [Source(f"m{number}", f"{server.url}/f") for number, server in enumerate(servers)],
        part,
        size=size,
        pins={"sha256": {SHA256}},
        health=health,
        progress=progress,
        name="f",
    )
    assert part.read_bytes() == CONTENT
    return source, health


def clock_with_slow_first_block() -> SimpleNamespace:
    """Return a clock that shows 0 s when a response begins, and 6 s from its first block on."""
    readings = itertools.chain([0.0], itertools.repeat(6.0))
    return SimpleNamespace(monotonic=lambda: next(readings))


class TestOneFile:
    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (Fault(status=404), "404"),
            (Fault(status=403), "403"),
            (Fault(status=429, headers={"Retry-After": "20"}), "429"),
            (Fault(stall=True), "timed out"),
            (Fault(stall_at=500_000), "timed out"),
            (Fault(cut=500_000), "the connection broke"),
            (Fault(body=b"<html>log in</html>"), "bytes"),
        ],
        ids=["404", "403", "429", "timeout", "timeout in the middle", "broken connection", "another file"],
    )
    def test_next_source_resumes_the_file_after_a_failed_source(
        self, serve: Any, tmp_path: Path, fault: Fault, reason: str
    ) -> None:
        bad, good = serve({"/f": CONTENT}, fault), serve({"/f": CONTENT})
        source, health = download_from(tmp_path / "part", bad, good)
        assert source == "m1"
        assert reason in health.fallbacks["f"]
        if fault.cut or fault.stall_at:
            assert good.seen[0][1]["Range"] == "bytes=500000-", "received bytes are kept"

    def test_source_that_failed_comes_last_for_the_next_file(self, serve: Any, tmp_path: Path) -> None:
        bad, good = serve({"/f": CONTENT}), serve({"/f": CONTENT})
        bad.close()
        _, health = download_from(tmp_path / "part", bad, good)
        assert health.order(["m0", "m1"]) == ["m1", "m0"]

    def test_source_of_wrong_content_is_banned_for_the_run(self, serve: Any, tmp_path: Path) -> None:
        bad, good = serve({"/f": CONTENT}, Fault(flip=True)), serve({"/f": CONTENT})
        _, health = download_from(tmp_path / "part", bad, good)
        assert health.order(["m0", "m1"]) == ["m1"]
        assert "m0 is not used again in this run: f: it sent content with sha256" in health.warnings()[0]
        download_from(tmp_path / "other", bad, good, health=health)
        assert len(bad.seen) == 1

    def test_source_is_not_banned_for_wrong_bytes_of_another_source(self, serve: Any, tmp_path: Path) -> None:
        wrong, good = serve({"/f": CONTENT}, Fault(flip=True, cut=300_000)), serve({"/f": CONTENT})
        source, health = download_from(tmp_path / "part", wrong, good)
        assert (source, health.banned) == ("m1", {})

    def test_single_source_is_retried_while_it_sends_new_bytes(self, serve: Any, tmp_path: Path) -> None:
        only = serve({"/f": CONTENT}, Fault(cut=150_000))
        download_from(tmp_path / "part", only)
        assert len(only.seen) == 7

    def test_single_busy_source_is_requested_again(self, serve: Any, tmp_path: Path) -> None:
        only = serve({"/f": CONTENT})
        only.faults = [Fault(status=429, headers={"Retry-After": "0"}, times=1)]
        download_from(tmp_path / "part", only)
        assert len(only.seen) == 2

    def test_slow_source_is_replaced_by_another_source(
        self, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resumable_request, "time", clock_with_slow_first_block())
        slow, good = serve({"/f": CONTENT}, Fault(crawl_at=20_000)), serve({"/f": CONTENT})
        source, health = download_from(tmp_path / "part", slow, good)
        assert source == "m1"
        assert "kB a second" in health.fallbacks["f"]

    def test_error_names_the_reason_of_each_source(self, serve: Any, tmp_path: Path) -> None:
        servers = [serve({"/f": CONTENT}, Fault(status=404)), serve({"/f": CONTENT}, Fault(status=403))]
        with pytest.raises(download.DownloadError, match=r"m0: it answers 404.*; m1: it answers 403"):
            download_from(tmp_path / "part", *servers)
        assert [len(server.seen) for server in servers] == [1, 1], "a source without the file is not tried again"

    def test_wrong_content_from_every_source_raises_wrong_content_error(self, serve: Any, tmp_path: Path) -> None:
        with pytest.raises(download.WrongContentError, match="but the pinned sha256 is"):
            download_from(tmp_path / "part", serve({"/f": CONTENT}, Fault(flip=True)))
        assert not (tmp_path / "part").exists()

    def test_stored_partial_file_is_resumed(self, serve: Any, tmp_path: Path) -> None:
        (tmp_path / "part").write_bytes(CONTENT[:700_000])
        only = serve({"/f": CONTENT})
        download_from(tmp_path / "part", only)
        assert [headers.get("Range") for _, headers in only.seen] == ["bytes=700000-"]

    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size known", "size unknown"])
    def test_complete_partial_file_with_the_pinned_hash_needs_no_request(
        self, serve: Any, tmp_path: Path, size: int | None
    ) -> None:
        (tmp_path / "part").write_bytes(CONTENT)
        only = serve({"/f": CONTENT})
        download_from(tmp_path / "part", only, size=size)
        assert not only.seen

    def test_partial_file_longer_than_the_file_is_downloaded_again(self, serve: Any, tmp_path: Path) -> None:
        (tmp_path / "part").write_bytes(CONTENT + b"more")
        download_from(tmp_path / "part", serve({"/f": CONTENT}), size=None)

    def test_partial_file_with_other_content_is_downloaded_again(self, serve: Any, tmp_path: Path) -> None:
        (tmp_path / "part").write_bytes(b"rubbish" * 1000)
        _, health = download_from(tmp_path / "part", serve({"/f": CONTENT}))
        assert health.banned == {}


def part_of(tmp_path: Path, content: bytes = CONTENT[:700_000]) -> Path:
    part = tmp_path / "part"
    part.write_bytes(content)
    return part


class TestPartialFileIsKept:
    """Tests that no response deletes a partial file that is the beginning of the pinned file."""

    WRONG_RESPONSES = (
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
        "broken connection",
        "another file",
        "another range",
        "no content range",
        "range not satisfiable",
        "short without a length",
        "endless",
        "login page",
        "a shorter file",
        "the bytes of the partial file",
        "the bytes of the partial file and more",
    )

    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size pinned", "not pinned"])
    @pytest.mark.parametrize("fault", WRONG_RESPONSES, ids=NAMES)
    def test_next_source_resumes_after_any_wrong_response(
        self, serve: Any, tmp_path: Path, fault: Fault, size: int | None
    ) -> None:
        bad, good = serve({"/f": CONTENT}, fault), serve({"/f": CONTENT})
        arrived: list[int] = []
        source, _ = download_from(part_of(tmp_path), bad, good, size=size, progress=arrived.append)
        assert source == "m1"
        assert [headers.get("Range") for _, headers in good.seen] == ["bytes=700000-"]

    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size pinned", "not pinned"])
    @pytest.mark.parametrize("fault", WRONG_RESPONSES, ids=NAMES)
    def test_wrong_response_of_a_single_source_keeps_the_partial_file(
        self, serve: Any, tmp_path: Path, fault: Fault, size: int | None
    ) -> None:
        part = part_of(tmp_path)
        with pytest.raises(FirstlightError):
            download_from(part, serve({"/f": CONTENT}, fault), size=size)
        assert part.read_bytes() == CONTENT[:700_000]

    @pytest.mark.parametrize("no_range", [False, True], ids=["ranges", "no ranges"])
    @pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size pinned", "not pinned"])
    @pytest.mark.parametrize(
        "content",
        [bytes(700_000), CONTENT + b"more", bytes(len(CONTENT))],
        ids=["other content", "too long", "same length"],
    )
    def test_partial_file_with_wrong_bytes_or_length_is_replaced_and_no_source_banned(
        self, serve: Any, tmp_path: Path, content: bytes, size: int | None, no_range: bool
    ) -> None:
        part = part_of(tmp_path, content)
        _, health = download_from(part, serve({"/f": CONTENT}, Fault(no_range=no_range)), size=size)
        assert health.banned == {}

    def test_whole_file_without_range_and_length_completes_the_partial_file(
        self, serve_raw: Any, tmp_path: Path
    ) -> None:
        def script(server: RawServer, line: socket.socket) -> None:
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            server.send(line, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT))

        arrived: list[int] = []
        download_from(part_of(tmp_path), serve_raw(script), progress=arrived.append)
        assert sum(arrived) == len(CONTENT) - 700_000

    def test_endless_body_is_abandoned_at_half_of_the_free_space(
        self, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4_000_000))
        endless, good = serve({"/f": CONTENT}, Fault(chunked=1 << 26)), serve({"/f": CONTENT})
        arrived: list[int] = []
        source, health = download_from(tmp_path / "part", endless, good, size=None, progress=arrived.append)
        assert source == "m1"
        assert "it sends more than 2,000,000 bytes (half of the free space)" in health.fallbacks["f"]
        assert sum(arrived) <= 2_000_000 + len(CONTENT)
        assert "Range" not in good.seen[0][1], "bytes of an endless body are not kept"


class TestWaiting:
    def test_download_waits_for_a_busy_source_if_the_other_source_is_unreachable(
        self, serve: Any, tmp_path: Path
    ) -> None:
        busy = serve({"/f": CONTENT}, Fault(status=429, headers={"Retry-After": "20"}, times=2))
        dead = serve({})
        dead.close()
        health = SourceHealth()
        _, waits = skip_waits(health)
        source, _ = download_from(tmp_path / "part", busy, dead, health=health)
        assert source == "m0"
        assert [round(seconds) for seconds in waits] == [20, 20]

    def test_download_waits_for_the_busy_source_with_the_shortest_retry_after(self, serve: Any, tmp_path: Path) -> None:
        long, short = (
            serve({"/f": CONTENT}, Fault(status=429, headers={"Retry-After": wait}, times=1)) for wait in ("300", "20")
        )
        health = SourceHealth()
        _, waits = skip_waits(health)
        source, _ = download_from(tmp_path / "part", long, short, health=health)
        assert source == "m1"
        assert [round(seconds) for seconds in waits] == [20]

    def test_wait_doubles_for_a_busy_source_without_retry_after(
        self, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only = serve({"/f": CONTENT}, Fault(status=503, headers={"Retry-After": "0"}, times=4))
        health = SourceHealth()
        _, waits = skip_waits(health)
        monkeypatch.setattr(download, "time", Standing())
        download_from(tmp_path / "part", only, health=health)
        assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6])

    @pytest.mark.parametrize(
        "headers",
        [{}, {"Retry-After": "0"}, {"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}],
        ids=["no Retry-After", "0 s", "past date"],
    )
    def test_retries_of_a_source_with_a_permanent_server_error_end_with_an_error(
        self, serve: Any, tmp_path: Path, headers: dict[str, str]
    ) -> None:
        only = serve({"/f": CONTENT}, Fault(status=500, headers=headers))
        health = SourceHealth()
        texts, waits = skip_waits(health)
        with pytest.raises(download.DownloadError, match="answers 500"):
            download_from(tmp_path / "part", only, health=health)
        assert sum(waits) < 40
        assert len(only.seen) <= 9
        assert texts
        assert not any("Retry-After" in text for text in texts)

    @pytest.mark.parametrize("year", ["99999999999999999999", "9999", "0000"])
    def test_retry_after_with_a_date_out_of_range_is_ignored(self, serve: Any, tmp_path: Path, year: str) -> None:
        headers = {"Retry-After": f"Mon, 01 Jan {year} 00:00:00 GMT"}
        bad, good = serve({"/f": CONTENT}, Fault(status=503, headers=headers)), serve({"/f": CONTENT})
        assert download_from(tmp_path / "part", bad, good)[0] == "m1"

    def test_slow_source_is_replaced_by_a_source_that_was_busy_before(
        self, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resumable_request, "time", clock_with_slow_first_block())
        monkeypatch.setattr(download, "time", Ticking(1.0))
        slow = serve({"/f": CONTENT}, Fault(crawl_at=40_000))
        busy = serve({"/f": CONTENT}, Fault(status=503, headers={"Retry-After": "0"}, times=1))
        source, health = download_from(tmp_path / "part", slow, busy)
        assert source == "m1"
        assert "kB a second" in health.fallbacks["f"]

    def test_slow_source_is_kept_while_the_other_source_is_busy(
        self, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resumable_request, "time", Ticking(6.0))
        monkeypatch.setattr(resumable_request, "_SLOWEST_BYTES", 1 << 30)
        slow = serve({"/f": CONTENT}, Fault(cut=10_000, times=1))
        busy = serve({"/f": CONTENT}, Fault(status=503, headers={"Retry-After": "300"}))
        assert download_from(tmp_path / "part", busy, slow)[0] == "m1"
        assert len(slow.seen) == 2


class TestBlockingServers:
    """Tests servers that send meaningless bytes forever, which a socket timeout alone would never end."""

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(CONTENT)

    def header(self, line: socket.socket, server: RawServer) -> None:
        server.send(line, self.HEAD)
        server.send(line, b"X-Long: ")
        server.drip(line, b"x")
        server.send(line, b"\r\n\r\n" + CONTENT)

    def informational(self, line: socket.socket, server: RawServer) -> None:
        server.drip(line, b"HTTP/1.1 100 Continue\r\n\r\n")
        server.send(line, self.HEAD + b"\r\n" + CONTENT)

    def chunk(self, line: socket.socket, server: RawServer) -> None:
        server.send(line, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        server.send(line, b"%x;" % len(CONTENT))
        server.drip(line, b"x")
        server.send(line, b"\r\n" + CONTENT + b"\r\n0\r\n\r\n")

    @pytest.mark.parametrize("part", ["header", "informational", "chunk"])
    def test_endless_header_or_chunk_line_times_out_and_the_next_source_is_used(
        self, serve_raw: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
    ) -> None:
        monkeypatch.setattr(download, "_SHORT_TIMEOUTS", (3.0, 0.5))
        slow = serve_raw(lambda server, line: getattr(self, part)(line, server))
        source, health = download_from(tmp_path / "part", slow, serve({"/f": CONTENT}))
        assert source == "m1"
        assert "m0: it timed out" in health.fallbacks["f"]

    @pytest.mark.parametrize("length", [b"Transfer-Encoding: chunked", b"Content-Length: 67108864"])
    def test_long_body_of_a_redirect_is_not_read(
        self, serve_raw: Any, serve: Any, tmp_path: Path, length: bytes
    ) -> None:
        far = serve({"/g": CONTENT})

        def script(server: RawServer, line: socket.socket) -> None:
            server.send(line, b"HTTP/1.1 302 Found\r\nLocation: %b/g\r\n%b\r\n\r\n" % (far.url.encode(), length))
            for _ in range(64):
                server.send(line, b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            server.send(line, b"0\r\n\r\n")

        near = serve_raw(script)
        download_from(tmp_path / "part", near)
        assert near.sent < 32 << 20

    def test_redirect_with_a_short_body_keeps_its_connection_open(
        self, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve({"/g": CONTENT}, Fault("/f", status=302, headers={"Location": "/g"}, body=b"Found"))
        lines: list[Any] = []
        begin = server.server.process_request

        def count(*line: Any) -> None:
            lines.append(line)
            begin(*line)

        monkeypatch.setattr(server.server, "process_request", count)
        download_from(tmp_path / "part", server)
        assert len(lines) == 1

    def test_redirect_loop_is_an_error(self, serve: Any, tmp_path: Path) -> None:
        server = serve({}, Fault("/f", status=302, headers={"Location": "/f"}))
        with pytest.raises(download.DownloadError, match="TooManyRedirects"):
            download_from(tmp_path / "part", server)
