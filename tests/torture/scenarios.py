"""Defines the scenarios of folder moves: the command that a power loss interrupts, and the follow-up commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping  # noqa: TC003 (fields of a dataclass)
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from provision.core import step as engine
from provision.core.errors import Exit, SpecError
from provision.core.layout import Root
from provision.core.step import State
from provision.fs import copy_file
from provision.fs.atomic import PART
from provision.host.tool_caches import RelocatedFolder
from provision.relocation import move, move_pair, preflight
from provision.relocation.record_step import RecordStep
from provision.relocation.step import RelocateStep
from provision.setup import undo as undo_runs
from provision.volume.journal import Journal
from provision.volume.journal_acts import RunUndone
from provision.volume.marker import VolumeStep
from provision.volume.owner import current
from tests.torture import disk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.core.step import Step

Reading = dict[str, object]
# The temporary name of a file that is being written. After a power loss or a kill, such a file may remain.


@dataclass(frozen=True)
class Field:
    """Hold the paths of a scenario's folders below `base`: a home, and a volume with a root."""

    base: Path

    @property
    def home(self) -> Path:
        return self.base / "home"

    @property
    def volume(self) -> Path:
        return self.base / "volume"

    @property
    def root(self) -> Root:
        return Root(self.volume / "data")

    @property
    def places(self) -> list[RelocatedFolder]:
        """Return the two folders of the home that setup relocates, with their targets on the volume."""
        return [
            RelocatedFolder(self.home / ".cache/hub", self.root.hub),
            RelocatedFolder(self.home / ".cache/pip", self.root.cache / "pip"),
        ]

    def read(self) -> Reading:
        """Return the reading of home and volume, without the root's .firstlight and without temporary files.

        A folder that holds only temporary files is left out, too.
        """
        now, _ = disk.read([self.home, self.volume])
        entries = {path: entry for path, entry in reading(now).items() if not path.startswith(str(self.root.state))}
        parts = [path for path in entries if PART.search(path)]
        only_parts = {str(Path(part).parent) for part in parts}
        only_parts -= {str(Path(path).parent) for path in entries if path not in parts}
        return {path: entry for path, entry in entries.items() if path not in parts and path not in only_parts}


@dataclass(frozen=True)
class Scenario:
    """Describe a command that a power loss interrupts, and the follow-up commands, which must repair the result.

    Attributes:
        lay: builds the folders as they are before the command.
        act: runs the command, whose writes are recorded.
        ends: {name: function that runs follow-up commands}. A function takes the readings before and after an
            uninterrupted command, and raises AssertionError if the folders differ from the expected reading.
        kept: returns the paths at which the user's content may be after the power loss.
        two_disks: whether home and volume are two file systems.
        owned: the contents of the user's files; None: the contents of all files before the command.
    """

    lay: Callable[[Field], None]
    act: Callable[[Field], None]
    ends: Mapping[str, Callable[[Field, Reading, Reading], None]]
    kept: Callable[[Field], Sequence[Path]]
    two_disks: bool = False
    owned: tuple[bytes, ...] | None = None


def reading(now: disk.Disk) -> Reading:
    """Return {path: (mode, content, extended attributes, first path of the same inode)}."""
    first: dict[int, str] = {}
    return {
        path: (node.mode, node.content, node.attributes, first.setdefault(number, path))
        for path, number, node in now.entries()
    }


class Patched:
    """Patches `provision` while a scenario runs.

    Files are copied in blocks of 4 kB, so that small files need several blocks. HOME is the scenario's home. With
    `two_disks`, home and volume have different device numbers.
    """

    def __init__(self, scenario: Scenario, field: Field) -> None:
        self.patches: list[Any] = [
            mock.patch.dict(os.environ, {"HOME": str(field.home)}),
            mock.patch.object(copy_file, "BLOCK", 4096),
            mock.patch.object(copy_file, "_PIECE", 4096),
            mock.patch.object(preflight, "require_unused"),  # it reads all of /proc
        ]
        if scenario.two_disks:
            self.patches.append(mock.patch.object(move, "_device", return_value=-1))

    def __enter__(self) -> None:
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self.patches):
            patch.stop()


def converge(steps: Sequence[Step]) -> None:
    """Run steps of setup as a command does, and assert that the exit code is 0.

    Raises:
        AssertionError: the exit code is not 0.
    """
    outcomes = engine.converge(steps, listen=lambda _, __: None)
    assert engine.exit_of(outcomes) is Exit.GOOD, [f"{row.step}: {row.error}" for row in outcomes if row.error]


