"""Tests that undo brings home what was saved in a folder that setup had made empty on the volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.setup.several_hosts import Hosts


def made_empty(hosts: Hosts) -> Path:
    """Let setup make an empty ~/work on the volume, save a file through its link, and return the path in the home."""
    folders = 'relocate = ["pip", {path = "~/work", to = "work"}]'
    (hosts.base / "host.toml").write_text(f'models = []\nmirror = "keep"\n{folders}\n')
    hosts.run("a", "setup", "--offline")
    work = hosts.home("a") / "work"
    assert work.readlink() == hosts.volume / "work"
    (work / "deep").mkdir()
    (work / "deep/file").write_text("saved through the link")
    (hosts.home("a") / ".cache/pip/wheel").write_text("a download")
    return work


def test_undo_moves_files_home_that_were_saved_in_a_folder_which_setup_made_empty(hosts: Hosts) -> None:
    work = made_empty(hosts)
    assert "move" in hosts.run("a", "undo", "--dry-run").stdout
    hosts.good("a", "undo")
    assert not work.is_symlink()
    assert (work / "deep/file").read_text() == "saved through the link"
    assert not (hosts.volume / "work").exists()
    assert (hosts.root.cache / "pip/wheel").read_text() == "a download", "the content of a tool's cache stays"
    assert not (hosts.home("a") / ".cache/pip").exists()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_undo_killed_while_it_moves_such_a_folder_home_is_completed_by_the_next_undo(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Interrupt the undo at one of its first renames."""
    from provision.fs.open_dir import OpenDir

    work = made_empty(hosts)
    rename, left = OpenDir.rename, [number]

    def interrupt(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        rename(self, name, other, new)

    with monkeypatch.context() as patch:
        patch.setattr(OpenDir, "rename", interrupt)
        hosts.run("a", "undo")
    hosts.run("a", "undo")
    assert not work.is_symlink()
    assert (work / "deep/file").read_text() == "saved through the link"
    assert not (hosts.volume / "work").exists()
