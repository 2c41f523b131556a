"""Tests undo on a volume that several hosts and homes share: no folder or link of another owner is lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.volume.link_uses import LinkUse, link_uses, of_others, read_journals
from provision.volume.owner import Owner
from tests.conftest import CHECKOUT
from tests.provision import random_trees

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.provision.setup.several_hosts import Hosts


def entries_of(*folders: Path) -> dict[str, object]:
    """Return {path: (mode, content or link target)} of all entries of folders, without the file of the run lock."""
    entries: dict[str, object] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            status = path.lstat()
            content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
            entries[str(path)] = (status.st_mode, content)
    return {path: entry for path, entry in entries.items() if not path.endswith("/.firstlight/lock")}


def test_undo_takes_back_the_newest_run_of_the_same_host_and_home_only(hosts: Hosts) -> None:
    of_a = hosts.relocated("a", "work", "by a", "work")
    of_b = hosts.relocated("b", "other", "by b", "other")
    of_b_target = of_b.readlink()
    hosts.good("a", "undo")
    assert not of_a.is_symlink()
    assert (of_a / "of a").read_text() == "by a"
    assert of_b.readlink() == of_b_target
    assert (of_b / "of b").read_text() == "by b"

    before = entries_of(hosts.home("a"), hosts.home("b"), hosts.volume)
    again = hosts.run("a", "undo")
    assert again.returncode == 2
    assert "nothing is left to undo" in again.stderr
    assert "1 runs of other hosts or homes are not undone" in again.stderr
    other_home = hosts.run("b", "undo", home=hosts.home("b2"))
    assert other_home.returncode == 2
    assert entries_of(hosts.home("a"), hosts.home("b"), hosts.volume) == before


def test_undo_list_shows_the_host_and_home_of_each_run(hosts: Hosts) -> None:
    hosts.relocated("a", "work", "by a", "work")
    hosts.relocated("b", "work", "by b", "work of b")
    assert [(run["host"], run["home"]) for run in hosts.runs()] == [
        ("a", str(hosts.home("a"))),
        ("b", str(hosts.home("b"))),
    ]
    text = hosts.good("a", "undo", "--list").stdout
    assert f"acts on b:{hosts.home('b')}" in text


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["undo", "dry run"])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_undo_of_another_hosts_run_is_refused_without_the_flag_yes(
    hosts: Hosts, dry: list[str], form: list[str]
) -> None:
    of_b = hosts.relocated("b", "proj", "by b", "proj")
    name = hosts.runs()[0]["run"]
    before = entries_of(hosts.home("a"), hosts.home("b"), hosts.volume)
    refused = hosts.run("a", "undo", name, *dry, *form)
    assert refused.returncode == 4
    text = json.loads(refused.stdout)["error"]["message"] if form else refused.stderr
    assert f"leaves the volume: {hosts.volume}/proj, 1 files, 4 bytes" in text
    assert f"then leads nowhere: b:{of_b} -> {hosts.volume}/proj" in text
    assert "--yes" in text
    assert entries_of(hosts.home("a"), hosts.home("b"), hosts.volume) == before


def test_undo_of_another_hosts_run_with_yes_moves_its_folder_to_the_current_home(hosts: Hosts) -> None:
    hosts.relocated("b", "proj", "by b", "proj")
    name = hosts.runs()[0]["run"]
    assert hosts.run("a", "undo", name, "--yes", "--dry-run").returncode == 3
    shown = hosts.good("a", "undo", name, "--yes").stdout
    assert "then leads nowhere: b:" in shown
    assert (hosts.home("a") / "proj/of b").read_text() == "by b"
    assert not (hosts.volume / "proj").exists()


def test_undo_of_another_hosts_run_with_yes_is_blocked_by_a_folder_of_the_same_name(hosts: Hosts) -> None:
    hosts.relocated("b", "proj", "by b", "proj")
    own = hosts.home("a") / "proj"
    own.mkdir()
    (own / "train.py").write_text("of a")
    before = entries_of(hosts.home("a"), hosts.home("b"), hosts.volume)
    for words in (["--dry-run"], []):
        refused = hosts.run("a", "undo", hosts.runs()[0]["run"], "--yes", *words)
        assert refused.returncode == 4
        assert f"{own} is a real folder now" in refused.stdout
    assert entries_of(hosts.home("a"), hosts.home("b"), hosts.volume) == before


def share_pip_cache(hosts: Hosts) -> tuple[Path, Path]:
    """Let hosts a and b both relocate pip's cache, each with a file of its own; return the links in both homes."""
    cache = hosts.home("a") / ".cache"
    (cache / "pip").mkdir(parents=True)
    (cache / "pip/of a").write_text("by a")
    hosts.good("a", "relocate", "pip")
    hosts.good("b", "relocate", "pip")
    (hosts.home("b") / ".cache/pip/of b").write_text("by b")
    return cache / "pip", hosts.home("b") / ".cache/pip"


