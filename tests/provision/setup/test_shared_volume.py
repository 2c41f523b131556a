"""Tests two hosts on one volume, volumes that are not mounted, and links that the user has made."""

from __future__ import annotations

import json
import os
import platform
import pty
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.volume import home_record, links
from provision.volume.links import Link
from provision.volume.owner import current
from tests.conftest import CHECKOUT
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.provision.fake_hub import FakeHub


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs at the path of the root, and yield the path."""
    folder = tmp_path / "root"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def on_host(name: str, *words: object, answer: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run `provision` in a UTS namespace with this host name; with `answer`, stdin is a terminal with this input."""
    script = 'hostname "$1" && shift && exec "$@"'
    argv = ["unshare", "--uts", "sh", "-c", script, "sh", name, sys.executable, "-m", "provision", *map(str, words)]
    environ = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    terminal, stdin = pty.openpty()
    if answer is not None:
        os.write(terminal, answer)
    done = subprocess.run(
        argv,
        stdin=stdin if answer is not None else subprocess.DEVNULL,
        capture_output=True,
        env=environ,
        text=True,
        check=False,
    )
    os.close(terminal)
    os.close(stdin)
    if "unshare failed" in done.stderr:
        pytest.skip("no right to make a UTS namespace")
    return done


def wipe(home: Path) -> None:
    shutil.rmtree(home)
    home.mkdir()


def outcome(done: subprocess.CompletedProcess[str], step: str) -> str:
    return next(str(row["after"]) for row in json.loads(done.stdout)["outcomes"] if row["step"] == step)