def setup_steps(field: Field) -> list[Step]:
    journal = Journal(field.root.journal, "setup")
    leading = [place.source for place in field.places]
    relocate = RelocateStep("huggingface", field.places, field.root, field.home, journal)
    return [
        VolumeStep(field.root, leading, journal),
        relocate,
        RecordStep(field.root, field.home, [relocate], journal),
    ]


def setup(field: Field) -> None:
    converge(setup_steps(field))


def undo(field: Field) -> None:
    """Undo the newest run; if a step is blocked, change nothing.

    Raises:
        SpecError: no run is left to undo.
        AssertionError: a step is blocked, or the exit code is not 0.
    """
    run = undo_runs.choose(field.root, None, current(field.home))
    journal = Journal(field.root.journal, "undo")
    steps = undo_runs.steps(run, field.root, field.home, journal)
    blocked = [check.detail for check in (step.check() for step in steps) if check.state is State.BLOCKED]
    assert not blocked, blocked
    converge(steps)
    journal.record(RunUndone(run.name))


def undo_all(field: Field) -> None:
    """Undo all runs, newest first."""
    for _ in range(10):
        try:
            undo(field)
        except SpecError:
            return
    raise AssertionError("ten undos left a run to undo")


def is_moved(field: Field, before: Reading, after: Reading) -> None:
    """Run setup; assert that the folders equal those of an uninterrupted setup, and that no step has work left."""
    setup(field)
    same(field.read(), after)
    steps = setup_steps(field)
    assert all(step.check().state is State.OK for step in steps), "a second run would change something"


def is_back(field: Field, before: Reading, after: Reading) -> None:
    """Undo all runs, and assert that the folders are as before setup."""
    undo_all(field)
    same(without_root(field, field.read()), without_root(field, before))


def is_moved_and_back(field: Field, before: Reading, after: Reading) -> None:
    setup(field)
    is_back(field, before, after)


def without_root(field: Field, entries: Reading) -> Reading:
    """Return a reading without the folders of volume and root, which undo keeps because the root holds the marker."""
    own = {str(field.root.path), str(field.volume)}
    return {path: entry for path, entry in entries.items() if path not in own}


def same(actual: Reading, expected: Reading) -> None:
    """Assert that two readings are equal, except for left-over folders in which the file system was tested."""
    # A power loss may leave the folder in which firstlight tests what the file system can do; a later test deletes it.
    actual = {path: entry for path, entry in actual.items() if "/.firstlight-probe-" not in path}
    missing = sorted(set(expected) - set(actual))
    unexpected = sorted(set(actual) - set(expected))
    different = sorted(path for path in set(actual) & set(expected) if actual[path] != expected[path])
    if missing or unexpected or different:
        raise AssertionError(f"missing: {missing}; unexpected: {unexpected}; different: {different}")


def fill(folder: Path, seed: bytes) -> None:
    """Write files smaller and larger than a block, a hard link, a symlink and an empty folder, all with fixed times."""
    (folder / "blobs/deep").mkdir(parents=True)
    (folder / "blobs/a").write_bytes(seed * 3000)
    (folder / "blobs/b").write_bytes(seed * 30)
    os.link(folder / "blobs/b", folder / "blobs/deep/b too")
    (folder / "blobs/deep/c").write_bytes(b"c" + seed)
    (folder / "blobs/deep/c").chmod(0o640)
    (folder / "link").symlink_to("blobs/a")
    (folder / "empty").mkdir()
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, ns=(10**18, 10**18 + number), follow_symlinks=False)


def lay_first(field: Field) -> None:
    """Build a home with the two folders, and no marker on the volume, as before the first setup."""
    fill(field.places[0].source, b"hub ")
    fill(field.places[1].source, b"pip ")


def lay_move(field: Field) -> None:
    """Build a home with the two folders, and a volume with a marker."""
    lay_first(field)
    lay_volume(field)


def lay_outgoing(field: Field) -> None:
    """Build what `lay_move` builds, and a relative link in the first folder to a target outside of that folder."""
    lay_move(field)
    (field.home / "drive").mkdir()
    (field.home / "drive/weights").write_bytes(b"weights")
    link = field.places[0].source / "blobs/deep/out"
    link.symlink_to("../../../../drive")
    os.utime(link, ns=(10**18, 10**18), follow_symlinks=False)


def lay_volume(field: Field) -> None:
    """Write the marker as an earlier run does, and delete the journal of that run."""
    VolumeStep(field.root, [], Journal(field.root.journal)).apply()
    shutil.rmtree(field.root.journal)


