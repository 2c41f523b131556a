"""Tests the commands `provision models …` on a blocked cache, and together with other runs."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from provision.cli import common, models
from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.models import manifest, remove
from provision.models.blob_lock import BlobLock
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.verify import Depth
from tests.provision import hub_server
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.http_server import Server

VOCABULARY = b'{"v": 1}' * 2000
FIRST = {"a/model.safetensors": b"A" * 5000, "vocab.json": VOCABULARY}
SECOND = {"b/model.safetensors": b"B" * 4000, "vocab.json": VOCABULARY}


@pytest.fixture
def hub(serve: Any) -> Server:
    """Start a hub with the files of two models that share a vocabulary."""
    server: Server = hub_server.start(serve, REPO, {**FILES, **FIRST, **SECOND})
    return server


@pytest.fixture
def flags(tmp_path: Path, envs: Path, hub: Server) -> list[str]:
    """Return the flags for a host without relocations and a manifest with both models, `m` and `n`."""
    text = hub_server.manifest_entry("m", REPO, FIRST) + hub_server.manifest_entry("n", REPO, SECOND)
    (envs / "models.toml").write_text(text)
    (tmp_path / "host.toml").write_text("relocate = []\n")
    return ["--host", str(tmp_path / "host.toml"), "--envs", str(envs)]


def pull(*argv: str) -> Any:
    """Run `provision models pull` with arguments, and return the result of the CliRunner."""
    return CliRunner().invoke(models.app, ["pull", *argv])


class TestJsonOfABlockedPull:
    """Tests that a blocked pull with --json prints one object with a row for each tried model."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Return the path of the hub cache, which HF_HUB_CACHE names."""
        folder = tmp_path / "hub"
        monkeypatch.setenv("HF_HUB_CACHE", str(folder))
        return folder

    def pulled_rows(self, hub: Server, flags: list[str]) -> tuple[int, list[tuple[str, str]], str]:
        """Pull both models; return (exit code, [(name, state) of each row], error of the first row)."""
        result = pull("m", "n", "--json", "--endpoint", hub.url, *flags)
        document = json.loads(result.stdout)
        assert document["exit"] == result.exit_code
        rows = [(row["name"], row["state"]) for row in document["models"]]
        return result.exit_code, rows, document["models"][0]["error"]

    @pytest.mark.parametrize("target", ["nowhere", "hub"], ids=["dangling", "looping"])
    def test_hub_cache_that_is_a_dangling_or_looping_link_blocks_the_pull(
        self, hub: Server, flags: list[str], cache: Path, tmp_path: Path, target: str
    ) -> None:
        cache.symlink_to(tmp_path / target)
        code, rows, error = self.pulled_rows(hub, flags)
        assert (code, rows) == (4, [("m", "failed"), ("n", "failed")])
        assert "its volume is not mounted" in error

    def test_root_that_is_not_set_up_blocks_the_pull(self, hub: Server, flags: list[str], tmp_path: Path) -> None:
        code, rows, error = self.pulled_rows(hub, [*flags, "--root", str(tmp_path / "volume")])
        assert (code, rows) == (4, [("m", "failed"), ("n", "failed")])
        assert "is not set up" in error

    def test_hub_cache_with_a_too_long_name_fails_the_pull(
        self, hub: Server, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ("n" * 300)))
        code, rows, error = self.pulled_rows(hub, flags)
        assert (code, rows) == (1, [("m", "failed"), ("n", "failed")])
        assert "File name too long" in error

    def test_file_in_the_place_of_the_repositorys_folder_blocks_the_pull(
        self, hub: Server, flags: list[str], cache: Path
    ) -> None:
        cache.mkdir()
        (cache / f"models--{REPO.replace('/', '--')}").write_text("x")
        code, rows, error = self.pulled_rows(hub, flags)
        assert (code, rows) == (4, [("m", "failed")]), "the next model would fail for the same reason"
        assert "a file is in the place of a folder" in error

    def test_disk_error_during_planning_fails_the_pull(
        self, hub: Server, flags: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: object) -> None:
            raise OSError(5, os.strerror(5), "a disk")

        monkeypatch.setattr("shutil.disk_usage", fail)
        code, rows, error = self.pulled_rows(hub, flags)
        assert (code, rows) == (1, [("m", "failed"), ("n", "failed")])
        assert "a disk: Input/output error" in error

    def test_pull_without_json_reports_a_dangling_hub_cache_link_on_stderr_only(
        self, flags: list[str], cache: Path, tmp_path: Path
    ) -> None:
        cache.symlink_to(tmp_path / "nowhere")
        result = pull("m", *flags)
        assert (result.exit_code, result.stdout) == (4, "")
        assert "its volume is not mounted" in result.stderr


