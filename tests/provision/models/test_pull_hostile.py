"""Hubs that lie, stumble or never end: what is here stays, what is right arrives, and nothing else is written."""

from __future__ import annotations

import hashlib
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli import models_output
from provision.core.errors import FirstlightError
from provision.mirrors import record
from provision.mirrors.record import MirrorChoice, MirrorRecord, MirrorSource
from provision.models import hub_client, manifest, pull
from provision.models.hub_client import AccessError, HubError
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.verify import Depth
from tests.clock import Standing
from tests.provision import hub_server
from tests.provision.conftest import git_sha1
from tests.provision.http_server import PORTAL, Fault, Played
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, gets, is_whole, pull_of, quick, run

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

TREE = f"/api/models/{REPO}/tree/{REVISION}"
CONFIG = "unet/config.json"
SHA256 = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}


def pinned_by_sha256(root: Root, *hubs: Played) -> Pull:
    """A pull of the model whose every file is pinned by sha256 alone, from several hubs in their order."""
    rows = [f'{{path = "{path}", size = {len(content)}, sha256 = "{SHA256[path]}"}}' for path, content in FILES.items()]
    head = f'[m]\nrepo = "{REPO}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
    (root.path / "models.toml").write_text(f"{head}files = [{', '.join(rows)}]\n")
    named = tuple(MirrorSource(f"hub{number}", each.url) for number, each in enumerate(hubs))
    record.write(root, MirrorRecord({"hf": MirrorChoice("auto", named, "")}))
    return Pull(root, "m", manifest.load(root.path / "models.toml").pick("m"), Hubs(root, {}))


def listing(**changes: dict[str, Any]) -> bytes:
    """The hub's listing with some rows changed: {path with / as __: what is changed}."""
    rows = [hub_server.entry(path, content) for path, content in FILES.items()]
    for row in rows:
        row.update(changes.get(row["path"].replace("/", "__").replace(".", "_"), {}))
    return json.dumps(rows).encode()


class TestListings:
    @pytest.mark.parametrize(
        "oid", ["./././../../../../../victim/precious.txt", "A" * 40, "g" * 40, "1" * 39, 7, None, ["1" * 40]]
    )
    def test_a_hash_that_is_none_names_no_file(self, root: Root, play: Any, tmp_path: Path, oid: object) -> None:
        victim = tmp_path / "victim" / "precious.txt"
        victim.parent.mkdir()
        victim.write_text("mine")
        played = hub_server.start(play, REPO, FILES)
        played.content[TREE] = listing(unet__config_json={"oid": oid})
        with pytest.raises(HubError, match="does not answer as a hub"):
            run(pinned_by_sha256(root, played))
        assert victim.read_text() == "mine"
        assert [path.name for path in victim.parent.iterdir()] == ["precious.txt"]

    @pytest.mark.parametrize("size", [-1, True, "9", None])
    def test_a_size_that_is_none_is_not_taken(self, root: Root, play: Any, size: object) -> None:
        played = hub_server.start(play, REPO, FILES)
        played.content[TREE] = listing(unet__config_json={"size": size})
        with pytest.raises(HubError, match="does not answer as a hub"):
            run(pinned_by_sha256(root, played))

    def test_a_lie_about_what_is_not_pinned_harms_no_honest_hub(self, root: Root, play: Any) -> None:
        # git's hash is not pinned, sha256 is: the liar's word for the first is worth nothing.
        liar = hub_server.start(play, REPO, FILES, Fault(f"/resolve/{REVISION}/{CONFIG}", status=404))
        liar.content[TREE] = listing(unet__config_json={"oid": "2" * 40})
        honest = hub_server.start(play, REPO, FILES)
        work = pinned_by_sha256(root, liar, honest)
        run(work)
        assert is_whole(work)
        assert not work.health.banned
        assert (work.snapshot / CONFIG).readlink().name == git_sha1(FILES[CONFIG])
        assert not (work.folder / "blobs" / ("2" * 40)).exists()

    @pytest.mark.parametrize(
        "body", [b"[" * 200_000, b"{}", b'{"a": 1}', b"[1]", b"null", b"\xff\xfe"], ids=lambda body: repr(body[:8])
    )
    def test_rubbish_is_left_for_the_next_hub(self, root: Root, play: Any, body: bytes) -> None:
        bad = hub_server.start(play, REPO, FILES)
        bad.content[TREE] = body
        work = pinned_by_sha256(root, bad, hub_server.start(play, REPO, FILES))
        run(work)
        assert is_whole(work)

    def test_a_next_page_that_is_no_address_is_left_for_the_next_hub(self, root: Root, play: Any) -> None:
        bad = hub_server.start(play, REPO, FILES)
        bad.headers[TREE] = {"Link": '<http://[>; rel="next"'}
        work = pinned_by_sha256(root, bad, hub_server.start(play, REPO, FILES))
        run(work)
        assert is_whole(work)

    def test_one_without_end_is_none(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub_client, "_LONGEST_ANSWER", 1 << 20)
        played = hub_server.start(play, REPO, FILES, Fault("/tree/", chunked=1 << 26))
        with pytest.raises(HubError, match="does not answer as a hub"):
            run(pull_of(root, played.url))

    def test_one_that_breaks_off_is_asked_for_again(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES, Fault("/tree/", cut=20, times=2))
        work = pull_of(root, played.url)
        run(work)
        assert is_whole(work)

    def test_a_hub_that_asks_for_an_hour_is_not_waited_for(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES, Fault("/tree/", status=429, headers={"Retry-After": "3600"}))
        with pytest.raises(HubError, match="answers 429"):
            run(pull_of(root, played.url))


