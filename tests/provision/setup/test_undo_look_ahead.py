"""Tests that undo checks every step before its first change, and that --dry-run reports the same as undo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import BlockedError
from provision.relocation.move import FolderMove
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from provision.relocation.move_pair import MovePair


@pytest.fixture
def flags(tmp_path: Path, volume: Path) -> list[object]:
    (tmp_path / "host.toml").write_text(
        'models = []\nrelocate = [{path = "~/first", to = "first"}, {path = "~/second", to = "second"}, "pip"]\n'
    )
    return ["--root", volume, "--host", tmp_path / "host.toml"]


@pytest.fixture
def folders(home: Path, flags: list[object], envs: Path) -> tuple[Path, Path]:
    """Relocate two folders of the home and pip's cache by one setup, and return the two folders."""
    return relocated(home, flags, envs)


def relocated(home: Path, flags: list[object], envs: Path) -> tuple[Path, Path]:
    for name in ("first", "second"):
        (home / name).mkdir()
        (home / name / "file").write_text(name)
    completed = provision("setup", *flags, "--envs", envs, env={"HOME": str(home)})
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return home / "first", home / "second"


def entries_of(*tops: Path) -> dict[str, object]:
    """Return {path: (mode, link target or None)} of all entries of folders, without the files of the run lock."""
    paths = [path for top in tops for path in sorted(top.rglob("*")) if path.name not in {"lock", "holder.json"}]
    return {str(path): (path.lstat().st_mode, path.readlink() if path.is_symlink() else None) for path in paths}


def assert_undo_is_blocked(flags: list[object], home: Path, text: str) -> None:
    """Assert that undo with and without --dry-run is blocked with the same text, and that no entry changes."""
    volume = Path(str(flags[1]))
    before = entries_of(home, volume)
    outputs = []
    for dry in (["--dry-run"], []):
        refused = provision("undo", *flags, *dry, env={"HOME": str(home)})
        assert refused.returncode == 4, refused.stdout + refused.stderr
        assert text in refused.stdout
        outputs.append([line.rpartition("  (")[0] for line in refused.stdout.splitlines() if "blocked" in line])
        assert entries_of(home, volume) == before
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("use", ["open file", "working folder"])
def test_undo_changes_nothing_while_a_process_uses_one_of_the_moved_folders(
    home: Path, flags: list[object], folders: tuple[Path, Path], use: str
) -> None:
    first, _ = folders
    argv = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    stream = (first / "file").open("rb") if use == "open file" else None
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stream,
        cwd=None if stream else first.resolve(),
    ) as child:
        if stream:
            stream.close()
        assert child.stdout is not None
        child.stdout.readline()
        assert_undo_is_blocked(flags, home, f"pid {child.pid} ")
        child.communicate()
    assert provision("undo", *flags).returncode == 0
    assert [path.is_symlink() for path in folders] == [False, False]
    assert not (home / ".cache/pip").is_symlink()


@pytest.fixture
def small_home(small_disk: Path) -> Iterator[Path]:
    home = small_disk / "home"
    home.mkdir()
    yield home
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


def test_undo_changes_nothing_if_the_home_has_too_little_space_for_both_folders(
    small_home: Path, flags: list[object], envs: Path
) -> None:
    """Fill each of two folders with 5 MB; the file system of the home has 8 MB."""
    folders = relocated(small_home, flags, envs)
    for folder in folders:
        (folder / "large").write_bytes(os.urandom(5_000_000))
    assert_undo_is_blocked(flags, small_home, "Free some space, then run again.")
    (folders[0] / "large").unlink()
    undone = provision("undo", *flags, env={"HOME": str(small_home)})
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert (folders[1] / "large").stat().st_size == 5_000_000


def test_undo_changes_nothing_if_the_home_has_too_few_inodes(small_home: Path, flags: list[object], envs: Path) -> None:
    first, _ = relocated(small_home, flags, envs)
    for number in range(80):
        (first / str(number)).touch()
    assert_undo_is_blocked(flags, small_home, "inodes are free")


def test_undo_changes_nothing_in_a_read_only_home(
    small_home: Path, flags: list[object], envs: Path, small_disk: Path
) -> None:
    relocated(small_home, flags, envs)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_undo_is_blocked(flags, small_home, "is not writable")


def test_undo_changes_nothing_if_one_of_its_links_was_replaced(
    home: Path, flags: list[object], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first, _ = folders
    first.unlink()
    first.symlink_to(tmp_path)
    assert_undo_is_blocked(flags, home, f"{first} is a link to {tmp_path} now")
    first.unlink()
    first.mkdir()
    (first / "own").write_text("made after the wipe of the link")
    assert_undo_is_blocked(flags, home, f"{first} is a real folder now")


def test_undo_restores_the_link_of_a_folder_that_cannot_be_moved_back(
    home: Path, flags: list[object], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FolderMove, pairs: Sequence[MovePair]) -> None:
        raise BlockedError("a program opened a file just now.")

    before = entries_of(home)
    with monkeypatch.context() as patch:
        patch.setattr(FolderMove, "run", fail)
        refused = provision("undo", *flags)
    assert refused.returncode == 1, "the link of pip was already removed, so the undo is in part done"
    assert "opened a file just now. " in refused.stdout
    assert "Run the same command again to continue." in refused.stdout
    for folder in folders:
        assert folder.is_symlink()
        assert before[str(folder)] == entries_of(home)[str(folder)]
    assert provision("undo", *flags).returncode == 0
    assert [path.is_symlink() for path in folders] == [False, False]


def test_undo_stopped_by_a_program_that_opens_a_file_is_completed_by_the_next_undo(
    home: Path, flags: list[object], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start a process with an open file in one folder, after undo has moved the other folder back."""
    run, children = FolderMove.run, []

    def run_and_open(self: FolderMove, pairs: Sequence[MovePair]) -> None:
        run(self, pairs)
        (other,) = [folder for folder in folders if folder.is_symlink()]
        with (other / "file").open("rb") as stream:
            children.append(subprocess.Popen(["sleep", "60"], stdin=stream))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(FolderMove, "run", run_and_open)
            stopped = provision("undo", *flags)
        (child,) = children
        assert stopped.returncode == 1, stopped.stdout + stopped.stderr
        assert f"pid {child.pid} (sleep 60) uses" in stopped.stdout
        assert "Run the same command again to continue." in stopped.stdout
        assert sorted(folder.is_symlink() for folder in folders) == [False, True]
        assert [(folder / "file").read_text() for folder in folders] == ["first", "second"]
    finally:
        for child in children:
            child.kill()
            child.wait()
    completed = provision("undo", *flags)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert [path.is_symlink() for path in folders] == [False, False]
    assert [(folder / "file").read_text() for folder in folders] == ["first", "second"]
