"""Tests pulls from a loopback hub with faults: each ends in the right files or the right error."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import BlockedError, FirstlightError
from provision.core.layout import Root
from provision.models import hub_client, manifest, pull_plan
from provision.models.hub_client import AccessError
from provision.models.hubs import Hubs
from provision.models.pull import CORRUPT, Pull
from provision.models.verify import Depth
from tests.conftest import CHECKOUT
from tests.provision import hub_server
from tests.provision.fake_hub import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, count_gets, is_complete, pull_of, run

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "hf_" + "T" * 30


class TestFaults:
    @pytest.mark.parametrize(
        "fault",
        [
            Fault("/resolve/", cut=100_000),
            Fault(WEIGHTS, status=429, headers={"Retry-After": "0"}, times=3),
            Fault(WEIGHTS, status=429, times=1),
            Fault(WEIGHTS, status=500, times=2, headers={"Retry-After": "0"}),
            Fault(WEIGHTS, status=503, headers={"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}, times=2),
            Fault("/tree/", status=429, headers={"Retry-After": "0"}, times=2),
            Fault("/tree/", status=503, times=1),
            Fault(WEIGHTS, bytes_a_second=6_000_000),
            Fault(WEIGHTS, stall_at=1_000_000, times=1),
            Fault(WEIGHTS, cut=2_999_999, times=1),
            Fault(WEIGHTS, no_range=True),
            Fault(WEIGHTS, cut=1_000_000, no_range=True, times=3),
        ],
        ids=[
            "cut every 100 kB",
            "429 with Retry-After",
            "429 without Retry-After",
            "500",
            "503 with a date",
            "429 for the listing",
            "503 for the listing",
            "slow",
            "stalls",
            "shorter than its declared length",
            "no ranges",
            "no ranges and cut off",
        ],
    )
    def test_temporary_fault_is_retried_until_the_pull_is_complete(self, root: Root, serve: Any, fault: Fault) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES, fault).url)
        run(work)
        assert is_complete(work)
        assert not list(work.folder.rglob("*.firstlight-*")), "no partial file is left"

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (Fault(WEIGHTS, flip=True), "it sent content with sha256"),
            (Fault(WEIGHTS, body=b"<html>login</html>"), "but the pinned size is 3,000,000 bytes"),
            (Fault(WEIGHTS, status=404), "answers 404"),
            (
                Fault("", status=404, headers={"X-Error-Code": "RepoNotFound"}),
                "the name is wrong, or the repository is private",
            ),
            (Fault("", status=404, headers={"X-Error-Code": "RevisionNotFound"}), "does not have the pinned revision"),
            (Fault("", status=401, headers={"X-Error-Code": "GatedRepo"}), "is gated.*Accept the terms"),
            (Fault("", status=403), "is gated"),
            (Fault(WEIGHTS, status=401, headers={"X-Error-Code": "GatedRepo"}), "is gated.*no token was sent"),
            (Fault(WEIGHTS, status=403, headers={"X-Error-Code": "GatedRepo"}), "is gated"),
            (Fault("/tree/", body=b"<html>login</html>"), "sent an invalid response to a request for"),
            (Fault("/tree/", status=418), "answers 418"),
        ],
    )
    def test_permanent_fault_of_a_hub_ends_the_pull_with_the_reason(
        self, root: Root, serve: Any, fault: Fault, reason: str
    ) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES, fault).url)
        with pytest.raises(FirstlightError, match=reason) as raised:
            run(work)
        assert "hf_" not in str(raised.value)
        assert not (work.snapshot / WEIGHTS).exists()
        assert work.check_files(Depth.SIZE)[2].state == "missing"

    def test_listing_with_another_size_or_hash_than_the_pin_stops_the_pull(self, root: Root, serve: Any) -> None:
        for changes in ({"size": 5}, {"oid": "2" * 40}):
            server = hub_server.start(serve, REPO, FILES, **changes)
            with pytest.raises(FirstlightError, match="The file was not downloaded"):
                run(pull_of(root, server.url))
            assert not count_gets(server, "/resolve/")

    def test_listed_paths_outside_of_the_snapshot_are_never_requested(self, root: Root, serve: Any) -> None:
        files = {**FILES, "../../../evil.json": b"{}", "unet/../../x.json": b"{}"}
        server = hub_server.start(serve, REPO, files)
        work = pull_of(root, server.url)
        run(work)
        assert is_complete(work)
        assert not any("evil" in path or "/x.json" in path for path in server.paths)

    def test_pull_does_not_contact_the_xet_servers_that_a_hub_names(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES, xetHash="9" * 64)
        unreachable = '<http://127.0.0.1:9/cas>; rel="xet-reconstruction-info", <http://127.0.0.1:9/a>; rel="xet-auth"'
        for path in server.headers:
            if "/resolve/" in path:
                server.headers[path] |= {"X-Xet-Hash": "9" * 64, "Link": unreachable}
        work = pull_of(root, server.url)
        run(work)
        assert is_complete(work)

    def test_pull_makes_links_and_refs_even_if_huggingface_hub_cannot_list_the_snapshot(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url)
        monkeypatch.setattr("provision.models.hf_listing.list_snapshot", lambda *_: False)
        run(work)
        assert is_complete(work)
        assert (work.folder / "refs/main").read_text() == REVISION
        assert not (work.snapshot / WEIGHTS).readlink().is_absolute()

    def test_pull_requests_each_weights_file_once_and_huggingface_hub_requests_none(
        self, root: Root, serve: Any
    ) -> None:
        server = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, server.url))
        assert count_gets(server, WEIGHTS) == 1
        assert count_gets(server, "vae/model.safetensors") == 1

    def test_second_mirror_resumes_the_partial_file_of_a_failed_mirror(self, root: Root, serve: Any) -> None:
        from provision.mirrors import chosen_mirrors
        from provision.mirrors.chosen_mirrors import MirrorChoice, MirrorRecord, MirrorSource

        first = hub_server.start(serve, REPO, FILES, Fault(WEIGHTS, cut=1_000_000, times=1), Fault(WEIGHTS, status=404))
        second = hub_server.start(serve, REPO, FILES)
        sources = (MirrorSource("one", first.url), MirrorSource("two", second.url))
        chosen_mirrors.write(root, MirrorRecord({"hf": MirrorChoice("auto", sources, "")}))
        path = root.path / "models.toml"
        path.write_text(hub_server.manifest_entry("m", REPO, FILES))
        work = Pull(root, "m", manifest.load(path).pick("m"), Hubs(root, {}))
        run(work)
        assert is_complete(work)
        ranges = [headers.get("Range") for path, headers in second.seen if WEIGHTS in path and "Range" in headers]
        assert "bytes=1000000-" in ranges


class TestResume:
    def test_partial_file_of_an_earlier_run_is_resumed(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url)
        part = work.folder / "blobs" / f"{hashlib.sha256(FILES[WEIGHTS]).hexdigest()}{pull_plan.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(FILES[WEIGHTS][:2_700_000])
        plan = work.plan()
        assert plan.bytes_wanted == 300_000 + 400_000 + len(FILES["model_index.json"]) + len(FILES["unet/config.json"])
        work.run(plan, lambda *_: None)
        assert is_complete(work)
        assert work.arrived == plan.bytes_wanted

    def test_partial_file_with_wrong_bytes_is_replaced(self, root: Root, serve: Any) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        part = work.folder / "blobs" / f"{hashlib.sha256(FILES[WEIGHTS]).hexdigest()}{pull_plan.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes(2_700_000))
        run(work)
        assert is_complete(work)

    def test_pull_downloads_only_the_corrupt_file_again_and_keeps_the_corrupt_bytes(
        self, root: Root, serve: Any
    ) -> None:
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url)
        run(work)
        blob = (work.snapshot / WEIGHTS).resolve()
        corrupt = bytearray(FILES[WEIGHTS])
        corrupt[77] ^= 1
        blob.write_bytes(corrupt)
        server.requests.clear()
        run(work)
        assert is_complete(work)
        assert (count_gets(server, WEIGHTS), count_gets(server, "vae/model.safetensors")) == (1, 0)
        assert blob.with_name(blob.name + CORRUPT).read_bytes() == bytes(corrupt), "the corrupt file is kept"

    def test_pull_of_a_complete_model_sends_no_request(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, server.url))
        server.requests.clear()
        assert pull_of(root, server.url).plan().is_done
        assert not server.requests

    def test_pull_killed_a_hundred_times_is_completed_by_the_next_run(
        self, root: Root, serve: Any, tmp_path: Path
    ) -> None:
        """Kill real processes after a random number of bytes; no received byte is lost."""
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url)
        generator = random.Random(3)  # noqa: S311 (it selects when to kill)
        kills = 0
        while kills < 100:
            bytes_before = sum(path.stat().st_size for path in work.folder.rglob("blobs/*"))
            if os.fork() == 0:
                _killed_after(work, generator.randrange(1, 120_000) if kills % 10 else generator.randrange(1, 30))
            _, status = os.wait()
            if not os.WIFSIGNALED(status):
                assert is_complete(work)
                for path in work.folder.rglob("*"):
                    if path.is_symlink() or path.is_file():
                        path.unlink()
                generator.random()
                continue
            generator.random()
            kills += 1
            assert sum(path.stat().st_size for path in work.folder.rglob("blobs/*")) >= bytes_before, (
                "no received byte is lost"
            )
            assert all(state.state in {"ok", "missing"} for state in work.check_files(Depth.HASH))
        run(work)
        assert is_complete(work)
        assert not list(work.folder.rglob("*.firstlight-*"))


# The audit events of changes of a file system (source: Python's table of audit events).
CHANGES = {f"os.{change}" for change in ("rename", "mkdir", "remove", "rmdir", "symlink", "link", "chmod", "truncate")}
STRIDES = [pytest.param(3, id="every third write"), pytest.param(1, id="every write", marks=pytest.mark.long)]


@pytest.mark.parametrize("stride", STRIDES)
def test_pull_killed_before_any_write_is_completed_by_the_next_run(root: Root, serve: Any, stride: int) -> None:
    """Kill the process before each write once: of the plan, locks, blobs, links, listing and refs."""
    server = hub_server.start(serve, REPO, FILES)
    number = 0
    while True:
        number += stride
        work = pull_of(root, server.url, pinned=False, trust=True)
        if os.fork() == 0:
            _killed_before(number)
            try:
                run(work)
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = os.wait()
        assert all(state.state in {"ok", "missing"} for state in work.check_files(Depth.HASH)), number
        next_pull = pull_of(root, server.url, pinned=False, trust=True)
        run(next_pull)
        assert is_complete(next_pull), number
        assert (next_pull.folder / "refs/main").read_text() == REVISION
        assert not list(next_pull.folder.rglob("*.firstlight-*")), number
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        shutil.rmtree(next_pull.folder)
        root.model_pins.unlink()
    assert number > 30, "the hook has counted too few writes"


def _killed_before(number: int) -> None:
    """Kill this process just before its n-th change of a file system; opening a file for writing counts."""
    left = [number]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _killed_after(work: Pull, count: int) -> None:
    """Run a pull in blocks of 16 KiB, and kill this (forked) process after `count` received bytes."""
    from provision.net import body

    body._BLOCK = 1 << 14
    left = [count]

    def count_down(_: str, arrived: int) -> None:
        left[0] -= arrived
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        work.run(work.plan(), count_down)
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_two_parallel_pulls_download_each_byte_once(root: Root, serve: Any) -> None:
    server = hub_server.start(serve, REPO, FILES, Fault("/resolve/", bytes_a_second=4_000_000))
    pulls = [pull_of(root, server.url) for _ in range(2)]
    plans = [one_pull.plan() for one_pull in pulls]
    threads = [
        threading.Thread(target=one_pull.run, args=(plan, lambda *_: None))
        for one_pull, plan in zip(pulls, plans, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_complete(pulls[0])
    assert sum(one_pull.arrived for one_pull in pulls) == sum(len(content) for content in FILES.values())
    assert count_gets(server, WEIGHTS) == 1


class TestRefusals:
    def test_pull_without_enough_space_downloads_nothing(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = hub_server.start(serve, REPO, FILES)
        monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(3_500_000))
        with pytest.raises(BlockedError, match="3,500,000 bytes are free, 3,7"):
            run(pull_of(root, server.url))
        assert not count_gets(server, "/resolve/")

    def test_pull_that_fills_the_disk_keeps_the_received_part_of_the_file(self, small_disk: Path, serve: Any) -> None:
        root = Root(small_disk / "root")
        root.state.mkdir(parents=True)
        root.hub.mkdir(parents=True)
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        plan = work.plan()
        (small_disk / "ballast").write_bytes(bytes(plan.free - 2_000_000))
        with pytest.raises(BlockedError, match=r"no space left.*bytes are needed"):
            work.run(plan, lambda *_: None)
        assert list((work.folder / "blobs").glob(f"*{pull_plan.PART}"))
        (small_disk / "ballast").unlink()
        run(work)
        assert is_complete(work)

    def test_interrupt_ends_the_pull_at_once_and_the_next_pull_resumes_the_file(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault(WEIGHTS, stall_at=1_000_000))
        work = pull_of(root, server.url)
        script = (
            "import sys, threading, _thread; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "from provision.models import manifest; from provision.core.layout import Root\n"
            "from provision.models.pull import Pull; from provision.models.hubs import Hubs\n"
            "root = Root(Path(sys.argv[2]))\n"
            "spec = manifest.load(root.path / 'models.toml').pick('m')\n"
            "work = Pull(root, 'm', spec, Hubs(root, {'HF_ENDPOINT': sys.argv[3]}))\n"
            "count = [0]\n"
            "def report(path, arrived):\n"
            "    count[0] += arrived if 'unet/model' in path else 0\n"
            "    if count[0] >= 1_000_000: _thread.interrupt_main()\n"
            "work.run(work.plan(), report)\n"
        )
        completed = subprocess.run(
            [sys.executable, "-c", script, str(CHECKOUT), str(root.path), server.url],
            capture_output=True,
            timeout=600,
            check=False,
        )
        assert b"KeyboardInterrupt" in completed.stderr
        assert [path.stat().st_size for path in (work.folder / "blobs").glob(f"*{pull_plan.PART}")] == [1_000_000]
        server.faults.clear()
        run(work)
        assert is_complete(work)

    def test_gated_repository_to_which_the_token_has_no_access_is_an_access_error(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server = hub_server.start(serve, REPO, FILES, Fault("", status=403, headers={"X-Error-Code": "GatedRepo"}))
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: server.url)
        with pytest.raises(AccessError, match="the token has no access to it"):
            run(pull_of(root, server.url))


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_stored_listing_is_readable_for_all_users(root: Root, serve: Any) -> None:
    work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
    run(work)
    (tree,) = (work.folder / "trees").glob("*.json")
    assert tree.stat().st_mode & 0o044 == 0o044
    assert json.loads(tree.read_text())["files"]
    assert git_sha1(FILES["unet/config.json"]) in {path.name for path in (work.folder / "blobs").iterdir()}
