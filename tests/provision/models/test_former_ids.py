"""Former ids of a repository in the hub cache, and two variants that share one snapshot."""

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
def known(tmp_path: Path, root: Root, play: Any) -> Manifest:
    """Both variants in a manifest, and pulled."""
    played = hub_server.start(play, REPO, {**PLAIN, **HALF})
    text = hub_server.manifest_entry("m", REPO, PLAIN, extra=f'aliases = ["{OLD}"]\n')
    text += hub_server.manifest_entry('"m@half"', REPO, HALF, variant="half")
    (tmp_path / "models.toml").write_text(text)
    found = manifest.load(tmp_path / "models.toml")
    for name in ("m", "m@half"):
        pull(root, found, name, played.url)
    return found


def pull(root: Root, known: Manifest, name: str, url: str = "http://127.0.0.1:9") -> list[str]:
    work = Pull(root, name, known.pick(name), Hubs(root, {"HF_ENDPOINT": url}), pinned=known.revisions(REPO))
    work.run(work.plan(), lambda *_: None)
    return work.notes


def link(root: Root) -> Path:
    return root.hub / "models--former--model"


def names(root: Root) -> list[str]:
    return sorted(path.name for path in (root.hub / "models--owner--model").rglob("snapshots/*/**/*") if path.is_file())


def test_a_cache_that_cannot_be_written_serves_the_model_without_its_former_id(
    root: Root, known: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mounted read-only, and was filled before the model moved."""
    link(root).unlink()
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    step = ModelStep(root, "m", known.pick("m"), Hubs(root, {}), retry=True, progress=lambda *_: None)
    check = step.check()
    assert check.state is State.OK
    assert f"is not found as {OLD}" in (check.fallback or "")
    (note,) = former_ids.make(root.hub, known.pick("m"))
    assert note.endswith(f"cannot be written, so {REPO} is not found as {OLD}")


def test_pulled_model_is_loaded_by_its_former_id(root: Root, known: Manifest) -> None:
    assert str(link(root).readlink()) == "models--owner--model", "relative: the cache may move"
    folder = snapshot_download(OLD, cache_dir=root.hub, local_files_only=True)
    assert folder.endswith(hub_server.REVISION)
    assert pull(root, known, "m") == []
    assert OLD not in inventory.others(root, known)
    step = SnapshotStep(root, [pins.apply(root, each) for each in known.every()], Journal(root.journal))
    assert step.check().detail.startswith("1 repositories"), "a link is not another repository"


def test_lost_link_is_drift_and_comes_back(root: Root, known: Manifest) -> None:
    link(root).unlink()
    step = ModelStep(
        root,
        "m",
        known.pick("m"),
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


def test_line_names_the_revision_where_main_names_another_that_is_here(root: Root, known: Manifest) -> None:
    folder = root.hub / "models--owner--model"
    (folder / "snapshots" / ("2" * 40)).mkdir()
    (folder / "refs/main").write_text("2" * 40)
    line = load_line.of_model(root, known.pick("m"), None)
    assert line is not None
    assert f'revision="{hub_server.REVISION}"' in line


@pytest.mark.parametrize("kind", ["folder", "link", "dangling"])
def test_what_a_user_has_under_the_former_id_stays(root: Root, known: Manifest, kind: str, tmp_path: Path) -> None:
    link(root).unlink()
    if kind == "folder":
        link(root).mkdir()
        (link(root) / "mine").write_text("x")
    else:
        (tmp_path / "own").mkdir()
        link(root).symlink_to(tmp_path / ("own" if kind == "link" else "gone"))
    before = link(root).lstat()
    (note,) = pull(root, known, "m")
    assert "is not ours and stays" in note
    for name in ("m", "m@half"):
        remove.remove(root, known, name)
    assert link(root).lstat().st_ino == before.st_ino


def test_link_that_a_user_made_to_our_folder_is_not_removed(root: Root, known: Manifest) -> None:
    (root.hub / "models--owner--model" / "firstlight-aliases").unlink()
    assert former_ids.owned(root.hub, "models--owner--model") == []
    for name in ("m", "m@half"):
        remove.remove(root, known, name)
    assert link(root).is_symlink()


@pytest.mark.parametrize("first", ["m", "m@half", REPO, f"{OLD}@half"])
def test_removal_keeps_what_the_other_variant_needs(root: Root, known: Manifest, first: str) -> None:
    remove.remove(root, known, first)
    is_half = first.endswith("@half")
    kept = "model.safetensors" if is_half else "model.fp16.safetensors"
    assert names(root) == sorted(["config.json", kept, "model_index.json"])
    assert link(root).is_symlink(), "it leads to the other one too"
    assert (root.hub / "models--owner--model/refs/main").read_text() == hub_server.REVISION
    other = "m" if is_half else "m@half"
    assert {each.asked: each.state for each in inventory.held(root, known)}[other] == "whole"
    remove.remove(root, known, other)
    assert [path.name for path in root.hub.iterdir() if path.name != ".locks"] == []


def test_commit_of_another_revision_is_still_removed_by_its_name(root: Root, known: Manifest) -> None:
    old = root.hub / "models--owner--model/snapshots" / ("2" * 40) / "x.json"
    old.parent.mkdir()
    old.write_text("x")
    remove.remove(root, known, f"{REPO}@2222")
    assert not old.exists()
    with pytest.raises(SpecError, match="is what m is pinned to"):
        remove.removal(root, known, f"{REPO}@1111")


def test_extra_that_is_part_of_an_entry_does_not_take_the_entry_along(root: Root, known: Manifest) -> None:
    model = known.models["m"].model_copy(update={"extras": {"checker": []}})
    changed = manifest.Manifest({**known.models, "m": model})
    with pytest.raises(SpecError, match="are part of m, and go with it alone"):
        remove.removal(root, changed, "m+checker")
    assert len(names(root)) == 4


def test_seed_serves_the_former_id_too(
    root: Root, known: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would serve is looked at where the server is made."""
    from provision.models import seed_server

    served: list[str] = []

    def server(models: list[seed_server.ServedModel], *_: object) -> None:
        served.extend(each.repo for each in models)
        raise SpecError("enough")

    monkeypatch.setattr(seed_server, "server", server)
    root.marker.write_text('{"schema": 1, "id": "x"}')
    (tmp_path / "host.toml").write_text("models = []\n")
    argv = ["seed", "--root", str(root.path), "--host", str(tmp_path / "host.toml"), "--envs", str(tmp_path)]
    assert "enough" in CliRunner().invoke(models_cli.app, argv).output
    assert served == [REPO, OLD] * 2
