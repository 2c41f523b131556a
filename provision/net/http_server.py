"""Serves HTTP/1.1 with limits on connections, times and sizes; h11 parses and checks the requests.

Each connection has a thread of its own, so a slow disk delays one client.
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import h11

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import BinaryIO

_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class HttpLimits:
    """Hold the limits of a server.

    `connections`: the most open connections. A new one closes the connection that has waited longest for a request;
    if all of them are busy, it gets status 503.
    `idle_seconds`: the time between two requests of a connection.
    `request_seconds`: the time from the first byte of a request to its last.
    `stall_seconds`: the time in which a client must read something of a response.
    `head_bytes`, `body_bytes`: the sizes of a request.
    """

    connections: int = 256
    idle_seconds: float = 60.0
    request_seconds: float = 30.0
    stall_seconds: float = 60.0
    head_bytes: int = 16 << 10
    body_bytes: int = 1 << 20


@dataclass(frozen=True)
class HttpRequest:
    """Describe one request. The names of `headers` are in lower case; of a repeated header the first counts."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class FilePart:
    """Describe `count` bytes of an open file from the offset `first`. The server closes the file."""

    file: BinaryIO
    first: int
    count: int

    def __len__(self) -> int:
        """Return the number of bytes, which h11 compares with the Content-Length."""
        return self.count


@dataclass(frozen=True)
class HttpResponse:
    """Describe one response; the server adds Content-Length, and leaves the content out for HEAD."""

    status: int
    content: bytes | FilePart = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpServer(socketserver.ThreadingTCPServer):
    """Answers requests at an address; `serve_forever` runs it.

    Args:
        address: (host, port); port 0 selects a free one.
        answer: returns the response to a request; called in the thread of the connection.
        limits: the limits of the server.

    Raises:
        OSError: the port is in use, or the host does not have the address.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], answer: Callable[[HttpRequest], HttpResponse], limits: HttpLimits | None = None
    ) -> None:
        self.answer = answer
        self.limits = limits or HttpLimits()
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, float | None] = {}  # since when it waits for a request; None: it is busy
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Start the thread of a new connection, or refuse the connection if all others are busy."""
        assert isinstance(request, socket.socket)  # noqa: S101 (a stream server)
        if self._admit(request):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.settimeout(1.0)
            request.sendall(b"HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """Close a connection, and no longer count it."""
        assert isinstance(request, socket.socket)  # noqa: S101 (a stream server)
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def set_waiting(self, connection: socket.socket, *, waits: bool) -> None:
        """Record whether a connection waits for the next request."""
        with self._lock:
            if connection in self._connections:
                self._connections[connection] = time.monotonic() if waits else None

    def _admit(self, connection: socket.socket) -> bool:
        """Count a new connection if there is room, or after the connection that waited longest was closed."""
        with self._lock:
            waiting = {other: since for other, since in self._connections.items() if since is not None}
            if len(self._connections) >= self.limits.connections:
                if not waiting:
                    return False
                longest = min(waiting, key=waiting.__getitem__)
                del self._connections[longest]
                with suppress(OSError):  # the client was quicker
                    longest.shutdown(socket.SHUT_RDWR)  # its thread reads the end of the connection, and closes it
            self._connections[connection] = time.monotonic()
            return True

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Print the traceback of an error; a lost or stalled connection is none, and does not get here."""
        super().handle_error(request, client_address)


class _Handler(socketserver.BaseRequestHandler):
    """Serves one connection: parses each request, and sends the response to it."""

    server: HttpServer
    request: socket.socket

    def handle(self) -> None:
        """Serve the requests of the connection until one side closes it or a limit is reached."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=self.server.limits.head_bytes)
        with suppress(ConnectionError, TimeoutError):
            while (request := self._next_request(connection)) is not None:
                response = self.server.answer(request)
                try:
                    self._send(connection, response, has_body=request.method != "HEAD")
                finally:
                    if isinstance(response.content, FilePart):
                        response.content.file.close()
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return
                connection.start_next_cycle()

    def _next_request(self, connection: h11.Connection) -> HttpRequest | None:
        """Return the next whole request; None if there is none, or if it breaks a limit or the protocol."""
        self.server.set_waiting(self.request, waits=True)
        if not connection.trailing_data[0]:
            self.request.settimeout(self.server.limits.idle_seconds)
            connection.receive_data(self.request.recv(_BLOCK_BYTES))
        try:
            return self._read_request(connection, time.monotonic() + self.server.limits.request_seconds)
        except h11.RemoteProtocolError as error:
            if connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:  # then close: the rest of the request is not read
                response = HttpResponse(error.error_status_hint, headers={"Connection": "close"})
                self._send(connection, response, has_body=True)
            return None

    def _read_request(self, connection: h11.Connection, deadline: float) -> HttpRequest | None:
        """Return a request of which some bytes have arrived; None if the client closes the connection before its end.

        Raises:
            RemoteProtocolError: it breaks a limit or the protocol.
            TimeoutError: the deadline (of time.monotonic) has passed.
        """
        head = self._next_event(connection, deadline)
        self.server.set_waiting(self.request, waits=False)
        if not isinstance(head, h11.Request):
            return None
        rows = reversed(list(head.headers))  # so that the first of a repeated header counts
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in rows}
        if "content-length" in headers and "transfer-encoding" in headers:
            raise h11.RemoteProtocolError("proxies disagree about where such a request ends", error_status_hint=400)
        size, body = int(headers.get("content-length", "0")), bytearray()  # h11 has checked the number
        while size <= self.server.limits.body_bytes:
            event = self._next_event(connection, deadline)
            if isinstance(event, h11.EndOfMessage):
                return HttpRequest(head.method.decode("ascii"), head.target.decode("latin-1"), headers, bytes(body))
            if not isinstance(event, h11.Data):
                return None
            body += event.data
            size = len(body)
        raise h11.RemoteProtocolError("the body is larger than the limit", error_status_hint=413)

    def _next_event(self, connection: h11.Connection, deadline: float) -> object:
        """Return the next event of h11, after as many bytes of the connection as it needs.

        Raises:
            TimeoutError: the deadline (of time.monotonic) has passed.
        """
        while (event := connection.next_event()) is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                self.request.sendall(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self.request.settimeout(remaining)
            connection.receive_data(self.request.recv(_BLOCK_BYTES))
        return event

    def _send(self, connection: h11.Connection, response: HttpResponse, *, has_body: bool) -> None:
        """Send a response.

        Raises:
            TimeoutError: the client reads nothing.
            ConnectionError: the client has closed the connection, or the file is shorter than it was.
        """
        self.request.settimeout(self.server.limits.stall_seconds)
        headers = {"Server": "firstlight", **response.headers, "Content-Length": str(len(response.content))}
        self._send_event(connection, h11.Response(status_code=response.status, headers=list(headers.items())))
        if has_body and len(response.content):
            self._send_event(connection, h11.Data(data=response.content))  # type: ignore[arg-type]
        self._send_event(connection, h11.EndOfMessage())

    def _send_event(self, connection: h11.Connection, event: h11.Event) -> None:
        parts: list[object] = list(connection.send_with_data_passthrough(event) or [])
        for part in parts:
            if isinstance(part, FilePart):
                # sendfile, where the system has it, does not copy the bytes through this process.
                if self.request.sendfile(part.file, part.first, part.count) < part.count:
                    raise ConnectionError("the file became shorter than the declared length")
            elif isinstance(part, bytes):
                self.request.sendall(part)
