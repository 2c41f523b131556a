"""What is done when the power fails, and the commands that go on after it."""

from __future__ import annotations

import os
import re
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
from provision.host.tool_caches import RelocatedFolder
from provision.relocation import move, preflight
from provision.relocation.relink_step import RecordStep
from provision.relocation.step import RelocateStep
from provision.setup import undo as undo_runs
from provision.volume.journal import Journal
from provision.volume.journal_acts import RunUndone
from provision.volume.marker import VolumeStep
from tests.torture import disk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.core.step import Step

Reading = dict[str, object]
# What a file is written to before it takes its name: one that a power loss leaves stays, as after a kill.
_PART = re.compile(r"\.part-[0-9]+$")


@dataclass(frozen=True)
class Field:
    """Where a scenario plays: a home, and a volume with a root in it."""

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
        """Two folders of the home, and where they are kept."""
        return [
            RelocatedFolder(self.home / ".cache/hub", self.root.hub),
            RelocatedFolder(self.home / ".cache/pip", self.root.cache / "pip"),
        ]

    def read(self) -> Reading:
        """{path: what counts} of all but our own bookkeeping; entries that are one file say so."""
        now, _ = disk.read([self.home, self.volume])
        found = {path: seen for path, seen in reading(now).items() if not path.startswith(str(self.root.state))}
        parts = [path for path in found if _PART.search(path)]
        alone = {str(Path(part).parent) for part in parts}
        alone -= {str(Path(path).parent) for path in found if path not in parts}
        return {path: seen for path, seen in found.items() if path not in parts and path not in alone}


@dataclass(frozen=True)
class Scenario:
    """One thing that is done, and what may follow.

    `lay` makes the folders as they are before, `act` is recorded. `ends`: {name of a way to go on: it}, each given the
    readings before and after an act that nothing interrupted; it raises AssertionError where it does not get there.
    `kept`: where the contents of the user may be; `two_disks`: home and volume are two file systems; `owned`: what the
    user's files hold, None: all files that are there before.
    """

    lay: Callable[[Field], None]
    act: Callable[[Field], None]
    ends: Mapping[str, Callable[[Field, Reading, Reading], None]]
    kept: Callable[[Field], Sequence[Path]]
    two_disks: bool = False
    owned: tuple[bytes, ...] | None = None


def reading(now: disk.Disk) -> Reading:
    """{path: mode, content and the first name of the same file}; a link's mode says nothing."""
    first: dict[int, str] = {}
    return {
        path: (node.mode, node.content, node.attributes, first.setdefault(number, path))
        for path, number, node in now.entries()
    }


class Patched:
    """Lets small files be copied as large ones are, and two folders of one disk be two disks."""

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
    """Run steps as a command does.

    Raises:
        AssertionError: its exit code would not be 0.
    """
    outcomes = engine.converge(steps, listen=lambda _, __: None)
    assert engine.exit_of(outcomes) is Exit.GOOD, [f"{each.step}: {each.error}" for each in outcomes if each.error]


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
    """Undo the newest run, all or nothing.

    Raises:
        SpecError: there is none.
        AssertionError: the exit code would not be 0.
    """
    run = undo_runs.choose(field.root, None)
    journal = Journal(field.root.journal, "undo")
    steps = undo_runs.steps(run, field.root, field.home, journal)
    blocked = [found.detail for found in (step.check() for step in steps) if found.state is State.BLOCKED]
    assert not blocked, blocked
    converge(steps)
    journal.record(RunUndone(run.name))


def undo_all(field: Field) -> None:
    """Undo run after run until none is left."""
    for _ in range(10):
        try:
            undo(field)
        except SpecError:
            return
    raise AssertionError("there is always one more run to undo")


def is_moved(field: Field, before: Reading, after: Reading) -> None:
    """Setup goes on, and ends as if nothing had happened."""
    setup(field)
    same(field.read(), after)
    steps = setup_steps(field)
    assert all(step.check().state is State.OK for step in steps), "a second run would change something"


