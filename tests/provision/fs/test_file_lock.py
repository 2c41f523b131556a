"""Tests the file lock: flock and lease together, and the lease alone where flock fails or excludes no other host."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from provision.fs.file_lock import FileLock, exclusive_lock, has_flock
from tests.conftest import CHECKOUT
from tests.provision.claims import HOLDER, claims, holder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class TestFileLock:
    def test_file_lock_excludes_a_process_that_uses_flock_only_and_a_second_file_lock(self, tmp_path: Path) -> None:
        import filelock

        lock = FileLock(tmp_path / "lock")
        assert lock.take()
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / "lock", blocking=False).acquire()
        assert not FileLock(tmp_path / "lock").take()
        lock.release()
        with filelock.FileLock(tmp_path / "lock", blocking=False):
            held = FileLock(tmp_path / "lock")
            assert not held.take()
            assert not held.is_undecided
            assert claims(tmp_path / "lock") == []

    def test_lease_excludes_a_second_process_where_flock_succeeds_for_every_process(
        self, tmp_path: Path, local_flock: None
    ) -> None:
        lock = tmp_path / "lock"
        with holder(lock):
            code = HOLDER.partition("sys.stdin")[0]
            done = subprocess.run(
                [sys.executable, "-c", code, str(lock)], cwd=CHECKOUT, capture_output=True, text=True, check=True
            )
            assert done.stdout == "False\n"

    @pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
    def test_lock_file_left_by_a_host_with_flock_does_not_block_a_host_without_flock(
        self, tmp_path: Path, set_flock_error: Callable[[str], None], code: str
    ) -> None:
        set_flock_error(code)
        lock = tmp_path / "volume/lock"
        lock.parent.mkdir()
        lock.touch()
        program = (
            "import sys\nfrom pathlib import Path\nfrom provision.fs.file_lock import FileLock, has_flock\n"
            "path = Path(sys.argv[1])\nassert not has_flock(path.parent)\nlock = FileLock(path)\nassert lock.take()\n"
            "assert not FileLock(path).take()\nlock.release()\n"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", program, str(lock)], cwd=CHECKOUT, check=True)
        assert list(lock.parent.iterdir()) == [lock]

    def test_flock_is_detected_in_a_local_folder_and_leaves_no_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "volume"
        folder.mkdir()
        assert has_flock(folder)
        assert list(folder.iterdir()) == []

    def test_exclusive_lock_removes_its_claim_at_its_end(self, tmp_path: Path) -> None:
        with exclusive_lock(tmp_path / "a.json"):
            assert claims(tmp_path / ".a.json.lock") == [".a.json.lock.lease-1"]
        assert claims(tmp_path / ".a.json.lock") == []
