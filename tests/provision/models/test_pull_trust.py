"""Tests which hubs get the token, and whose hashes are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import FirstlightError
from provision.models import hub_client, pins
from provision.models.hub_client import HubError
from tests.provision import hub_server
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, count_gets, is_complete, pull_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

TOKEN = "hf_" + "T" * 30


class TestTokens:
    @pytest.fixture(autouse=True)
    def _token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def test_mirror_never_gets_the_token(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, server.url))
        assert {token for _, _, token in server.requests} == {None}

    def test_official_hub_gets_the_token(self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        server = hub_server.start(serve, REPO, FILES)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: server.url)
        run(pull_of(root, server.url))
        own_requests = server.requests[: len(FILES) + 1]
        assert {token for _, _, token in own_requests} == {f"Bearer {TOKEN}"}
        assert {token for _, _, token in server.requests[len(own_requests) :]} <= {None}, (
            "huggingface_hub gets no token"
        )

    def test_host_that_the_user_names_gets_the_token(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, server.url, tokens=(server.url.removeprefix("http://"),)))
        assert {token for _, _, token in server.requests[: len(FILES) + 1]} == {f"Bearer {TOKEN}"}

    def test_private_repository_is_pulled_with_the_token(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = hub_server.start(serve, REPO, FILES, Fault("", status=401, without_token=True))
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: server.url)
        work = pull_of(root, server.url)
        run(work)
        assert is_complete(work)

    def test_redirect_target_does_not_get_the_token(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target_server = serve({"/data": FILES[WEIGHTS]})
        redirect = Fault(
            f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{target_server.url}/data"}
        )
        server = hub_server.start(serve, REPO, FILES, redirect)
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: server.url)
        work = pull_of(root, server.url)
        run(work)
        assert is_complete(work)
        assert target_server.requests
        assert {token for _, _, token in target_server.requests} == {None}

    def test_redirect_that_has_expired_is_requested_again_from_the_hub(self, root: Root, serve: Any) -> None:
        target_server = serve({"/data": FILES[WEIGHTS]}, Fault("/data", status=403, times=1))
        redirect = Fault(
            f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{target_server.url}/data"}
        )
        work = pull_of(root, hub_server.start(serve, REPO, FILES, redirect).url)
        run(work)
        assert is_complete(work)
        assert len(target_server.requests) == 2

    def test_next_page_of_a_listing_is_requested_from_the_hub_and_not_from_a_foreign_link(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other_server = serve({})
        server = hub_server.start(serve, REPO, FILES)
        tree = f"/api/models/{REPO}/tree/{REVISION}"
        server.headers[tree] |= {"Link": f'<{other_server.url}{tree}?cursor=2>; rel="next"'}
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: server.url)
        monkeypatch.setattr(hub_client, "_MAX_PAGES", 2)
        run(pull_of(root, server.url))
        assert {token for _, _, token in other_server.requests} <= {None}
        assert server.paths.count(tree) >= 2

    def test_mirror_gets_neither_the_token_nor_a_password_of_netrc(
        self, root: Root, serve: Any, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (home / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
        server = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, server.url))
        assert {token for _, _, token in server.requests} == {None}


class TestPins:
    def test_unpinned_file_gets_its_hash_from_the_official_hub(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        official, mirror = (hub_server.start(serve, REPO, FILES) for _ in range(2))
        monkeypatch.setattr(hub_client, "official_endpoint", lambda: official.url)
        run(pull_of(root, official.url, pinned=False))
        work = pull_of(root, mirror.url, pinned=False)
        assert all(file.locked for file in work.spec.files)
        (work.snapshot / WEIGHTS).resolve().unlink()
        run(work)
        assert is_complete(work)
        assert count_gets(mirror, WEIGHTS) == 1, "a pinned file may come from a mirror"

    def test_pull_of_an_unpinned_model_from_a_mirror_is_refused_without_trust_mirror(
        self, root: Root, serve: Any
    ) -> None:
        mirror = hub_server.start(serve, REPO, FILES)
        with pytest.raises(HubError, match="--trust-mirror"):
            run(pull_of(root, mirror.url, pinned=False))
        assert not count_gets(mirror, "/resolve/")

    def test_hash_of_a_trusted_mirror_is_recorded_with_the_address_of_the_mirror(self, root: Root, serve: Any) -> None:
        mirror = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, mirror.url, pinned=False, trust=True)
        run(work)
        assert is_complete(work)
        assert pins.source(root, work.spec, WEIGHTS) == mirror.url

    def test_changed_hash_from_trusted_mirror_is_rejected(self, root: Root, serve: Any) -> None:
        mirror = hub_server.start(serve, REPO, FILES)
        run(pull_of(root, mirror.url, pinned=False, trust=True))
        changed_mirror = hub_server.start(serve, REPO, {**FILES, WEIGHTS: b"other"})
        work = pull_of(root, changed_mirror.url, pinned=False, trust=True)
        (work.snapshot / WEIGHTS).resolve().unlink()
        with pytest.raises(FirstlightError, match="The file was not downloaded"):
            run(work)