def is_back(field: Field, before: Reading, after: Reading) -> None:
    """Undo puts everything back, whatever setup had reached."""
    undo_all(field)
    same(without_root(field, field.read()), without_root(field, before))


def is_moved_and_back(field: Field, before: Reading, after: Reading) -> None:
    setup(field)
    is_back(field, before, after)


def without_root(field: Field, seen: Reading) -> Reading:
    """The volume keeps its marker, and so its folder."""
    own = {str(field.root.path), str(field.volume)}
    return {path: found for path, found in seen.items() if path not in own}


def same(seen: Reading, wanted: Reading) -> None:
    gone = sorted(set(wanted) - set(seen))
    more = sorted(set(seen) - set(wanted))
    other = sorted(path for path in set(seen) & set(wanted) if seen[path] != wanted[path])
    if gone or more or other:
        raise AssertionError(f"not there: {gone}; not expected: {more}; different: {other}")


def fill(folder: Path, seed: bytes) -> None:
    """A few files of every kind: small, of several blocks, with two names, a link, modes, attributes."""
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
    """A home with two folders, and a volume that nobody has marked."""
    fill(field.places[0].source, b"hub ")
    fill(field.places[1].source, b"pip ")


def lay_move(field: Field) -> None:
    """The same with a volume that an earlier run has marked."""
    lay_first(field)
    lay_volume(field)


def lay_volume(field: Field) -> None:
    """A volume that an earlier run has marked."""
    VolumeStep(field.root, [], Journal(field.root.journal)).apply()
    shutil.rmtree(field.root.journal)


def lay_merge(field: Field) -> None:
    """Both folders are on the volume as well: some files are the same there, some older, some newer, some others."""
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


def lay_undo(lay: Callable[[Field], None]) -> Callable[[Field], None]:
    def laying(field: Field) -> None:
        lay(field)
        setup(field)

    return laying


def lay_wipe(field: Field) -> None:
    """Everything is moved, then the home is wiped."""
    lay_move(field)
    setup(field)
    shutil.rmtree(field.home)
    field.home.mkdir()


def is_undone(field: Field, before: Reading, after: Reading) -> None:
    """Undo goes on, and ends as if nothing had happened."""
    undo_all(field)
    same(field.read(), after)


def is_linked_by_the_script(field: Field, before: Reading, after: Reading) -> None:
    """relink.sh needs nothing else."""
    done = subprocess.run(["sh", field.root.relink, "-q"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    is_moved(field, before, after)


def folders(field: Field) -> list[Path]:
    """Every name that the move has for a folder."""
    pairs = [move.MovePair(place.source, place.target) for place in field.places]
    backs = [move.MovePair(pair.target, pair.source) for pair in pairs]
    return [name for pair in (*pairs, *backs) for name in (pair.source, pair.target, pair.aside, pair.partial)]


_FORTH = {"setup": is_moved, "undo": is_back, "setup, undo": is_moved_and_back}
_BACK = {"undo": is_undone}


def _both(name: str, lay: Callable[[Field], None]) -> dict[str, Scenario]:
    """Forth and back, on one disk and on two."""
    found = {}
    for where, two in (("one disk", False), ("two disks", True)):
        found[f"{name}, {where}"] = Scenario(lay, setup, _FORTH, folders, two)
        found[f"undo of {name}, {where}"] = Scenario(lay_undo(lay), undo, _BACK, folders, two)
    return found


FOLDERS: dict[str, Scenario] = {
    **_both("move", lay_move),
    **_both("merge", lay_merge),
    "first setup, one disk": Scenario(lay_first, setup, _FORTH, folders),
    "first setup, two disks": Scenario(lay_first, setup, _FORTH, folders, two_disks=True),
    "links after a wipe": Scenario(
        lay_wipe, setup, {"setup": is_moved, "script": is_linked_by_the_script}, folders, two_disks=True
    ),
}
