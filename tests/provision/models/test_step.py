"""Models from a hub on loopback: pinned, resumed, verified; and what a silent or lying hub gets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.config import models, toml
from provision.core import step as engine
from provision.core.errors import BlockedError, FirstlightError, SpecError
from provision.core.layout import Root
from provision.core.step import State
from provision.models import hub_client
from provision.models.hubs import Hubs
from provision.models.step import ModelStep
from provision.net.urls import check_address

if TYPE_CHECKING:
    from tests.provision.conftest import FakeHub


@pytest.fixture
def root(tmp_path: Path) -> Root:
    found = Root(tmp_path / "root")
    found.state.mkdir(parents=True)
    return found


def step(root: Root, tmp_path: Path, hub: FakeHub, *, pinned: bool = True, retry: bool = False) -> ModelStep:
    file = tmp_path / "models.toml"
    file.write_text(hub.manifest(pinned=pinned))
    model = toml.load_tables(file, models.ModelSpec)["model"]
    arrived: list[int] = []
    return ModelStep(
        root,
        "model",
        model,
        Hubs(root, {"HF_ENDPOINT": hub.url}),
        retry=retry,
        progress=lambda count, _, __="bytes", /: arrived.append(count),
    )


def weight_requests(hub: FakeHub) -> list[str]:
    return [path for method, path, _ in hub.seen if method == "GET" and path.endswith(".safetensors")]


def test_a_pull_is_whole_verified_and_found_by_the_client(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    from huggingface_hub import snapshot_download

    model = step(root, tmp_path, hub)
    assert model.check().state is State.DRIFTED
    model.apply()
    found = model.check(deep=True)
    assert (found.state, found.fallback) == (State.OK, None)
    assert len(weight_requests(hub)) == 1, "the weights were fetched once, and never by the hub's client"
    folder = snapshot_download(hub.repo, revision=hub.revision, cache_dir=root.hub_in_use, local_files_only=True)
    assert (Path(folder) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_no_token_goes_to_a_mirror(root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    step(root, tmp_path, hub).apply()
    assert hub.seen
    assert {token for _, _, token in hub.seen} == {None}


def test_the_official_hub_gets_the_token(
    root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    monkeypatch.setattr(hub_client, "official_endpoint", lambda: hub.url)
    step(root, tmp_path, hub).apply()
    assert next(token for _, path, token in hub.seen if "/tree/" in path) == "Bearer hf_" + "a" * 20


def test_a_cut_line_is_resumed_not_begun_again(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    size = len(hub.files["model.safetensors"])
    hub.faults["cut"] = {"model.safetensors": size // 2}
    model = step(root, tmp_path, hub)
    model.apply()
    assert model.check(deep=True).state is State.OK
    assert len(weight_requests(hub)) == 2


def test_a_stored_partial_is_hashed_before_it_is_trusted(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    content = hub.files["model.safetensors"]
    model = step(root, tmp_path, hub)
    blob = model.pull.folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True)
    part = blob.with_name(f"{blob.name}.firstlight-part")
    part.write_bytes(b"rubbish" + content[7 : len(content) // 2])
    model.apply()
    assert model.check(deep=True).state is State.OK


def test_wrong_content_is_refused(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    wrong = bytes(len(hub.files["model.safetensors"]))
    hub.faults["content"] = {"model.safetensors": wrong}
    model = step(root, tmp_path, hub)
    with pytest.raises(FirstlightError, match="pinned is"):
        model.apply()
    assert not list(root.hub_in_use.glob("**/snapshots/*/model.safetensors"))


def test_a_hub_that_lists_another_hash_is_not_even_asked_for_the_file(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    model = step(root, tmp_path, hub)
    hub.files["model.safetensors"] = b"x" * len(hub.files["model.safetensors"])
    with pytest.raises(FirstlightError, match="It was not fetched"):
        model.apply()
    assert not weight_requests(hub)


def test_an_unpinned_model_is_not_taken_from_a_mirror(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    model = step(root, tmp_path, hub, pinned=False)
    model.apply()
    found = model.check()
    assert found.state is State.OK
    assert "not the official hub" in (found.fallback or "")
    assert not weight_requests(hub)


def test_an_unpinned_model_is_locked_by_the_official_hub(
    root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "official_endpoint", lambda: hub.url)
    model = step(root, tmp_path, hub, pinned=False)
    model.apply()
    assert model.check(deep=True).state is State.OK
    blob = (model.pull.snapshot / "model.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    assert model.check().state is State.OK
    assert model.check(deep=True).state is State.DRIFTED, "its blob's name is its lock"


def test_a_corrupt_blob_is_moved_aside_and_fetched_again(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    model = step(root, tmp_path, hub)
    model.apply()
    blob = (model.pull.snapshot / "model.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    assert model.check(deep=True).state is State.DRIFTED
    model.apply()
    assert model.check(deep=True).state is State.OK
    assert list(blob.parent.glob("*.firstlight-corrupt")), "nothing is deleted"


@pytest.mark.parametrize(
    "faults",
    [{"status": 503}, {"status": 404}, {"status": 401}, {"tree": "<html>log in</html>"}, {"tree": '{"a": 1}'}],
    ids=["503", "404", "401", "portal", "object"],
)
def test_a_hub_that_is_none_becomes_a_stand_in(
    root: Root, tmp_path: Path, hub: FakeHub, faults: dict[str, object]
) -> None:
    hub.faults.update(faults)
    model = step(root, tmp_path, hub)
    model.apply()
    assert "none of its files is here" in (model.check().fallback or "")
    assert "stand-in" not in model.check().detail, "none was built"
    hub.faults.clear()
    assert step(root, tmp_path, hub).check().state is State.OK, "a status asks no network"
    later = step(root, tmp_path, hub, retry=True)
    assert later.retry_reason() == f"{hub.url} answers now"
    assert step(root, tmp_path, hub).retry_reason() is None, "a status asks no network"
    later.apply()
    assert later.check().fallback is None
    assert json.loads(root.stand_ins.read_text()) == {}


def test_one_run_tries_once_to_build_a_stand_in(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    hub.faults["status"] = 404
    step(root, tmp_path, hub).apply()
    tries: list[int] = []

    def build(_: object) -> Path:
        tries.append(1)
        raise FirstlightError("torch is not here")

    later = step(root, tmp_path, hub, retry=True)
    later.build = build
    (outcome,) = engine.converge([later], listen=lambda *_: None)
    assert (outcome.before, outcome.after, outcome.changed) == (State.DRIFTED, State.OK, True)
    assert "none was built: torch is not here" in (outcome.fallback or "")
    assert outcome.error is None
    assert len(tries) == 1
    (again,) = engine.check_all([later], listen=lambda *_: None)
    assert (again.after, again.detail) == (State.DRIFTED, "its stand-in is not built"), "the next run tries again"


def test_a_setup_says_what_it_waits_for(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    told: list[str] = []
    waiting = step(root, tmp_path, hub)
    model = ModelStep(
        root, "model", waiting.pull.spec, waiting.pull.hubs, retry=False, progress=lambda *_: None, tell=told.append
    )
    model.pull.health.stopped.set()
    model.pull.health.wait(300, "model")
    assert told == ["model: waiting 300 s, as Retry-After requests"]


def test_no_space_is_told_before_anything_is_fetched(
    root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BlockedError, match="1 bytes are free"):
        step(root, tmp_path, hub).apply()
    assert not weight_requests(hub)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://example.com", "nonsense", "http://8.8.8.8"])
def test_an_endpoint_that_anybody_could_change_is_refused(url: str) -> None:
    with pytest.raises(SpecError, match="is not allowed"):
        check_address(url, "HF_ENDPOINT")


@pytest.mark.parametrize(
    "url",
    [
        "http://u:12/SECRET@127.0.0.1",
        "https://u:12?SECRET@host",
        "https://u:12#SECRET@host",
        "http://u:SECRET@8.8.8.8",
        "u:SECRET@host",
        "u:SECRET@x://host",
    ],
)
def test_a_password_of_a_refused_endpoint_is_not_shown(url: str) -> None:
    with pytest.raises(SpecError, match="is not allowed") as caught:
        check_address(url, "HF_ENDPOINT")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["https://example.com/", "http://127.0.0.1:80", "http://192.168.1.2", "http://localhost", "https://u:p@host/x"],
)
def test_a_sound_endpoint_is_taken(url: str) -> None:
    assert check_address(url, "HF_ENDPOINT") == url.rstrip("/")


@pytest.mark.parametrize("path", ["../x.json", "/x.json", "a/../../x", "x.bin", "x.ckpt", "x.py", "a//b.json", "x.pkl"])
def test_the_manifest_takes_no_dangerous_path(tmp_path: Path, hub: FakeHub, path: str) -> None:
    hub.files = {path: b""}
    file = tmp_path / "models.toml"
    file.write_text(hub.manifest())
    with pytest.raises(SpecError, match=r"line 6, key model\.files\.0\.path"):
        toml.load_tables(file, models.ModelSpec)