def test_undo_copies_a_folder_back_and_keeps_the_original_to_which_another_host_links(hosts: Hosts) -> None:
    of_a, of_b = share_pip_cache(hosts)
    dry = hosts.run("a", "undo", "--dry-run")
    assert dry.returncode == 3
    assert f"copy {hosts.volume}/cache/pip back to {of_a}" in dry.stdout
    assert f"because b:{of_b} leads there" in dry.stdout
    hosts.good("a", "undo")
    assert not of_a.is_symlink()
    assert (of_a / "of a").read_text() == "by a"
    assert random_trees.read(of_a) == random_trees.read(of_b.resolve())
    assert (of_b / "of a").read_text() == "by a"
    assert (of_b / "of b").read_text() == "by b"
    assert hosts.run("a", "undo").returncode == 2, "the run is already undone"
    hosts.good("b", "undo")
    assert not of_b.exists()
    assert (hosts.volume / "cache/pip/of b").read_text() == "by b", "a run that moved nothing moves nothing back"


def test_undo_of_a_merge_keeps_the_files_on_the_volume_to_which_another_host_links(hosts: Hosts) -> None:
    of_a = hosts.relocated("a", "work", "by a", "work")
    of_b = hosts.relocated("b", "work", "by b", "work")
    assert (of_a / "of b").read_text() == "by b"
    hosts.good("b", "undo")
    assert [path.name for path in of_b.iterdir()] == ["of b"]
    assert not of_b.is_symlink()
    assert {path.name for path in of_a.iterdir()} == {"of a", "of b"}
    assert hosts.run("b", "undo").returncode == 2


def test_undo_keeps_an_empty_folder_on_the_volume_to_which_another_host_links(hosts: Hosts) -> None:
    hosts.good("a", "relocate", "pip")
    hosts.good("b", "relocate", "pip")
    hosts.good("a", "undo")
    of_b = hosts.home("b") / ".cache/pip"
    assert of_b.is_dir()
    hosts.good("b", "undo")
    assert not of_b.is_symlink()


