"""Tests the limits of the HTTP server: connections, times, and the sizes of a request."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from provision.net.http_server import FilePart, HttpLimits, HttpRequest, HttpResponse, HttpServer
from tests.clock import GUARD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LARGE_BYTES = 256 << 20  # more than the buffers of the sockets hold
GET = b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
SMALL_RESPONSE_END = b"\r\n\r\nsmall"


@dataclass
class Running:
    """Hold a running server, and the events that its connections ended."""

    server: HttpServer
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    lines: list[socket.socket] = field(default_factory=list)

    def connect(self, content: bytes = b"") -> socket.socket:
        """Open a connection and send bytes on it; the fixture closes the connection."""
        line = socket.create_connection(("127.0.0.1", self.server.server_address[1]), timeout=GUARD_SECONDS)
        self.lines.append(line)
        line.sendall(content)
        return line

    def wait_for_end(self) -> None:
        """Wait until the server has closed one more connection."""
        assert self.ended.acquire(timeout=GUARD_SECONDS)


def read_until(line: socket.socket, end: bytes) -> bytes:
    """Read from a connection until the bytes end so, or until its end."""
    content = b""
    while not content.endswith(end) and (block := line.recv(1 << 16)):
        content += block
    return content


def read_all(line: socket.socket) -> int:
    """Return the number of bytes until the server's end of the connection."""
    count = 0
    with contextlib.suppress(ConnectionError):
        while block := line.recv(1 << 20):
            count += len(block)
    return count


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a server with limits; at the end it must have printed nothing."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(LARGE_BYTES)

    def answer(request: HttpRequest) -> HttpResponse:
        if request.target == "/large":
            return HttpResponse(200, FilePart(large.open("rb"), 0, LARGE_BYTES))
        return HttpResponse(200, request.body or b"small")

    started: list[tuple[Running, threading.Thread]] = []

    def start(**limits: float) -> Running:
        running = Running(HttpServer(("127.0.0.1", 0), answer, HttpLimits(**limits)))  # type: ignore[arg-type]
        shutdown_request = running.server.shutdown_request

        def shutdown_and_count(request: socket.socket | tuple[bytes, socket.socket]) -> None:
            shutdown_request(request)
            running.ended.release()

        running.server.shutdown_request = shutdown_and_count  # type: ignore[method-assign]
        running.server.daemon_threads = False
        thread = threading.Thread(target=running.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((running, thread))
        return running

    yield start
    for running, thread in started:
        for line in running.lines:
            line.close()
        running.server.shutdown()
        running.server.server_close()
        thread.join()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost"], ids=["nothing", "half a request"])
def test_new_connection_closes_the_one_that_waits_longest(run: Callable[..., Running], sent: bytes) -> None:
    running = run(connections=2)
    first = running.connect(sent)
    second = running.connect(GET)
    assert read_until(second, SMALL_RESPONSE_END).startswith(b"HTTP/1.1 200 ")
    third = running.connect(GET)
    assert read_until(third, SMALL_RESPONSE_END).startswith(b"HTTP/1.1 200 ")
    assert read_all(first) == 0
    second.sendall(GET)
    assert read_until(second, SMALL_RESPONSE_END).startswith(b"HTTP/1.1 200 "), "the younger one stays open"


def test_new_connection_gets_503_while_all_others_are_busy(run: Callable[..., Running]) -> None:
    running = run(connections=2)
    busy = [running.connect(LARGE) for _ in range(2)]
    for line in busy:
        assert line.recv(8) == b"HTTP/1.1"
    assert read_until(running.connect(), b"\r\n\r\n").startswith(b"HTTP/1.1 503 ")
    running.wait_for_end()
    busy[0].close()
    running.wait_for_end()
    assert read_until(running.connect(GET), SMALL_RESPONSE_END).startswith(b"HTTP/1.1 200 ")


def test_connection_without_a_request_is_closed(run: Callable[..., Running]) -> None:
    assert read_all(run(idle_seconds=0.05).connect()) == 0


@pytest.mark.parametrize(
    "part", [b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"], ids=["head", "body"]
)
def test_connection_with_half_a_request_is_closed(run: Callable[..., Running], part: bytes) -> None:
    assert read_all(run(request_seconds=0.05).connect(part)) == 0


def test_client_that_reads_nothing_is_disconnected(run: Callable[..., Running]) -> None:
    running = run(stall_seconds=0.05)
    line = running.connect(LARGE)
    running.wait_for_end()
    assert read_all(line) < LARGE_BYTES


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 9000 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n" + bytes(2_000_000), 413),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
    ],
    ids=["long target", "long head", "large body", "no HTTP", "two lengths", "no host"],
)
def test_request_beyond_the_limits_is_refused(run: Callable[..., Running], request_bytes: bytes, status: int) -> None:
    running = run()
    line = running.connect()
    with contextlib.suppress(ConnectionError):  # the server closes the connection without reading all
        line.sendall(request_bytes)
    with contextlib.suppress(ConnectionError):
        assert line.recv(12) == f"HTTP/1.1 {status}".encode()
    running.wait_for_end()
    assert read_until(running.connect(GET), SMALL_RESPONSE_END).startswith(b"HTTP/1.1 200 ")


def test_requests_that_arrive_together_are_answered_in_their_order(run: Callable[..., Running]) -> None:
    posted = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody"
    content = read_until(run().connect(GET + posted), b"body")
    assert content.count(b"HTTP/1.1 200 ") == 2
    assert content.index(SMALL_RESPONSE_END) < content.index(b"\r\n\r\nbody")
