"""Tests the links for the former ids of a repository, and two variants that share one snapshot."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import snapshot_download
from typer.testing import CliRunner

from provision.cli import models as models_cli
from provision.core.errors import SpecError
from provision.core.step import State
from provision.models import former_ids, inventory, load_line, manifest, pins, remove
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.snapshots import SnapshotStep
from provision.models.step import ModelStep
from provision.volume.journal import Journal
from tests.provision import hub_server

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root
    from provision.models.manifest import Manifest

REPO, OLD = "owner/model", "former/model"
SMALL = {"model_index.json": b"{}", "unet/config.json": b'{"a": 1}'}
PLAIN = {**SMALL, "unet/model.safetensors": b"whole" * 1000}
HALF = {**SMALL, "unet/model.fp16.safetensors": b"half" * 1000}


@pytest.fixture
def both_pulled(tmp_path: Path, root: Root, serve: Any) -> Manifest:
    """Return a manifest with two variants of a repository, both pulled."""
    server = hub_server.start(serve, REPO, {**PLAIN, **HALF})
    text = hub_server.manifest_entry("m", REPO, PLAIN, extra=f'aliases = ["{OLD}"]\n')
    text += hub_server.manifest_entry('"m@half"', REPO, HALF, variant="half")
    (tmp_path / "models.toml").write_text(text)
    both = manifest.load(tmp_path / "models.toml")
    for name in ("m", "m@half"):
        pull(root, both, name, server.url)
    return both


def pull(root: Root, both_pulled: Manifest, name: str, url: str = "http://127.0.0.1:9") -> list[str]:
    """Pull a model of the manifest, and return the notes for the user."""
    work = Pull(
        root, name, both_pulled.pick(name), Hubs(root, {"HF_ENDPOINT": url}), pinned=both_pulled.revisions(REPO)
    )
    work.run(work.plan(), lambda *_: None)
    return work.notes


def link(root: Root) -> Path:
    """Return the path of the link in the hub cache that has the name of the former id."""
    return root.hub / "models--former--model"


def names(root: Root) -> list[str]:
    """Return the names of the files in all snapshots, sorted."""
    return sorted(path.name for path in (root.hub / "models--owner--model").rglob("snapshots/*/**/*") if path.is_file())


def test_missing_link_for_the_former_id_in_a_read_only_cache_is_a_warning(
    root: Root, both_pulled: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a read-only cache without the link, as it was filled before the repository was renamed."""
    link(root).unlink()
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    step = ModelStep(root, "m", both_pulled.pick("m"), Hubs(root, {}), retry=True, progress=lambda *_: None)
    check = step.check()
    assert check.state is State.OK
    assert f"cannot be loaded as {OLD}" in (check.fallback or "")
    (note,) = former_ids.make(root.hub, both_pulled.pick("m"))
    assert note.endswith(f"is read-only, so {REPO} cannot be loaded as {OLD} (former id)")


def test_pulled_model_is_loaded_by_its_former_id(root: Root, both_pulled: Manifest) -> None:
    assert str(link(root).readlink()) == "models--owner--model", "the link is relative, since the cache may move"
    folder = snapshot_download(OLD, cache_dir=root.hub, local_files_only=True)
    assert folder.endswith(hub_server.REVISION)
    assert pull(root, both_pulled, "m") == []
    assert OLD not in inventory.unlisted(root, both_pulled)
    step = SnapshotStep(
        root, [pins.apply(root, model) for model in both_pulled.with_all_extras()], Journal(root.journal)
    )
    assert step.check().detail.startswith("1 repositories"), "the link does not count as another repository"


