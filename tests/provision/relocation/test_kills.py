"""Kills a move, a merge and an undo before each act and at random bytes of a copy: no data is lost."""

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
from provision.fs.open_dir import OpenDir, link_target
from provision.host.tool_caches import RelocatedFolder
from provision.relocation.step import RelocateStep
from provision.setup import undo as undo_runs
from provision.volume.journal import Journal
from provision.volume.marker import VolumeStep
from tests.conftest import CHECKOUT
from tests.provision import random_trees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The audit events of the calls that change a file system (docs.python.org/3/library/audit_events.html).
ACTS = {f"os.{act}" for act in ("rename", "mkdir", "remove", "rmdir", "symlink", "link", "truncate", "utime", "chmod")}
LONG = pytest.param(True, marks=pytest.mark.long, id="all")


@dataclass
class Trial:
    """Describe one trial: a home, a volume, and the entries of the source and the target before the trial."""

    home: Path
    volume: Path
    source: Path
    source_before: dict[str, object]
    volume_before: dict[str, object]

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
        for step in undo_runs.steps(undo_runs.runs(self.root)[0], self.root, self.home, journal):
            if step.check().state is not State.OK:
                step.apply()


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    other = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield tmp_path / "trial", other
    shutil.rmtree(other, ignore_errors=True)


def new_trial(folders: tuple[Path, Path], *, other_disk: bool, merge: bool) -> Trial:
    """Build a new home and volume, and return the trial; with `merge` the target folder already has files."""
    here, other = folders
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    home, volume = here / "home", (other if other_disk else here) / "volume"
    trial = Trial(home, volume, home / ".cache/hub", {}, {})
    VolumeStep(trial.root, [], Journal(trial.root.journal)).apply()
    shutil.rmtree(trial.root.journal)
    trial.source.mkdir(parents=True)
    trial.source_before = random_trees.small(trial.source)
    if merge:
        (trial.target / "blobs").mkdir(parents=True)
        (trial.target / "blobs/b").write_text("an older version of the volume")
        os.utime(trial.target / "blobs/b", (1000, 1000))
        (trial.target / "link").symlink_to("a target of the volume")
        (trial.target / "only there").write_text("of the volume")
        shutil.copy2(trial.source / "blobs/a", trial.target / "blobs/a")
        trial.volume_before = random_trees.contents(trial.target)
    return trial


def fail_with_enosys(*_: Any) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def forbid_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each rename of the source folder fail with EXDEV, as overlayfs does for a folder of an image layer."""
    rename = OpenDir.rename

    def rename_elsewhere(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        if name == "hub" and self.path.name == ".cache":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(self, name, other, new)

    monkeypatch.setattr(OpenDir, "exchange", fail_with_exdev)
    monkeypatch.setattr(OpenDir, "rename", rename_elsewhere)


def fail_with_exdev(*_: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def is_killed_at(act: Callable[[], None], *, number: int | None = None, offset: int | None = None) -> bool:
    """Run `act` in a child process, and return whether the process was killed.

    The kill comes before its call `number` that changes a file system, or after it has copied `offset` bytes.
    """
    pid = os.fork()
    if pid == 0:
        try:
            (_kill_before_act(number) if number is not None else _kill_at_byte(offset or 0))
            act()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "`act` failed in the child process"
    return os.WIFSIGNALED(status)


def _kill_before_act(number: int) -> None:
    left = number

    def count_act() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ACTS or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            count_act()

    exchange = OpenDir.exchange

    def counted(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        count_act()
        exchange(self, name, other, new)
        count_act()

    OpenDir.exchange = counted  # type: ignore[method-assign]
    sys.addaudithook(hook)


def _kill_at_byte(offset: int) -> None:
    left = offset
    copy_file_range, write = os.copy_file_range, os.write

    def count_bytes(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def copy(source: int, target: int, count: int) -> int:
        # Small parts, so that a kill can hit the middle of a file.
        done = copy_file_range(source, target, min(count, 4096 if left < 65536 else 65536))
        count_bytes(done)
        return done

    def write_part(target: int, content: bytes) -> int:
        done = write(target, content[: max(left, 1)])
        count_bytes(done)
        return done

    os.copy_file_range = copy  # type: ignore[assignment]
    os.write = write_part  # type: ignore[assignment]


def assert_nothing_is_lost(trial: Trial) -> None:
    """Check that a path in the journal has a complete copy, and that each file's content before the trial exists."""
    paths = {trial.source, trial.target}
    for path in trial.root.journal.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            paths |= {Path(row[key]) for key in ("source", "target", "aside", "partial", "whole") if row.get(key)}
    trees = [random_trees.contents(path) for path in paths if path.is_dir()]
    complete = {
        name: entry[3]
        for name, entry in trial.source_before.items()
        if isinstance(entry, tuple) and entry[3] is not None
    }
    if not trial.volume_before:
        assert complete in trees, f"no complete copy at any of {sorted(map(str, paths))}"
    contents = [content for tree in trees for content in tree.values()]
    for name, content in (*complete.items(), *trial.volume_before.items()):
        assert content in contents, f"{name} is lost"


def assert_next_run_completes(trial: Trial) -> None:
    trial.step().apply()
    assert trial.step().check().state is State.OK
    if trial.volume_before:
        kept = list(random_trees.contents(trial.target).values())
        for content in (*random_trees.contents(trial.source).values(), *trial.volume_before.values()):
            assert content in kept
        assert (trial.source / "only there").exists()
        assert (trial.source / "blobs/deep/c").read_text() == "c"
    else:
        assert random_trees.read(trial.target) == trial.source_before
    assert [str(path) for top in (trial.home, trial.volume) for path in top.rglob(".*.firstlight-*")] == []