def test_undo_interrupted_while_it_copies_a_folder_back_is_completed_by_the_next_undo(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt the undo between the removal of the link and the placement of the copy."""
    from provision.fs.open_dir import OpenDir

    of_a, of_b = share_pip_cache(hosts)
    rename = OpenDir.rename

    def fail(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        if new == of_a.name:
            raise KeyboardInterrupt
        rename(self, name, other, new)

    with monkeypatch.context() as patch:
        patch.setattr(OpenDir, "rename", fail)
        assert hosts.run("a", "undo").returncode == 130
    assert not of_a.exists()
    assert (of_b / "of a").read_text() == "by a"
    hosts.good("a", "undo")
    assert (of_a / "of a").read_text() == "by a"
    assert (of_b / "of b").read_text() == "by b"
    assert list(of_a.parent.glob(".*.firstlight-*")) == []


@contextlib.contextmanager
def mounted_elsewhere(hosts: Hosts) -> Iterator[Path]:
    """Give the volume another path, as another mount point does, and yield that path."""
    earlier, moved = hosts.volume, hosts.volume.with_name("elsewhere")
    earlier.rename(moved)
    hosts.volume = moved
    yield moved
    moved.rename(earlier)


def test_undo_works_after_the_volume_got_another_mount_point(hosts: Hosts) -> None:
    hosts.relocated("a", "work", "by a", "work")
    (hosts.home("a") / ".bashrc").write_text("alias x=y\n")
    for name in ("merged", "linked"):
        (hosts.home("a") / name).mkdir()
    (hosts.volume / "merged").mkdir()
    (hosts.volume / "merged/there").write_text("there")
    (hosts.home("a") / "merged/here").write_text("here")
    hosts.good("a", "relocate", hosts.home("a") / "merged", "--to", "merged")
    with mounted_elsewhere(hosts) as moved:
        hosts.good("a", "undo")
        assert (hosts.home("a") / "merged/here").read_text() == "here"
        assert [path.name for path in (moved / "merged").iterdir()] == ["there"]
        hosts.good("a", "undo")
        assert (hosts.home("a") / "work/of a").read_text() == "by a"
        assert not (hosts.home("a") / "work").is_symlink()


def test_older_journal_without_a_root_is_undone_at_another_mount_point(hosts: Hosts) -> None:
    """Remove the root from the headers, so that only the act of the first run that made the marker has its path."""
    hosts.relocated("a", "first", "by a", "first")
    hosts.relocated("a", "work", "by a", "work")
    for path in hosts.root.journal.glob("*.jsonl"):
        header, *rest = path.read_text().splitlines()
        fields = json.loads(header)
        del fields["root"]
        path.write_text("\n".join([json.dumps(fields), *rest]) + "\n")
    hosts.root.links.unlink()
    with mounted_elsewhere(hosts):
        hosts.good("a", "undo")
        assert (hosts.home("a") / "work/of a").read_text() == "by a"


def test_undo_on_an_unmounted_volume_is_blocked_and_undoes_no_run(hosts: Hosts) -> None:
    hosts.relocated("a", "work", "by a", "work")
    away = hosts.volume.with_name("away")
    hosts.volume.rename(away)
    hosts.volume.mkdir()
    try:
        for words in ([], ["--dry-run"], ["--list"]):
            refused = hosts.run("a", "undo", *words)
            assert refused.returncode == 4
            assert "not mounted" in refused.stderr
        assert list(hosts.volume.iterdir()) == []
    finally:
        hosts.volume.rmdir()
        away.rename(hosts.volume)


@pytest.mark.parametrize(
    ("row", "owners"),
    [
        ({}, [None]),
        ({"host": "b", "home": "/h"}, [Owner("b", "/h")]),
        ({"owner": {"host": "b", "home": "/h"}}, [Owner("b", "/h")]),
        ({"owner": "b:/h"}, [Owner("b", "/h")]),
        ({"owners": [{"host": "b", "home": "/h"}, "c:/i"]}, [Owner("b", "/h"), Owner("c", "/i")]),
        ({"owners": []}, [None]),
    ],
    ids=["no owner", "host and home", "owner as object", "owner as text", "two owners", "empty list of owners"],
)
def test_record_of_links_is_read_with_no_owner_one_owner_and_several_owners(
    tmp_path: Path, row: dict[str, object], owners: list[Owner | None]
) -> None:
    root = Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    root.links.write_text(json.dumps({"schema": 2, "links": [{"path": "~/x", "target": "x", **row}]}))
    uses = link_uses(root, Path("/this"), read_journals(root))
    homes = [Path(owner.home) if owner else Path("/this") for owner in owners]
    target = root.path / "x"
    assert uses == [LinkUse(owner, home / "x", target) for owner, home in zip(owners, homes, strict=True)]
    others = of_others(uses, target, {Owner("b", "/h")}, {Path("/this/x")})
    assert [use.owner for use in others] == [owner for owner in owners if owner == Owner("c", "/i")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a second host name needs root")
def test_undo_under_one_real_host_name_keeps_the_folders_of_the_other_host(tmp_path: Path, envs: Path) -> None:
    """Run each host in a UTS namespace of its own; both homes have the same path, as in two pods."""
    (tmp_path / "host.toml").write_text('models = []\nrelocate = ["pip"]\n')
    home = tmp_path / "home"

    def on(host: str, command: str, *words: object) -> subprocess.CompletedProcess[str]:
        kept = tmp_path / f"home of {host}"
        kept.mkdir(exist_ok=True)
        kept.rename(home)
        flags = ["--root", tmp_path / "root", "--host", tmp_path / "host.toml"]
        flags += ["--envs", envs] if command != "undo" else []
        argv = [sys.executable, "-m", "provision", command, *words, *flags]
        script = ["unshare", "-u", "sh", "-c", 'hostname "$0" && exec "$@"', host, *map(str, argv)]
        environ = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT), "HOME": str(home)}
        completed = subprocess.run(script, env=environ, check=False, capture_output=True, text=True)
        home.rename(kept)
        return completed

    assert on("hosta", "relocate", "pip").returncode == 0
    (tmp_path / "home of hosta/proj").mkdir()
    (tmp_path / "home of hosta/proj/train.py").write_text("of a")
    (tmp_path / "home of hostb/proj").mkdir(parents=True)
    (tmp_path / "home of hostb/proj/train.py").write_text("of b")
    moved = on("hostb", "relocate", home / "proj")
    assert moved.returncode == 0, moved.stdout + moved.stderr
    undone = on("hosta", "undo")
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert (tmp_path / "home of hosta/proj/train.py").read_text() == "of a"
    assert not (tmp_path / "home of hosta/.cache/pip").exists()
    assert (tmp_path / "home of hostb/proj/train.py").read_text() == "of b"
    refused = on("hosta", "undo", json.loads(on("hosta", "undo", "--list", "--json").stdout)["runs"][-1]["run"])
    assert refused.returncode == 4
    assert f"was made by hostb:{home}" in refused.stderr


def test_run_of_an_adopted_host_is_this_homes_own(hosts: Hosts) -> None:
    """The host comes back under another name with its home. Its earlier run is undone without --yes, to its path."""
    path = hosts.relocated("old", "work", "mine", "work")
    home = hosts.home("old")
    refused = hosts.run("new", "undo", home=home)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    hosts.good("new", "repair", "--adopt", f"old:{home}", home=home)
    hosts.good("new", "undo", home=home)  # the repair itself may have made a run
    if path.is_symlink():
        hosts.good("new", "undo", home=home)
    assert not path.is_symlink()
    assert (path / "of old").read_text() == "mine"
    assert not (hosts.volume / "work").exists(), "the links of the adopted name are no links of another home"


def test_run_of_an_adopted_host_is_undone_by_name_without_yes(hosts: Hosts) -> None:
    path = hosts.relocated("old", "work", "mine", "work")
    home = hosts.home("old")
    (name,) = [run["run"] for run in hosts.runs()]
    hosts.good("new", "repair", "--adopt", f"old:{home}", home=home)
    hosts.good("new", "undo", name, home=home)
    assert not path.is_symlink()
    assert not (hosts.volume / "work").exists()