class TestBodies:
    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (Fault(WEIGHTS, body=PORTAL), "pinned are 3,000,000"),
            (Fault(WEIGHTS, status=416), "answers 416"),
            (Fault(WEIGHTS, chunked=1 << 20), "it sent fewer bytes than the partial file holds"),
            (Fault(WEIGHTS, status=200, body=b""), "pinned are 3,000,000"),
        ],
        ids=["portal", "416", "no length", "empty"],
    )
    def test_no_wrong_answer_costs_a_good_partial(self, root: Root, play: Any, fault: Fault, said: str) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES, fault).url)
        part = work.folder / "blobs" / f"{SHA256[WEIGHTS]}{pull.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(FILES[WEIGHTS][:2_700_000])
        with pytest.raises(FirstlightError, match=said):
            run(work)
        assert part.read_bytes() == FILES[WEIGHTS][:2_700_000]

    def test_a_body_without_end_is_left_at_the_size_that_is_right(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES, Fault(WEIGHTS, chunked=1 << 26))
        work = pull_of(root, played.url)
        with pytest.raises(FirstlightError, match="sends more than 3,000,000 bytes"):
            run(work)
        assert max(path.stat().st_size for path in (work.folder / "blobs").iterdir()) <= len(FILES[WEIGHTS])
        played.faults.clear()
        again = pull_of(root, played.url)
        run(again)
        assert is_whole(again)

    def test_a_partial_that_is_a_link_is_not_followed(self, root: Root, play: Any, tmp_path: Path) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        victim = tmp_path / "victim"
        victim.write_text("mine")
        part = work.folder / "blobs" / f"{SHA256[WEIGHTS]}{pull.PART}"
        part.parent.mkdir(parents=True)
        part.symlink_to(victim)
        run(work)
        assert is_whole(work)
        assert victim.read_text() == "mine"

    def test_a_wait_is_as_long_as_the_hub_asks(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("provision.net.download.time", Standing())
        busy = [Fault(place, status=429, headers={"Retry-After": "300"}, times=1) for place in (WEIGHTS, "/tree/")]
        work = pull_of(root, hub_server.start(play, REPO, FILES, *busy).url)
        told, slept = quick(work.health)
        run(work)
        assert is_whole(work)
        assert slept == pytest.approx([300, 300], abs=0.1)
        assert all("waiting 300 s, as Retry-After requests" in text for text in told)
        assert len(told) == 2

    def test_nobody_waits_for_one_hub_while_another_has_it(self, root: Root, play: Any) -> None:
        slow = Fault("", status=429, headers={"Retry-After": "300"})
        work = pinned_by_sha256(root, hub_server.start(play, REPO, FILES, slow), hub_server.start(play, REPO, FILES))
        _, slept = quick(work.health)
        run(work)
        assert is_whole(work)
        assert not slept

    def test_the_patience_of_a_run_ends(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        played = hub_server.start(play, REPO, FILES, Fault("/resolve/", status=429, headers={"Retry-After": "500"}))
        work = pull_of(root, played.url)
        _, slept = quick(work.health)
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(slept), time=time.time)
        for module in ("source_health", "download"):
            monkeypatch.setattr(f"provision.net.{module}.time", clock)
        with pytest.raises(FirstlightError, match="answers 429"):
            run(work)
        assert 500 <= sum(slept) <= 1200

    def test_whoever_asks_for_an_hour_is_not_waited_for(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES, Fault(WEIGHTS, status=503, headers={"Retry-After": "3600"}))
        with pytest.raises(FirstlightError, match="Retry-After of 3,600 s"):
            run(pull_of(root, played.url))

    def test_an_etag_that_is_no_hash_costs_nothing(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        for path, headers in played.headers.items():
            if "/resolve/" in path:
                headers["ETag"] = '"an-etag-of-a-file-server"'
        work = pull_of(root, played.url)
        run(work)
        assert is_whole(work)
        assert gets(played, WEIGHTS) == 1
        assert {path.name for path in (work.folder / "blobs").iterdir()} == {
            SHA256[path] if path.endswith(".safetensors") else git_sha1(content) for path, content in FILES.items()
        }

    def test_every_fault_is_told(self, root: Root, play: Any) -> None:
        faults = (Fault(WEIGHTS, status=404), Fault("vae/model.safetensors", flip=True))
        with pytest.raises(FirstlightError, match="answers 404") as caught:
            run(pull_of(root, hub_server.start(play, REPO, FILES, *faults).url))
        assert "vae/model.safetensors was not accepted" in str(caught.value)

    def test_an_answer_of_where_it_was_sent_on_to_says_nothing_of_access(self, root: Root, play: Any) -> None:
        far = play({"/data": FILES[WEIGHTS]}, Fault("/data", status=403))
        near = Fault(f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{far.url}/data"})
        with pytest.raises(FirstlightError, match="its redirect target answers 403") as caught:
            run(pull_of(root, hub_server.start(play, REPO, FILES, near).url))
        assert "gated" not in str(caught.value)

    def test_what_a_mirror_wants_of_a_user_is_what_helps(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES, Fault("", status=403, headers={"X-Error-Code": "GatedRepo"}))
        with pytest.raises(AccessError, match=r"or show your token here: --send-token-to 127\.0\.0\.1:\d+") as caught:
            run(pull_of(root, played.url))
        assert "HF_TOKEN" not in str(caught.value), "a token that is set is not sent there"


class TestWhatIsHere:
    def test_a_blob_that_the_pin_does_not_know_is_fetched_anew(self, root: Root, play: Any) -> None:
        """The hub's client took another file of the same size from a mirror, whose listing says that it is right."""
        evil = b'{"a": 6}\n'
        liar = hub_server.start(play, REPO, {**FILES, CONFIG: evil})
        work = pinned_by_sha256(root, liar, hub_server.start(play, REPO, FILES))
        blob = work.folder / "blobs" / git_sha1(evil)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(evil)
        link = work.snapshot / CONFIG
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
        run(work)
        assert is_whole(work)
        assert link.read_bytes() == FILES[CONFIG]

    @pytest.fixture
    def official(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> Played:
        """The model is here, from the official hub, and what it said of hashes is lost."""
        played = hub_server.start(play, REPO, FILES)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: played.url)
        run(pull_of(root, played.url, pinned=False))
        root.model_pins.unlink()
        return played

    @pytest.mark.parametrize("content", [b'{"a": 6}\n', FILES[CONFIG]], ids=["another", "the right one"])
    def test_a_real_file_in_place_of_a_link_is_held_to_what_the_official_hub_lists(
        self, root: Root, official: Played, content: bytes
    ) -> None:
        work = pull_of(root, official.url, pinned=False)
        (work.snapshot / CONFIG).unlink()
        (work.snapshot / CONFIG).write_bytes(content)
        plan = work.plan()
        assert [each.file.path for each in plan.needed] == ([] if content == FILES[CONFIG] else [CONFIG])
        work.run(plan, lambda *_: None)
        assert is_whole(work)
        assert (work.snapshot / f"{CONFIG}.firstlight-corrupt").exists() is bool(plan.needed), "nothing is deleted"

    def test_what_nobody_has_pinned_stays_where_nobody_can_be_asked(
        self, root: Root, play: Any, official: Played
    ) -> None:
        mirror = hub_server.start(play, REPO, FILES)
        plan = pull_of(root, mirror.url, pinned=False).plan()
        assert (plan.needed, plan.unproven) == ([], len(FILES))
        assert "pinned by nobody" in models_output.plan_line("m", plan)

    def test_the_official_word_takes_the_place_of_a_mirrors(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(play, REPO, {**FILES, CONFIG: b'{"a": 6}\n'})
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        official = hub_server.start(play, REPO, FILES)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: official.url)
        work = pull_of(root, official.url, pinned=False)
        run(work)
        again = pull_of(root, official.url, pinned=False)
        assert is_whole(again)
        assert all(state.state == "ok" for state in again.look(Depth.HASH))
        assert gets(official, WEIGHTS) == 0, "what was right all the time is not fetched again"

    def test_a_shared_store_behind_a_blob_is_no_fault(self, root: Root, play: Any) -> None:
        """The client of xet keeps `blobs/HASH` as a link to a store of all repositories."""
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url, pinned=True)
        run(work)
        blob = work.folder / "blobs" / SHA256[WEIGHTS]
        store = root.hub_in_use / "blobs" / "ab" / ("a" * 64)
        store.parent.mkdir(parents=True)
        blob.replace(store)
        blob.symlink_to(store)
        unpinned = pull_of(root, played.url, pinned=False)
        assert all(state.state == "ok" for state in unpinned.look(Depth.HASH))

    def test_a_pin_of_the_manifest_goes_before_every_hub(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was pulled by a mirror's word once; then the manifest was completed, and the official hub lies."""
        mirror = hub_server.start(play, REPO, FILES)
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        liar = hub_server.start(play, REPO, {**FILES, WEIGHTS: bytes(len(FILES[WEIGHTS]))})
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: liar.url)
        work = pull_of(root, liar.url)
        run(work)
        assert is_whole(work)
        assert not liar.requests, "what is pinned and whole asks nobody"

    @pytest.mark.parametrize("size", [5, 3_000_001, 10**15])
    def test_a_size_that_nobody_has_pinned_is_one_hubs_word(self, root: Root, play: Any, size: int) -> None:
        digest = SHA256[WEIGHTS]
        text = f'[m]\nrepo = "{REPO}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
        liar = hub_server.start(play, REPO, FILES, Fault(f"/resolve/{REVISION}/{WEIGHTS}", status=404))
        lfs = {"oid": digest, "size": size, "pointerSize": 134}
        liar.content[TREE] = listing(unet__model_safetensors={"size": size, "lfs": lfs})
        work = pinned_by_sha256(root, liar, hub_server.start(play, REPO, FILES))
        (root.path / "models.toml").write_text(f'{text}files = [{{path = "{WEIGHTS}", sha256 = "{digest}"}}]\n')
        work = Pull(root, "m", manifest.load(root.path / "models.toml").pick("m"), work.hubs)
        part = work.folder / "blobs" / f"{digest}{pull.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(FILES[WEIGHTS][:2_700_000])
        run(work)
        assert (work.snapshot / WEIGHTS).read_bytes() == FILES[WEIGHTS]
        assert work.arrived == 300_000

    def test_what_went_away_meanwhile_is_not_fetched_unproven(self, root: Root, play: Any) -> None:
        """Another run removes a file that was right when this one planned; the mirror has other bytes for it."""
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        run(work)
        (work.snapshot / WEIGHTS).resolve().unlink()
        played.content[f"/{REPO}/resolve/{REVISION}/{CONFIG}"] = b'{"a": 6}\n'
        plan = work.plan()
        with pytest.raises(FirstlightError, match="went away while others arrived"):
            work.run(plan, lambda *_: (work.snapshot / CONFIG).unlink(missing_ok=True))
        assert not (work.snapshot / CONFIG).exists()