def lay_merge(field: Field) -> None:
    """Build what `lay_move` builds, and a target that a move must merge.

    The target has equal, older, newer and additional files, and a file where the source has a folder.
    """
    lay_move(field)
    target = field.places[0].target
    fill(target, b"hub ")
    for name, content, time in (("blobs/a", b"older there", 1), ("blobs/deep/c", b"newer there", 2 * 10**18)):
        (target / name).write_bytes(content)
        os.utime(target / name, ns=(time, time))
    (target / "link").unlink()
    (target / "link").symlink_to("of the volume")
    os.utime(target / "link", ns=(1, 1), follow_symlinks=False)
    (target / "only there").write_bytes(b"only there")
    source = field.places[0].source
    (source / "new").mkdir()
    (source / "new/file").write_bytes(b"in a new folder")
    (source / "clash").mkdir()
    (source / "clash/inner").write_bytes(b"in a folder that is a file there")
    (target / "clash").write_bytes(b"a file that is a folder here")
    os.utime(target / "clash", ns=(1, 1))


def lay_environments(field: Field) -> None:
    """Build source and target with conda environments of the same names, which a merge must keep whole.

    They are an equal one, two different ones, and one that is incomplete in the source. The source's version of the
    environment `kept` is beside the target's already, as after an earlier merge.
    """
    lay_move(field)
    source, target = field.places[0].source, field.places[0].target
    for top, number in ((source, b"3.10"), (target, b"3.12")):
        for name, version in (("equal", b"3.11"), ("different", number), ("partial", b"3.11"), ("kept", number)):
            (top / name / "conda-meta").mkdir(parents=True)
            (top / name / "conda-meta" / f"python-{version.decode()}.json").write_bytes(name.encode() + version)
            (top / name / "python").write_bytes(b"the program " + version)
            os.utime(top / name / "python", ns=(10**18, 10**18))
    (source / "partial/python").unlink()
    shutil.copytree(source / "kept", target / "kept.firstlight-from-an-earlier-host")


def lay_undo(lay: Callable[[Field], None]) -> Callable[[Field], None]:
    """Return a function that builds the folders by `lay`, and then runs setup."""

    def laying(field: Field) -> None:
        lay(field)
        setup(field)

    return laying


def lay_wipe(field: Field) -> None:
    """Build what `lay_move` builds, run setup, which moves both folders, and then empty the home as a wipe does."""
    lay_move(field)
    setup(field)
    shutil.rmtree(field.home)
    field.home.mkdir()


def is_undone(field: Field, before: Reading, after: Reading) -> None:
    """Undo all runs, and assert that the folders equal those of an uninterrupted undo."""
    undo_all(field)
    same(field.read(), after)


def is_linked_by_the_script(field: Field, before: Reading, after: Reading) -> None:
    """Run relink.sh, then setup; assert that the folders equal those of an uninterrupted setup."""
    completed = subprocess.run(["sh", field.root.relink, "-q"], check=False, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    is_moved(field, before, after)


def folders(field: Field) -> list[Path]:
    """Return all paths, temporary ones also, to which a move or its undo may bring the user's files."""
    pairs = [move_pair.MovePair(place.source, place.target) for place in field.places]
    backs = [move_pair.MovePair(pair.target, pair.source) for pair in pairs]
    names = [name for pair in (*pairs, *backs) for name in (pair.source, pair.target, pair.aside, pair.partial)]
    return [*names, field.home / "drive"]


_FORTH = {"setup": is_moved, "undo": is_back, "setup, undo": is_moved_and_back}
_BACK = {"undo": is_undone}


def _both(name: str, lay: Callable[[Field], None]) -> dict[str, Scenario]:
    """Return the scenarios of setup and of its undo, on one disk and on two."""
    scenarios = {}
    for where, two in (("one disk", False), ("two disks", True)):
        scenarios[f"{name}, {where}"] = Scenario(lay, setup, _FORTH, folders, two)
        scenarios[f"undo of {name}, {where}"] = Scenario(lay_undo(lay), undo, _BACK, folders, two)
    return scenarios


FOLDERS: dict[str, Scenario] = {
    **_both("move", lay_move),
    **_both("merge", lay_merge),
    **_both("merge of environments", lay_environments),
    **_both("move of an outgoing link", lay_outgoing),
    "first setup, one disk": Scenario(lay_first, setup, _FORTH, folders),
    "first setup, two disks": Scenario(lay_first, setup, _FORTH, folders, two_disks=True),
    "links after a wipe": Scenario(
        lay_wipe, setup, {"setup": is_moved, "script": is_linked_by_the_script}, folders, two_disks=True
    ),
}
