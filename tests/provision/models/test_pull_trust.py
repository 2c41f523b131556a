"""Whom a pull trusts: who sees the token, and whose word is taken for a hash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import FirstlightError
from provision.models import hub_client, pins
from provision.models.hub_client import HubError
from tests.provision import hub_server
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, gets, is_whole, pull_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

TOKEN = "hf_" + "T" * 30


class TestTokens:
    @pytest.fixture(autouse=True)
    def _token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def test_a_mirror_never_sees_it(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        run(pull_of(root, played.url))
        assert {token for _, _, token in played.requests} == {None}

    def test_the_official_hub_does(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        played = hub_server.start(play, REPO, FILES)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: played.url)
        run(pull_of(root, played.url))
        ours = played.requests[: len(FILES) + 1]
        assert {token for _, _, token in ours} == {f"Bearer {TOKEN}"}
        assert {token for _, _, token in played.requests[len(ours) :]} <= {None}, "the client that links needs none"

    def test_a_host_that_the_user_names_does(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        run(pull_of(root, played.url, tokens=(played.url.removeprefix("http://"),)))
        assert {token for _, _, token in played.requests[: len(FILES) + 1]} == {f"Bearer {TOKEN}"}

    def test_a_repository_that_only_the_token_opens_is_linked_all_the_same(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        played = hub_server.start(play, REPO, FILES, Fault("", status=401, without_token=True))
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: played.url)
        work = pull_of(root, played.url)
        run(work)
        assert is_whole(work)

    def test_it_does_not_travel_with_a_redirect(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        far = play({"/data": FILES[WEIGHTS]})
        near = Fault(f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{far.url}/data"})
        played = hub_server.start(play, REPO, FILES, near)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: played.url)
        work = pull_of(root, played.url)
        run(work)
        assert is_whole(work)
        assert far.requests
        assert {token for _, _, token in far.requests} == {None}

    def test_an_expired_redirect_is_asked_for_anew(self, root: Root, play: Any) -> None:
        far = play({"/data": FILES[WEIGHTS]}, Fault("/data", status=403, times=1))
        near = Fault(f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{far.url}/data"})
        work = pull_of(root, hub_server.start(play, REPO, FILES, near).url)
        run(work)
        assert is_whole(work)
        assert len(far.requests) == 2

    def test_a_page_of_the_listing_is_asked_where_the_first_was(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far = play({})
        played = hub_server.start(play, REPO, FILES)
        tree = f"/api/models/{REPO}/tree/{REVISION}"
        played.headers[tree] |= {"Link": f'<{far.url}{tree}?cursor=2>; rel="next"'}
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: played.url)
        monkeypatch.setattr(hub_client, "_MOST_PAGES", 2)
        run(pull_of(root, played.url))
        assert {token for _, _, token in far.requests} <= {None}
        assert played.paths.count(tree) >= 2

    def test_a_password_of_netrc_does_not_take_its_place(
        self, root: Root, play: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (home / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
        played = hub_server.start(play, REPO, FILES)
        run(pull_of(root, played.url))
        assert {token for _, _, token in played.requests} == {None}


class TestPins:
    def test_an_unpinned_file_is_pinned_by_the_official_hub(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        official, mirror = (hub_server.start(play, REPO, FILES) for _ in range(2))
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: official.url)
        run(pull_of(root, official.url, pinned=False))
        work = pull_of(root, mirror.url, pinned=False)
        assert all(file.locked for file in work.spec.files)
        (work.snapshot / WEIGHTS).resolve().unlink()
        run(work)
        assert is_whole(work)
        assert gets(mirror, WEIGHTS) == 1, "what is pinned may come from a mirror"

    def test_a_mirror_is_not_trusted_unasked(self, root: Root, play: Any) -> None:
        mirror = hub_server.start(play, REPO, FILES)
        with pytest.raises(HubError, match="--trust-mirror"):
            run(pull_of(root, mirror.url, pinned=False))
        assert not gets(mirror, "/resolve/")

    def test_a_mirror_that_is_trusted_is_on_record(self, root: Root, play: Any) -> None:
        mirror = hub_server.start(play, REPO, FILES)
        work = pull_of(root, mirror.url, pinned=False, trust=True)
        run(work)
        assert is_whole(work)
        assert pins.source(root, work.spec, WEIGHTS) == mirror.url

    def test_its_word_is_held_to(self, root: Root, play: Any) -> None:
        mirror = hub_server.start(play, REPO, FILES)
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        other = hub_server.start(play, REPO, {**FILES, WEIGHTS: b"other"})
        work = pull_of(root, other.url, pinned=False, trust=True)
        (work.snapshot / WEIGHTS).resolve().unlink()
        with pytest.raises(FirstlightError, match="It was not fetched"):
            run(work)
