"""Tests pulls from hubs with wrong, failed or endless responses: right files stay, and only right content is stored."""

from __future__ import annotations

import hashlib
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli import models_output
from provision.core.errors import FirstlightError
from provision.mirrors import chosen_mirrors
from provision.mirrors.chosen_mirrors import MirrorChoice, MirrorRecord, MirrorSource
from provision.models import hub_client, manifest, pull_plan
from provision.models.hub_client import AccessError, HubError
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.verify import Depth
from tests.clock import Standing
from tests.provision import hub_server
from tests.provision.fake_hub import git_sha1
from tests.provision.http_server import PORTAL, Fault, Server
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, count_gets, is_complete, pull_of, run, skip_waits

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

TREE = f"/api/models/{REPO}/tree/{REVISION}"
CONFIG = "unet/config.json"
SHA256 = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}


def pinned_by_sha256(root: Root, *hubs: Server) -> Pull:
    """Return a pull of the model `m`, whose files are all pinned by sha256 and size, from the hubs in this order."""
    rows = [f'{{path = "{path}", size = {len(content)}, sha256 = "{SHA256[path]}"}}' for path, content in FILES.items()]
    head = f'[m]\nrepo = "{REPO}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
    (root.path / "models.toml").write_text(f"{head}files = [{', '.join(rows)}]\n")
    sources = tuple(MirrorSource(f"hub{number}", hub.url) for number, hub in enumerate(hubs))
    chosen_mirrors.write(root, MirrorRecord({"hf": MirrorChoice("auto", sources, "")}))
    return Pull(root, "m", manifest.load(root.path / "models.toml").pick("m"), Hubs(root, {}))


def listing(**changes: dict[str, Any]) -> bytes:
    """Return the listing of FILES as JSON; a keyword such as `unet__config_json` changes keys of that file's entry."""
    rows = [hub_server.entry(path, content) for path, content in FILES.items()]
    for row in rows:
        row.update(changes.get(row["path"].replace("/", "__").replace(".", "_"), {}))
    return json.dumps(rows).encode()


class TestListings:
    @pytest.mark.parametrize(
        "oid", ["./././../../../../../victim/precious.txt", "A" * 40, "g" * 40, "1" * 39, 7, None, ["1" * 40]]
    )
    def test_listing_with_an_invalid_hash_is_refused_and_no_file_gets_that_name(
        self, root: Root, serve: Any, tmp_path: Path, oid: object
    ) -> None:
        victim = tmp_path / "victim" / "precious.txt"
        victim.parent.mkdir()
        victim.write_text("mine")
        server = hub_server.start(serve, REPO, FILES)
        server.content[TREE] = listing(unet__config_json={"oid": oid})
        with pytest.raises(HubError, match="sent an invalid response to a request for"):
            run(pinned_by_sha256(root, server))
        assert victim.read_text() == "mine"
        assert [path.name for path in victim.parent.iterdir()] == ["precious.txt"]

    @pytest.mark.parametrize("size", [-1, True, "9", None])
    def test_listing_with_an_invalid_size_is_refused(self, root: Root, serve: Any, size: object) -> None:
        server = hub_server.start(serve, REPO, FILES)
        server.content[TREE] = listing(unet__config_json={"size": size})
        with pytest.raises(HubError, match="sent an invalid response to a request for"):
            run(pinned_by_sha256(root, server))

    def test_wrong_git_hash_in_a_listing_bans_no_hub_if_only_sha256_is_pinned(self, root: Root, serve: Any) -> None:
        # The sha256 is pinned and git's hash is not, so a wrong git hash in a listing proves no wrong content.
        wrong_hub = hub_server.start(serve, REPO, FILES, Fault(f"/resolve/{REVISION}/{CONFIG}", status=404))
        wrong_hub.content[TREE] = listing(unet__config_json={"oid": "2" * 40})
        right_hub = hub_server.start(serve, REPO, FILES)
        work = pinned_by_sha256(root, wrong_hub, right_hub)
        run(work)
        assert is_complete(work)
        assert not work.health.banned
        assert (work.snapshot / CONFIG).readlink().name == git_sha1(FILES[CONFIG])
        assert not (work.folder / "blobs" / ("2" * 40)).exists()

    @pytest.mark.parametrize(
        "body", [b"[" * 200_000, b"{}", b'{"a": 1}', b"[1]", b"null", b"\xff\xfe"], ids=lambda body: repr(body[:8])
    )
    def test_pull_uses_the_next_hub_after_an_invalid_listing(self, root: Root, serve: Any, body: bytes) -> None:
        invalid_hub = hub_server.start(serve, REPO, FILES)
        invalid_hub.content[TREE] = body
        work = pinned_by_sha256(root, invalid_hub, hub_server.start(serve, REPO, FILES))
        run(work)
        assert is_complete(work)

    def test_pull_uses_the_next_hub_after_a_listing_with_an_invalid_link_to_its_next_page(
        self, root: Root, serve: Any
    ) -> None:
        invalid_hub = hub_server.start(serve, REPO, FILES)
        invalid_hub.headers[TREE] = {"Link": '<http://[>; rel="next"'}
        work = pinned_by_sha256(root, invalid_hub, hub_server.start(serve, REPO, FILES))
        run(work)
        assert is_complete(work)

    def test_endless_listing_is_refused(self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub_client, "_MAX_RESPONSE_BYTES", 1 << 20)
        server = hub_server.start(serve, REPO, FILES, Fault("/tree/", chunked=1 << 26))
        with pytest.raises(HubError, match="sent an invalid response to a request for"):
            run(pull_of(root, server.url))

    def test_listing_is_requested_again_after_a_broken_connection(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault("/tree/", cut=20, times=2))
        work = pull_of(root, server.url)
        run(work)
        assert is_complete(work)

    def test_pull_fails_without_a_wait_if_the_listing_has_a_retry_after_of_an_hour(
        self, root: Root, serve: Any
    ) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault("/tree/", status=429, headers={"Retry-After": "3600"}))
        with pytest.raises(HubError, match="answers 429"):
            run(pull_of(root, server.url))