def test_lost_link_for_the_former_id_is_drift_and_is_made_again(root: Root, both_pulled: Manifest) -> None:
    link(root).unlink()
    step = ModelStep(
        root,
        "m",
        both_pulled.pick("m"),
        Hubs(root, {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        retry=False,
        progress=lambda *_: None,
    )
    assert (step.check().state, OLD in step.check().detail) == (State.DRIFTED, True)
    step.apply()
    assert step.check().state is State.OK
    line = f'DiffusionPipeline.from_pretrained("{REPO}", torch_dtype=torch.float16)'
    assert step.check().detail.endswith(f"load it: {line}")
    assert link(root).is_symlink()


def test_python_line_that_loads_a_model_has_the_revision_if_refs_main_is_another_one(
    root: Root, both_pulled: Manifest
) -> None:
    folder = root.hub / "models--owner--model"
    (folder / "snapshots" / ("2" * 40)).mkdir()
    (folder / "refs/main").write_text("2" * 40)
    line = load_line.of_model(root, both_pulled.pick("m"), None)
    assert line is not None
    assert f'revision="{hub_server.REVISION}"' in line


@pytest.mark.parametrize("kind", ["folder", "link", "dangling"])
def test_folder_or_link_of_the_user_with_the_name_of_the_former_id_is_kept(
    root: Root, both_pulled: Manifest, kind: str, tmp_path: Path
) -> None:
    link(root).unlink()
    if kind == "folder":
        link(root).mkdir()
        (link(root) / "mine").write_text("x")
    else:
        (tmp_path / "own").mkdir()
        link(root).symlink_to(tmp_path / ("own" if kind == "link" else "gone"))
    before = link(root).lstat()
    (note,) = pull(root, both_pulled, "m")
    assert "was not made by firstlight and stays" in note
    for name in ("m", "m@half"):
        remove.remove(root, both_pulled, name)
    assert link(root).lstat().st_ino == before.st_ino


def test_removal_keeps_a_link_for_the_former_id_that_firstlight_did_not_make(root: Root, both_pulled: Manifest) -> None:
    (root.hub / "models--owner--model" / "firstlight-aliases").unlink()
    assert former_ids.owned(root.hub, "models--owner--model") == []
    for name in ("m", "m@half"):
        remove.remove(root, both_pulled, name)
    assert link(root).is_symlink()


@pytest.mark.parametrize("removed", ["m", "m@half", REPO, f"{OLD}@half"])
def test_removal_of_one_variant_keeps_the_files_of_the_other_variant(
    root: Root, both_pulled: Manifest, removed: str
) -> None:
    remove.remove(root, both_pulled, removed)
    is_half = removed.endswith("@half")
    kept = "model.safetensors" if is_half else "model.fp16.safetensors"
    assert names(root) == sorted(["config.json", kept, "model_index.json"])
    assert link(root).is_symlink(), "the link belongs to the other variant, too"
    assert (root.hub / "models--owner--model/refs/main").read_text() == hub_server.REVISION
    other = "m" if is_half else "m@half"
    assert {cached.name: cached.state for cached in inventory.cached_models(root, both_pulled)}[other] == "whole"
    remove.remove(root, both_pulled, other)
    assert [path.name for path in root.hub.iterdir() if path.name != ".locks"] == []


def test_revision_that_no_model_pins_is_removed_by_its_abbreviated_commit(root: Root, both_pulled: Manifest) -> None:
    unpinned_file = root.hub / "models--owner--model/snapshots" / ("2" * 40) / "x.json"
    unpinned_file.parent.mkdir()
    unpinned_file.write_text("x")
    remove.remove(root, both_pulled, f"{REPO}@2222")
    assert not unpinned_file.exists()
    with pytest.raises(SpecError, match="is the pinned revision of m"):
        remove.removal(root, both_pulled, f"{REPO}@1111")


def test_removal_of_an_extra_whose_files_are_in_the_models_own_entry_is_refused(
    root: Root, both_pulled: Manifest
) -> None:
    model = both_pulled.models["m"].model_copy(update={"extras": {"checker": []}})
    changed = manifest.Manifest({**both_pulled.models, "m": model})
    with pytest.raises(SpecError, match="has no files of its own: they are part of m"):
        remove.removal(root, changed, "m+checker")
    assert len(names(root)) == 4


def test_models_seed_serves_a_repository_under_its_present_and_its_former_id(
    root: Root, both_pulled: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the server by a function that records the models to serve."""
    from provision.models import seed_server

    served: list[str] = []

    def server(models: list[seed_server.ServedModel], *_: object) -> None:
        served.extend(model.repo for model in models)
        raise SpecError("end of the test")

    monkeypatch.setattr(seed_server, "server", server)
    root.marker.write_text('{"schema": 1, "id": "x"}')
    (tmp_path / "host.toml").write_text("models = []\n")
    argv = ["seed", "--root", str(root.path), "--host", str(tmp_path / "host.toml"), "--envs", str(tmp_path)]
    assert "end of the test" in CliRunner().invoke(models_cli.app, argv).output
    assert served == [REPO, OLD] * 2
