"""Tests that undo refuses a journal that names paths which no run of firstlight changes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.layout import Root
from provision.volume.owner import current
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Make a folder that is neither in the home nor in the root, with one file."""
    folder = tmp_path / "system"
    folder.mkdir()
    (folder / "passwd").write_text("root")
    return folder


@pytest.fixture
def root(tmp_path: Path, home: Path) -> Root:
    """Make a root by a real run, which relocates ~/data."""
    (home / "data").mkdir()
    (home / "data/file").write_text("mine")
    assert provision("relocate", home / "data", "--root", tmp_path / "root").returncode == 0
    return Root(tmp_path / "root")


def write_journal(root: Root, home: Path, *rows: dict[str, Any]) -> None:
    """Write the journal of a run of this owner that is newer than all others."""
    owner = current(home)
    header = {"schema": 2, "run": "99990101T000000Z-1", "started": "99990101T000000Z", "command": "setup"}
    header |= {"host": owner.host, "home": owner.home, "root": str(root.path)}
    lines = [header, *({"at": 1e10, **row} for row in rows)]
    (root.journal / "99990101T000000Z-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def hostile_acts(outside: Path, root: Root, home: Path) -> dict[str, dict[str, Any]]:
    """Return {name: act} of acts that would change something outside of the home and the root."""
    digest = hashlib.sha256((outside / "passwd").read_bytes()).hexdigest()
    backup = root.state / "backup/evil"
    file = {"act": "file", "backup": str(backup), "mode": 511, "sha256": digest}
    move = {"source": str(home / "x"), "target": str(outside), "whole": str(outside)}
    return {
        "a file": file | {"path": str(outside / "passwd")},
        "a removed file": file | {"path": str(outside / "passwd"), "backup": None, "mode": None},
        "a backup": file | {"path": str(home / "copy"), "backup": str(outside / "passwd"), "sha256": None},
        "a file above the home": file | {"path": f"{home}/../system/passwd"},
        "a moved folder": {"act": "move", "aside": str(home / "aside"), **move},
        "a link": {"act": "link", "path": str(home / "x"), "was": None, **move},
        "links": {"act": "links", "paths": [str(home / "x")], "targets": [str(outside)]},
    }


@pytest.mark.parametrize(
    "name",
    ["a file", "a removed file", "a backup", "a file above the home", "a moved folder", "a link", "links"],
)
def test_undo_refuses_a_journal_with_a_path_that_no_run_changes(
    root: Root, home: Path, outside: Path, name: str
) -> None:
    (root.state / "backup").mkdir(exist_ok=True)
    (root.state / "backup/evil").write_text("evil")
    (home / "x").symlink_to(outside)
    write_journal(root, home, hostile_acts(outside, root, home)[name])
    for words in (["--dry-run"], []):
        refused = provision("undo", *words, "--root", root.path)
        assert refused.returncode == 4, refused.stdout + refused.stderr
        assert "which no run of firstlight changes, so nothing was undone" in refused.stderr
    assert (outside / "passwd").read_text() == "root"
    assert not (home / "copy").exists()
    assert (home / "x").is_symlink()


def test_start_file_behind_a_link_out_of_the_home_is_restored(root: Root, home: Path, outside: Path) -> None:
    (outside / "bashrc").write_text("# before\n")
    (home / ".bashrc").symlink_to(outside / "bashrc")
    host = home / "host.toml"
    host.write_text('login = true\nmodels = []\nmirror = "keep"\nrelocate = []\n')
    provision("setup", "--root", root.path, "--host", host, "--offline")
    assert "firstlight" in (outside / "bashrc").read_text()
    undone = provision("undo", "--root", root.path, "--host", host)
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert (outside / "bashrc").read_text() == "# before\n"
