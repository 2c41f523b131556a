"""Tests the setup step of a model against a loopback hub: pinned, resumed and verified files, and failing hubs."""

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
    from tests.provision.fake_hub import FakeHub


@pytest.fixture
def root(tmp_path: Path) -> Root:
    volume_root = Root(tmp_path / "root")
    volume_root.state.mkdir(parents=True)
    return volume_root


def step(root: Root, tmp_path: Path, hub: FakeHub, *, pinned: bool = True, retry: bool = False) -> ModelStep:
    """Return the setup step of the model in the hub's manifest, which is pulled from the hub."""
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
    """Return the URL paths of the GET requests for weights."""
    return [path for method, path, _ in hub.seen if method == "GET" and path.endswith(".safetensors")]


def test_pulled_model_is_complete_and_loaded_by_huggingface_hub(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    from huggingface_hub import snapshot_download

    model = step(root, tmp_path, hub)
    assert model.check().state is State.DRIFTED
    model.apply()
    check = model.check(deep=True)
    assert (check.state, check.fallback) == (State.OK, None)
    assert len(weight_requests(hub)) == 1, "the weights were downloaded once, and never by huggingface_hub"
    folder = snapshot_download(hub.repo, revision=hub.revision, cache_dir=root.hub_in_use, local_files_only=True)
    assert (Path(folder) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_mirror_never_gets_the_token(root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    step(root, tmp_path, hub).apply()
    assert hub.seen
    assert {token for _, _, token in hub.seen} == {None}


def test_official_hub_gets_the_token(root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    monkeypatch.setattr(hub_client, "official_endpoint", lambda: hub.url)
    step(root, tmp_path, hub).apply()
    assert next(token for _, path, token in hub.seen if "/tree/" in path) == "Bearer hf_" + "a" * 20


def test_download_is_resumed_after_a_broken_connection(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    size = len(hub.files["model.safetensors"])
    hub.faults["cut"] = {"model.safetensors": size // 2}
    model = step(root, tmp_path, hub)
    model.apply()
    assert model.check(deep=True).state is State.OK
    assert len(weight_requests(hub)) == 2


def test_partial_file_with_wrong_bytes_is_detected_and_downloaded_again(
    root: Root, tmp_path: Path, hub: FakeHub
) -> None:
    content = hub.files["model.safetensors"]
    model = step(root, tmp_path, hub)
    blob = model.pull.folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True)
    part = blob.with_name(f"{blob.name}.firstlight-part")
    part.write_bytes(b"rubbish" + content[7 : len(content) // 2])
    model.apply()
    assert model.check(deep=True).state is State.OK


def test_file_with_another_hash_than_the_pin_is_refused_and_not_placed(
    root: Root, tmp_path: Path, hub: FakeHub
) -> None:
    wrong = bytes(len(hub.files["model.safetensors"]))
    hub.faults["content"] = {"model.safetensors": wrong}
    model = step(root, tmp_path, hub)
    with pytest.raises(FirstlightError, match="but the pinned sha256 is"):
        model.apply()
    assert not list(root.hub_in_use.glob("**/snapshots/*/model.safetensors"))


def test_file_whose_listed_hash_differs_from_the_pin_is_not_requested(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    model = step(root, tmp_path, hub)
    hub.files["model.safetensors"] = b"x" * len(hub.files["model.safetensors"])
    with pytest.raises(FirstlightError, match="The file was not downloaded"):
        model.apply()
    assert not weight_requests(hub)


def test_unpinned_model_is_not_pulled_from_a_mirror(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    model = step(root, tmp_path, hub, pinned=False)
    model.apply()
    check = model.check()
    assert check.state is State.OK
    assert "not the official hub" in (check.fallback or "")
    assert not weight_requests(hub)


def test_unpinned_model_gets_its_hashes_from_the_official_hub(
    root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "official_endpoint", lambda: hub.url)
    model = step(root, tmp_path, hub, pinned=False)
    model.apply()
    assert model.check(deep=True).state is State.OK
    blob = (model.pull.snapshot / "model.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    assert model.check().state is State.OK
    assert model.check(deep=True).state is State.DRIFTED, "the name of the blob is its hash"


def test_corrupt_blob_is_set_aside_and_downloaded_again(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    model = step(root, tmp_path, hub)
    model.apply()
    blob = (model.pull.snapshot / "model.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    assert model.check(deep=True).state is State.DRIFTED
    model.apply()
    assert model.check(deep=True).state is State.OK
    assert list(blob.parent.glob("*.firstlight-corrupt")), "the corrupt file is kept"


@pytest.mark.parametrize(
    "faults",
    [{"status": 503}, {"status": 404}, {"status": 401}, {"tree": "<html>log in</html>"}, {"tree": '{"a": 1}'}],
    ids=["503", "404", "401", "login page", "not a list"],
)
def test_model_of_a_failing_hub_is_a_recorded_fallback_until_the_hub_answers(
    root: Root, tmp_path: Path, hub: FakeHub, faults: dict[str, object]
) -> None:
    hub.faults.update(faults)
    model = step(root, tmp_path, hub)
    model.apply()
    assert "none of its files is present" in (model.check().fallback or "")
    assert "stand-in" not in model.check().detail, "no stand-in was built"
    hub.faults.clear()
    assert step(root, tmp_path, hub).check().state is State.OK, "a step without retry does not contact the hub"
    later = step(root, tmp_path, hub, retry=True)
    assert later.retry_reason() == f"{hub.url} answers now"
    assert step(root, tmp_path, hub).retry_reason() is None, "a step without retry sends no request"
    later.apply()
    assert later.check().fallback is None
    assert json.loads(root.stand_ins.read_text()) == {}


def test_failed_build_of_a_stand_in_is_tried_once_in_a_run_and_again_in_the_next_run(
    root: Root, tmp_path: Path, hub: FakeHub
) -> None:
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
    assert "no stand-in was built: torch is not here" in (outcome.fallback or "")
    assert outcome.error is None
    assert len(tries) == 1
    (again,) = engine.check_all([later], listen=lambda *_: None)
    assert (again.after, again.detail) == (State.DRIFTED, "the stand-in is not built"), "the next run tries again"


def test_wait_of_300_seconds_for_a_hub_is_reported(root: Root, tmp_path: Path, hub: FakeHub) -> None:
    messages: list[str] = []
    first_step = step(root, tmp_path, hub)
    model = ModelStep(
        root,
        "model",
        first_step.pull.spec,
        first_step.pull.hubs,
        retry=False,
        progress=lambda *_: None,
        tell=messages.append,
    )
    model.pull.health.stopped.set()
    model.pull.health.wait(300, "model")
    assert messages == ["model: waiting 300 s, as Retry-After requests"]


def test_pull_without_enough_space_is_blocked_before_the_download(
    root: Root, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BlockedError, match="1 bytes are free"):
        step(root, tmp_path, hub).apply()
    assert not weight_requests(hub)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://example.com", "nonsense", "http://8.8.8.8"])
def test_hub_endpoint_that_is_neither_https_nor_private_is_refused(url: str) -> None:
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
def test_error_of_a_refused_hub_endpoint_hides_its_password(url: str) -> None:
    with pytest.raises(SpecError, match="is not allowed") as raised:
        check_address(url, "HF_ENDPOINT")
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    ["https://example.com/", "http://127.0.0.1:80", "http://192.168.1.2", "http://localhost", "https://u:p@host/x"],
)
def test_hub_endpoint_that_is_https_or_private_is_accepted(url: str) -> None:
    assert check_address(url, "HF_ENDPOINT") == url.rstrip("/")


@pytest.mark.parametrize("path", ["../x.json", "/x.json", "a/../../x", "x.bin", "x.ckpt", "x.py", "a//b.json", "x.pkl"])
def test_manifest_with_a_dangerous_file_path_is_refused_with_line_and_key(
    tmp_path: Path, hub: FakeHub, path: str
) -> None:
    hub.files = {path: b""}
    file = tmp_path / "models.toml"
    file.write_text(hub.manifest())
    with pytest.raises(SpecError, match=r"line 6, key model\.files\.0\.path"):
        toml.load_tables(file, models.ModelSpec)
