"""How a pull ends: what is fetched once, what is said where it fails, and what is left for the next one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import threading
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli.models_output import plan_line
from provision.core.errors import BlockedError, FirstlightError
from provision.fs import file_lock
from provision.fs.atomic import write_atomic
from provision.models import blob_lock, hf_listing, pull, snapshots
from provision.models.hub_client import AccessError
from provision.models.hubs import Hubs
from provision.models.verify import Depth
from provision.net import partial_file
from provision.net.source_health import SourceHealth
from tests.provision import hub_server
from tests.provision.conftest import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, entry_of, gets, hubs_of, pull_from, pull_of, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from provision.core.layout import Root

DEAD = "http://127.0.0.1:9"
NEW = "2" * 40
SHA256 = hashlib.sha256(FILES[WEIGHTS]).hexdigest()


TWICE = {"a/model.safetensors": FILES[WEIGHTS], "b/model.safetensors": FILES[WEIGHTS]}
RETRY = {"Retry-After": "300"}


class TestOneContent:
    def test_two_files_of_one_content_are_fetched_once(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, TWICE)
        work = pull_from(root, Hubs(root, {"HF_ENDPOINT": played.url}), hub_server.manifest_entry("m", REPO, TWICE))
        told: list[str] = []
        work.health.tell = told.append
        plan = work.plan()
        assert plan.bytes_wanted == len(FILES[WEIGHTS])
        assert "3,000,000 bytes to fetch" in plan_line("m", plan)
        work.run(plan, lambda *_: None)
        assert [state.state for state in work.look(Depth.HASH)] == ["ok", "ok"]
        assert gets(played, "model.safetensors") == 1
        assert (told, work.arrived) == ([], len(FILES[WEIGHTS]))

    def test_its_space_is_wanted_once(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        played = hub_server.start(play, REPO, TWICE)
        work = pull_from(root, Hubs(root, {"HF_ENDPOINT": played.url}), hub_server.manifest_entry("m", REPO, TWICE))
        monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(4_000_000))
        run(work)
        assert [state.state for state in work.look(Depth.HASH)] == ["ok", "ok"]

    def test_a_listing_that_names_another_blob_each_time_leaves_one_partial(self, root: Root, play: Any) -> None:
        text = entry_of(f'{{path = "{WEIGHTS}", size = 3000000, sha256 = "{SHA256}"}}')
        played = hub_server.start(play, REPO, FILES, Fault(WEIGHTS, cut=2_000_000, times=99, no_range=True))
        for _ in range(3):
            row = {"type": "file", "path": WEIGHTS, "size": 3_000_000, "oid": secrets.token_hex(20)}
            played.content[f"/api/models/{REPO}/tree/{REVISION}"] = json.dumps([row]).encode()
            work = pull_from(root, Hubs(root, {"HF_ENDPOINT": played.url}), text)
            with pytest.raises(FirstlightError):
                run(work)
        left = {path.name: path.stat().st_size for path in (work.folder / "blobs").iterdir()}
        assert left == {f"{SHA256}{pull.PART}": 2_000_000}
        played.faults.clear()
        assert pull_from(root, work.hubs, text).plan().bytes_wanted == 1_000_000

    @pytest.mark.parametrize("size", [5, 3_000_001])
    def test_a_listing_has_no_word_for_the_size_of_a_git_hash(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        pin = git_sha1(FILES[WEIGHTS])
        liar, honest = (hub_server.start(play, REPO, FILES) for _ in range(2))
        for played, told in ((liar, size), (honest, 3_000_000)):
            row = {"type": "file", "path": WEIGHTS, "size": told, "oid": pin}
            played.content[f"/api/models/{REPO}/tree/{REVISION}"] = json.dumps([row]).encode()
        text = entry_of(f'{{path = "{WEIGHTS}", size = 3000000, git_sha1 = "{pin}"}}')
        work = pull_from(root, hubs_of(root, monkeypatch, liar.url, honest.url), text)
        run(work)
        assert (work.snapshot / WEIGHTS).read_bytes() == FILES[WEIGHTS]

    def test_both_hashes_without_a_size_are_held_to(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        pins = f'sha256 = "{SHA256}", git_sha1 = "{git_sha1(FILES[WEIGHTS])}"'
        work = pull_from(root, Hubs(root, {"HF_ENDPOINT": played.url}), entry_of(f'{{path = "{WEIGHTS}", {pins}}}'))
        run(work)
        assert (work.snapshot / WEIGHTS).read_bytes() == FILES[WEIGHTS]


class TestWhatIsSaid:
    def test_a_mirror_that_refuses_beside_a_hub_that_is_dead(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(play, REPO, FILES, Fault("/resolve/", status=403))
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, DEAD))
        with pytest.raises(AccessError, match=r"is gated.*Of the other hubs, official: it does not answer"):
            run(work)

    def test_a_refusal_is_not_all_where_another_file_is_nowhere(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nowhere = Fault("vae/model", status=404)
        mirror = hub_server.start(play, REPO, FILES, Fault("unet/config", status=403), nowhere)
        official = hub_server.start(play, REPO, FILES, Fault("unet/config", status=404), nowhere)
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, official.url))
        with pytest.raises(FirstlightError, match=r"vae/model\.safetensors could not be fetched.*404"):
            run(work)

    def test_what_the_client_overwrites_is_seen(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)

        def overwrite(*_: object) -> bool:
            (work.snapshot / "unet/config.json").resolve().write_bytes(b'{"a": 6}\n')
            return True

        monkeypatch.setattr(hf_listing, "list_snapshot", overwrite)
        with pytest.raises(FirstlightError, match="files changed while others arrived"):
            run(work)

    def test_a_full_disk_ends_every_waiting(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """One worker waits for a hub that asks for five minutes when another one finds no space."""
        work = pull_of(root, hub_server.start(play, REPO, FILES, Fault("vae/", status=429, headers=RETRY)).url)
        waits = threading.Event()
        workers: list[threading.Thread] = []
        ended: list[bool] = []
        wait = SourceHealth.wait

        def waiting(self: SourceHealth, *args: Any, **named: Any) -> bool:
            workers.append(threading.current_thread())
            waits.set()
            ended.append(wait(self, *args, **named))
            return ended[-1]

        add = partial_file.PartialFile.add

        def full(self: partial_file.PartialFile, blocks: Iterator[Any], *rest: Any) -> None:
            if self.size == len(FILES[WEIGHTS]):
                assert waits.wait(600)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            add(self, blocks, *rest)

        monkeypatch.setattr(SourceHealth, "wait", waiting)
        monkeypatch.setattr(partial_file.PartialFile, "add", full)
        monkeypatch.setattr(pull, "_POLL_SECONDS", 0.02)
        with pytest.raises(BlockedError, match="no space left"):
            run(work)
        assert ended == [False]
        assert not workers[0].is_alive()


def kill_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the process end before it names anything in the cache for the n-th time."""
    left = [number]

    def dies(path: Path, content: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        write_atomic(path, content)

    monkeypatch.setattr(snapshots, "write_atomic", dies)


class TestMain:
    def moved(self, root: Root, play: Any) -> tuple[Any, str]:
        """The model at one revision is here; the manifest has moved on to a new one, which the hub has too."""
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        run(work)
        content, headers = hub_server.served(REPO, FILES, NEW)
        played.content |= content
        played.headers |= headers
        return work, hub_server.manifest_entry("m", REPO, FILES).replace(REVISION, NEW)

    def test_what_a_pull_has_named_moves_with_the_manifest(self, root: Root, play: Any) -> None:
        work, text = self.moved(root, play)
        again = pull_from(root, work.hubs, text)
        run(again)
        assert ((work.folder / "refs/main").read_text(), again.notes) == (NEW, [])

    def test_two_entries_of_one_repository_do_not_take_turns(self, root: Root, play: Any) -> None:
        work, text = self.moved(root, play)
        again = pull_from(root, work.hubs, text)
        again.pinned = {REVISION, NEW}
        run(again)
        assert (work.folder / "refs/main").read_text() == REVISION
        assert len(again.notes) == 1
        assert re.match("refs/main names 1111111, which is here too", again.notes[0])

    @pytest.mark.parametrize("killed_at", [1, 2])
    def test_a_kill_at_any_write_converges(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch, killed_at: int
    ) -> None:
        work, text = self.moved(root, play)
        kill_at_write(monkeypatch, killed_at)
        with pytest.raises(KeyboardInterrupt):
            run(pull_from(root, work.hubs, text))
        monkeypatch.undo()
        run(pull_from(root, work.hubs, text))
        assert (work.folder / "refs/main").read_text() == NEW
        again = pull_from(root, work.hubs, text.replace(NEW, REVISION))
        run(again)
        assert ((work.folder / "refs/main").read_text(), again.notes) == (REVISION, [])

    @pytest.mark.parametrize("killed_at", [1, 2])
    def test_a_kill_at_the_first_naming_converges(
        self, root: Root, monkeypatch: pytest.MonkeyPatch, killed_at: int
    ) -> None:
        folder = root.hub / "models--a--b"
        for revision in (REVISION, NEW):
            (folder / "snapshots" / revision).mkdir(parents=True)
        kill_at_write(monkeypatch, killed_at)
        with pytest.raises(KeyboardInterrupt):
            snapshots.name_main(folder, REVISION, {REVISION})
        monkeypatch.undo()
        assert snapshots.name_main(folder, REVISION, {REVISION}) is None
        assert snapshots.name_main(folder, NEW, {NEW}) is None
        assert (folder / "refs/main").read_text() == NEW


class TestLedger:
    def test_files_that_wait_together_wait_once(self) -> None:
        health = SourceHealth()
        health.stopped.set()
        threads = [threading.Thread(target=health.wait, args=(600.0, "x")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert health._waited == pytest.approx(600, abs=60)

    def test_only_what_was_asked_for_is_said_to_be(self) -> None:
        told: list[str] = []
        health = SourceHealth(tell=told.append)
        health.stopped.set()
        health.wait(9, "x")
        health.wait(9, "x", is_requested=False)
        assert told == ["x: waiting 9 s, as Retry-After requests", "x: waiting 9 s"]


def test_whoever_shares_the_cache_may_hold_a_lock(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        lock = blob_lock.BlobLock(tmp_path / "locks" / "a.lock")
        assert lock.take()
        lock.release()
        with file_lock.exclusive_lock(tmp_path / "b.json"):
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.lock")}
    finally:
        os.umask(before)
    assert modes == {"a.lock": 0o666, ".b.json.lock": 0o666}


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free