def test_setup_on_a_second_host_of_the_volume_keeps_that_hosts_folders_and_links(
    tmp_path: Path, home: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, first_home, nvme = Root(tmp_path / "root"), tmp_path / "home of a", tmp_path / "nvme"
    monkeypatch.setattr(platform, "node", lambda: "a")
    (home / "work").mkdir()
    (home / "work/train.py").write_text("a's")
    assert provision("setup", *flags).returncode == 0
    for path in ("~/work", "pip"):
        assert provision("relocate", path, *flags).returncode == 0
    home.rename(first_home)

    monkeypatch.setattr(platform, "node", lambda: "b")
    nvme.mkdir()
    (home / "work").mkdir(parents=True)
    (home / "work/train.py").write_text("b's")
    (home / ".cache").mkdir()
    (home / ".cache/pip").symlink_to(nvme)
    for command in ("setup", "repair", "setup", "status"):
        done = provision(command, *flags)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not (home / "work").is_symlink()
    assert (home / "work/train.py").read_text() == "b's"
    assert (home / ".cache/pip").readlink() == nvme
    assert (root.path / "relocated/work/train.py").read_text() == "a's"

    assert provision("relocate", "uv", *flags).returncode == 0
    both = root.links.read_bytes(), root.relink.read_bytes()
    second_home = tmp_path / "home of b"
    for name, own, other in (("a", first_home, second_home), ("b", second_home, first_home)) * 2:
        if home.exists():
            home.rename(other)
        own.rename(home)
        monkeypatch.setattr(platform, "node", lambda name=name: name)
        for command in ("setup", "repair"):
            assert provision(command, *flags).returncode == 0
        assert (root.links.read_bytes(), root.relink.read_bytes()) == both


def test_setup_in_a_second_home_with_the_same_host_name_and_path_keeps_that_homes_folder(
    tmp_path: Path, home: Path, flags: list[object]
) -> None:
    work = Root(tmp_path / "root").path / "relocated/work"
    (home / "work").mkdir()
    (home / "work/train.py").write_text("a's")
    assert provision("relocate", home / "work", *flags).returncode == 0
    home.rename(tmp_path / "home of a")
    (home / "work").mkdir(parents=True)
    (home / "work/train.py").write_text("b's")
    for _ in range(2):
        done = provision("setup", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"provision relocate {home}/work --to relocated/work" in done.stdout
        assert (home / "work/train.py").read_text() == "b's"
        assert [path.read_text() for path in work.iterdir()] == ["a's"]
    assert provision("relocate", home / "work", *flags).returncode == 0
    assert sorted(path.read_text() for path in work.iterdir()) == ["a's", "b's"], (
        "`relocate` merges a folder that the user names"
    )


def test_host_with_a_new_name_gets_its_links_back_by_the_flag_adopt_or_a_prompt(
    tmp_path: Path, home: Path, flags: list[object]
) -> None:
    root = Root(tmp_path / "root")
    (home / "work").mkdir()
    (home / "work/train.py").write_text("of years")
    assert on_host("pod-1", "relocate", home / "work", *flags).returncode == 0
    wipe(home)
    shown = on_host("pod-2", "setup", *flags)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"--adopt pod-1:{home}" in shown.stdout
    assert not os.path.lexists(home / "work")
    adopted = on_host("pod-2", "repair", "--adopt", "pod-1", *flags)
    assert adopted.returncode == 0, adopted.stdout + adopted.stderr
    assert (home / "work/train.py").read_text() == "of years"
    assert on_host("pod-2", "status", *flags).returncode == 0
    wipe(home)
    assert on_host("pod-3", "repair", "--adopt", f":{home}", *flags).returncode == 0
    assert (home / "work/train.py").read_text() == "of years"
    wipe(home)
    asked = on_host("pod-4", "repair", *flags, answer=b"y\n")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert f"links of pod-3:{home}" in asked.stdout
    assert (home / "work/train.py").read_text() == "of years"
    wipe(home)
    assert on_host("pod-5", "repair", *flags, answer=b"n\n").returncode == 0
    assert not os.path.lexists(home / "work")
    unknown = on_host("pod-5", "repair", "--adopt", "pod-9", *flags)
    assert unknown.returncode == 2
    assert f"pod-4:{home}" in unknown.stderr
    assert {row.owner.host for row in links.read(root).rows if row.owner} == {"pod-4"}


@pytest.mark.parametrize("record", ["kept", "missing", "damaged"])
def test_commands_are_blocked_if_the_volume_to_which_a_folder_was_relocated_is_unmounted(
    volume: Path, home: Path, flags: list[object], record: str
) -> None:
    for name in ("kept", "other"):
        (home / name).mkdir()
        (home / name / "file").write_text(name)
    assert provision("relocate", home / "kept", *flags).returncode == 0
    file = home_record.record_file(home)
    assert str(home / "kept") in file.read_text()
    if record == "missing":
        shutil.rmtree(home / ".local")
    elif record == "damaged":
        file.write_text('{"roots": [{"path": 1}, "x"')
    subprocess.run(["umount", volume], check=True)
    for command in (("relocate", home / "other"), ("setup",), ("repair",), ("status",)):
        done = provision(*command, *flags)
        assert done.returncode == 4, done.stdout + done.stderr
        assert f"{volume} is not mounted" in done.stdout
        assert list(volume.iterdir()) == [], "the mount point stays empty"
    assert (home / "other/file").read_text() == "other"


def test_setup_is_blocked_if_the_volume_that_only_the_homes_record_names_is_unmounted(
    volume: Path, home: Path, flags: list[object]
) -> None:
    assert provision("setup", *flags).returncode == 0
    subprocess.run(["umount", volume], check=True)
    done = provision("setup", *flags)
    assert done.returncode == 4
    assert f"rm {home_record.record_file(home)}" in done.stdout
    assert list(volume.iterdir()) == []
    home_record.record_file(home).unlink()
    assert provision("plan", *flags).returncode == 3, "after the command in the message, setup can make a new root"


def test_undo_of_a_relocation_removes_the_volume_from_the_record_in_the_home(
    volume: Path, home: Path, flags: list[object]
) -> None:
    before = sorted(home.rglob("*"))
    (home / "kept").mkdir()
    assert provision("relocate", home / "kept", *flags).returncode == 0
    entry = home_record.used(home, Root(volume))
    assert entry is not None
    assert (entry.mount, entry.paths) == (str(volume), (str(home / "kept"),))
    assert provision("undo", *flags[:2]).returncode == 0
    assert home_record.read(home) == []
    (home / "kept").rmdir()
    assert sorted(home.rglob("*")) == before


def test_users_link_into_a_new_volume_does_not_block_setup_and_is_restored_after_a_wipe(
    volume: Path, home: Path, flags: list[object]
) -> None:
    (volume / "pip").mkdir()
    (home / ".cache").mkdir()
    (home / ".cache/pip").symlink_to(volume / "pip")
    done = provision("setup", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert links.recorded(Root(volume), current(home)) == [Link(home / ".cache/pip", volume / "pip")]
    wipe(home)
    assert provision("repair", *flags).returncode == 0
    assert (home / ".cache/pip").readlink() == volume / "pip"


@pytest.mark.parametrize("listed", ["", 'relocate = ["huggingface", "pip"]\n'])
def test_users_cache_links_to_the_volume_are_kept_by_setup_and_restored_after_a_wipe(
    tmp_path: Path, home: Path, flags: list[object], listed: str
) -> None:
    (tmp_path / "host.toml").write_text(f"models = []\n{listed}")
    root = Root(tmp_path / "root")
    for name in ("hf/hub/models--a--b", "own pip"):
        (root.path / name).mkdir(parents=True)
    (root.path / "own pip/wheel").write_text("w")
    (home / ".cache").mkdir()
    mine = {home / ".cache/huggingface": root.path / "hf", home / ".cache/pip": root.path / "own pip"}
    for path, target in mine.items():
        path.symlink_to(target)
    for _ in range(2):
        done = provision("setup", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert provision("status", *flags).returncode == 0
        assert {path: path.readlink() for path in mine} == mine, "setup never changes the links"
        wipe(home)
        repaired = provision("repair", *flags)
        assert repaired.returncode == 0, repaired.stdout + repaired.stderr
        assert {path: path.readlink() for path in mine} == mine
        assert (home / ".cache/huggingface/hub/models--a--b").is_dir()
        assert not root.hub.exists(), "setup makes no second, empty cache"
    wipe(home)
    assert subprocess.run(["sh", root.relink], check=False, capture_output=True).returncode == 0
    assert {path: path.readlink() for path in mine} == mine


def test_users_hub_link_to_another_folder_of_the_volume_is_kept_and_restored_after_a_wipe(
    tmp_path: Path, home: Path, flags: list[object], hub: FakeHub
) -> None:
    (tmp_path / "host.toml").write_text('models = []\nrelocate = ["huggingface"]\n')
    models = tmp_path / "root/models"
    (models / f"models--{hub.repo.replace('/', '--')}").mkdir(parents=True)
    link = home / ".cache/huggingface/hub"
    link.parent.mkdir(parents=True)
    link.symlink_to(models)
    done = provision("setup", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert link.readlink() == models
    wipe(home)
    assert provision("repair", *flags).returncode == 0
    assert link.readlink() == models


def test_setup_is_blocked_by_a_cache_link_to_a_place_that_does_not_exist(
    tmp_path: Path, home: Path, flags: list[object]
) -> None:
    (tmp_path / "host.toml").write_text("models = []\n")
    (home / ".cache").mkdir()
    (home / ".cache/huggingface").symlink_to("/not mounted/hf")
    done = provision("setup", *flags)
    assert done.returncode == 4
    assert f"{home}/.cache/huggingface is a link to /not mounted/hf, which does not exist" in done.stdout
    assert (home / ".cache/huggingface").readlink().as_posix() == "/not mounted/hf"
    assert links.recorded(Root(tmp_path / "root"), current(home)) == []


def test_relocation_of_a_missing_folder_is_rejected(tmp_path: Path, home: Path, flags: list[object]) -> None:
    done = provision("relocate", "nothere", *flags)
    assert done.returncode == 2
    assert "nothere does not exist" in done.stderr
    assert not (tmp_path / "root").exists()
    assert list(home.iterdir()) == []


def test_repair_with_a_link_record_of_an_older_version_keeps_the_folders_of_the_home(
    tmp_path: Path, home: Path, flags: list[object]
) -> None:
    root = Root(tmp_path / "root")
    assert provision("setup", *flags).returncode == 0
    rows = [{"path": f"~/{name}", "target": name} for name in ("work", "led", "gone")]
    root.links.write_text(json.dumps({"schema": 1, "root": str(root.path), "links": rows}))
    for name in ("work", "led", "gone"):
        (root.path / name).mkdir()
        (root.path / name / "file").write_text("of an unknown home")
    (home / "work").mkdir()
    (home / "work/file").write_text("mine")
    (home / "led").symlink_to(tmp_path)
    done = provision("repair", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (home / "work/file").read_text() == "mine"
    assert not (home / "work").is_symlink()
    assert (home / "led").readlink() == tmp_path
    assert (home / "gone/file").read_text() == "of an unknown home"
    assert provision("status", *flags).returncode == 0