class TestBodies:
    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (Fault(WEIGHTS, body=PORTAL), "but the pinned size is 3,000,000 bytes"),
            (Fault(WEIGHTS, status=416), "answers 416"),
            (Fault(WEIGHTS, chunked=1 << 20), "it sent fewer bytes than the partial file holds"),
            (Fault(WEIGHTS, status=200, body=b""), "but the pinned size is 3,000,000 bytes"),
        ],
        ids=["login page", "416", "chunked body without a length", "empty body"],
    )
    def test_wrong_response_for_a_file_keeps_the_right_partial_file(
        self, root: Root, serve: Any, fault: Fault, reason: str
    ) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES, fault).url)
        part = work.folder / "blobs" / f"{SHA256[WEIGHTS]}{pull_plan.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(FILES[WEIGHTS][:2_700_000])
        with pytest.raises(FirstlightError, match=reason):
            run(work)
        assert part.read_bytes() == FILES[WEIGHTS][:2_700_000]

    def test_endless_body_is_abandoned_at_the_pinned_size(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault(WEIGHTS, chunked=1 << 26))
        work = pull_of(root, server.url)
        with pytest.raises(FirstlightError, match="sends more than 3,000,000 bytes"):
            run(work)
        assert max(path.stat().st_size for path in (work.folder / "blobs").iterdir()) <= len(FILES[WEIGHTS])
        server.faults.clear()
        next_pull = pull_of(root, server.url)
        run(next_pull)
        assert is_complete(next_pull)

    def test_link_in_the_place_of_a_partial_file_is_replaced_and_its_target_unchanged(
        self, root: Root, serve: Any, tmp_path: Path
    ) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        victim = tmp_path / "victim"
        victim.write_text("mine")
        part = work.folder / "blobs" / f"{SHA256[WEIGHTS]}{pull_plan.PART}"
        part.parent.mkdir(parents=True)
        part.symlink_to(victim)
        run(work)
        assert is_complete(work)
        assert victim.read_text() == "mine"

    def test_pull_waits_for_a_busy_hub_for_the_seconds_of_retry_after(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("provision.net.download.time", Standing())
        busy = [Fault(path, status=429, headers={"Retry-After": "300"}, times=1) for path in (WEIGHTS, "/tree/")]
        work = pull_of(root, hub_server.start(serve, REPO, FILES, *busy).url)
        messages, waits = skip_waits(work.health)
        run(work)
        assert is_complete(work)
        assert waits == pytest.approx([300, 300], abs=0.1)
        assert all("waiting 300 s, as Retry-After requests" in text for text in messages)
        assert len(messages) == 2

    def test_pull_uses_another_hub_with_the_file_instead_of_waiting_for_a_busy_hub(
        self, root: Root, serve: Any
    ) -> None:
        busy = Fault("", status=429, headers={"Retry-After": "300"})
        work = pinned_by_sha256(root, hub_server.start(serve, REPO, FILES, busy), hub_server.start(serve, REPO, FILES))
        _, waits = skip_waits(work.health)
        run(work)
        assert is_complete(work)
        assert not waits

    def test_pull_from_a_busy_hub_fails_when_its_waits_reach_the_limit_of_the_run(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault("/resolve/", status=429, headers={"Retry-After": "500"}))
        work = pull_of(root, server.url)
        _, waits = skip_waits(work.health)
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(waits), time=time.time)
        for module in ("source_health", "download"):
            monkeypatch.setattr(f"provision.net.{module}.time", clock)
        with pytest.raises(FirstlightError, match="answers 429"):
            run(work)
        assert 500 <= sum(waits) <= 1200

    def test_pull_fails_without_a_wait_if_a_file_has_a_retry_after_of_an_hour(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault(WEIGHTS, status=503, headers={"Retry-After": "3600"}))
        with pytest.raises(FirstlightError, match="Retry-After of 3,600 s"):
            run(pull_of(root, server.url))

    def test_etag_of_a_file_that_is_not_a_hash_is_ignored(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        for path, headers in server.headers.items():
            if "/resolve/" in path:
                headers["ETag"] = '"an-etag-of-a-file-server"'
        work = pull_of(root, server.url)
        run(work)
        assert is_complete(work)
        assert count_gets(server, WEIGHTS) == 1
        assert {path.name for path in (work.folder / "blobs").iterdir()} == {
            SHA256[path] if path.endswith(".safetensors") else git_sha1(content) for path, content in FILES.items()
        }

    def test_error_of_a_pull_names_the_fault_of_each_file(self, root: Root, serve: Any) -> None:
        faults = (Fault(WEIGHTS, status=404), Fault("vae/model.safetensors", flip=True))
        with pytest.raises(FirstlightError, match="answers 404") as raised:
            run(pull_of(root, hub_server.start(serve, REPO, FILES, *faults).url))
        assert "vae/model.safetensors was not accepted" in str(raised.value)

    def test_redirect_target_that_answers_403_is_not_reported_as_a_gated_repository(
        self, root: Root, serve: Any
    ) -> None:
        target_server = serve({"/data": FILES[WEIGHTS]}, Fault("/data", status=403))
        redirect = Fault(
            f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{target_server.url}/data"}
        )
        with pytest.raises(FirstlightError, match="its redirect target answers 403") as raised:
            run(pull_of(root, hub_server.start(serve, REPO, FILES, redirect).url))
        assert "gated" not in str(raised.value)

    def test_gated_repository_on_a_mirror_is_an_error_that_suggests_send_token_to(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault("", status=403, headers={"X-Error-Code": "GatedRepo"}))
        with pytest.raises(
            AccessError, match=r"or allow the token for this hub: --send-token-to 127\.0\.0\.1:\d+"
        ) as raised:
            run(pull_of(root, server.url))
        assert "HF_TOKEN" not in str(raised.value), "HF_TOKEN is not sent to a mirror"


class TestPresentFiles:
    def test_present_blob_that_does_not_match_the_pinned_hash_is_downloaded_again(self, root: Root, serve: Any) -> None:
        """Start with a wrong file of the same size, as huggingface_hub gets it from a mirror that lists its hash."""
        wrong_content = b'{"a": 6}\n'
        wrong_hub = hub_server.start(serve, REPO, {**FILES, CONFIG: wrong_content})
        work = pinned_by_sha256(root, wrong_hub, hub_server.start(serve, REPO, FILES))
        blob = work.folder / "blobs" / git_sha1(wrong_content)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(wrong_content)
        link = work.snapshot / CONFIG
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
        run(work)
        assert is_complete(work)
        assert link.read_bytes() == FILES[CONFIG]

    @pytest.fixture
    def official(self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch) -> Server:
        """Pull the model without pins from an official hub, delete the recorded hashes, and return the hub."""
        server = hub_server.start(serve, REPO, FILES)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: server.url)
        run(pull_of(root, server.url, pinned=False))
        root.model_pins.unlink()
        return server

    @pytest.mark.parametrize("content", [b'{"a": 6}\n', FILES[CONFIG]], ids=["other content", "the right content"])
    def test_real_file_in_the_place_of_a_snapshot_link_is_verified_with_the_official_listing(
        self, root: Root, official: Server, content: bytes
    ) -> None:
        work = pull_of(root, official.url, pinned=False)
        (work.snapshot / CONFIG).unlink()
        (work.snapshot / CONFIG).write_bytes(content)
        plan = work.plan()
        assert [target.file.path for target in plan.needed] == ([] if content == FILES[CONFIG] else [CONFIG])
        work.run(plan, lambda *_: None)
        assert is_complete(work)
        assert (work.snapshot / f"{CONFIG}.firstlight-corrupt").exists() is bool(plan.needed), (
            "the corrupt file is kept"
        )

    def test_present_files_without_a_pinned_hash_stay_if_only_a_mirror_is_used(
        self, root: Root, serve: Any, official: Server
    ) -> None:
        mirror = hub_server.start(serve, REPO, FILES)
        plan = pull_of(root, mirror.url, pinned=False).plan()
        assert (plan.needed, plan.unproven) == ([], len(FILES))
        assert "without a pinned hash" in models_output.plan_line("m", plan)

    def test_hash_from_the_official_hub_replaces_a_recorded_hash_of_a_mirror(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mirror = hub_server.start(serve, REPO, {**FILES, CONFIG: b'{"a": 6}\n'})
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        official = hub_server.start(serve, REPO, FILES)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: official.url)
        work = pull_of(root, official.url, pinned=False)
        run(work)
        next_pull = pull_of(root, official.url, pinned=False)
        assert is_complete(next_pull)
        assert all(state.state == "ok" for state in next_pull.check_files(Depth.HASH))
        assert count_gets(official, WEIGHTS) == 0, "a right file is not downloaded again"

    def test_blob_that_links_to_a_shared_store_is_accepted(self, root: Root, serve: Any) -> None:
        """Make `blobs/HASH` a link into a store that repositories share, as the Xet client does."""
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url, pinned=True)
        run(work)
        blob = work.folder / "blobs" / SHA256[WEIGHTS]
        store = root.hub_in_use / "blobs" / "ab" / ("a" * 64)
        store.parent.mkdir(parents=True)
        blob.replace(store)
        blob.symlink_to(store)
        unpinned = pull_of(root, server.url, pinned=False)
        assert all(state.state == "ok" for state in unpinned.check_files(Depth.HASH))

    def test_hash_pinned_in_the_manifest_goes_before_a_different_hash_in_a_listing(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pull with a mirror's hashes; then pin the files, while the official hub lists other content."""
        mirror = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        wrong_hub = hub_server.start(serve, REPO, {**FILES, WEIGHTS: bytes(len(FILES[WEIGHTS]))})
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: wrong_hub.url)
        work = pull_of(root, wrong_hub.url)
        run(work)
        assert is_complete(work)
        assert not wrong_hub.requests, "a complete pinned model makes no request"

    @pytest.mark.parametrize("size", [5, 3_000_001, 10**15])
    def test_wrong_size_in_the_listing_of_one_hub_is_ignored_if_no_size_is_pinned(
        self, root: Root, serve: Any, size: int
    ) -> None:
        digest = SHA256[WEIGHTS]
        head = f'[m]\nrepo = "{REPO}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
        wrong_hub = hub_server.start(serve, REPO, FILES, Fault(f"/resolve/{REVISION}/{WEIGHTS}", status=404))
        lfs = {"oid": digest, "size": size, "pointerSize": 134}
        wrong_hub.content[TREE] = listing(unet__model_safetensors={"size": size, "lfs": lfs})
        work = pinned_by_sha256(root, wrong_hub, hub_server.start(serve, REPO, FILES))
        (root.path / "models.toml").write_text(f'{head}files = [{{path = "{WEIGHTS}", sha256 = "{digest}"}}]\n')
        work = Pull(root, "m", manifest.load(root.path / "models.toml").pick("m"), work.hubs)
        part = work.folder / "blobs" / f"{digest}{pull_plan.PART}"
        part.parent.mkdir(parents=True)
        part.write_bytes(FILES[WEIGHTS][:2_700_000])
        run(work)
        assert (work.snapshot / WEIGHTS).read_bytes() == FILES[WEIGHTS]
        assert work.arrived == 300_000

    def test_file_that_is_removed_during_the_pull_is_an_error_and_is_not_downloaded(
        self, root: Root, serve: Any
    ) -> None:
        """Remove a right file after the plan, as another run may do; the mirror has other bytes for that file."""
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url)
        run(work)
        (work.snapshot / WEIGHTS).resolve().unlink()
        server.content[f"/{REPO}/resolve/{REVISION}/{CONFIG}"] = b'{"a": 6}\n'
        plan = work.plan()
        with pytest.raises(FirstlightError, match="a file was removed during the pull"):
            work.run(plan, lambda *_: (work.snapshot / CONFIG).unlink(missing_ok=True))
        assert not (work.snapshot / CONFIG).exists()
