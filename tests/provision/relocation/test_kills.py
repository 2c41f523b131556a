"""The move, the merge and the undo, killed before every act and at random bytes of the copy: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.layout import Root
from provision.core.step import State
from provision.fs.open_dir import OpenDir
from provision.host.tool_caches import RelocatedFolder
from provision.relocation.step import RelocateStep
from provision.setup import undo as undo_runs
from provision.volume.journal import Journal
from provision.volume.marker import VolumeStep
from tests.conftest import CHECKOUT
from tests.provision import random_trees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What changes a file system, by the names that the interpreter itself gives these acts (sys.audit).
ACTS = {f"os.{act}" for act in ("rename", "mkdir", "remove", "rmdir", "symlink", "link", "truncate", "utime", "chmod")}
LONG = pytest.param(True, marks=pytest.mark.long, id="all")


@dataclass
class Field:
    """Where one trial plays: a home folder, a volume, and what both held at first."""

    home: Path
    volume: Path
    source: Path
    held: dict[str, object]
    volume_held: dict[str, object]

    @property
    def root(self) -> Root:
        return Root(self.volume)

    @property
    def target(self) -> Path:
        return self.root.hub

    def step(self) -> RelocateStep:
        places = [RelocatedFolder(self.source, self.target)]
        return RelocateStep("huggingface", places, self.root, self.home, Journal(self.root.journal, "setup"))

    def undo(self) -> None:
        journal = Journal(self.root.journal, "undo")
        for each in undo_runs.steps(undo_runs.runs(self.root)[0], self.root, self.home, journal):
            if each.check().state is not State.OK:
                each.apply()


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    other = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield tmp_path / "trial", other
    shutil.rmtree(other, ignore_errors=True)


def lay(folders: tuple[Path, Path], *, other_disk: bool, merge: bool) -> Field:
    """A fresh home and volume."""
    here, other = folders
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    home, volume = here / "home", (other if other_disk else here) / "volume"
    field = Field(home, volume, home / ".cache/hub", {}, {})
    VolumeStep(field.root, [], Journal(field.root.journal)).apply()
    shutil.rmtree(field.root.journal)
    field.source.mkdir(parents=True)
    field.held = random_trees.small(field.source)
    if merge:
        (field.target / "blobs").mkdir(parents=True)
        (field.target / "blobs/b").write_text("the volume's own, and older")
        os.utime(field.target / "blobs/b", (1000, 1000))
        (field.target / "link").symlink_to("the volume's own")
        (field.target / "only there").write_text("of the volume")
        shutil.copy2(field.source / "blobs/a", field.target / "blobs/a")
        field.volume_held = random_trees.contents(field.target)
    return field


def no_exchange(*_: Any) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """As overlayfs does for a folder of an image's layer."""
    rename = OpenDir.rename

    def refused(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        if name == "hub" and self.path.name == ".cache":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(self, name, other, new)

    monkeypatch.setattr(OpenDir, "exchange", refusing_exdev)
    monkeypatch.setattr(OpenDir, "rename", refused)


def refusing_exdev(*_: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def killed_at(act: Callable[[], None], *, number: int | None = None, offset: int | None = None) -> bool:
    """Run it in a process of its own that is killed before its nth act, or at a byte; whether that came to be."""
    pid = os.fork()
    if pid == 0:
        try:
            (_count(number) if number is not None else _weigh(offset or 0))
            act()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the act itself failed"
    return os.WIFSIGNALED(status)


def _count(number: int) -> None:
    left = number

    def die_in_time() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ACTS or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            die_in_time()

    exchange = OpenDir.exchange

    def counted(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        die_in_time()
        exchange(self, name, other, new)
        die_in_time()

    OpenDir.exchange = counted  # type: ignore[method-assign]
    sys.addaudithook(hook)


def _weigh(offset: int) -> None:
    left = offset
    inside, write = os.copy_file_range, os.write

    def weighed(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def copy(source: int, target: int, count: int) -> int:
        # In small pieces, so that the kill can fall inside a file.
        done = inside(source, target, min(count, 4096 if left < 65536 else 65536))
        weighed(done)
        return done

    def writing(target: int, content: bytes) -> int:
        done = write(target, content[: max(left, 1)])
        weighed(done)
        return done

    os.copy_file_range = copy  # type: ignore[assignment]
    os.write = writing  # type: ignore[assignment]


def nothing_is_lost(field: Field) -> None:
    """Every content is at a place that the journal names."""
    named = {field.source, field.target}
    for path in field.root.journal.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            named |= {Path(row[key]) for key in ("source", "target", "aside", "partial", "whole") if row.get(key)}
    places = [random_trees.contents(path) for path in named if path.is_dir()]
    wanted = {name: seen[3] for name, seen in field.held.items() if isinstance(seen, tuple) and seen[3] is not None}
    if not field.volume_held:
        assert any(wanted == place for place in places), f"no complete copy at any of {sorted(map(str, named))}"
    everything = [content for place in places for content in place.values()]
    for name, content in (*wanted.items(), *field.volume_held.items()):
        assert content in everything, f"{name} is lost"


def is_moved(field: Field) -> None:
    field.step().apply()
    assert field.step().check().state is State.OK
    if field.volume_held:
        kept = list(random_trees.contents(field.target).values())
        for content in (*random_trees.contents(field.source).values(), *field.volume_held.values()):
            assert content in kept
        assert (field.source / "only there").exists()
        assert (field.source / "blobs/deep/c").read_text() == "c"
    else:
        assert random_trees.read(field.target) == field.held
    assert [str(path) for top in (field.home, field.volume) for path in top.rglob(".*.firstlight-*")] == []


def is_back(field: Field) -> None:
    field.undo()
    assert not field.source.is_symlink()
    assert random_trees.read(field.source) == field.held
    if field.volume_held:
        assert random_trees.contents(field.target) == field.volume_held
    else:
        assert not field.target.exists()
    assert [str(path) for top in (field.home, field.volume) for path in top.rglob(".*.firstlight-*")] == []


CASES = {
    "one disk": (False, False, None),
    "two disks": (True, False, None),
    "one disk, no exchange": (False, False, "exchange"),
    "two disks, no exchange": (True, False, "exchange"),
    "one disk, no rename": (False, False, "rename"),
    "two disks, no rename": (True, False, "rename"),
    "merge on one disk": (False, True, None),
    "merge of two disks": (True, True, None),
    "merge, no exchange": (True, True, "exchange"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["move", "undo"])
@pytest.mark.parametrize("every", [pytest.param(False, id="some"), LONG])
def test_killed_before_every_act(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, case: str, way: str, every: bool
) -> None:
    other_disk, merge, without = CASES[case]
    if without == "exchange":
        monkeypatch.setattr(OpenDir, "exchange", no_exchange)
    if without == "rename":
        no_rename(monkeypatch)
    kills = 0
    for number in range(1, 1000, 1 if every else 2):
        field = lay(folders, other_disk=other_disk, merge=merge)
        if way == "undo":
            field.step().apply()
        if not killed_at(field.undo if way == "undo" else field.step().apply, number=number):
            break
        kills += 1
        nothing_is_lost(field)
        (is_back if way == "undo" else is_moved)(field)
    else:
        pytest.fail("it never came to an end")
    assert kills >= 4
    print(f"{kills} kills: {way}, {case}")


@pytest.mark.parametrize("case", ["two disks", "two disks, no exchange", "merge of two disks"])
@pytest.mark.parametrize("every", [pytest.param(False, id="some"), LONG])
def test_killed_at_random_bytes_of_the_copy(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, case: str, every: bool
) -> None:
    other_disk, merge, without = CASES[case]
    if without == "exchange":
        monkeypatch.setattr(OpenDir, "exchange", no_exchange)
    chance = random.Random(7)  # noqa: S311 (it chooses where to kill)
    kills = 0
    offsets = 60 if every else 5
    for _ in range(offsets):
        field = lay(folders, other_disk=other_disk, merge=merge)
        if merge:
            (field.target / "blobs/a").unlink()
            field.volume_held = random_trees.contents(field.target)
        kills += killed_at(field.step().apply, offset=chance.randrange(1, 2_500_000))
        nothing_is_lost(field)
        is_moved(field)
    assert kills == offsets
    print(f"{kills} kills at random bytes, {case}")


def test_a_kill_of_the_whole_command_and_then_setup(folders: tuple[Path, Path], home: Path) -> None:
    """The command itself, killed while it copies 300 MB; the next setup ends the move."""
    _, other = folders
    big = home / "data"
    big.mkdir()
    for number in range(3):
        (big / f"{number}").write_bytes(os.urandom(1 << 20) * 100)
    held = random_trees.contents(big)
    argv = [sys.executable, "-m", "provision", "relocate", str(big), "--root", str(other / "root")]
    environ = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    partial = other / "root/relocated/.data.firstlight-partial"
    with subprocess.Popen(argv, env=environ, stdout=subprocess.DEVNULL) as process:
        while not partial.exists() and process.poll() is None:
            select.select([], [], [], 0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode in {-signal.SIGKILL, 0}, "0: it was done before it could be killed"
    assert random_trees.contents(big) == held
    done = subprocess.run(argv, env=environ, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert big.is_symlink()
    assert random_trees.contents(big) == held
