"""The commands of models where something is in the way, or another run comes between."""

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

    from tests.provision.http_server import Played

VOCABULARY = b'{"v": 1}' * 2000
ONE = {"a/model.safetensors": b"A" * 5000, "vocab.json": VOCABULARY}
OTHER = {"b/model.safetensors": b"B" * 4000, "vocab.json": VOCABULARY}


@pytest.fixture
def hub(play: Any) -> Played:
    played: Played = hub_server.start(play, REPO, {**FILES, **ONE, **OTHER})
    return played


@pytest.fixture
def flags(tmp_path: Path, envs: Path, hub: Played) -> list[str]:
    text = hub_server.manifest_entry("m", REPO, ONE) + hub_server.manifest_entry("n", REPO, OTHER)
    (envs / "models.toml").write_text(text)
    (tmp_path / "host.toml").write_text("relocate = []\n")
    return ["--host", str(tmp_path / "host.toml"), "--envs", str(envs)]


def pull(*argv: str) -> Any:
    return CliRunner().invoke(models.app, ["pull", *argv])


class TestOneObject:
    """Whatever is in the way, a program that asked for JSON gets an object with a row for each model."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "hub"
        monkeypatch.setenv("HF_HUB_CACHE", str(folder))
        return folder

    def told(self, hub: Played, flags: list[str]) -> tuple[int, list[tuple[str, str]], str]:
        done = pull("m", "n", "--json", "--endpoint", hub.url, *flags)
        told = json.loads(done.stdout)
        assert told["exit"] == done.exit_code
        rows = [(row["name"], row["state"]) for row in told["models"]]
        return done.exit_code, rows, told["models"][0]["error"]

    @pytest.mark.parametrize("target", ["nowhere", "hub"], ids=["dangling", "looping"])
    def test_a_link_that_leads_nowhere(
        self, hub: Played, flags: list[str], cache: Path, tmp_path: Path, target: str
    ) -> None:
        cache.symlink_to(tmp_path / target)
        code, rows, error = self.told(hub, flags)
        assert (code, rows) == (4, [("m", "failed"), ("n", "failed")])
        assert "its volume is not mounted" in error

    def test_a_root_that_is_not_set_up(self, hub: Played, flags: list[str], tmp_path: Path) -> None:
        code, rows, error = self.told(hub, [*flags, "--root", str(tmp_path / "volume")])
        assert (code, rows) == (4, [("m", "failed"), ("n", "failed")])
        assert "is not set up" in error

    def test_a_name_that_is_too_long(
        self, hub: Played, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ("n" * 300)))
        code, rows, error = self.told(hub, flags)
        assert (code, rows) == (1, [("m", "failed"), ("n", "failed")])
        assert "File name too long" in error

    def test_a_file_in_the_place_of_a_folder(self, hub: Played, flags: list[str], cache: Path) -> None:
        cache.mkdir()
        (cache / f"models--{REPO.replace('/', '--')}").write_text("x")
        code, rows, error = self.told(hub, flags)
        assert (code, rows) == (4, [("m", "failed")]), "no other one would do better"
        assert "a file is in the place of a folder" in error

    def test_what_the_plan_cannot_read(
        self, hub: Played, flags: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: object) -> None:
            raise OSError(5, os.strerror(5), "a disk")

        monkeypatch.setattr("shutil.disk_usage", fail)
        code, rows, error = self.told(hub, flags)
        assert (code, rows) == (1, [("m", "failed"), ("n", "failed")])
        assert "a disk: Input/output error" in error

    def test_without_json_it_is_an_error(self, flags: list[str], cache: Path, tmp_path: Path) -> None:
        cache.symlink_to(tmp_path / "nowhere")
        done = pull("m", *flags)
        assert (done.exit_code, done.stdout) == (4, "")
        assert "its volume is not mounted" in done.stderr


@pytest.mark.parametrize("is_marked", [True, False], ids=["a root", "the home's own cache"])
def test_what_another_run_has_come_to_need_stays(
    hub: Played, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_marked: bool
) -> None:
    """While a person is asked, another entry is pulled that shares a file."""
    root = Root(tmp_path / "volume")
    if is_marked:
        root.state.mkdir(parents=True)
        root.marker.write_text(json.dumps({"schema": 1, "id": "x"}))
        root.hub.mkdir(parents=True)
    chosen = [*flags, "--root", str(root.path)]
    known = manifest.load(tmp_path / "envs/models.toml")

    def pulled(name: str) -> Pull:
        return Pull(root, name, known.pick(name), Hubs(root, {"HF_ENDPOINT": hub.url}))

    first = pulled("m")
    first.run(first.plan(), lambda *_: None)

    def confirm(_: str) -> bool:
        other = pulled("n")
        other.run(other.plan(), lambda *_: None)
        return True

    monkeypatch.setattr("typer.confirm", confirm)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(common, "sys", SimpleNamespace(stdin=terminal, exit=sys.exit, argv=[]))
    done = CliRunner().invoke(models.app, ["remove", "m", *chosen])
    assert done.exit_code == 0, done.output
    assert [state.state for state in pulled("n").look(Depth.HASH)] == ["ok", "ok"]
    assert not (first.folder / "snapshots" / REVISION / "a/model.safetensors").exists()
    assert [state.state for state in first.look(Depth.SIZE)] == ["missing", "ok"]


def test_what_is_needed_a_moment_before_its_lock_is_ours_stays(
    hub: Played, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path / "volume")
    root.hub.mkdir(parents=True)
    root.state.mkdir()
    known = manifest.load(tmp_path / "envs/models.toml")
    first, other = (Pull(root, name, known.pick(name), Hubs(root, {"HF_ENDPOINT": hub.url})) for name in "mn")
    first.run(first.plan(), lambda *_: None)

    class Late(BlobLock):
        def take(self) -> bool:
            if not (other.snapshot / "b").exists():
                other.run(other.plan(), lambda *_: None)
            return super().take()

    monkeypatch.setattr(remove, "BlobLock", Late)
    remove.remove(root, known, "m")
    assert [state.state for state in other.look(Depth.HASH)] == ["ok", "ok"]
    assert [state.state for state in first.look(Depth.SIZE)] == ["missing", "ok"]


def test_what_is_fetched_under_the_pin_of_another_hash_is_left_alone(
    hub: Played, flags: list[str], tmp_path: Path
) -> None:
    """The lock bears the pin of what is fetched; the blob bears git's hash."""
    root = Root(tmp_path / "volume")
    root.hub.mkdir(parents=True)
    root.state.mkdir()
    digest = hashlib.sha256(VOCABULARY).hexdigest()
    text = hub_server.manifest_entry("m", REPO, ONE)
    row = next(line for line in text.splitlines() if "vocab" in line)
    pinned = f'  {{path = "vocab.json", size = {len(VOCABULARY)}, sha256 = "{digest}"}},'
    (tmp_path / "envs/models.toml").write_text(text.replace(row, pinned))
    known = manifest.load(tmp_path / "envs/models.toml")
    work = Pull(root, "m", known.pick("m"), Hubs(root, {"HF_ENDPOINT": hub.url}))
    work.run(work.plan(), lambda *_: None)
    lock = BlobLock(root.hub_in_use / ".locks" / work.spec.folder / f"{digest}.lock")
    assert lock.take()
    with pytest.raises(BlockedError, match="is being fetched by another run"):
        remove.remove(root, known, "m")
    lock.release()
    assert [state.state for state in work.look(Depth.HASH)] == ["ok", "ok"]
    remove.remove(root, known, "m")
    assert not work.folder.exists()


def test_two_entries_of_one_repository_do_not_take_turns_at_main(
    hub: Played, flags: list[str], tmp_path: Path, home: Path
) -> None:
    new = "2" * 40
    content, headers = hub_server.served(REPO, OTHER, new)
    hub.content |= content
    hub.headers |= headers
    (tmp_path / "envs/models.toml").write_text(
        hub_server.manifest_entry("m", REPO, ONE) + hub_server.manifest_entry("n", REPO, OTHER).replace(REVISION, new)
    )
    main = home / ".cache/huggingface/hub" / f"models--{REPO.replace('/', '--')}" / "refs/main"
    for name in ("m", "n", "m"):
        done = pull(name, "--endpoint", hub.url, *flags)
        assert done.exit_code == 0, done.output
        assert main.read_text() == REVISION
        assert ("refs/main names 1111111" in done.stdout) is (name == "n")
