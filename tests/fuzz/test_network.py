"""Tests that no listing of a hub, and no request to the seed server, causes an error that is not handled."""

from __future__ import annotations

import json
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provision.core.errors import FirstlightError
from provision.models import seed_server
from provision.models.hub_client import Hub
from provision.models.snapshots import link
from tests.fuzz import kept_inputs, mutations

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from provision.net.http_server import HttpServer

COMMIT, BLOB, LFS = "1" * 40, "b" * 40, "c" * 64
LISTING = [
    {"type": "file", "path": "a/b.json", "size": 1, "oid": BLOB},
    {"type": "file", "path": "w.safetensors", "size": 9, "oid": BLOB, "lfs": {"oid": LFS, "size": 9}},
    {"type": "directory", "path": "a"},
]
REVISION = {"sha": COMMIT, "cardData": {"license": "mit"}}
PATHS = f"/api/models/me/tiny/paths-info/{COMMIT}"
TARGETS = [
    *(f"/api/models/me/tiny/tree/{COMMIT}?recursive=true", "/api/models/me/tiny", "/api/models/me/tiny/revision/main"),
    *(f"/me/tiny/resolve/{COMMIT}/a/b.json", "/me/tiny/resolve/main/../../etc/passwd", PATHS, "/", "*", "//[::1/x"),
    *("http://[::1", "/%00/%ff/resolve/main/x", "/me/tiny/resolve/main/" + "a/" * 3000, "x", "/?#", "//[x]:9/a/b"),
]
RANGES = ["bytes=0-0", "bytes=9-1", "bytes=-1", "bytes=0-" + "9" * 18, "bytes=5-", "x", "bytes=0-0,2-3", ""]


def requests() -> st.SearchStrategy[bytes]:
    """Return a strategy for requests: with odd targets, ranges and bodies, and some with damaged bytes."""
    bodies = mutations.json_of({"paths": ["a/b.json"], "expand": False})
    parts = st.tuples(
        st.sampled_from(["GET", "HEAD", "POST", "PUT", "x" * 40]),
        st.sampled_from(TARGETS),
        st.sampled_from(RANGES),
        bodies,
    )
    whole = parts.map(lambda row: request(*row))
    return whole | whole | mutations.bytes_of(request("POST", PATHS, "", b'{"paths": ["a/b.json"]}'))


def request(method: str, target: str, byte_range: str, body: bytes) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nRange: {byte_range}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.fixture
def seed(tmp_path: Path) -> Iterator[HttpServer]:
    folder = tmp_path / "hub/models--me--tiny"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / BLOB).write_bytes(b"0123456789")
    link(folder, COMMIT, [("a/b.json", BLOB)])
    model = seed_server.served("me/tiny", COMMIT, "mit", folder / "snapshots" / COMMIT, ["a/b.json"])
    server = seed_server.server([model], "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_request_to_the_seed_server_gets_a_response_or_a_closed_connection(
    seed: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(seed, "handle_error", lambda *_: errors.append(sys.exc_info()[1]))

    def send(content: bytes) -> None:
        received = b""
        with suppress(OSError), socket.create_connection(seed.server_address[:2]) as line:  # type: ignore[arg-type]
            line.sendall(content)
            line.shutdown(socket.SHUT_WR)
            while block := line.recv(1 << 16):
                received += block
        assert errors == []
        assert received[:9] in {b"", b"HTTP/1.1 "}

    for target in TARGETS:
        send(request("GET", target, "", b""))
        send(request("POST", target, "", b""))
    for content in kept_inputs.of("seed server"):
        send(content)
        send(request("POST", PATHS, "", content))
    mutations.fuzzed(150)(given(requests())(send))()


@pytest.mark.parametrize("kind", ["listing", "revision"])
def test_listing_of_a_hub_is_accepted_or_refused_with_an_own_error(serve: Any, kind: str) -> None:
    server = serve({})

    def fetch(content: bytes) -> None:
        path = f"/api/models/me/tiny/{'tree' if kind == 'listing' else 'revision'}/{COMMIT}"
        server.content = {path: content, f"{path}?recursive=true&expand=false": content}
        hub = Hub({"HF_ENDPOINT": server.url})
        with suppress(FirstlightError):
            if kind == "listing":
                hub.listing("me/tiny", COMMIT)
            else:
                hub.resolve("me/tiny", COMMIT)

    sample: Any = LISTING if kind == "listing" else REVISION
    fetch(json.dumps(sample).encode())
    assert server.seen
    for content in kept_inputs.of("hub"):
        fetch(content)
    mutations.fuzzed(60)(given(mutations.json_of(sample))(fetch))()
