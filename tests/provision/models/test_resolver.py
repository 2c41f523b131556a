"""What hubs list, held against what is pinned: who is asked, who is waited for, and whose word counts."""

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
from tests.provision.conftest import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import (
    FILES,
    REPO,
    WEIGHTS,
    entry_of,
    gets,
    hubs_of,
    is_whole,
    pull_from,
    pull_of,
    quick,
    run,
)

if TYPE_CHECKING:
    from provision.core.layout import Root

CONFIG = "unet/config.json"
EVIL = {**FILES, CONFIG: b'{"a": 6}\n'}
DEAD = "http://127.0.0.1:9"
KEY = f"{REPO}@{REVISION}"


def busy(seconds: int, **fault: Any) -> Fault:
    return Fault("/tree/", status=429, headers={"Retry-After": str(seconds)}, **fault)


class TestWhoIsWaitedFor:
    def test_a_lie_does_not_go_before_a_hub_that_asks_for_time(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        liar = hub_server.start(play, REPO, EVIL)
        honest = hub_server.start(play, REPO, FILES, busy(20, times=1))
        work = pull_from(root, hubs_of(root, monkeypatch, liar.url, honest.url))
        _, slept = quick(work.health)
        run(work)
        assert is_whole(work)
        assert slept == [20]
        assert "mirror" in work.health.banned

    def test_the_first_that_is_free_is_waited_for(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = (hub_server.start(play, REPO, FILES, busy(seconds, times=1)) for seconds in (300, 20))
        work = pull_from(root, hubs_of(root, monkeypatch, first.url, second.url))
        _, slept = quick(work.health)
        run(work)
        assert is_whole(work)
        assert slept == [20]

    def test_a_sole_hub_that_asks_for_an_hour_is_not_waited_for(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES, busy(3600)).url)
        told, slept = quick(work.health)
        with pytest.raises(HubError) as caught:
            run(work)
        assert type(caught.value) is HubError
        assert (told, slept) == ([], [])

    def test_the_patience_of_a_hub_does_not_end_with_its_first_pull(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        run(work)
        (work.snapshot / WEIGHTS).resolve().unlink()
        played.faults.append(busy(20, times=1))
        work._asking._listings.clear()
        _, slept = quick(work.health)
        work.health.stopped.set()  # as the first run has left it
        run(work)
        assert is_whole(work)
        assert slept == [20]


class TestWhoIsAsked:
    def test_two_hubs_that_have_all_of_it_together(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = hub_server.start(play, REPO, {path: each for path, each in FILES.items() if path != CONFIG})
        other = hub_server.start(play, REPO, {path: each for path, each in FILES.items() if path != WEIGHTS})
        work = pull_from(root, hubs_of(root, monkeypatch, one.url, other.url))
        run(work)
        assert is_whole(work)

    def test_one_that_lists_one_file_otherwise_is_not_asked_for_the_others(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        liar, honest = hub_server.start(play, REPO, EVIL), hub_server.start(play, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, liar.url, honest.url))
        run(work)
        assert is_whole(work)
        assert not gets(liar, "/resolve/")

    @pytest.mark.parametrize("status", [404, 503])
    def test_what_the_official_hub_only_lists_a_mirror_may_deliver(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch, status: int
    ) -> None:
        mirror = hub_server.start(play, REPO, FILES)
        official = hub_server.start(play, REPO, FILES, Fault("/resolve/", status=status))
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, official.url), pinned=False)
        quick(work.health)
        run(work)
        assert is_whole(work)
        assert pins.by_mirrors(root, work.spec) == {}, "its hash is the official hub's word"

    def test_a_mirror_that_delivers_other_bytes_for_them_is_not_believed(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(play, REPO, EVIL)
        official = hub_server.start(play, REPO, FILES, Fault(f"resolve/{REVISION}/{CONFIG}", status=404))
        work = pull_from(root, hubs_of(root, monkeypatch, mirror.url, official.url), pinned=False)
        with pytest.raises(FirstlightError, match="pinned is"):
            run(work)
        assert not (work.snapshot / CONFIG).exists()

    def test_a_listing_is_asked_for_as_it_is(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        run(pull_of(root, played.url))
        ours = [each for path, each in played.seen if "/tree/" in path and each.get("User-Agent") == "firstlight"]
        assert [headers["Accept-Encoding"] for headers in ours] == ["identity"]

    def test_the_body_of_a_redirected_listing_is_not_read(self, raw: Any) -> None:
        def script(server: Any, line: Any) -> None:
            server.send(line, b"HTTP/1.1 302 Found\r\nLocation: /x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(64):
                server.send(line, b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            server.send(line, b"0\r\n\r\n")

        endless = raw(script)
        with pytest.raises(HubError):
            Hub({}, endpoint=endless.url).listing(REPO, REVISION, seconds=1.0)
        assert endless.sent < 6 * (32 << 20)


class TestWhoseWord:
    def test_of_what_is_whole_only_the_official_hub_may_say_otherwise(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(pull_of(root, hub_server.start(play, REPO, FILES).url, pinned=False, trust=True))
        other = hub_server.start(play, REPO, EVIL)
        work = pull_from(root, hubs_of(root, monkeypatch, other.url, DEAD), pinned=False)
        assert work.plan().needed == []
        assert is_whole(work)

    def test_what_is_here_by_a_mirrors_word_is_said(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(play, REPO, FILES)
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        told: list[str] = []
        row = models_run.pull(pull_of(root, DEAD, pinned=False), told.append, quiet=True, dry_run=False)
        assert told == [f"m: all 4 files are here, every pinned hash right, 4 by the word of {mirror.url}"]
        assert f"4 files are pinned by the word of {mirror.url} alone; the official hub could not be asked" in row.said

    def test_what_nobody_doubts_needs_no_word(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        run(work)
        plan = pull_of(root, DEAD).plan()
        assert models_output.plan_line("m", plan) == "m: all 4 files are here, every hash right"

    def test_what_it_learns_is_held_to_by_the_same_pull(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        official = hub_server.start(play, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, DEAD, official.url), pinned=False)
        run(work)
        assert all(file.locked for file in work.spec.files)
        harmed = work.snapshot / CONFIG
        content = harmed.read_bytes()
        harmed.unlink()
        harmed.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert [state.path for state in work.look(Depth.HASH) if state.state != "ok"] == [CONFIG]

    def test_the_official_word_is_asked_for_before_a_mirrors(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evil = hub_server.start(play, REPO, EVIL)
        first = pull_of(root, evil.url, pinned=False, trust=True)
        run(first)
        (first.snapshot / CONFIG).resolve().unlink()
        official = hub_server.start(play, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, evil.url, official.url), pinned=False, trust=True)
        run(work)
        assert is_whole(work)
        assert pins.by_mirrors(root, work.spec) == {}

    def test_a_wrong_file_that_bears_the_right_blobs_name_is_seen_at_once(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A mirror's sha256 of it is on record; the official hub lists git's hash, which its blob has for a name."""
        good, evil = b'{"good": 1}\n', b'{"evil": 1}\n'
        official = hub_server.start(play, REPO, {"config.json": good})
        work = pull_from(root, hubs_of(root, monkeypatch, DEAD, official.url), entry_of('{path = "config.json"}'))
        pins.keep(root, work.spec, [ListedFile("config.json", len(evil), hashlib.sha256(evil).hexdigest())], "mirror")
        blob = work.folder / "blobs" / git_sha1(good)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(evil)
        snapshots.link(work.folder, REVISION, [("config.json", blob.name)])
        run(pull_from(root, work.hubs, entry_of('{path = "config.json"}')))
        assert (work.snapshot / "config.json").read_bytes() == good

    def test_a_size_that_the_manifest_pins_goes_before_every_record(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = entry_of(f'{{path = "{CONFIG}", size = {len(FILES[CONFIG])}}}')
        run(pull_from(root, Hubs(root, {"HF_ENDPOINT": hub_server.start(play, REPO, FILES).url}), text, trust=True))
        official = hub_server.start(play, REPO, {**FILES, CONFIG: b'{"another size": 1}\n'})
        for _ in range(2):
            work = pull_from(root, hubs_of(root, monkeypatch, DEAD, official.url), text)
            with pytest.raises(FirstlightError, match=r"with size 20, pinned is 9\. It was not fetched"):
                run(work)
            assert [file.size for file in work.spec.files] == [len(FILES[CONFIG])]
            (work.snapshot / CONFIG).unlink(missing_ok=True)

    def test_a_record_that_contradicts_the_manifest_is_none(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        official = hub_server.start(play, REPO, FILES)
        known = hubs_of(root, monkeypatch, DEAD, official.url)
        run(pull_from(root, known, entry_of(f'{{path = "{CONFIG}"}}')))
        work = pull_from(root, known, entry_of(f'{{path = "{CONFIG}", size = 5}}'))
        assert [(file.size, file.locked) for file in work.spec.files] == [(5, False)]
        assert work.look(Depth.SIZE)[0].reason == f"has {len(FILES[CONFIG])} bytes, pinned are 5"


class TestEditedPins:
    @pytest.mark.parametrize(
        "kept",
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
    def test_what_is_no_record_is_none(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch, kept: object, pinned: bool
    ) -> None:
        root.model_pins.write_text(json.dumps({"pins": {KEY: kept}}))
        official = hub_server.start(play, REPO, FILES)
        work = pull_from(root, hubs_of(root, monkeypatch, DEAD, official.url), pinned=pinned)
        run(work)
        assert is_whole(work)

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"pins": []}', "[]", "no JSON"])
    def test_what_is_no_document_is_none(self, root: Root, text: str) -> None:
        root.model_pins.write_text(text)
        assert pins.by_mirrors(root, pull_of(root, DEAD).spec) == {}