@pytest.mark.parametrize("is_marked", [True, False], ids=["root with setup", "root without setup"])
def test_remove_keeps_a_blob_that_another_model_gets_during_the_confirmation(
    hub: Server, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_marked: bool
) -> None:
    """Pull a second model, which shares a file with the first one, while the prompt waits for confirmation."""
    root = Root(tmp_path / "volume")
    if is_marked:
        root.state.mkdir(parents=True)
        root.marker.write_text(json.dumps({"schema": 1, "id": "x"}))
        root.hub.mkdir(parents=True)
    (tmp_path / "host.toml").write_text('relocate = ["huggingface"]\n')
    root_flags = [*flags, "--root", str(root.path)]
    entries = manifest.load(tmp_path / "envs/models.toml")

    def pull_of(name: str) -> Pull:
        return Pull(root, name, entries.pick(name), Hubs(root, {"HF_ENDPOINT": hub.url}))

    first = pull_of("m")
    first.run(first.plan(), lambda *_: None)

    def confirm(_: str) -> bool:
        second = pull_of("n")
        second.run(second.plan(), lambda *_: None)
        return True

    monkeypatch.setattr("typer.confirm", confirm)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(common, "sys", SimpleNamespace(stdin=terminal, exit=sys.exit, argv=[]))
    result = CliRunner().invoke(models.app, ["remove", "m", *root_flags])
    assert result.exit_code == 0, result.output
    assert [state.state for state in pull_of("n").check_files(Depth.HASH)] == ["ok", "ok"]
    assert not (first.folder / "snapshots" / REVISION / "a/model.safetensors").exists()
    assert [state.state for state in first.check_files(Depth.SIZE)] == ["missing", "ok"]


def test_remove_keeps_a_blob_that_another_model_gets_just_before_the_blob_is_locked(
    hub: Server, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path / "volume")
    root.hub.mkdir(parents=True)
    root.state.mkdir()
    entries = manifest.load(tmp_path / "envs/models.toml")
    first, second = (Pull(root, name, entries.pick(name), Hubs(root, {"HF_ENDPOINT": hub.url})) for name in "mn")
    first.run(first.plan(), lambda *_: None)

    class LateLock(BlobLock):
        def take(self) -> bool:
            if not (second.snapshot / "b").exists():
                second.run(second.plan(), lambda *_: None)
            return super().take()

    monkeypatch.setattr(remove, "BlobLock", LateLock)
    remove.remove(root, entries, "m")
    assert [state.state for state in second.check_files(Depth.HASH)] == ["ok", "ok"]
    assert [state.state for state in first.check_files(Depth.SIZE)] == ["missing", "ok"]


def test_remove_is_blocked_by_a_download_that_is_locked_under_another_hash_of_the_file(
    hub: Server, flags: list[str], tmp_path: Path
) -> None:
    """Hold the download lock with the name of the pinned sha256, while the blob's name is git's hash of the file."""
    root = Root(tmp_path / "volume")
    root.hub.mkdir(parents=True)
    root.state.mkdir()
    digest = hashlib.sha256(VOCABULARY).hexdigest()
    text = hub_server.manifest_entry("m", REPO, FIRST)
    row = next(line for line in text.splitlines() if "vocab" in line)
    pinned = f'  {{path = "vocab.json", size = {len(VOCABULARY)}, sha256 = "{digest}"}},'
    (tmp_path / "envs/models.toml").write_text(text.replace(row, pinned))
    entries = manifest.load(tmp_path / "envs/models.toml")
    work = Pull(root, "m", entries.pick("m"), Hubs(root, {"HF_ENDPOINT": hub.url}))
    work.run(work.plan(), lambda *_: None)
    lock = BlobLock(root.hub_in_use / ".locks" / work.spec.folder / f"{digest}.lock")
    assert lock.take()
    with pytest.raises(BlockedError, match="is being downloaded by another run"):
        remove.remove(root, entries, "m")
    lock.release()
    assert [state.state for state in work.check_files(Depth.HASH)] == ["ok", "ok"]
    remove.remove(root, entries, "m")
    assert not work.folder.exists()


def test_pull_of_a_second_pinned_revision_does_not_change_refs_main(
    hub: Server, flags: list[str], tmp_path: Path, home: Path
) -> None:
    new = "2" * 40
    content, headers = hub_server.served(REPO, SECOND, new)
    hub.content |= content
    hub.headers |= headers
    (tmp_path / "envs/models.toml").write_text(
        hub_server.manifest_entry("m", REPO, FIRST)
        + hub_server.manifest_entry("n", REPO, SECOND).replace(REVISION, new)
    )
    main = home / ".cache/huggingface/hub" / f"models--{REPO.replace('/', '--')}" / "refs/main"
    for name in ("m", "n", "m"):
        result = pull(name, "--endpoint", hub.url, *flags)
        assert result.exit_code == 0, result.output
        assert main.read_text() == REVISION
        assert ("refs/main is 1111111" in result.stdout) is (name == "n")
