"""Tests that a merge keeps environments, packages and repositories whole, and that undo separates them exactly."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.core.step import State
from provision.fs import tree
from provision.fs.open_dir import OpenDir
from provision.host.tool_caches import RelocatedFolder
from provision.relocation import whole_folders
from provision.relocation.move import FolderMove
from provision.relocation.move_pair import MovePair
from provision.relocation.step import RelocateStep
from provision.setup import undo as undo_runs
from provision.volume.journal import Journal
from provision.volume.marker import VolumeStep
from provision.volume.owner import current
from tests.provision import random_trees
from tests.provision.folder_moves import leftovers

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {
    "conda environment": {"conda-meta/history": "", "conda-meta/python-{0}.json": "{0}", "lib/shared": "{0}"},
    "virtual environment": {"pyvenv.cfg": "version = {0}", "lib/python{0}/site-packages/p.py": "{0}"},
    "conda package": {"info/index.json": "{0}", "bin/tool-{0}": "{0}"},
    "git repository": {".git/HEAD": "ref: refs/heads/main", ".git/objects/{0}": "{0}", "file": "{0}"},
    "torch.hub repository": {"hubconf.py": "{0}", "module_{0}.py": "{0}"},
    "folder of Python packages": {"p-{0}.dist-info/RECORD": "{0}", "p/__init__.py": "{0}"},
    "Python installation": {"lib/python3.{0}/os.py": "{0}", "bin/python3": "{0}"},
}


def write(folder: Path, kind: str, version: str, time: int = 10**9) -> dict[str, object]:
    """Write a whole folder of this kind and version, and return `random_trees.contents` of it; `time` is in seconds."""
    for path, text in KINDS[kind].items():
        file = folder / path.format(version)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(version))
        os.utime(file, (time, time))
    return random_trees.contents(folder)


def step_of(home: Path, volume: Path) -> RelocateStep:
    """Return the step that relocates ~/tools to VOLUME/tools, with a new journal."""
    root = Root(volume)
    if not root.marker.exists():
        VolumeStep(root, [], Journal(root.journal)).apply()
    return RelocateStep(
        "~/tools", [RelocatedFolder(home / "tools", volume / "tools")], root, home, Journal(root.journal, "relocate")
    )


def undo_newest(home: Path, root: Root) -> None:
    run = next(run for run in reversed(undo_runs.runs(root)) if run.header.command == "relocate" and not run.undone)
    for step in undo_runs.steps(run, root, home, Journal(root.journal, "undo")):
        if step.check().state is not State.OK:
            step.apply()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kept_name(name: str = "one") -> str:
    return f"{name}.firstlight-from-{platform.node()}"


@pytest.mark.parametrize("newer", ["home", "volume"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_keeps_two_different_whole_folders_of_one_name_under_two_names(
    home: Path, volume: Path, kind: str, newer: str
) -> None:
    step = step_of(home, volume)
    mine = write(home / "tools/deep/one", kind, "10", 2 * 10**9 if newer == "home" else 1)
    there = write(volume / "tools/deep/one", kind, "12")
    before = random_trees.read(home / "tools"), random_trees.contents(volume / "tools")
    step.apply()
    assert random_trees.contents(volume / "tools/deep/one") == there
    assert random_trees.contents(volume / "tools/deep" / kept_name()) == mine
    assert names_in(home / "tools/deep") == ["one", kept_name()]
    check = step.check()
    assert check.state is State.OK
    assert f"the {kind} {home}/tools/deep/one differs" in (check.fallback or "")
    assert f"{volume}/tools/deep/{kept_name()}" in (check.fallback or "")
    undo_newest(home, step.root)
    assert (random_trees.read(home / "tools"), random_trees.contents(volume / "tools")) == before
    assert leftovers(home, volume) == []


def test_merge_of_different_environments_explains_how_to_run_the_renamed_one(home: Path, volume: Path) -> None:
    step = step_of(home, volume)
    for kind, name in (("conda environment", "c"), ("virtual environment", "v")):
        write(home / "tools" / name, kind, "10")
        write(volume / "tools" / name, kind, "12")
    step.apply()
    notes = step.check().fallback or ""
    for name in ("c", "v"):
        assert f"Run {volume}/tools/{kept_name(name)}/bin/python -m NAME" in notes
    assert f"conda create --name NAME --clone {volume}/tools/{kept_name('c')}" in notes


@pytest.mark.parametrize("kind", KINDS)
def test_merge_of_two_equal_whole_folders_keeps_one_folder(home: Path, volume: Path, kind: str) -> None:
    step = step_of(home, volume)
    write(home / "tools/one", kind, "10", 1)
    content = write(volume / "tools/one", kind, "10")
    before = random_trees.read(home / "tools")
    step.apply()
    assert names_in(volume / "tools") == ["one"]
    assert random_trees.contents(volume / "tools/one") == content
    undo_newest(home, step.root)
    assert random_trees.read(home / "tools") == before
    assert random_trees.contents(volume / "tools/one") == content


def test_merge_reuses_an_equal_folder_that_an_earlier_home_left_on_the_volume(
    home: Path, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(volume / "tools/one", "conda environment", "12")
    before = write(home / "tools/one", "conda environment", "10")
    step_of(home, volume).apply()
    name = kept_name()
    for host in ("pod-2", "pod-3"):
        monkeypatch.setattr(platform, "node", lambda host=host: host)
        (home / "tools").unlink()
        write(home / "tools/one", "conda environment", "10")  # the new home has the folder of its image again
        step = step_of(home, volume)
        step.apply()
        assert names_in(volume / "tools") == ["one", name]
        assert name in (step.check().fallback or "")
    undo_newest(home, Root(volume))
    assert random_trees.contents(home / "tools/one") == before
    assert random_trees.contents(volume / "tools" / name) == before, "the folder belongs to an earlier run"


def test_merges_of_three_different_folders_of_one_name_keep_each_under_its_own_name(home: Path, volume: Path) -> None:
    write(volume / "tools/one", "git repository", "0")
    for version in ("1", "2", "3"):
        if (home / "tools").is_symlink():
            (home / "tools").unlink()
        write(home / "tools/one", "git repository", version)
        step_of(home, volume).apply()
    names = ["one", kept_name(), f"{kept_name()}-2", f"{kept_name()}-3"]
    assert names_in(volume / "tools") == names
    assert [(volume / "tools" / name / "file").read_text() for name in names] == ["0", "1", "2", "3"]


def test_merge_of_an_environment_that_lacks_a_file_adds_nothing_to_the_complete_one(home: Path, volume: Path) -> None:
    content = write(volume / "tools/one", "conda environment", "12")
    write(home / "tools/one", "conda environment", "12")
    (home / "tools/one/lib/shared").unlink()
    step_of(home, volume).apply()
    assert random_trees.contents(volume / "tools") == {f"one/{path}": text for path, text in content.items()}


def test_plain_folder_is_not_merged_into_an_environment_of_the_same_name(home: Path, volume: Path) -> None:
    content = write(volume / "tools/one", "virtual environment", "3.12")
    (home / "tools/one").mkdir(parents=True)
    (home / "tools/one/notes").write_text("mine")
    step_of(home, volume).apply()
    assert random_trees.contents(volume / "tools/one") == content
    assert (home / "tools" / kept_name() / "notes").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_relocation_of_a_whole_folder_onto_a_different_one_is_blocked_before_any_change(
    home: Path, volume: Path, kind: str
) -> None:
    step = step_of(home, volume)
    write(home / "tools", kind, "10")
    write(volume / "tools", kind, "12")
    before = random_trees.read(home), random_trees.read(volume)
    check = step.check()
    assert check.state is State.BLOCKED
    assert f"provision relocate {home}/tools --to PLACE" in check.detail
    with pytest.raises(BlockedError, match="never merged"):
        FolderMove(step.journal).run([MovePair(home / "tools", volume / "tools")])
    assert (random_trees.read(home), random_trees.read(volume)) == before


def test_relocated_repository_that_equals_the_one_on_the_volume_becomes_a_link(home: Path, volume: Path) -> None:
    step = step_of(home, volume)
    write(home / "tools", "git repository", "1")
    write(volume / "tools", "git repository", "1")
    step.apply()
    assert step.check().state is State.OK
    assert (home / "tools").is_symlink()


def test_undo_of_a_merge_is_blocked_if_the_renamed_folder_is_missing(home: Path, volume: Path) -> None:
    step = step_of(home, volume)
    write(home / "tools/one", "conda environment", "10")
    write(volume / "tools/one", "conda environment", "12")
    step.apply()
    with OpenDir.at(volume / "tools") as folder:
        tree.remove(folder, kept_name())
    run = undo_runs.choose(step.root, None, current(home))
    states = [item.check().state for item in undo_runs.steps(run, step.root, home, Journal(step.root.journal, "undo"))]
    assert State.BLOCKED in states
    assert (home / "tools").is_symlink()


def test_two_real_git_repositories_of_one_name_are_intact_after_a_merge(home: Path, volume: Path) -> None:
    step = step_of(home, volume)
    commits = {}
    for top in (home, volume):
        repository = top / "tools/project"
        repository.mkdir(parents=True)
        for argv in (
            ["git", "init", "-q", "-b", "main"],
            ["git", "-c", "user.name=n", "-c", "user.email=e@e", "commit", "-q", "--allow-empty", "-m", str(top)],
            ["git", "pack-refs", "--all"] if top == home else ["git", "status"],
        ):
            subprocess.run(argv, cwd=repository, check=True, capture_output=True)
        commits[top] = head(repository)
    step.apply()
    assert head(volume / "tools/project") == commits[volume]
    assert head(volume / "tools" / kept_name("project")) == commits[home]


def head(repository: Path) -> str:
    subprocess.run(["git", "fsck", "--strict"], cwd=repository, check=True, capture_output=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True
    ).stdout


def test_bare_git_repository_is_a_whole_folder_and_a_hub_cache_is_not(tmp_path: Path) -> None:
    for name in ("HEAD", "objects", "refs"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    for name in ("blobs", "refs", "snapshots"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    with OpenDir.at(tmp_path / "bare") as bare, OpenDir.at(tmp_path / "hub") as cache:
        assert whole_folders.kind_of(bare) == "git repository"
        assert whole_folders.kind_of(cache) is None


def test_undo_of_a_merge_is_blocked_by_a_new_folder_with_a_different_file_of_the_same_name(
    home: Path, volume: Path
) -> None:
    step = step_of(home, volume)
    for top, text in ((home, "mine"), (volume, "there")):
        (top / "tools").mkdir(exist_ok=True)
        (top / "tools/file").write_text(text)
    step.apply()
    (home / "tools").unlink()
    (home / "tools").mkdir()
    (home / "tools/file").write_text("since then")
    run = undo_runs.choose(step.root, None, current(home))
    steps = undo_runs.steps(run, step.root, home, Journal(step.root.journal, "undo"))
    assert State.BLOCKED in [item.check().state for item in steps]
    assert (home / "tools/file").read_text() == "since then"
