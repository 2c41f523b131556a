"""Tests that a root whose records another user can change is not trusted, and that the message has the remedy."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.volume import trust

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OTHER_USER, OTHER_GROUP = 4_242, 4_343

needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root for another user")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Make a root with records that every user can read and only this user can write."""
    root = Root(tmp_path / "my volume/data")
    root.journal.mkdir(parents=True)
    root.marker.write_text("{}")
    root.links.write_text("{}")
    for path in (root.path.parent, root.path, root.state, root.journal):
        path.chmod(0o755)
    for path in (root.marker, root.links):
        path.chmod(0o644)
    return root


def mend(root: Root) -> None:
    """Run the commands of the messages until the root is trusted."""
    for _ in range(5):
        distrust = trust.find(root)
        if distrust is None:
            return
        subprocess.run(shlex.split(distrust.remedy), check=True)
    pytest.fail(f"still not trusted: {trust.find(root)}")


def test_root_that_only_this_user_can_write_is_trusted(root: Root) -> None:
    assert trust.find(root) is None
    trust.require(root)


def test_root_that_does_not_exist_yet_is_judged_by_the_folder_above(root: Root) -> None:
    later = Root(root.path / "later/root")
    assert trust.find(later) is None
    root.path.chmod(0o777)
    distrust = trust.find(later)
    assert distrust is not None
    assert distrust.path == root.path


@pytest.mark.parametrize(
    "name", ["links.json", "", "..", "../.."], ids=["a record", "the state folder", "the root", "the folder above it"]
)
@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_path_that_every_user_can_write_is_not_trusted(root: Root, name: str, mode: int) -> None:
    path = (root.state / name).resolve()
    path.chmod(mode)
    distrust = trust.find(root)
    assert distrust is not None
    assert distrust.path == path
    assert f"writable by every user (mode 0{mode:o})" in str(distrust)
    mend(root)
    trust.require(root)


def test_message_has_the_command_and_the_way_to_trust_the_volume(root: Root) -> None:
    root.path.chmod(0o777)
    with pytest.raises(BlockedError) as error:
        trust.require(root)
    assert f"chmod go-w {shlex.quote(str(root.path))}" in str(error.value)
    assert "FIRSTLIGHT_TRUST_VOLUME=1" in str(error.value)


def test_sticky_folder_above_the_root_is_trusted(root: Root) -> None:
    root.path.parent.chmod(0o1777)  # as /tmp: only an owner renames or deletes in it
    assert trust.find(root) is None


def test_records_of_a_private_state_folder_are_trusted_with_any_mode(root: Root) -> None:
    root.links.chmod(0o666)
    root.state.chmod(0o700)
    assert trust.find(root) is None
    root.state.chmod(0o755)
    assert trust.find(root) is not None


@pytest.mark.parametrize("name", ["lock", "lock.lease-1", ".model-pins.json.lock"])
def test_lock_that_every_user_can_write_is_no_reason_for_distrust(root: Root, name: str) -> None:
    (root.state / name).touch()
    (root.state / name).chmod(0o666)
    assert trust.find(root) is None


def test_root_is_not_trusted_if_one_of_its_record_files_is_a_symbolic_link(root: Root, tmp_path: Path) -> None:
    root.links.rename(tmp_path / "elsewhere")
    root.links.symlink_to(tmp_path / "elsewhere")
    distrust = trust.find(root)
    assert distrust is not None
    assert distrust.path == root.links
    mend(root)


def test_root_behind_a_link_is_judged_by_the_folder_to_which_the_link_leads(root: Root, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root.path)
    linked = Root(tmp_path / "link")
    assert trust.find(linked) is None
    root.path.chmod(0o777)
    distrust = trust.find(linked)
    assert distrust is not None
    assert distrust.path == root.path


@needs_root
@pytest.mark.parametrize("name", ["links.json", "", "..", "../.."])
def test_path_of_another_user_is_not_trusted(root: Root, name: str) -> None:
    path = (root.state / name).resolve()
    os.chown(path, OTHER_USER, -1)
    distrust = trust.find(root)
    assert distrust is not None
    assert distrust.path == path
    assert f"belongs to the user {OTHER_USER}" in str(distrust)
    mend(root)


@needs_root
@pytest.mark.parametrize(("uid_map", "is_trusted"), [("0 1000 1", True), ("0 0 4294967295", False)])
def test_folder_of_the_hosts_root_is_trusted_in_a_user_namespace(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid_map: str, is_trusted: bool
) -> None:
    (tmp_path / "uid_map").write_text(f"{uid_map}\n")
    monkeypatch.setattr(trust, "_UID_MAP", tmp_path / "uid_map")
    os.chown(root.path.parent, 65_534, -1)
    assert (trust.find(root) is None) is is_trusted


@needs_root
def test_group_that_has_other_members_is_not_trusted(root: Root) -> None:
    os.chown(root.path, -1, OTHER_GROUP)
    root.path.chmod(0o2775)
    distrust = trust.find(root)
    assert distrust is not None
    assert f"writable by the group {OTHER_GROUP} (mode 2775)" in str(distrust)
    mend(root)


def test_own_group_without_other_members_is_trusted(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    import grp
    import pwd

    own = pwd.struct_passwd(("me", "x", os.geteuid(), os.getegid(), "", "/home/me", "/bin/sh"))
    other = pwd.struct_passwd(("you", "x", 4000, os.getegid(), "", "/home/you", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwall", lambda: [own])
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("me", "x", os.getegid(), [])))
    os.chown(root.path, -1, os.getegid())
    root.path.chmod(0o775)  # as umask 002 makes it on systems where each user has a group
    assert trust.find(root) is None
    monkeypatch.setattr(pwd, "getpwall", lambda: [own, other])
    assert trust.find(root) is not None
    monkeypatch.setattr(pwd, "getpwall", lambda: [own])
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("me", "x", os.getegid(), ["you"])))
    assert trust.find(root) is not None


def test_file_system_with_one_owner_for_all_files_is_trusted(limited: Callable[..., Path]) -> None:
    """Mount a file system that shows each file as of user 1000, as an NFS export that squashes all users does."""
    root = Root(limited("owner") / "data")
    root.state.mkdir(parents=True)
    assert root.state.stat().st_uid != os.geteuid()
    assert trust.find(root) is None
    root.path.chmod(0o777)
    assert trust.find(root) is not None, "the modes of this file system are evidence"


@pytest.mark.parametrize(("shell", "is_trusted"), [("/usr/sbin/nologin", True), ("/bin/bash", False)])
def test_fixed_modes_are_trusted_only_where_no_other_person_can_log_in(
    limited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, shell: str, is_trusted: bool
) -> None:
    import pwd

    root = Root(limited("fixed-modes") / "data")
    root.state.mkdir(parents=True)
    other = pwd.struct_passwd(("you", "x", 4000, 4000, "", "/home/you", shell))
    monkeypatch.setattr(pwd, "getpwall", lambda: [other])
    assert (trust.find(root) is None) is is_trusted
