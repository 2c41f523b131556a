"""Defines the scenario of a model that is pulled from a local hub."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

from provision.config.models import cache_folder
from provision.core.step import State
from provision.models import manifest
from provision.models.hubs import Hubs
from provision.models.snapshots import SnapshotStep
from provision.models.step import ModelStep
from provision.volume.journal import Journal
from tests.provision import hub_server
from tests.torture import scenarios
from tests.torture.scenarios import Field, Reading, Scenario

if TYPE_CHECKING:
    from pathlib import Path

REPO = "owner/model"
FILES = {
    "model_index.json": b'{"_class_name": "X"}\n',
    "unet/model.safetensors": random.Random(1).randbytes(40_000),  # noqa: S311 (weights, not secrets)
    "vae/model.safetensors": random.Random(2).randbytes(9_000),  # noqa: S311
}
_OTHER = cache_folder("owner/other")


def lay(field: Field) -> None:
    """Build a volume with a marker, a cache with another model of the user, and a manifest with the test model."""
    scenarios.lay_volume(field)
    blobs = field.root.hub / _OTHER / "blobs"
    blobs.mkdir(parents=True)
    (blobs / ("1" * 64)).write_bytes(b"the user's own")
    (field.root.path / "models.toml").write_text(hub_server.manifest_entry("m", REPO, FILES))


def step(field: Field) -> ModelStep:
    spec = manifest.load(field.root.path / "models.toml").pick("m")
    hubs = Hubs(field.root, {"HF_ENDPOINT": os.environ["HF_ENDPOINT"]})
    return ModelStep(field.root, "m", spec, hubs, retry=False, progress=lambda *_: None)


def pull(field: Field) -> None:
    model = step(field)
    snapshots = SnapshotStep(field.root, [model.pull.spec], Journal(field.root.journal, "setup"))
    scenarios.converge([snapshots, model])


def is_whole(field: Field, before: Reading, after: Reading) -> None:
    """Pull again, and assert that the check passes and that every file in the snapshot has the right bytes."""
    pull(field)
    check = step(field).check(deep=True)
    assert check.state is State.OK, check.detail
    folder = field.root.hub / cache_folder(REPO)
    for path, content in FILES.items():
        assert (folder / "snapshots" / hub_server.REVISION / path).read_bytes() == content
    assert (folder / "refs/main").read_text() == hub_server.REVISION
    assert (field.root.hub / _OTHER / "blobs" / ("1" * 64)).read_bytes() == b"the user's own"


def kept(field: Field) -> list[Path]:
    return [field.root.hub, field.home, field.root.path / "models.toml"]


PULL: dict[str, Scenario] = {"pull of a model": Scenario(lay, pull, {"setup": is_whole}, kept, True)}
