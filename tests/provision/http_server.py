"""Provides loopback servers that act as mirrors: complete, slow, outdated, unreachable or with wrong content."""

from __future__ import annotations

import hashlib
import json
import re
import select
import socketserver
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from tests.provision.silent_server import CLOCK, SILENT

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable
    from pathlib import Path

PORTAL = b"<html><head><title>Campus Network Login</title></head><body><form action='/login'></form></body></html>"


@dataclass
class Fault:
    """Describe a faulty response of a server to each request whose path contains `path`.

    `after` is the number of such requests before the first fault, and `times` the number of faults (None: no limit).
    `status`, `headers` and `body` replace the response, and `flip` changes all bytes but the first.
    `chunked` is the size of a body without a declared length. `cut` is the size after which the connection ends.
    `stall` and `stall_at`: the server stops after the headers, or after so many bytes, and the client's read times out
    at once (see silent_server.py). `crawl_at`: the server stops after so many bytes, and the read does not time out.
    `bytes_a_second` limits the rate, and `no_range` ignores the Range header.
    `without_agent` and `without_token`: the fault does not apply to requests with firstlight's User-Agent, or with a
    token.
    """

    path: str = ""
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    flip: bool = False
    stall: bool = False
    stall_at: int | None = None
    crawl_at: int | None = None
    cut: int | None = None
    bytes_a_second: int | None = None
    no_range: bool = False
    chunked: int | None = None
    without_agent: bool = False
    without_token: bool = False
    after: int = 0
    times: int | None = None


class Server:
    """Serves {URL path: content} with range requests on a loopback port, and records the requests."""

    def __init__(self, content: dict[str, bytes], *faults: Fault) -> None:
        self.content = content
        self.headers: dict[str, dict[str, str]] = {}
        self.faults = list(faults)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.over = threading.Event()
        self.met = 0
        self.server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        SILENT[self.port] = set()
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.closed = False

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.over.set()
            self.server.shutdown()
            self.server.server_close()
            SILENT.pop(self.port, None)

    def fault_for(self, path: str, headers: Any) -> Fault | None:
        for fault in self.faults:
            is_exempt = (fault.without_agent and "firstlight" in headers.get("User-Agent", "")) or (
                fault.without_token and "Authorization" in headers
            )
            if fault.path in path and not is_exempt:
                if fault.after > 0:
                    fault.after -= 1
                    continue
                if fault.times is not None:
                    if fault.times == 0:
                        continue
                    fault.times -= 1
                return fault
        return None


class RawServer:
    """Listens on a loopback port until the test ends, and calls `script` to send bytes on each connection."""

    def __init__(self, script: Callable[[RawServer, socket.socket], None]) -> None:
        self.over = threading.Event()
        self.sent = 0
        raw_server = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(1 << 16)
                try:
                    script(raw_server, self.request)
                except OSError:
                    """The client has closed the connection."""

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def send(self, line: socket.socket, text: bytes) -> None:
        line.sendall(text)
        self.sent += len(text)

    def drip(self, line: socket.socket, piece: bytes) -> None:
        """Send a piece again and again until the client closes the connection; each one advances `CLOCK` by 0.3 s.

        The clock may advance once more after the client has closed, which is too little for another client's timeout.
        """
        for _ in range(60_000):  # a limit, so that a hanging test ends
            if self.over.is_set() or select.select([line], [], [], 0.01)[0]:
                return
            self.send(line, piece)
            CLOCK.now += 0.3

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def index(wheels: Iterable[Path], *, hashes: bool = True, as_json: bool = False) -> dict[str, bytes]:
    """Return {URL path: content} of an index of wheels: the pages /simple/NAME/ and the files /files/FILE."""
    content: dict[str, bytes] = {}
    rows: dict[str, list[tuple[str, str]]] = {}
    for wheel in wheels:
        content[f"/files/{wheel.name}"] = wheel.read_bytes()
        name = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        rows.setdefault(name, []).append((wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()))
    for name, files in rows.items():
        if as_json:
            page = {"files": [{"filename": n, "url": f"/files/{n}", "hashes": {"sha256": h}} for n, h in files]}
            content[f"/simple/{name}/"] = json.dumps(page).encode()
        else:
            links = (f'<a href="../../files/{n}{f"#sha256={h}" if hashes else ""}">{n}</a>' for n, h in files)
            content[f"/simple/{name}/"] = f"<html><body>{''.join(links)}</body></html>".encode()
    return content


class _QuietServer(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Print nothing about clients that disconnect early, which tests do on purpose."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (one class, whose methods are counted together)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            server.seen.append((path, dict(self.headers)))
            server.requests.append((self.command, path, self.headers.get("Authorization")))
            fault = server.fault_for(path, self.headers) or Fault()
            content = server.content.get(path)
            if fault.chunked is not None:
                self.without_length(fault.chunked)
                return
            if fault.status is not None:
                self.reply(fault.status, fault.body or b"", fault.headers, Fault(), body=body)
                return
            if fault.body is not None:
                self.reply(200, fault.body, {"Content-Type": "text/html"}, fault, body=body)
                return
            if content is None:
                self.reply(404, b"", {}, Fault(), body=body)
                return
            if fault.flip:
                content = bytes([content[0]]) + bytes(byte ^ 1 for byte in content[1:])
            kind = "application/vnd.pypi.simple.v1+json" if content.startswith(b"{") else "text/html"
            headers = {"Content-Type": kind if path.endswith("/") else "application/octet-stream"}
            headers |= server.headers.get(path, {})
            requested = None if fault.no_range else re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            status, part = 200, content
            if requested:
                first = int(requested.group(1))
                last = min(int(requested.group(2) or len(content) - 1), len(content) - 1)
                if first >= len(content):
                    self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"}, Fault(), body=body)
                    return
                status, part = 206, content[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.reply(status, part, headers, fault, body=body)

        def reply(self, status: int, content: bytes, headers: dict[str, str], fault: Fault, *, body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not body:
                return
            sent = 0 if fault.stall else fault.stall_at if fault.crawl_at is None else fault.crawl_at
            if sent is not None:
                self.wfile.write(content[:sent])
                self.wfile.flush()
                if fault.crawl_at is None:
                    self.fall_silent()
                server.over.wait()
                self.close_connection = True
            elif fault.cut is not None and len(content) > fault.cut:
                self.wfile.write(content[: fault.cut])
                self.close_connection = True
            elif fault.bytes_a_second:
                self.dribble(content, fault.bytes_a_second)
            else:
                self.wfile.write(content)

        def fall_silent(self) -> None:
            if server.port in SILENT:
                SILENT[server.port].add(self.client_address[1])

        def without_length(self, count: int) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            block = bytes(1 << 16)
            for _ in range(count // len(block)):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
            self.wfile.write(b"0\r\n\r\n")

        def dribble(self, content: bytes, rate: int) -> None:
            step = max(1, rate // 20)
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                self.wfile.flush()
                if server.over.wait(step / rate):
                    self.close_connection = True
                    return

    return Handler
