"""Tests the comparison of listings with pins: waits for busy hubs, the selected hubs, and the accepted hashes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli import models_output, models_run
from provision.core.errors import FirstlightError
from provision.models import pins, snapshots
from provision.models.hub_client import Hub, HubError, ListedFile
from provision.models.hubs import Hubs
from provision.models.verify import Depth
from tests.provision import hub_server
from tests.provision.fake_hub import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import (
    FILES,
    REPO,
    WEIGHTS,
    count_gets,
    entry_of,
    hubs_of,
    is_complete,
    pull_from,
    pull_of,
    run,
    skip_waits,
)

if TYPE_CHECKING:
    from provision.core.layout import Root

CONFIG = "unet/config.json"
CHANGED = {**FILES, CONFIG: b'{"a": 6}\n'}
UNREACHABLE = "http://127.0.0.1:9"
KEY = f"{REPO}@{REVISION}"


def busy(seconds: int, **fault: Any) -> Fault:
    """Return the fault of a busy hub: its listing has status 429 and a Retry-After of `seconds`."""
    return Fault("/tree/", status=429, headers={"Retry-After": str(seconds)}, **fault)


class TestWaits:
    def test_pull_waits_for_a_busy_hub_if_the_other_hub_lists_a_wrong_hash(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong_hub = hub_server.start(serve, REPO, CHANGED)
        right_hub = hub_server.start(serve, REPO, FILES, busy(20, times=1))
        work = pull_from(root, hubs_of(root, monkeypatch, wrong_hub.url, right_hub.url))
        _, waits = skip_waits(work.health)
        run(work)
        assert is_complete(work)
        assert waits == [20]
        assert "mirror" in work.health.banned

    def test_pull_waits_for_the_busy_hub_with_the_shortest_retry_after(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (hub_server.start(serve, REPO, FILES, busy(seconds, times=1)) for seconds in (300, 20))
        work = pull_from(root, hubs_of(root, monkeypatch, first.url, second.url))
        _, waits = skip_waits(work.health)
        run(work)
        assert is_complete(work)
        assert waits == [20]

    def test_pull_fails_without_a_wait_if_the_only_hub_has_a_retry_after_of_an_hour(
        self, root: Root, serve: Any
    ) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES, busy(3600)).url)
        messages, waits = skip_waits(work.health)
        with pytest.raises(HubError) as raised:
            run(work)
        assert type(raised.value) is HubError
        assert (messages, waits) == ([], [])

    def test_second_run_of_the_same_pull_waits_for_a_busy_hub_again(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url)
        run(work)
        (work.snapshot / WEIGHTS).resolve().unlink()
        server.faults.append(busy(20, times=1))
        work._resolver._listings.clear()
        _, waits = skip_waits(work.health)
        work.health.stopped.set()  # as the end of the first run does
        run(work)
        assert is_complete(work)
        assert waits == [20]


class TestHubs:
    def test_model_is_pulled_from_two_hubs_that_each_lack_a_different_file(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without_config = hub_server.start(
            serve, REPO, {path: content for path, content in FILES.items() if path != CONFIG}
        )
        without_weights = hub_server.start(
            serve, REPO, {path: content for path, content in FILES.items() if path != WEIGHTS}
        )
        work = pull_from(root, hubs_of(root, monkeypatch, without_config.url, without_weights.url))
        run(work)
        assert is_complete(work)

    def test_hub_that_lists_one_wrong_hash_is_used_for_no_file(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong_hub, right_hub = hub_server.start(serve, REPO, CHANGED), hub_server.start(serve, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, wrong_hub.url, right_hub.url))
        run(work)
        assert is_complete(work)
        assert not count_gets(wrong_hub, "/resolve/")

    @pytest.mark.parametrize("status", [404, 503])
    def test_mirror_delivers_a_file_that_the_official_hub_lists_and_does_not_serve(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch, status: int
    ) -> None:
        mirror = hub_server.start(serve, REPO, FILES)
        official = hub_server.start(serve, REPO, FILES, Fault("/resolve/", status=status))
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, official.url), pinned=False)
        skip_waits(work.health)
        run(work)
        assert is_complete(work)
        assert pins.by_mirrors(root, work.spec) == {}, "the hashes come from the official hub"

    def test_wrong_bytes_of_a_mirror_for_a_file_listed_by_the_official_hub_are_refused(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(serve, REPO, CHANGED)
        official = hub_server.start(serve, REPO, FILES, Fault(f"resolve/{REVISION}/{CONFIG}", status=404))
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, official.url), pinned=False)
        with pytest.raises(FirstlightError, match="but the pinned git_sha1 is"):
            run(work)
        assert not (work.snapshot / CONFIG).exists()

    def test_listing_is_requested_without_compression(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, server.url))
        own_requests = [
            headers for path, headers in server.seen if "/tree/" in path and headers.get("User-Agent") == "firstlight"
        ]
        assert [headers["Accept-Encoding"] for headers in own_requests] == ["identity"]

    def test_endless_body_of_a_redirect_of_the_listing_is_not_read(self, serve_raw: Any) -> None:
        def script(server: Any, line: Any) -> None:
            server.send(line, b"HTTP/1.1 302 Found\r\nLocation: /x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(64):
                server.send(line, b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            server.send(line, b"0\r\n\r\n")

        endless = serve_raw(script)
        with pytest.raises(HubError):
            Hub({}, endpoint=endless.url).listing(REPO, REVISION, seconds=1.0)
        assert endless.sent < 6 * (32 << 20)


class TestTrust:
    def test_present_file_stays_if_only_a_mirror_lists_another_hash(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(pull_of(root, hub_server.start(serve, REPO, FILES).url, pinned=False, trust=True))
        mirror = hub_server.start(serve, REPO, CHANGED)
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, UNREACHABLE), pinned=False)
        assert work.plan().needed == []
        assert is_complete(work)

    def test_present_files_whose_hash_comes_from_a_mirror_only_are_reported(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        messages: list[str] = []
        row = models_run.pull(pull_of(root, UNREACHABLE, pinned=False), messages.append, quiet=True, dry_run=False)
        assert messages == [
            f"m: all 4 files are present, every pinned hash matches, 4 with a hash from {mirror.url} only"
        ]
        assert f"4 files have a hash from {mirror.url} only; the official hub could not be reached" in row.detail

    def test_plan_of_a_complete_pinned_model_needs_no_hub(self, root: Root, serve: Any) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        run(work)
        plan = pull_of(root, UNREACHABLE).plan()
        assert models_output.plan_line("m", plan) == "m: all 4 files are present, every hash matches"

    def test_hashes_that_a_pull_has_recorded_detect_a_corrupt_file_in_the_same_pull(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        official = hub_server.start(serve, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, UNREACHABLE, official.url), pinned=False)
        run(work)
        assert all(file.locked for file in work.spec.files)
        corrupt = work.snapshot / CONFIG
        content = corrupt.read_bytes()
        corrupt.unlink()
        corrupt.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert [state.path for state in work.check_files(Depth.HASH) if state.state != "ok"] == [CONFIG]

    def test_hash_of_the_official_hub_is_preferred_to_the_hash_of_a_trusted_mirror(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed_mirror = hub_server.start(serve, REPO, CHANGED)
        first = pull_of(root, changed_mirror.url, pinned=False, trust=True)
        run(first)
        (first.snapshot / CONFIG).resolve().unlink()
        official = hub_server.start(serve, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, changed_mirror.url, official.url), pinned=False, trust=True)
        run(work)
        assert is_complete(work)
        assert pins.by_mirrors(root, work.spec) == {}

    def test_blob_with_wrong_content_under_the_right_git_hash_is_downloaded_again(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Record the sha256 of a mirror, while the official hub lists git's hash, which is the name of the blob."""
        right_content, wrong_content = b'{"good": 1}\n', b'{"evil": 1}\n'
        official = hub_server.start(serve, REPO, {"config.json": right_content})
        work = pull_from(
            root, hubs_of(root, monkeypatch, UNREACHABLE, official.url), entry_of('{path = "config.json"}')
        )
        pins.keep(
            root,
            work.spec,
            [ListedFile("config.json", len(wrong_content), hashlib.sha256(wrong_content).hexdigest())],
            "mirror",
        )
        blob = work.folder / "blobs" / git_sha1(right_content)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(wrong_content)
        snapshots.link(work.folder, REVISION, [("config.json", blob.name)])
        run(pull_from(root, work.hubs, entry_of('{path = "config.json"}')))
        assert (work.snapshot / "config.json").read_bytes() == right_content

    def test_listing_with_another_size_than_the_manifest_pins_is_refused_despite_a_record(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = entry_of(f'{{path = "{CONFIG}", size = {len(FILES[CONFIG])}}}')
        run(pull_from(root, Hubs(root, {"HF_ENDPOINT": hub_server.start(serve, REPO, FILES).url}), text, trust=True))
        official = hub_server.start(serve, REPO, {**FILES, CONFIG: b'{"another size": 1}\n'})
        for _ in range(2):
            work = pull_from(root, hubs_of(root, monkeypatch, UNREACHABLE, official.url), text)
            with pytest.raises(
                FirstlightError, match=r"with size 20, but the pinned size is 9\. The file was not downloaded"
            ):
                run(work)
            assert [file.size for file in work.spec.files] == [len(FILES[CONFIG])]
            (work.snapshot / CONFIG).unlink(missing_ok=True)

    def test_recorded_hash_with_another_size_than_the_manifest_pins_is_ignored(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        official = hub_server.start(serve, REPO, FILES)
        hubs = hubs_of(root, monkeypatch, UNREACHABLE, official.url)
        run(pull_from(root, hubs, entry_of(f'{{path = "{CONFIG}"}}')))
        work = pull_from(root, hubs, entry_of(f'{{path = "{CONFIG}", size = 5}}'))
        assert [(file.size, file.locked) for file in work.spec.files] == [(5, False)]
        assert (
            work.check_files(Depth.SIZE)[0].reason == f"has {len(FILES[CONFIG])} bytes, but the pinned size is 5 bytes"
        )


class TestInvalidRecords:
    @pytest.mark.parametrize(
        "record",
        [
            {"model_index.json": "x"},
            {"model_index.json": None},
            {"model_index.json": {"size": "x", "sha256": 7}},
            {"model_index.json": {"size": 3, "sha256": "no hash", "from": []}},
            {"model_index.json": {"git_sha1": "2" * 40, "from": "official"}},
            [],
            None,
            "x",
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("pinned", [True, False])
    def test_invalid_record_of_the_hashes_of_a_model_is_ignored(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch, record: object, pinned: bool
    ) -> None:
        root.model_pins.write_text(json.dumps({"pins": {KEY: record}}))
        official = hub_server.start(serve, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, UNREACHABLE, official.url), pinned=pinned)
        run(work)
        assert is_complete(work)

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"pins": []}', "[]", "no JSON"])
    def test_invalid_file_of_recorded_hashes_is_ignored(self, root: Root, text: str) -> None:
        root.model_pins.write_text(text)
        assert pins.by_mirrors(root, pull_of(root, UNREACHABLE).spec) == {}