def assert_undo_completes(trial: Trial) -> None:
    trial.undo()
    assert not trial.source.is_symlink()
    assert random_trees.read(trial.source) == trial.source_before
    if trial.volume_before:
        assert random_trees.contents(trial.target) == trial.volume_before
    else:
        assert not trial.target.exists()
    assert [str(path) for top in (trial.home, trial.volume) for path in top.rglob(".*.firstlight-*")] == []


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
@pytest.mark.parametrize("operation", ["move", "undo"])
@pytest.mark.parametrize("is_long", [pytest.param(False, id="some"), LONG])
def test_move_or_undo_killed_before_any_change_loses_no_data_and_the_next_run_completes_it(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, case: str, operation: str, is_long: bool
) -> None:
    other_disk, merge, without = CASES[case]
    if without == "exchange":
        monkeypatch.setattr(OpenDir, "exchange", fail_with_enosys)
    if without == "rename":
        forbid_rename(monkeypatch)
    kills = 0
    for number in range(1, 1000, 1 if is_long else 2):
        trial = new_trial(folders, other_disk=other_disk, merge=merge)
        if operation == "undo":
            trial.step().apply()
        if not is_killed_at(trial.undo if operation == "undo" else trial.step().apply, number=number):
            break
        kills += 1
        assert_nothing_is_lost(trial)
        (assert_undo_completes if operation == "undo" else assert_next_run_completes)(trial)
    else:
        pytest.fail("the operation still runs at its 1000th change")
    assert kills >= 4
    print(f"{kills} kills: {operation}, {case}")


@pytest.mark.parametrize("case", ["two disks", "two disks, no exchange", "merge of two disks"])
@pytest.mark.parametrize("is_long", [pytest.param(False, id="some"), LONG])
def test_copy_killed_at_a_random_byte_loses_no_data_and_the_next_run_completes_it(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, case: str, is_long: bool
) -> None:
    other_disk, merge, without = CASES[case]
    if without == "exchange":
        monkeypatch.setattr(OpenDir, "exchange", fail_with_enosys)
    chance = random.Random(7)  # noqa: S311 (it selects the byte, and needs no secrecy)
    kills = 0
    offsets = 60 if is_long else 5
    for _ in range(offsets):
        trial = new_trial(folders, other_disk=other_disk, merge=merge)
        if merge:
            (trial.target / "blobs/a").unlink()
            trial.volume_before = random_trees.contents(trial.target)
        kills += is_killed_at(trial.step().apply, offset=chance.randrange(1, 2_500_000))
        assert_nothing_is_lost(trial)
        assert_next_run_completes(trial)
    assert kills == offsets
    print(f"{kills} kills at random bytes, {case}")


@pytest.mark.parametrize("case", ["one disk", "two disks, no exchange", "merge of two disks"])
@pytest.mark.parametrize("operation", ["move", "undo"])
@pytest.mark.parametrize("is_long", [pytest.param(False, id="some"), LONG])
def test_relative_link_out_of_the_folder_keeps_its_target_after_a_kill_before_any_change(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, case: str, operation: str, is_long: bool
) -> None:
    """Move a folder with a relative link out of the folder; undo restores the text of the link."""
    other_disk, merge, without = CASES[case]
    if without == "exchange":
        monkeypatch.setattr(OpenDir, "exchange", fail_with_enosys)
    kills = 0
    for number in range(1, 1000, 1 if is_long else 3):
        trial = new_trial(folders, other_disk=other_disk, merge=merge)
        (trial.home / "drive").mkdir()
        (trial.home / "drive/weights").write_text("w")
        link = trial.source / "blobs/deep/out"
        link.symlink_to("../../../../drive")
        trial.source_before = random_trees.read(trial.source)
        if operation == "undo":
            trial.step().apply()
        is_killed = is_killed_at(trial.undo if operation == "undo" else trial.step().apply, number=number)
        if os.path.lexists(link):
            assert (link / "weights").read_text() == "w"
        if not is_killed:
            break
        kills += 1
        if operation == "move":
            trial.step().apply()
            assert trial.step().check().state is State.OK
            assert link.readlink() == trial.home / "drive"
        else:
            assert_undo_completes(trial)
            assert link_target(link) == "../../../../drive"
        assert (link / "weights").read_text() == "w"
    else:
        pytest.fail("the operation still runs at its 1000th change")
    assert kills >= 4


def test_relocate_command_killed_during_the_copy_is_completed_by_the_same_command(
    folders: tuple[Path, Path], home: Path
) -> None:
    """Kill `provision relocate` while it copies 300 MB."""
    _, other = folders
    big = home / "data"
    big.mkdir()
    for number in range(3):
        (big / f"{number}").write_bytes(os.urandom(1 << 20) * 100)
    before = random_trees.contents(big)
    argv = [sys.executable, "-m", "provision", "relocate", str(big), "--root", str(other / "root")]
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    partial = other / "root/relocated/.data.firstlight-partial"
    with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL) as process:
        while not partial.exists() and process.poll() is None:
            select.select([], [], [], 0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode in {-signal.SIGKILL, 0}, "with 0, the command ended before the kill"
    assert random_trees.contents(big) == before
    completed = subprocess.run(argv, env=environment, check=False, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert big.is_symlink()
    assert random_trees.contents(big) == before
