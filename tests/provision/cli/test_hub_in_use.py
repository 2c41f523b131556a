"""Tests that commands use the hub cache that huggingface_hub uses, and report a cache that programs do not find."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.core.step import State
from provision.models import hub_in_use
from provision.models.hub_in_use import HubStep
from tests.conftest import CHECKOUT
from tests.provision import hub_server, run_command
from tests.provision.hub_server import manifest_entry

if TYPE_CHECKING:
    from tests.provision.http_server import Server

REPO = "owner/model"
FILES = {"model_index.json": b"{}", "unet/model.safetensors": b"W" * 3000}
FIND = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r}, local_files_only=True)"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Return a root with a marker and a hub cache."""
    root = Root(tmp_path / "volume")
    root.hub.mkdir(parents=True)
    root.state.mkdir()
    root.marker.write_text(json.dumps({"schema": 1, "id": "x"}))
    return root


@pytest.fixture
def flags(serve: Any, monkeypatch: pytest.MonkeyPatch, envs: Path, tmp_path: Path, root: Root) -> list[object]:
    """Start a hub with one model, and return the flags for the root and a manifest with that model."""
    server: Server = hub_server.start(serve, REPO, FILES)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    (envs / "models.toml").write_text(manifest_entry("m", REPO, FILES))
    (envs / "architectures").symlink_to(CHECKOUT / "envs/architectures")
    (tmp_path / "host.toml").write_text('relocate = []\nmodels = ["m"]\n')
    return ["--root", root.path, "--host", tmp_path / "host.toml", "--envs", envs]


def is_found() -> bool:
    """Return whether huggingface_hub, with this process's variables, finds the model offline by the repository's id."""
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-I", "-c", FIND], env=environment, check=False).returncode == 0


def output_of(*argv: object) -> tuple[int, str]:
    """Run `provision` with arguments, and return (exit code, stdout and stderr)."""
    completed = run_command.provision(*argv)
    return completed.returncode, completed.stdout + completed.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HOME", "{tmp}/hf"),
        ("HUGGINGFACE_HUB_CACHE", "{tmp}/old name"),
        ("HF_HUB_CACHE", "$PLACE/hub"),
        ("XDG_CACHE_HOME", "~/x"),
    ],
)
def test_pull_fills_the_hub_cache_that_a_variable_of_the_shell_names(
    flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, root: Root
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    monkeypatch.setenv(name, value.format(tmp=tmp_path))
    code, text = output_of("models", "pull", "m", *flags)
    assert code == 0
    assert is_found()
    assert f"(from {name})" in text
    assert f"unset {name}" in text, "the volume has a hub of its own"
    assert not list(root.hub.iterdir())
    assert "present" in output_of("models", "list", *flags)[1]


def test_pull_without_a_relocated_hub_cache_fills_the_homes_cache_and_not_the_volumes(
    flags: list[object], root: Root, home: Path
) -> None:
    root.hub.mkdir(parents=True, exist_ok=True)
    assert output_of("models", "pull", "m", *flags)[0] == 0
    assert is_found()
    assert (home / ".cache/huggingface/hub").is_dir()
    assert list(root.hub.glob("models--*")) == []


def test_pull_to_the_volume_reports_a_missing_link_from_the_home_to_the_hub_cache(
    flags: list[object], root: Root, home: Path
) -> None:
    Path(str(flags[3])).write_text('relocate = ["huggingface"]\nmodels = ["m"]\n')
    code, text = output_of("models", "pull", "m", *flags)
    assert code == 3
    assert not is_found()
    assert "provision relocate huggingface" in text
    assert f"export HF_HUB_CACHE={root.hub}" in text
    assert output_of("doctor", *flags)[0] == 4
    step = HubStep(root)
    assert step.check().state is State.DRIFTED
    with pytest.raises(BlockedError, match="do not find its models"):
        step.apply()
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/hub").symlink_to(root.hub)
    assert output_of("models", "pull", "m", *flags)[0] == 0
    assert is_found()
    assert step.check().state is State.OK


@pytest.mark.parametrize("value", ["./models", "", "$NOT_SET/hub"])
def test_relative_path_of_the_hub_cache_is_reported_with_the_absolute_path_to_export(
    flags: list[object], root: Root, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", value)
    code, text = output_of("models", "pull", "m", *flags)
    assert code == 3
    assert "relative path" in text
    assert is_found(), "the relative path leads to the models in the current working folder"
    assert HubStep(root).check().state is State.DRIFTED
    assert f"export HF_HUB_CACHE={shlex.quote(str(Path(value).absolute()))}" in text


def test_variable_that_leads_through_a_link_to_the_volumes_hub_cache_is_accepted(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").symlink_to(root.hub.parent)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    hub = hub_in_use.of(root)
    assert (hub.path, hub.problem, hub.is_found) == (root.hub, None, True)
    assert hub.line == f"hub in use: {root.hub} (from HF_HOME, {tmp_path}/hf/hub leads to it)"


def test_models_list_and_doctor_show_the_hub_cache_and_the_variable_that_names_it(
    flags: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    document = json.loads(output_of("models", "list", "--json", *flags)[1])
    assert document["hub"]["path"] == str(tmp_path / "hf/hub")
    assert document["hub"]["from"] == "HF_HOME"
    assert f"{tmp_path}/hf/hub (from HF_HOME)" in output_of("doctor", *flags)[1]
