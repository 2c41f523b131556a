"""A model's pull over loopback: every fault ends in the right model or the right message, and loses nothing."""

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
from provision.models import hub_client, manifest, pull
from provision.models.hub_client import AccessError
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.verify import Depth
from tests.conftest import CHECKOUT
from tests.provision import hub_server
from tests.provision.conftest import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, gets, is_whole, pull_of, run

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
            "429 without",
            "500",
            "503 with a date",
            "429 for the listing",
            "503 for the listing",
            "slow",
            "stalls",
            "truncated under a right length",
            "no ranges",
            "no ranges and cut",
        ],
    )
    def test_what_passes_is_sat_out(self, root: Root, play: Any, fault: Fault) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES, fault).url)
        run(work)
        assert is_whole(work)
        assert not list(work.folder.rglob("*.firstlight-*")), "nothing is left behind"

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (Fault(WEIGHTS, flip=True), "it sent content with sha256"),
            (Fault(WEIGHTS, body=b"<html>login</html>"), "pinned are 3,000,000"),
            (Fault(WEIGHTS, status=404), "answers 404"),
            (Fault("", status=404, headers={"X-Error-Code": "RepoNotFound"}), "its name is wrong, or it is private"),
            (Fault("", status=404, headers={"X-Error-Code": "RevisionNotFound"}), "does not have the pinned revision"),
            (Fault("", status=401, headers={"X-Error-Code": "GatedRepo"}), "is gated.*Accept its terms"),
            (Fault("", status=403), "is gated"),
            (Fault(WEIGHTS, status=401, headers={"X-Error-Code": "GatedRepo"}), "is gated.*no token is sent"),
            (Fault(WEIGHTS, status=403, headers={"X-Error-Code": "GatedRepo"}), "is gated"),
            (Fault("/tree/", body=b"<html>login</html>"), "does not answer as a hub"),
            (Fault("/tree/", status=418), "answers 418"),
        ],
    )
    def test_what_does_not_pass_is_said(self, root: Root, play: Any, fault: Fault, said: str) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES, fault).url)
        with pytest.raises(FirstlightError, match=said) as caught:
            run(work)
        assert "hf_" not in str(caught.value)
        assert not (work.snapshot / WEIGHTS).exists()
        assert work.look(Depth.SIZE)[2].state == "missing"

    def test_a_listing_of_another_size_or_hash_is_not_followed(self, root: Root, play: Any) -> None:
        for changes in ({"size": 5}, {"oid": "2" * 40}):
            played = hub_server.start(play, REPO, FILES, **changes)
            with pytest.raises(FirstlightError, match="It was not fetched"):
                run(pull_of(root, played.url))
            assert not gets(played, "/resolve/")

    def test_names_that_lead_out_are_never_asked_for(self, root: Root, play: Any) -> None:
        files = {**FILES, "../../../evil.json": b"{}", "unet/../../x.json": b"{}"}
        played = hub_server.start(play, REPO, files)
        work = pull_of(root, played.url)
        run(work)
        assert is_whole(work)
        assert not any("evil" in path or "/x.json" in path for path in played.paths)

    def test_dead_data_hosts_of_xet_are_not_asked(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES, xetHash="9" * 64)
        dead = '<http://127.0.0.1:9/cas>; rel="xet-reconstruction-info", <http://127.0.0.1:9/a>; rel="xet-auth"'
        for path in played.headers:
            if "/resolve/" in path:
                played.headers[path] |= {"X-Xet-Hash": "9" * 64, "Link": dead}
        work = pull_of(root, played.url)
        run(work)
        assert is_whole(work)

    def test_where_no_hub_answers_any_more_the_links_are_made_all_the_same(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        monkeypatch.setattr("provision.models.hf_listing.list_snapshot", lambda *_: False)
        run(work)
        assert is_whole(work)
        assert (work.folder / "refs/main").read_text() == REVISION
        assert not (work.snapshot / WEIGHTS).readlink().is_absolute()

    def test_the_client_asks_for_no_weights(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        run(pull_of(root, played.url))
        assert gets(played, WEIGHTS) == 1
        assert gets(played, "vae/model.safetensors") == 1

    def test_two_mirrors_share_a_file_by_its_hash(self, root: Root, play: Any) -> None:
        from provision.mirrors import record
        from provision.mirrors.record import MirrorChoice, MirrorRecord, MirrorSource

        first = hub_server.start(play, REPO, FILES, Fault(WEIGHTS, cut=1_000_000, times=1), Fault(WEIGHTS, status=404))
        second = hub_server.start(play, REPO, FILES)
        named = (MirrorSource("one", first.url), MirrorSource("two", second.url))
        record.write(root, MirrorRecord({"hf": MirrorChoice("auto", named, "")}))
        path = root.path / "models.toml"
        path.write_text(hub_server.manifest_entry("m", REPO, FILES))
        work = Pull(root, "m", manifest.load(path).pick("m"), Hubs(root, {}))
        run(work)
        assert is_whole(work)
        asked = [headers.get("Range") for path, headers in second.seen if WEIGHTS in path and "Range" in headers]
        assert "bytes=1000000-" in asked


class TestResume:
    def test_a_partial_of_an_earlier_run_is_gone_on_with(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        part = work.folder / "blobs" / f"{hashlib.sha256(FILES[WEIGHTS]).hexdigest()}{pull.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(FILES[WEIGHTS][:2_700_000])
        plan = work.plan()
        assert plan.bytes_wanted == 300_000 + 400_000 + len(FILES["model_index.json"]) + len(FILES["unet/config.json"])
        work.run(plan, lambda *_: None)
        assert is_whole(work)
        assert work.arrived == plan.bytes_wanted

    def test_a_wrong_partial_costs_its_bytes_and_no_more(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        part = work.folder / "blobs" / f"{hashlib.sha256(FILES[WEIGHTS]).hexdigest()}{pull.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes(2_700_000))
        run(work)
        assert is_whole(work)

    def test_only_what_is_corrupt_is_fetched_again(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        run(work)
        blob = (work.snapshot / WEIGHTS).resolve()
        harmed = bytearray(FILES[WEIGHTS])
        harmed[77] ^= 1
        blob.write_bytes(harmed)
        played.requests.clear()
        run(work)
        assert is_whole(work)
        assert (gets(played, WEIGHTS), gets(played, "vae/model.safetensors")) == (1, 0)
        assert blob.with_name(blob.name + pull.CORRUPT).read_bytes() == bytes(harmed), "nothing is deleted"

    def test_what_is_whole_asks_nobody(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        run(pull_of(root, played.url))
        played.requests.clear()
        assert pull_of(root, played.url).plan().is_done
        assert not played.requests

    def test_killed_at_a_hundred_moments(self, root: Root, play: Any, tmp_path: Path) -> None:
        """Real kills of a real pull; whoever comes next goes on, and in the end every byte is right."""
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        chance = random.Random(3)  # noqa: S311 (it chooses where to kill)
        kills = 0
        while kills < 100:
            before = sum(path.stat().st_size for path in work.folder.rglob("blobs/*"))
            if os.fork() == 0:
                _killed_after(work, chance.randrange(1, 120_000) if kills % 10 else chance.randrange(1, 30))
            _, status = os.wait()
            if not os.WIFSIGNALED(status):
                assert is_whole(work)
                for path in work.folder.rglob("*"):
                    if path.is_symlink() or path.is_file():
                        path.unlink()
                chance.random()
                continue
            chance.random()
            kills += 1
            assert sum(path.stat().st_size for path in work.folder.rglob("blobs/*")) >= before, "no byte is lost"
            assert all(state.state in {"ok", "missing"} for state in work.look(Depth.HASH))
        run(work)
        assert is_whole(work)
        assert not list(work.folder.rglob("*.firstlight-*"))


# What changes a file system, by the names that the interpreter itself gives these acts (sys.audit).
ACTS = {f"os.{act}" for act in ("rename", "mkdir", "remove", "rmdir", "symlink", "link", "chmod", "truncate")}
EVERY = [pytest.param(3, id="every third"), pytest.param(1, id="all", marks=pytest.mark.long)]


@pytest.mark.parametrize("stride", EVERY)
def test_killed_before_every_act(root: Root, play: Any, stride: int) -> None:
    """The plan, the locks, the blobs, the links, the listing and the refs: each act is the last one once."""
    played = hub_server.start(play, REPO, FILES)
    number = 0
    while True:
        number += stride
        work = pull_of(root, played.url, pinned=False, trust=True)
        if os.fork() == 0:
            _killed_before(number)
            try:
                run(work)
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = os.wait()
        assert all(state.state in {"ok", "missing"} for state in work.look(Depth.HASH)), number
        again = pull_of(root, played.url, pinned=False, trust=True)
        run(again)
        assert is_whole(again), number
        assert (again.folder / "refs/main").read_text() == REVISION
        assert not list(again.folder.rglob("*.firstlight-*")), number
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        shutil.rmtree(again.folder)
        root.model_pins.unlink()
    assert number > 30, "hardly an act was seen"


def _killed_before(number: int) -> None:
    """Die before the nth act that changes a file system, or opens a file to write."""
    left = [number]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in ACTS or writes:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _killed_after(work: Pull, count: int) -> None:
    """In a forked process: pull in small pieces, and die once so many bytes have come."""
    from provision.net import body

    body._BLOCK = 1 << 14
    left = [count]

    def told(_: str, arrived: int) -> None:
        left[0] -= arrived
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        work.run(work.plan(), told)
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_two_pulls_at_once_fetch_each_byte_once(root: Root, play: Any) -> None:
    played = hub_server.start(play, REPO, FILES, Fault("/resolve/", bytes_a_second=4_000_000))
    works = [pull_of(root, played.url) for _ in range(2)]
    plans = [work.plan() for work in works]
    threads = [
        threading.Thread(target=work.run, args=(plan, lambda *_: None)) for work, plan in zip(works, plans, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_whole(works[0])
    assert sum(work.arrived for work in works) == sum(len(content) for content in FILES.values())
    assert gets(played, WEIGHTS) == 1


class TestRefusals:
    def test_what_does_not_fit_is_not_begun(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        played = hub_server.start(play, REPO, FILES)
        monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(3_500_000))
        with pytest.raises(BlockedError, match="3,500,000 bytes are free, 3,7"):
            run(pull_of(root, played.url))
        assert not gets(played, "/resolve/")

    def test_a_disk_that_fills_keeps_what_arrived(self, small_disk: Path, play: Any) -> None:
        root = Root(small_disk / "root")
        root.state.mkdir(parents=True)
        root.hub.mkdir(parents=True)
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        plan = work.plan()
        (small_disk / "ballast").write_bytes(bytes(plan.free - 2_000_000))
        with pytest.raises(BlockedError, match=r"no space left.*bytes are needed"):
            work.run(plan, lambda *_: None)
        assert list((work.folder / "blobs").glob(f"*{pull.PART}"))
        (small_disk / "ballast").unlink()
        run(work)
        assert is_whole(work)

    def test_an_interrupt_ends_at_once_and_the_next_pull_goes_on(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES, Fault(WEIGHTS, stall_at=1_000_000))
        work = pull_of(root, played.url)
        script = (
            "import sys, threading, _thread; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "from provision.models import manifest; from provision.core.layout import Root\n"
            "from provision.models.pull import Pull; from provision.models.hubs import Hubs\n"
            "root = Root(Path(sys.argv[2]))\n"
            "spec = manifest.load(root.path / 'models.toml').pick('m')\n"
            "work = Pull(root, 'm', spec, Hubs(root, {'HF_ENDPOINT': sys.argv[3]}))\n"
            "count = [0]\n"
            "def told(path, arrived):\n"
            "    count[0] += arrived if 'unet/model' in path else 0\n"
            "    if count[0] >= 1_000_000: _thread.interrupt_main()\n"
            "work.run(work.plan(), told)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(CHECKOUT), str(root.path), played.url],
            capture_output=True,
            timeout=600,
            check=False,
        )
        assert b"KeyboardInterrupt" in done.stderr
        assert [path.stat().st_size for path in (work.folder / "blobs").glob(f"*{pull.PART}")] == [1_000_000]
        played.faults.clear()
        run(work)
        assert is_whole(work)

    def test_gated_and_absent_are_told_apart(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        played = hub_server.start(play, REPO, FILES, Fault("", status=403, headers={"X-Error-Code": "GatedRepo"}))
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: played.url)
        with pytest.raises(AccessError, match="the token that you gave does not have it"):
            run(pull_of(root, played.url))


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_the_listing_for_others_can_be_read_by_others(root: Root, play: Any) -> None:
    work = pull_of(root, hub_server.start(play, REPO, FILES).url)
    run(work)
    trees = list((work.folder / "trees").glob("*.json"))
    assert trees
    assert all(tree.stat().st_mode & 0o044 == 0o044 for tree in trees)
    assert json.loads(trees[0].read_text())["files"]
    assert git_sha1(FILES["unet/config.json"]) in {path.name for path in (work.folder / "blobs").iterdir()}
