"""Tests the server of `models seed`: the bytes and listings that it serves, and its responses to invalid requests."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from provision.models import seed_server
from provision.models.snapshots import link
from tests.provision.fake_hub import git_sha1

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPO = "owner/model"
REVISION = "1" * 40
FILES = {"unet/config.json": b'{"a": 1}\n', "empty.txt": b"", "w.safetensors": bytes(range(256)) * 40}
BLOBS = {
    path: hashlib.sha256(content).hexdigest() if path == "w.safetensors" else git_sha1(content)
    for path, content in FILES.items()
}
LARGE = "large.safetensors"
PLACE = f"/{REPO}/resolve/{REVISION}"
INFO = f"/api/models/{REPO}"


@dataclass
class Response:
    """Hold the status, headers and body of a response."""

    status: int
    headers: dict[str, str]
    content: bytes


@dataclass
class Seed:
    """Hold the port of a running seed server, and the open connections to the server."""

    port: int
    open: list[http.client.HTTPConnection] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection, which the fixture closes."""
        self.open.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600))
        return self.open[-1]

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Response:
        """Send a request on a new connection, and return the whole response."""
        return send(self.connect(), method, path, body, **headers)


def send(
    line: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str
) -> Response:
    """Send a request on a connection, and return the whole response; `_` in a header's name stands for `-`."""
    line.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = line.getresponse()
    return Response(response.status, dict(response.getheaders()), response.read())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return the folder of one repository in a hub cache, with FILES and a large sparse file."""
    folder = tmp_path / "hub/models--owner--model"
    (folder / "blobs").mkdir(parents=True)
    for path, content in FILES.items():
        (folder / "blobs" / BLOBS[path]).write_bytes(content)
    with (folder / "blobs" / ("f" * 64)).open("wb") as large:
        large.truncate(256 << 20)  # a sparse file, larger than the buffers of the sockets
    link(folder, REVISION, [*BLOBS.items(), (LARGE, "f" * 64)])
    return folder


@pytest.fixture
def seed(cache: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Seed]:
    """Start a seed server of the cache; assert at the end of the test that stderr is empty."""
    model = seed_server.served(REPO, REVISION, "mit", cache / "snapshots" / REVISION, [*FILES, LARGE, "absent.json"])
    running = seed_server.server([model], "127.0.0.1", 0)
    running.daemon_threads = False  # so that the shutdown waits for every response
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    running_seed = Seed(running.server_address[1])
    yield running_seed
    for connection in running_seed.open:
        connection.close()
    running.shutdown()
    running.server_close()
    thread.join()
    assert capfd.readouterr().err == ""


def raw(seed: Seed, content: bytes) -> bytes:
    """Send bytes on a new connection, and return all bytes until the server closes it."""
    with socket.create_connection(("127.0.0.1", seed.port), timeout=600) as line:
        line.sendall(content)
        return b"".join(iter(lambda: line.recv(4096), b""))


def reset(line: http.client.HTTPConnection) -> None:
    """Close a connection with a TCP reset, as a killed client does."""
    line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


@pytest.mark.parametrize("path", FILES)
def test_file_is_served_with_its_bytes_and_hash(seed: Seed, path: str) -> None:
    for revision in (REVISION, "main"):
        response = seed.request("GET", f"/{REPO}/resolve/{revision}/{path}")
        assert (response.status, response.content) == (200, FILES[path])
    assert response.headers["ETag"] == response.headers["X-Linked-Etag"] == f'"{BLOBS[path]}"'
    assert response.headers["X-Repo-Commit"] == REVISION
    head = seed.request("HEAD", f"{PLACE}/{path}")
    assert (head.status, head.content) == (200, b"")
    assert head.headers["Content-Length"] == str(len(FILES[path])) == response.headers["Content-Length"]


def test_listing_has_all_served_files_and_no_absent_one(seed: Seed) -> None:
    tree = {
        row["path"]: row for row in json.loads(seed.request("GET", f"{INFO}/tree/{REVISION}?recursive=True").content)
    }
    assert set(tree) == {*FILES, LARGE}
    assert (tree["empty.txt"]["oid"], tree["empty.txt"]["size"]) == (BLOBS["empty.txt"], 0)
    assert tree["w.safetensors"]["lfs"]["oid"] == BLOBS["w.safetensors"]
    for place in (INFO, f"{INFO}/revision/main"):
        info = json.loads(seed.request("GET", place).content)
        assert (info["sha"], len(info["siblings"])) == (REVISION, len(tree))


@pytest.mark.parametrize(
    ("range_header", "status", "begin", "end"),
    [
        ("bytes=100-", 206, 100, 10240),
        ("bytes=100-199", 206, 100, 200),
        ("bytes=10239-99999", 206, 10239, 10240),
        ("bytes=10240-", 416, 0, 0),
        ("bytes=4-2", 200, 0, 10240),
        ("bytes=-3", 200, 0, 10240),
        ("bytes=0-1,4-5", 200, 0, 10240),
        ("bytes=" + "9" * 5000 + "-", 200, 0, 10240),
        ("lines=1-2", 200, 0, 10240),
    ],
    ids=lambda value: str(value)[:20],
)
def test_valid_range_is_served_and_an_invalid_range_header_is_ignored(
    seed: Seed, range_header: str, status: int, begin: int, end: int
) -> None:
    line = seed.connect()
    response = send(line, "GET", f"{PLACE}/w.safetensors", Range=range_header)
    assert (response.status, response.content) == (status, FILES["w.safetensors"][begin:end])
    content_ranges = {206: f"bytes {begin}-{end - 1}/10240", 416: "bytes */10240"}
    assert response.headers.get("Content-Range") == content_ranges.get(status)
    assert send(line, "GET", INFO).status == 200, "the connection stays open"


def test_range_of_an_empty_file_gets_416(seed: Seed) -> None:
    assert seed.request("GET", f"{PLACE}/empty.txt", Range="bytes=0-").status == 416
    assert seed.request("GET", f"{PLACE}/empty.txt", Range="bytes=4-2").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        f"{PLACE}/../../../../blobs/{BLOBS['empty.txt']}",
        f"{PLACE}/%2e%2e/%2e%2e/blobs/{BLOBS['empty.txt']}",
        f"{PLACE}/..%2f..%2fblobs%2f{BLOBS['empty.txt']}",
        f"{PLACE}/%2fetc%2fpasswd",
        f"{PLACE}//etc/passwd",
        f"{PLACE}/unet/../empty.txt",
        f"{PLACE}/unet",
        f"{PLACE}/%00",
        f"{PLACE}/absent.json",
        f"/{REPO}/resolve/{'2' * 40}/empty.txt",
        f"{INFO}/tree/{'2' * 40}",
        f"{INFO}/revision/{'2' * 40}",
        "/api/models/owner/other",
        "/api/models/owner%2fmodel%2f..",
        "/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_path_that_is_not_served_gets_404(seed: Seed, method: str, path: str) -> None:
    response = seed.request(method, path)
    assert (response.status, response.content) == (404, b"")
    if "/tree/" in path:
        assert response.headers["X-Error-Code"] == "RevisionNotFound"


def test_paths_info_lists_the_requested_files_and_rejects_an_invalid_body(seed: Seed) -> None:
    line = seed.connect()
    place = f"{INFO}/paths-info/{REVISION}"
    response = send(line, "POST", place, json.dumps({"paths": ["w.safetensors", "absent.json"]}).encode())
    assert [row["path"] for row in json.loads(response.content)] == ["w.safetensors"]
    for wrong in (b"", b"[]", b"{", b"3", b'{"paths": 3}', b"[" * 10**5):
        assert send(line, "POST", place, wrong).status == 400, wrong[:9]
    assert send(line, "POST", f"{INFO}/paths-info/{'2' * 40}", b"{}").status == 404
    assert send(line, "POST", f"{PLACE}/empty.txt", b"{}").status == 404
    assert send(line, "GET", INFO).status == 200, "every body was read, and the connection stays open"


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Content-Length", str(2 << 20), 413),
        ("Content-Length", "9" * 5000, 400),
        ("Content-Length", "-1", 400),
        ("Content-Length", "2\r\nTransfer-Encoding: chunked", 400),
    ],
    ids=["too large", "too many digits", "negative", "both framings"],
)
def test_request_whose_body_is_not_read_is_rejected_and_closes_the_connection(
    seed: Seed, header: str, value: str, status: int
) -> None:
    head = f"POST {INFO}/paths-info/main HTTP/1.1\r\nHost: x\r\n{header}: {value}\r\n\r\n"
    response = raw(seed, head.encode())
    assert response.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\nconnection: close\r\n" in response.lower()


def test_client_that_disconnects_causes_no_printed_error(seed: Seed) -> None:
    idle, busy = seed.connect(), seed.connect()
    assert send(idle, "GET", INFO).status == 200
    busy.request("GET", f"{PLACE}/{LARGE}")
    response = busy.getresponse()
    assert response.read(1 << 20) == bytes(1 << 20)
    reset(idle)
    response.close()
    reset(busy)
    assert seed.request("GET", INFO).status == 200


def test_file_that_was_removed_after_the_start_is_not_found(seed: Seed, cache: Path) -> None:
    (cache / "blobs" / BLOBS["empty.txt"]).unlink()
    response = seed.request("GET", f"{PLACE}/empty.txt")
    assert (response.status, response.headers["X-Error-Code"]) == (404, "EntryNotFound")


def test_chunked_body_is_read(seed: Seed) -> None:
    body = b'{"paths": ["empty.txt"]}'
    head = f"POST {INFO}/paths-info/main HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    response = raw(seed, head.encode() + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert [row["path"] for row in json.loads(response.partition(b"\r\n\r\n")[2])] == ["empty.txt"]


def test_body_of_a_get_is_not_taken_for_the_next_request(seed: Seed) -> None:
    inner = f"GET {INFO} HTTP/1.1\r\nHost: y\r\n\r\n".encode()
    head = f"GET {PLACE}/empty.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(inner)}\r\n\r\n"
    assert raw(seed, head.encode() + inner).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("method", ["PUT", "DELETE", "TRACE", "OPTIONS"])
def test_method_that_changes_something_is_refused(seed: Seed, method: str) -> None:
    assert seed.request(method, INFO).status == 405


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Bearer ", 401), ("Basic c2VjcmV0", 401), ("Bearer secret", 200)],
)
def test_server_with_a_token_serves_only_requests_that_have_it(
    cache: Path, authorization: str | None, status: int
) -> None:
    model = seed_server.served(REPO, REVISION, "mit", cache / "snapshots" / REVISION, list(FILES))
    with seed_server.server([model], "127.0.0.1", 0, token="secret") as running:  # noqa: S106 (a test's)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        client = Seed(running.server_address[1])
        headers = {} if authorization is None else {"Authorization": authorization}
        for path in (INFO, f"{INFO}/tree/main", f"{PLACE}/empty.txt"):
            assert client.request("GET", path, None, **headers).status == status
        assert client.request("POST", f"{INFO}/paths-info/main", b"{}", **headers).status == status
        running.shutdown()
        thread.join()
        for connection in client.open:
            connection.close()


def test_blob_in_a_shared_store_is_listed_with_its_hash_in_the_repository(tmp_path: Path) -> None:
    """Keep the blob in a store of all repositories, under another hash, as the Xet client does."""
    content = FILES["w.safetensors"]
    store = tmp_path / "hub/blobs/ab" / ("ab" + "c" * 62)
    store.parent.mkdir(parents=True)
    store.write_bytes(content)
    folder = tmp_path / "hub/models--owner--model"
    blob = folder / "blobs" / BLOBS["w.safetensors"]
    blob.parent.mkdir(parents=True)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    link(folder, REVISION, [("unet/w.safetensors", blob.name)])
    model = seed_server.served(REPO, REVISION, "mit", folder / "snapshots" / REVISION, ["unet/w.safetensors"])
    row: dict[str, Any] = model.listing()[0]
    assert (row["lfs"]["oid"], row["size"]) == (BLOBS["w.safetensors"], len(content))
    assert model.files["unet/w.safetensors"].read_bytes() == content


def test_snapshot_file_whose_blob_is_not_named_by_a_hash_is_not_served(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "copy.json").write_text("{}")
    (snapshot / BLOBS["empty.txt"]).write_text("{}")
    (snapshot / "named.json").symlink_to("copy.json")
    (snapshot / "gone.json").symlink_to(f"../../blobs/{BLOBS['empty.txt']}")
    names = sorted(path.name for path in snapshot.iterdir())
    assert seed_server.served(REPO, REVISION, "mit", snapshot, names).files == {}
