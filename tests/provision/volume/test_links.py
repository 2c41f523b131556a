"""Tests relink.sh in each installed shell, the login block, and the record of links."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.core.step import State
from provision.relocation.login_step import BEGIN, END, LoginStep
from provision.volume import link_files as relink_files
from provision.volume import links, relink_script, variables
from provision.volume.journal import Journal
from provision.volume.links import Link, LinkFile
from provision.volume.marker import VolumeStep
from provision.volume.owner import Owner, current
from tests.provision import random_trees

if TYPE_CHECKING:
    from collections.abc import Sequence

SHELLS = [shell for shell in ("dash", "bash", "busybox", "zsh", "ksh") if shutil.which(shell)]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path / "a volume's (own)")
    VolumeStep(root, [], Journal(root.journal)).apply()
    return root


def relink(root: Root, home: Path, *flags: str, shell: str = "sh") -> subprocess.CompletedProcess[bytes]:
    """Run relink.sh in a shell with PATH=/usr/bin:/bin, and return its output and exit code."""
    argv = {"busybox": ["busybox", "sh"], "zsh": ["zsh", "--emulate", "sh"]}.get(shell, [shell])
    environ = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    return subprocess.run([*argv, root.relink, *flags], capture_output=True, env=environ, check=False)


@pytest.mark.parametrize("shell", SHELLS)
def test_relink_makes_all_links_in_a_wiped_home(root: Root, home: Path, tmp_path: Path, shell: str) -> None:
    outside = tmp_path / "opt/env's"
    expected = [
        Link(home / ".cache/pip", root.cache / "pip"),
        Link(home / 'it\'s "$HOME" `x`', root.path / "odd"),
        Link(home / "new\nline", root.path / "new\nline"),
        Link(home / "中文/文件", root.path / "中文"),
        Link(Path(os.fsdecode(os.fsencode(home) + b"/\xff\xfe")), root.path / "bytes"),
        Link(home / "-rf", root.path / "-rf"),
        Link(home / " trailing\n", root.path / "t"),
        Link(outside, root.path / "outside"),
    ]
    relink_files.write(root, home, expected)
    assert links.recorded(root, current(home)) == sorted(expected)
    first = relink(root, home, shell=shell)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr == b""
    assert {link.path: link.path.readlink() for link in expected} == {link.path: link.target for link in expected}
    assert all(link.target.is_dir() for link in expected)
    assert b"8 made" in first.stdout
    again = relink(root, home, shell=shell)
    assert (again.returncode, again.stderr) == (0, b"")
    assert b"8 right, 0 made" in again.stdout
    assert relink(root, home, "-q", shell=shell).stdout == b""


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(random_trees.NAMES, min_size=1, max_size=5))
def test_relink_makes_links_with_names_of_any_bytes(root: Root, home: Path, names: set[bytes]) -> None:
    shutil.rmtree(home)
    home.mkdir()
    expected = [Link(Path(os.fsdecode(os.fsencode(home) + b"/" + name)), root.cache / "x") for name in names]
    relink_files.write(root, home, expected)
    done = relink(root, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {os.fsencode(path.name) for path in home.iterdir()} == names


@pytest.mark.parametrize("shell", SHELLS)
def test_relink_keeps_files_folders_and_links_of_the_user(root: Root, home: Path, tmp_path: Path, shell: str) -> None:
    expected = [Link(home / name, root.path / name) for name in ("link", "folder", "file", "empty", "good")]
    relink_files.write(root, home, expected)
    (home / "link").symlink_to(tmp_path)
    (home / "folder").mkdir()
    (home / "folder/mine").write_text("mine")
    (home / "file").write_text("mine")
    (home / "empty").mkdir()
    done = relink(root, home, shell=shell)
    assert done.returncode == 3
    assert done.stdout.count(b"left alone") == 4  # one line for each of the three entries, and the summary
    assert (home / "link").readlink() == tmp_path
    assert (home / "folder/mine").read_text() == (home / "file").read_text() == "mine"
    assert (home / "empty").readlink() == root.path / "empty"
    assert (home / "good").is_symlink()


@pytest.mark.parametrize("shell", SHELLS)
def test_relink_without_the_marker_fails_and_makes_no_link(root: Root, home: Path, shell: str) -> None:
    relink_files.write(root, home, [Link(home / "x", root.path / "x")])
    root.marker.unlink()
    done = relink(root, home, shell=shell)
    assert done.returncode == 4
    assert b"not mounted" in done.stderr
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_relink_updates_links_of_a_volume_with_a_new_mount_point(
    root: Root, home: Path, tmp_path: Path, shell: str
) -> None:
    relink_files.write(root, home, [Link(home / "x", root.path / "x")])
    relink(root, home, shell=shell)
    moved = Root(tmp_path / "elsewhere")
    root.path.rename(moved.path)
    done = relink(moved, home, shell=shell)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (home / "x").readlink() == moved.path / "x"


def test_relink_makes_the_missing_target_folder_of_a_link(root: Root, home: Path) -> None:
    relink_files.write(root, home, [Link(home / "x", root.path / "x")])
    relink(root, home)
    (root.path / "x").rmdir()
    assert relink(root, home).returncode == 0
    assert (root.path / "x").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"target": "/etc"},
        {"target": "../../etc"},
        {"target": "pip/../../x"},
        {"path": "~/../other/.ssh"},
        {"path": "a\0b"},
    ],
    ids=["absolute target", "target above the root", "target with ..", "path above the home", "NUL"],
)
def test_record_with_a_link_that_firstlight_does_not_make_is_rejected(
    root: Root, home: Path, change: dict[str, str]
) -> None:
    row = {"root": str(root.path), "path": "~/.cache/pip", "target": "cache/pip"} | change
    root.links.write_text(json.dumps({"schema": 2, "links": [row]}))
    with pytest.raises(BlockedError, match=r"links\.json cannot be read"):
        links.read(root)


def test_unreadable_record_of_links_is_an_error(root: Root, home: Path) -> None:
    root.links.write_text("{")
    with pytest.raises(BlockedError, match=r"links\.json cannot be read"):
        links.recorded(root, current(home))


def login_step(root: Root, home: Path, shell: str = "bash", *, wanted: bool = True) -> LoginStep:
    return LoginStep(root, home, {"SHELL": f"/bin/{shell}"}, Journal(root.journal), wanted=wanted)


@pytest.mark.parametrize("shell", [shell for shell in ("bash", "zsh", "fish") if shutil.which(shell)])
def test_login_makes_the_links_and_works_without_the_volume(root: Root, home: Path, shell: str) -> None:
    relink_files.write(root, home, [Link(home / "x", root.path / "x")])
    step = login_step(root, home, shell)
    assert step.check().state is State.DRIFTED
    step.apply()
    assert step.check().state is State.OK
    variables.write(root, {"FIRST": "a light"}, current(home))
    environ = {"HOME": str(home), "PATH": os.environ["PATH"]}
    show = 'printf "<%s>" "$FIRST"'
    done = subprocess.run([shell, "-i", "-c", show], env=environ, capture_output=True, text=True, check=False)
    assert "<a light>" in done.stdout, done.stderr
    assert (home / "x").readlink() == root.path / "x"
    shutil.move(root.path, root.path.with_name("unmounted"))
    (home / "x").unlink()
    done = subprocess.run([shell, "-i", "-c", "echo fine"], env=environ, capture_output=True, text=True, check=False)
    assert "fine" in done.stdout
    assert not os.path.lexists(home / "x")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.binary(max_size=200).filter(lambda text: BEGIN not in text and END not in text),
    mode=st.sampled_from([0o644, 0o600, 0o755]),
)
def test_login_block_is_added_and_removed_without_another_changed_byte(
    root: Root, home: Path, before: bytes, mode: int
) -> None:
    file = home / ".bashrc"
    file.write_bytes(before)
    file.chmod(mode)
    login_step(root, home).apply()
    assert file.read_bytes().startswith(before)
    assert file.stat().st_mode & 0o777 == mode
    assert login_step(root, home).check().state is State.OK
    removal = login_step(root, home, wanted=False)
    assert removal.check().state is State.DRIFTED
    removal.apply()
    assert file.read_bytes() == before
    assert file.stat().st_mode & 0o777 == mode


def test_start_file_of_the_shell_that_setup_made_is_removed_with_the_login_block(root: Root, home: Path) -> None:
    login_step(root, home).apply()
    assert (home / ".bashrc").exists()
    login_step(root, home, wanted=False).apply()
    assert not (home / ".bashrc").exists()


def test_start_file_of_the_shell_that_is_a_link_stays_a_link(root: Root, home: Path, tmp_path: Path) -> None:
    dotfiles = tmp_path / "dotfiles"
    dotfiles.write_text("alias x=y\n")
    (home / ".bashrc").symlink_to(dotfiles)
    login_step(root, home).apply()
    assert (home / ".bashrc").is_symlink()
    assert "relink.sh" in dotfiles.read_text()


def test_lines_after_the_login_block_stay_when_the_block_is_rewritten_and_removed(
    root: Root, home: Path, tmp_path: Path
) -> None:
    file = home / ".bashrc"
    file.write_text("before\n")
    login_step(root, home).apply()
    with file.open("a") as end:
        end.write("after\n")
    moved = Root(tmp_path / "moved")
    shutil.copytree(root.path, moved.path)
    again = login_step(moved, home)
    assert again.check().state is State.DRIFTED, "the block names the path of the root, which has moved"
    again.apply()
    assert str(moved.relink) in file.read_text()
    assert str(root.relink) not in file.read_text().replace(str(moved.relink), "")
    login_step(moved, home, wanted=False).apply()
    assert file.read_text() == "before\nafter\n"


@pytest.mark.parametrize(
    "block",
    [BEGIN + b"\nhalf\n", END, END + b"\n" + BEGIN],
    ids=["begin without end", "end without begin", "end before begin"],
)
def test_damaged_login_block_blocks_the_step(root: Root, home: Path, block: bytes) -> None:
    (home / ".bashrc").write_bytes(b"a\n" + block)
    for wanted in (True, False):
        check = login_step(root, home, wanted=wanted).check()
        assert check.state is State.BLOCKED
        assert "damaged" in check.detail


def test_powershell_script_quotes_special_characters_in_paths(root: Root, home: Path) -> None:
    paths: Sequence[str] = ["it's", "$env:x", "`n", "中文"]
    expected = [Link(home / path, root.path / path) for path in paths]
    content = LinkFile().with_links(Owner("it's a host", str(home)), root, expected)
    text = relink_script.powershell_script("id", content).decode()
    assert f"if ($owner -ceq 'it''s a host:{home}')" in text
    assert "Restore-Link (Join-Path $HOME 'it''s') (Join-Path $root 'it''s')" in text
    assert "'$env:x'" in text
