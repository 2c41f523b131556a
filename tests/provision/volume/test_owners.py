"""Tests links of several owners on one volume: their record, and relink.sh on hosts with other names and homes."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import SpecError
from provision.core.layout import Root
from provision.volume import adoption, link_files, links
from provision.volume.adoption import Adoption
from provision.volume.journal import Journal
from provision.volume.links import Link
from provision.volume.marker import VolumeStep
from provision.volume.owner import Owner, current

if TYPE_CHECKING:
    from pathlib import Path

SHELLS = [shell for shell in ("dash", "bash", "busybox", "zsh", "ksh") if shutil.which(shell)]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path / "a volume's (own)")
    VolumeStep(root, [], Journal(root.journal)).apply()
    return root


@pytest.fixture
def other_home(tmp_path: Path) -> Path:
    folder = tmp_path / "other 'home'"
    folder.mkdir()
    return folder


def on_host(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(platform, "node", lambda: name)


def run_on(host: str, root: Root, home: Path, *flags: str, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    """Run relink.sh in a new UTS namespace, whose host name is `host`."""
    words = {"busybox": "busybox sh", "zsh": "zsh --emulate sh"}.get(shell, shell)
    script = f'hostname "$1" && shift && exec {words} "$@"'
    argv: list[str | Path] = ["unshare", "--uts", "sh", "-c", script, "sh", host, root.relink, *flags]
    environ = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, capture_output=True, env=environ, text=True, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip("no right to make a UTS namespace")
    return done


def write_schema_1(root: Root, *rows: tuple[str, str], made_at: str | None = None) -> None:
    content = {
        "schema": 1,
        "root": made_at or str(root.path),
        "links": [{"path": path, "target": target} for path, target in rows],
    }
    root.links.write_text(json.dumps(content))


def test_host_that_records_its_links_keeps_those_of_another_host_byte_for_byte(
    root: Root, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host(monkeypatch, "a")
    link_files.write(root, home, [Link(home / "work", root.path / "work")])
    first = json.loads(root.links.read_text())["links"]
    on_host(monkeypatch, "b")
    assert links.recorded(root, current(home)) == []
    link_files.write(root, home, [Link(home / ".cache/pip", root.cache / "pip")])
    both = root.links.read_bytes(), root.relink.read_bytes()
    assert json.loads(both[0])["links"][:1] == first
    link_files.forget(root, home, home / "work")
    assert root.links.read_bytes() == both[0], "the link of another owner is not forgotten"
    work, pip = Link(home / "work", root.path / "work"), Link(home / ".cache/pip", root.cache / "pip")
    for host, link in (("a", work), ("b", pip)):
        on_host(monkeypatch, host)
        assert links.recorded(root, current(home)) == [link]
        link_files.write(root, home, [link])
        assert (root.links.read_bytes(), root.relink.read_bytes()) == both, "no host changes the files again"


def test_two_hosts_with_different_mount_points_do_not_rewrite_each_others_links(
    root: Root, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Root(tmp_path / "mounted elsewhere")
    other.path.symlink_to(root.path)
    for host, mounted in (("a", root), ("b", other)):
        on_host(monkeypatch, host)
        link_files.write(mounted, home, [Link(home / "x", mounted.path / "x")])
    before = root.links.read_bytes(), root.relink.read_bytes()
    for host, mounted in (("a", root), ("b", other)) * 2:
        on_host(monkeypatch, host)
        assert links.recorded(mounted, current(home)) == [Link(home / "x", mounted.path / "x")]
        link_files.write(mounted, home, [Link(home / "x", mounted.path / "x")])
        assert (root.links.read_bytes(), root.relink.read_bytes()) == before


@pytest.mark.parametrize("shell", SHELLS)
def test_relink_makes_the_links_of_the_current_host_and_home_only(
    root: Root, home: Path, other_home: Path, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host, folder, name in (("a", home, "of a"), ("b", home, "of b"), ("a", other_home, "of another home")):
        on_host(monkeypatch, host)
        link_files.write(root, folder, [Link(folder / name, root.path / name)])
    for host, folder, name in (("b", home, "of b"), ("a", other_home, "of another home"), ("a", home, "of a")):
        done = run_on(host, root, folder, shell=shell)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert (folder / name).readlink() == root.path / name
        (folder / name).unlink()
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_relink_on_a_host_without_recorded_links_names_the_owners_and_makes_no_link(
    root: Root, home: Path, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host(monkeypatch, "a")
    link_files.write(root, home, [Link(home / "x", root.path / "x")])
    for flags in ((), ("-q",)):
        done = run_on("c", root, home, *flags, shell=shell)
        assert (done.returncode, done.stderr) == (3, "")
        assert f"no links of c:{home} are recorded" in done.stdout
        assert f"provision repair --root {root.path} --adopt a:{home}" in done.stdout
        assert list(home.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_relink_makes_links_of_an_unknown_owner_only_where_no_entry_exists(
    root: Root, home: Path, tmp_path: Path, shell: str
) -> None:
    write_schema_1(root, *((f"~/{name}", name) for name in ("empty", "file", "folder", "free", "link", "right")))
    content = links.read(root)
    link_files.write(root, home, [])
    assert links.read(root) == content
    (home / "empty").mkdir()
    (home / "folder").mkdir()
    (home / "folder/mine").touch()
    (home / "file").touch()
    (home / "link").symlink_to(tmp_path / "elsewhere")
    (root.path / "right").mkdir()
    (home / "right").symlink_to(root.path / "right")

    def entries() -> dict[Path, tuple[int, int, int]]:
        # Reading a link may change its access time.
        states = {path: path.lstat() for path in home.iterdir()}
        return {path: (state.st_ino, state.st_mode, state.st_mtime_ns) for path, state in states.items()}

    before = entries()
    done = run_on("any", root, home, shell=shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 right, 1 made, 0 left alone" in done.stdout
    assert (home / "free").readlink() == root.path / "free"
    (home / "free").unlink()
    assert entries() == before


def test_recorded_link_of_an_unknown_owner_becomes_that_of_the_home_that_has_the_link(
    root: Root, home: Path, other_home: Path
) -> None:
    write_schema_1(root, ("~/work", "work"), ("~/other", "other"), made_at="/earlier")
    assert links.of_unknown_owner(root, home) == [
        Link(home / "other", root.path / "other"),
        Link(home / "work", root.path / "work"),
    ]
    link_files.write(root, home, [Link(home / "work", root.path / "work")])
    assert links.recorded(root, current(home)) == [Link(home / "work", root.path / "work")]
    (row,) = links.read(root).of(None)
    assert (row.path, row.root) == ("~/other", "/earlier")
    link_files.forget(root, home, home / "other")
    assert links.of_unknown_owner(root, other_home) == [], "a link that was undone is also removed from the old record"


def test_links_that_are_adopted_belong_to_the_new_host_in_every_record(
    root: Root, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host(monkeypatch, "pod-1")
    old = current(home)
    link_files.write(root, home, [Link(home / "work", root.path / "work"), Link(home / "x", root.path / "old x")])
    for name in ("pod-2", "pod-3"):
        on_host(monkeypatch, name)
        new = current(home)
        assert adoption.candidates(root, new) == [old]
        offer = adoption.offer(root, new)
        assert offer is not None
        assert f"--adopt {old}" in offer
        assert adoption.resolve(root, old.host, new) == adoption.resolve(root, f":{home}", new) == old
        adopted = Adoption(old).with_links(root, new)
        assert adopted == [Link(home / "work", root.path / "work"), Link(home / "x", root.path / "old x")]
        link_files.write(root, home, adopted, old)
        assert links.recorded(root, new) == adopted
        assert links.recorded(root, old) == []
        assert adoption.candidates(root, new) == []
        assert adoption.resolve(root, str(old), new) is None, "a second adoption has nothing to do"
        old = new
    assert {earlier.host: later.host for earlier, later in links.read(root).adopted} == {
        "pod-1": "pod-3", "pod-2": "pod-3",
    }  # fmt: skip
    on_host(monkeypatch, "pod-1")
    link_files.write(root, home, [Link(home / "y", root.path / "y")])
    assert [earlier.host for earlier, _ in links.read(root).adopted] == ["pod-2"], (
        "a host that writes links again is no longer recorded as adopted"
    )


@pytest.mark.parametrize("text", ["none", "none:/h", "", ":", "a", "a:/nowhere"])
def test_adoption_of_an_unknown_or_ambiguous_owner_is_rejected_with_the_known_owners(
    root: Root, home: Path, text: str
) -> None:
    rows = [links.LinkRow(Owner("a", folder), str(root.path), "~/x", "x") for folder in ("/h", "/i")]
    root.links.write_bytes(links.LinkFile(tuple(rows)).to_json())
    with pytest.raises(SpecError, match=r"a:/h, a:/i"):
        adoption.resolve(root, text, current(home))
