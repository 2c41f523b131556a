"""The seed: what it serves of a cache, byte for byte, and what it makes of requests that are none."""

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
from tests.provision.conftest import git_sha1

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
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes


@dataclass
class Seed:
    """A seed on loopback."""

    port: int
    open: list[http.client.HTTPConnection] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        self.open.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600))
        return self.open[-1]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        return answer(self.connect(), method, path, body, **headers)


def answer(
    line: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str
) -> Answer:
    line.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    got = line.getresponse()
    return Answer(got.status, dict(got.getheaders()), got.read())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder of one repository in a hub cache."""
    folder = tmp_path / "hub/models--owner--model"
    (folder / "blobs").mkdir(parents=True)
    for path, content in FILES.items():
        (folder / "blobs" / BLOBS[path]).write_bytes(content)
    with (folder / "blobs" / ("f" * 64)).open("wb") as large:
        large.truncate(256 << 20)  # it takes no space, and more than the sockets hold
    link(folder, REVISION, [*BLOBS.items(), (LARGE, "f" * 64)])
    return folder


@pytest.fixture
def seed(cache: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Seed]:
    """It serves the cache; whatever it is asked, it prints nothing."""
    model = seed_server.served(REPO, REVISION, "mit", cache / "snapshots" / REVISION, [*FILES, LARGE, "absent.json"])
    running = seed_server.server([model], "127.0.0.1", 0)
    running.daemon_threads = False  # so that its end waits for every answer
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made = Seed(running.server_address[1])
    yield made
    for each in made.open:
        each.close()
    running.shutdown()
    running.server_close()
    thread.join()
    assert capfd.readouterr().err == ""


def reset(line: http.client.HTTPConnection) -> None:
    """Go away without a word, as a client does that is killed."""
    line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


@pytest.mark.parametrize("path", FILES)
def test_every_byte_and_its_hash(seed: Seed, path: str) -> None:
    for revision in (REVISION, "main"):
        got = seed.ask("GET", f"/{REPO}/resolve/{revision}/{path}")
        assert (got.status, got.content) == (200, FILES[path])
    assert got.headers["ETag"] == got.headers["X-Linked-Etag"] == f'"{BLOBS[path]}"'
    assert got.headers["X-Repo-Commit"] == REVISION
    head = seed.ask("HEAD", f"{PLACE}/{path}")
    assert (head.status, head.content) == (200, b"")
    assert head.headers["Content-Length"] == str(len(FILES[path])) == got.headers["Content-Length"]


def test_what_it_lists(seed: Seed) -> None:
    tree = {row["path"]: row for row in json.loads(seed.ask("GET", f"{INFO}/tree/{REVISION}?recursive=True").content)}
    assert set(tree) == {*FILES, LARGE}
    assert (tree["empty.txt"]["oid"], tree["empty.txt"]["size"]) == (BLOBS["empty.txt"], 0)
    assert tree["w.safetensors"]["lfs"]["oid"] == BLOBS["w.safetensors"]
    for place in (INFO, f"{INFO}/revision/main"):
        info = json.loads(seed.ask("GET", place).content)
        assert (info["sha"], len(info["siblings"])) == (REVISION, len(tree))


@pytest.mark.parametrize(
    ("asked", "status", "begin", "end"),
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
def test_a_range_is_resumed_and_an_impossible_one_ignored(
    seed: Seed, asked: str, status: int, begin: int, end: int
) -> None:
    line = seed.connect()
    got = answer(line, "GET", f"{PLACE}/w.safetensors", Range=asked)
    assert (got.status, got.content) == (status, FILES["w.safetensors"][begin:end])
    told = {206: f"bytes {begin}-{end - 1}/10240", 416: "bytes */10240"}
    assert got.headers.get("Content-Range") == told.get(status)
    assert answer(line, "GET", INFO).status == 200, "the connection is kept"


def test_an_empty_file_has_no_range(seed: Seed) -> None:
    assert seed.ask("GET", f"{PLACE}/empty.txt", Range="bytes=0-").status == 416
    assert seed.ask("GET", f"{PLACE}/empty.txt", Range="bytes=4-2").status == 200


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
def test_nothing_else_is_there(seed: Seed, method: str, path: str) -> None:
    got = seed.ask(method, path)
    assert (got.status, got.content) == (404, b"")
    if "/tree/" in path:
        assert got.headers["X-Error-Code"] == "RevisionNotFound"


def test_the_listing_of_some_files(seed: Seed) -> None:
    line = seed.connect()
    place = f"{INFO}/paths-info/{REVISION}"
    got = answer(line, "POST", place, json.dumps({"paths": ["w.safetensors", "absent.json"]}).encode())
    assert [row["path"] for row in json.loads(got.content)] == ["w.safetensors"]
    for wrong in (b"", b"[]", b"{", b"3", b'{"paths": 3}', b"[" * 10**5):
        assert answer(line, "POST", place, wrong).status == 400, wrong[:9]
    assert answer(line, "POST", f"{INFO}/paths-info/{'2' * 40}", b"{}").status == 404
    assert answer(line, "POST", f"{PLACE}/empty.txt", b"{}").status == 404
    assert answer(line, "GET", INFO).status == 200, "every body was read, and the connection is kept"


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Content-Length", str(2 << 20), 413),
        ("Content-Length", "9" * 5000, 413),
        ("Content-Length", "-1", 411),
        ("Transfer-Encoding", "chunked", 411),
    ],
    ids=["too large", "beyond all", "negative", "chunked"],
)
def test_a_body_that_is_not_read_ends_the_connection(seed: Seed, header: str, value: str, status: int) -> None:
    asked = f"POST {INFO}/paths-info/main HTTP/1.1\r\nHost: x\r\n{header}: {value}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", seed.port), timeout=600) as line:
        line.sendall(asked.encode())
        got = b"".join(iter(lambda: line.recv(4096), b""))
    assert got.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\nConnection: close\r\n" in got


def test_a_client_that_goes_away_is_no_fault(seed: Seed) -> None:
    idle, busy = seed.connect(), seed.connect()
    assert answer(idle, "GET", INFO).status == 200
    busy.request("GET", f"{PLACE}/{LARGE}")
    got = busy.getresponse()
    assert got.read(1 << 20) == bytes(1 << 20)
    reset(idle)
    got.close()
    reset(busy)
    assert seed.ask("GET", INFO).status == 200


def test_another_fault_is_told(seed: Seed, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (cache / "blobs" / BLOBS["empty.txt"]).unlink()
    with pytest.raises(http.client.RemoteDisconnected):
        seed.ask("GET", f"{PLACE}/empty.txt")
    assert "FileNotFoundError" in capfd.readouterr().err


def test_a_blob_in_a_shared_store_keeps_its_own_name(tmp_path: Path) -> None:
    """hf-xet keeps one copy for all repositories, under a hash of its own."""
    content = FILES["w.safetensors"]
    store = tmp_path / "hub/blobs/ab" / ("ab" + "c" * 62)
    store.parent.mkdir(parents=True)
    store.write_bytes(content)
    folder = tmp_path / "hub/models--owner--model"
    blob = folder / "blobs" / BLOBS["w.safetensors"]
    blob.parent.mkdir(parents=True)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    link(folder, REVISION, [("unet/w.safetensors", blob.name)])
    found = seed_server.served(REPO, REVISION, "mit", folder / "snapshots" / REVISION, ["unet/w.safetensors"])
    row: dict[str, Any] = found.listing()[0]
    assert (row["lfs"]["oid"], row["size"]) == (BLOBS["w.safetensors"], len(content))
    assert found.files["unet/w.safetensors"].read_bytes() == content


def test_what_bears_no_hash_is_not_served(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "copy.json").write_text("{}")
    (snapshot / BLOBS["empty.txt"]).write_text("{}")
    (snapshot / "named.json").symlink_to("copy.json")
    (snapshot / "gone.json").symlink_to(f"../../blobs/{BLOBS['empty.txt']}")
    names = sorted(path.name for path in snapshot.iterdir())
    assert seed_server.served(REPO, REVISION, "mit", snapshot, names).files == {}
