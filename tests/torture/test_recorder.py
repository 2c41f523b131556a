"""Tests that the recorder logs every write, and that the file system models lose what a real one may lose."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.torture import crash, disk, write_log
from tests.torture.disk import Data, Names, Size, Status, Sync

if TYPE_CHECKING:
    from pathlib import Path

    from tests.torture.write_log import Recording

# A program that changes files in every way that the recorder logs: by path, and by file descriptor.
EVERYTHING = """
import ctypes, fcntl, os, pathlib, sys
top = sys.argv[1]
os.chdir(top)
with open("written", "w") as file:
    file.write("twelve bytes")
    file.flush()
    os.fsync(file.fileno())
with open("written", "a") as file:
    file.write(", and more")
number = os.open("by-number", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
os.pwrite(number, b"placed", 3)
os.writev(number, [b"in", b" parts"])
os.pwritev(number, [b"late", b"r"], 20)
os.ftruncate(number, 22)
os.fdatasync(number)
source = os.open("written", os.O_RDONLY)
copied = os.open("copied", os.O_WRONLY | os.O_CREAT)
try:
    os.copy_file_range(source, copied, 6)
except OSError:
    pass
os.sendfile(copied, source, 0, 4)
try:
    fcntl.ioctl(copied, 0x40049409, source)
except OSError:
    pass
os.posix_fallocate(number, 0, 64)
folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
os.mkdir("below", 0o700, dir_fd=folder)
os.mkdir("gone")
os.symlink("written", "link", dir_fd=folder)
os.link("written", "below/twin", src_dir_fd=folder, dst_dir_fd=folder)
os.rename("copied", "below/renamed", src_dir_fd=folder, dst_dir_fd=folder)
os.replace("by-number", "below/twin")
libc = ctypes.CDLL(None, use_errno=True)
assert libc.renameat2(folder, b"below", folder, b"link", 2) == 0 or ctypes.get_errno() in (22, 38)
assert libc.renameat2(folder, b"written", folder, b"moved", 1) == 0 or ctypes.get_errno() in (22, 38)
os.rmdir("gone")
os.mkfifo("pipe")
os.unlink("pipe", dir_fd=folder)
pathlib.Path("cut").write_bytes(b"long enough")
os.truncate("cut", 4)
with open("cut", "w") as file:
    file.write("new")
os.chmod("cut", 0o600)
os.utime("cut", ns=(1, 2))
os.utime(folder, ns=(1, 2))
try:
    os.setxattr("cut", "user.note", b"kept")
    os.setxattr("cut", "user.gone", b"x")
    os.removexattr("cut", "user.gone")
except OSError:
    pass
os.fchmod(number, 0o600)
os.fsync(folder)
assert libc.syncfs(folder) == 0
os.sync()
"""


def recorded(library: Path, base: Path, program: str) -> Recording:
    top = base / "top"
    top.mkdir()
    argv = [sys.executable, "-I", "-B", "-c", program, str(top)]
    return write_log.record(library, argv, {top: 0}, base / "log")


def at_the_end(recording: Recording, model: str) -> list[dict[str, bytes]]:
    """Return {path: bytes} of the files on each disk that a power loss at the program's end may leave by a model."""
    count = len(recording.steps)
    states = crash.states(recording, seeds=30, only=lambda step: step == count, models=[model])
    top = next(iter(recording.before.tops))
    return [
        {path.removeprefix(f"{top}/"): content for path, content in disk.contents(state.disk).items()}
        for state in states
    ]


def test_recording_of_every_kind_of_change_leads_to_the_real_folders(library: Path, base: Path) -> None:
    recording = recorded(library, base, EVERYTHING)
    kinds = [type(step) for step in recording.steps]
    assert {Names, Data, Size, Status, Sync} == set(kinds)
    assert sum(isinstance(step, Names) and len(step.changes) == 2 for step in recording.steps) >= 2
    assert [step.node is None for step in recording.steps if isinstance(step, Sync)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    real, _ = disk.read([base / "top"])
    assert recording.after().digest() != recording.before.digest()
    assert disk.contents(recording.after()) == disk.contents(real)


def test_write_that_bypasses_the_recorder_fails_the_recording(library: Path, base: Path) -> None:
    program = (
        "import mmap, os, sys\n"
        "file = os.open(sys.argv[1] + '/mapped', os.O_RDWR | os.O_CREAT)\n"
        "os.write(file, b'before')\n"
        "with mmap.mmap(file, 6) as view:\n"
        "    view[:] = b'behind'\n"
    )
    with pytest.raises(AssertionError, match="bypassed the recorder"):
        recorded(library, base, program)


def test_raw_system_call_that_writes_ends_the_program(library: Path, base: Path) -> None:
    with pytest.raises(AssertionError, match="is not recorded"):
        recorded(library, base, "import ctypes; ctypes.CDLL(None).syscall(74, 1)")


def test_file_renamed_without_fsync_may_be_empty_after_a_power_loss(library: Path, base: Path) -> None:
    program = (
        "import os, sys; os.chdir(sys.argv[1]); file = open('part', 'w'); file.write('text'); file.close()\n"
        "os.rename('part', 'name')"
    )
    recording = recorded(library, base, program)
    assert {"name": b""} in at_the_end(recording, crash.ORDERED)
    assert {"name": b""} in at_the_end(recording, crash.STRICT)
    assert {} in at_the_end(recording, crash.ORDERED)


def test_file_renamed_after_fsync_is_complete_under_its_old_or_new_name(library: Path, base: Path) -> None:
    program = (
        "import os, sys; os.chdir(sys.argv[1]); file = open('part', 'w'); file.write('text'); file.flush()\n"
        "os.fsync(file.fileno()); os.rename('part', 'name')"
    )
    recording = recorded(library, base, program)
    ordered, strict = at_the_end(recording, crash.ORDERED), at_the_end(recording, crash.STRICT)
    assert {"part": b"text"} in ordered, "on ext4 an fsync of a file makes its name durable"
    assert all(content == b"text" for state in (*ordered, *strict) for content in state.values())
    assert {} in strict, "POSIX requires an fsync of the folder for the name"
    assert {} not in ordered


def test_name_survives_a_power_loss_after_fsync_of_its_folder(library: Path, base: Path) -> None:
    program = (
        "import os, sys; os.chdir(sys.argv[1]); file = open('part', 'w'); file.write('text'); file.flush()\n"
        "os.fsync(file.fileno()); os.rename('part', 'name'); os.fsync(os.open('.', os.O_RDONLY))"
    )
    recording = recorded(library, base, program)
    assert at_the_end(recording, crash.ORDERED) == at_the_end(recording, crash.STRICT) == [{"name": b"text"}]


def test_strict_model_reorders_renames_and_ordered_model_does_not(library: Path, base: Path) -> None:
    program = (
        "import os, sys; os.chdir(sys.argv[1]); os.mkdir('a'); os.mkdir('b')\n"
        "for name in ('a/x', 'b/y'):\n    open(name, 'w').close()\n"
        "os.sync(); os.rename('a/x', 'a/x2'); os.rename('b/y', 'b/y2')"
    )
    recording = recorded(library, base, program)
    assert {"a/x": b"", "b/y2": b""} in at_the_end(recording, crash.STRICT)
    assert {"a/x": b"", "b/y2": b""} not in at_the_end(recording, crash.ORDERED)


def test_disk_written_to_folders_is_read_back_equal(library: Path, base: Path) -> None:
    recording = recorded(library, base, EVERYTHING)
    for state in crash.states(recording, seeds=1, only=lambda step: step % 5 == 0):
        state.disk.write()
        real, _ = disk.read(state.disk.tops)
        assert real.digest() == state.disk.digest(), state.name
