"""Tests the end of a pull: files with equal content, errors, refs/main, waits, and the mode of lock files."""

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
from provision.models import blob_lock, hf_listing, main_ref, pull, pull_plan
from provision.models.hub_client import AccessError
from provision.models.hubs import Hubs
from provision.models.verify import Depth
from provision.net import partial_file
from provision.net.source_health import SourceHealth
from tests.provision import hub_server
from tests.provision.fake_hub import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, count_gets, entry_of, hubs_of, pull_from, pull_of, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from provision.core.layout import Root

UNREACHABLE = "http://127.0.0.1:9"
NEW = "2" * 40
SHA256 = hashlib.sha256(FILES[WEIGHTS]).hexdigest()


SAME_CONTENT = {"a/model.safetensors": FILES[WEIGHTS], "b/model.safetensors": FILES[WEIGHTS]}
RETRY = {"Retry-After": "300"}


class TestSameContent:
    def test_two_files_with_the_same_content_are_downloaded_once(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, SAME_CONTENT)
        work = pull_from(
            root, Hubs(root, {"HF_ENDPOINT": server.url}), hub_server.manifest_entry("m", REPO, SAME_CONTENT)
        )
        messages: list[str] = []
        work.health.tell = messages.append
        plan = work.plan()
        assert plan.bytes_wanted == len(FILES[WEIGHTS])
        assert "3,000,000 bytes to fetch" in plan_line("m", plan)
        work.run(plan, lambda *_: None)
        assert [state.state for state in work.check_files(Depth.HASH)] == ["ok", "ok"]
        assert count_gets(server, "model.safetensors") == 1
        assert (messages, work.arrived) == ([], len(FILES[WEIGHTS]))

    def test_two_files_with_the_same_content_need_disk_space_for_one(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = hub_server.start(serve, REPO, SAME_CONTENT)
        work = pull_from(
            root, Hubs(root, {"HF_ENDPOINT": server.url}), hub_server.manifest_entry("m", REPO, SAME_CONTENT)
        )
        monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(4_000_000))
        run(work)
        assert [state.state for state in work.check_files(Depth.HASH)] == ["ok", "ok"]

    def test_pulls_from_a_hub_whose_listed_git_hash_changes_share_one_partial_file(
        self, root: Root, serve: Any
    ) -> None:
        text = entry_of(f'{{path = "{WEIGHTS}", size = 3000000, sha256 = "{SHA256}"}}')
        server = hub_server.start(serve, REPO, FILES, Fault(WEIGHTS, cut=2_000_000, times=99, no_range=True))
        for _ in range(3):
            row = {"type": "file", "path": WEIGHTS, "size": 3_000_000, "oid": secrets.token_hex(20)}
            server.content[f"/api/models/{REPO}/tree/{REVISION}"] = json.dumps([row]).encode()
            work = pull_from(root, Hubs(root, {"HF_ENDPOINT": server.url}), text)
            with pytest.raises(FirstlightError):
                run(work)
        partial_files = {path.name: path.stat().st_size for path in (work.folder / "blobs").iterdir()}
        assert partial_files == {f"{SHA256}{pull_plan.PART}": 2_000_000}
        server.faults.clear()
        assert pull_from(root, work.hubs, text).plan().bytes_wanted == 1_000_000

    @pytest.mark.parametrize("size", [5, 3_000_001])
    def test_hub_that_lists_a_wrong_size_for_a_pinned_git_hash_is_replaced_by_the_next_hub(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        pin = git_sha1(FILES[WEIGHTS])
        wrong_hub, right_hub = (hub_server.start(serve, REPO, FILES) for _ in range(2))
        for server, listed_size in ((wrong_hub, size), (right_hub, 3_000_000)):
            row = {"type": "file", "path": WEIGHTS, "size": listed_size, "oid": pin}
            server.content[f"/api/models/{REPO}/tree/{REVISION}"] = json.dumps([row]).encode()
        text = entry_of(f'{{path = "{WEIGHTS}", size = 3000000, git_sha1 = "{pin}"}}')
        work = pull_from(root, hubs_of(root, monkeypatch, wrong_hub.url, right_hub.url), text)
        run(work)
        assert (work.snapshot / WEIGHTS).read_bytes() == FILES[WEIGHTS]

    def test_file_pinned_by_both_hashes_without_a_size_is_downloaded(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        pins = f'sha256 = "{SHA256}", git_sha1 = "{git_sha1(FILES[WEIGHTS])}"'
        work = pull_from(root, Hubs(root, {"HF_ENDPOINT": server.url}), entry_of(f'{{path = "{WEIGHTS}", {pins}}}'))
        run(work)
        assert (work.snapshot / WEIGHTS).read_bytes() == FILES[WEIGHTS]


class TestErrors:
    def test_error_of_a_pull_names_the_hub_that_refused_and_the_unreachable_hub(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(serve, REPO, FILES, Fault("/resolve/", status=403))
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, UNREACHABLE))
        with pytest.raises(AccessError, match=r"is gated.*The other hubs failed too: official: it does not answer"):
            run(work)

    def test_file_that_no_hub_has_is_reported_before_a_file_that_one_hub_refused(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = Fault("vae/model", status=404)
        mirror = hub_server.start(serve, REPO, FILES, Fault("unet/config", status=403), missing)
        official = hub_server.start(serve, REPO, FILES, Fault("unet/config", status=404), missing)
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, official.url))
        with pytest.raises(FirstlightError, match=r"vae/model\.safetensors could not be downloaded.*404"):
            run(work)

    def test_file_changed_during_the_pull_is_an_error(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)

        def overwrite(*_: object) -> bool:
            (work.snapshot / "unet/config.json").resolve().write_bytes(b'{"a": 6}\n')
            return True

        monkeypatch.setattr(hf_listing, "list_snapshot", overwrite)
        with pytest.raises(FirstlightError, match="a file was changed during the pull"):
            run(work)

    def test_full_disk_found_by_one_worker_ends_the_waits_of_the_others(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Let one worker wait five minutes for a busy hub, while another worker finds no space on the disk."""
        work = pull_of(root, hub_server.start(serve, REPO, FILES, Fault("vae/", status=429, headers=RETRY)).url)
        wait_began = threading.Event()
        workers: list[threading.Thread] = []
        wait_results: list[bool] = []
        wait = SourceHealth.wait

        def recorded_wait(self: SourceHealth, *args: Any, **named: Any) -> bool:
            workers.append(threading.current_thread())
            wait_began.set()
            wait_results.append(wait(self, *args, **named))
            return wait_results[-1]

        add = partial_file.PartialFile.add

        def add_to_full_disk(self: partial_file.PartialFile, blocks: Iterator[Any], *rest: Any) -> None:
            if self.size == len(FILES[WEIGHTS]):
                assert wait_began.wait(600)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            add(self, blocks, *rest)

        monkeypatch.setattr(SourceHealth, "wait", recorded_wait)
        monkeypatch.setattr(partial_file.PartialFile, "add", add_to_full_disk)
        monkeypatch.setattr(pull, "_POLL_SECONDS", 0.02)
        with pytest.raises(BlockedError, match="no space left"):
            run(work)
        assert wait_results == [False]
        assert not workers[0].is_alive()


def interrupt_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the n-th file that main_ref.py writes raise KeyboardInterrupt before the write."""
    remaining = [number]

    def interrupted_write_atomic(path: Path, content: str) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise KeyboardInterrupt
        write_atomic(path, content)

    monkeypatch.setattr(main_ref, "write_atomic", interrupted_write_atomic)


class TestMain:
    def pull_and_newer_manifest(self, root: Root, serve: Any) -> tuple[Any, str]:
        """Pull one revision; return the pull, and the text of a manifest with a newer revision that the hub has."""
        server = hub_server.start(serve, REPO, FILES)
        first_pull = pull_of(root, server.url)
        run(first_pull)
        content, headers = hub_server.served(REPO, FILES, NEW)
        server.content |= content
        server.headers |= headers
        return first_pull, hub_server.manifest_entry("m", REPO, FILES).replace(REVISION, NEW)

    def test_refs_main_that_a_pull_has_set_changes_to_the_newer_revision_of_the_manifest(
        self, root: Root, serve: Any
    ) -> None:
        first_pull, text = self.pull_and_newer_manifest(root, serve)
        next_pull = pull_from(root, first_pull.hubs, text)
        run(next_pull)
        assert ((first_pull.folder / "refs/main").read_text(), next_pull.notes) == (NEW, [])

    def test_pull_of_a_second_pinned_revision_keeps_refs_main_and_adds_a_note(self, root: Root, serve: Any) -> None:
        first_pull, text = self.pull_and_newer_manifest(root, serve)
        next_pull = pull_from(root, first_pull.hubs, text)
        next_pull.pinned = {REVISION, NEW}
        run(next_pull)
        assert (first_pull.folder / "refs/main").read_text() == REVISION
        assert len(next_pull.notes) == 1
        assert re.match("refs/main is 1111111, which is present too", next_pull.notes[0])

    @pytest.mark.parametrize("interrupted_write", [1, 2])
    def test_refs_main_interrupted_at_any_write_is_corrected_by_the_next_pull(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch, interrupted_write: int
    ) -> None:
        first_pull, text = self.pull_and_newer_manifest(root, serve)
        interrupt_at_write(monkeypatch, interrupted_write)
        with pytest.raises(KeyboardInterrupt):
            run(pull_from(root, first_pull.hubs, text))
        monkeypatch.undo()
        run(pull_from(root, first_pull.hubs, text))
        assert (first_pull.folder / "refs/main").read_text() == NEW
        next_pull = pull_from(root, first_pull.hubs, text.replace(NEW, REVISION))
        run(next_pull)
        assert ((first_pull.folder / "refs/main").read_text(), next_pull.notes) == (REVISION, [])

    @pytest.mark.parametrize("interrupted_write", [1, 2])
    def test_refs_main_whose_first_write_was_interrupted_is_completed_by_the_next_call(
        self, root: Root, monkeypatch: pytest.MonkeyPatch, interrupted_write: int
    ) -> None:
        folder = root.hub / "models--a--b"
        for revision in (REVISION, NEW):
            (folder / "snapshots" / revision).mkdir(parents=True)
        interrupt_at_write(monkeypatch, interrupted_write)
        with pytest.raises(KeyboardInterrupt):
            main_ref.set_main(folder, REVISION, {REVISION})
        monkeypatch.undo()
        assert main_ref.set_main(folder, REVISION, {REVISION}) is None
        assert main_ref.set_main(folder, NEW, {NEW}) is None
        assert (folder / "refs/main").read_text() == NEW


class TestWaits:
    def test_parallel_waits_of_four_threads_count_once_in_the_waited_seconds_of_the_run(self) -> None:
        health = SourceHealth()
        health.stopped.set()
        threads = [threading.Thread(target=health.wait, args=(600.0, "x")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert health._waited == pytest.approx(600, abs=60)

    def test_message_about_a_wait_mentions_retry_after_only_if_the_server_sent_it(self) -> None:
        messages: list[str] = []
        health = SourceHealth(tell=messages.append)
        health.stopped.set()
        health.wait(9, "x")
        health.wait(9, "x", is_requested=False)
        assert messages == ["x: waiting 9 s, as Retry-After requests", "x: waiting 9 s"]


def test_lock_files_are_writable_for_all_users(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        lock = blob_lock.BlobLock(tmp_path / "locks" / "a.lock")
        assert lock.take()
        lock.release()
        with file_lock.exclusive_lock(tmp_path / "b.json"):
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.lock")}
    finally:
        os.umask(umask)
    assert modes == {"a.lock": 0o666, ".b.json.lock": 0o666}


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_pull_into_a_hub_whose_link_leads_nowhere_is_blocked_and_names_the_link(
    root: Root, serve: Any, tmp_path: Path
) -> None:
    root.hub.parent.mkdir(parents=True, exist_ok=True)
    if root.hub.exists():
        root.hub.rmdir()
    work = pull_from(root, Hubs(root, {"HF_ENDPOINT": hub_server.start(serve, REPO, FILES).url}))
    plan = work.plan()
    hub = work.folder.parent
    hub.parent.mkdir(parents=True, exist_ok=True)
    hub.symlink_to(tmp_path / "unmounted")
    with pytest.raises(BlockedError, match=rf"{hub} is a link to {tmp_path}/unmounted, which does not exist"):
        work.run(plan, lambda *_: None)
