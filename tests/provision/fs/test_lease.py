"""Tests leases whose holder has ended, does not renew, renews or is suspended, with a clock that the tests set."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import LostLockError
from provision.fs import process_identity
from provision.fs.file_lock import FileLock
from provision.fs.lease import EXPIRY_SECONDS, Holder, Lease, read_holder
from provision.fs.process_identity import Life
from tests.conftest import CHECKOUT
from tests.provision.claims import FAR, HOLDER, Clock, claims, holder, run_before_method, wait_in_steps, write_claim

if TYPE_CHECKING:
    from pathlib import Path


class TestExpiry:
    def test_claim_of_another_host_that_is_not_renewed_expires_after_120_seconds(self, tmp_path: Path) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        write_claim(lock, FAR)
        lease = Lease(lock, clock)
        assert not wait_in_steps(lease, clock, EXPIRY_SECONDS - 1)
        assert lease.is_undecided
        assert lease.seconds_to_expiry == 1
        clock.now += 1
        assert lease.take()
        assert claims(lock) == ["lock.lease-2"]
        assert lease.taken_over == [
            "pid 1 on far, at work since 2026-01-01 00:00:00Z, has not renewed it for 120 s, so it has expired"
        ]
        lease.release()
        assert claims(lock) == []

    def test_renewed_claim_never_expires(self, tmp_path: Path) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        lease = Lease(lock, clock)
        for renewals in range(20):
            write_claim(lock, FAR, renewals=renewals)
            assert not wait_in_steps(lease, clock, EXPIRY_SECONDS - 1)
            assert lease.is_undecided == (renewals == 0)

    def test_time_in_which_the_waiting_process_is_suspended_does_not_count_towards_expiry(self, tmp_path: Path) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        write_claim(lock, FAR)
        lease = Lease(lock, clock)
        assert not lease.take()
        clock.now += 10 * EXPIRY_SECONDS
        assert not lease.take()
        assert wait_in_steps(lease, clock, EXPIRY_SECONDS)
        lease.release()

    @pytest.mark.parametrize("record", [b"", b"{", b"[1]", b'{"pid": 1}'], ids=["empty", "cut", "a list", "no token"])
    def test_claim_with_an_unreadable_record_expires_after_120_seconds(self, tmp_path: Path, record: bytes) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        (tmp_path / "lock.lease-1").write_bytes(record)
        lease = Lease(lock, clock)
        assert not wait_in_steps(lease, clock, EXPIRY_SECONDS - 1)
        assert wait_in_steps(lease, clock, 2)
        assert "another run" in lease.taken_over[0]
        lease.release()

    def test_new_claim_in_the_place_of_an_older_one_restarts_the_time_to_expiry(self, tmp_path: Path) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        write_claim(lock, FAR).unlink()
        lease = Lease(lock, clock)
        write_claim(lock, FAR)
        assert not wait_in_steps(lease, clock, EXPIRY_SECONDS - 1)
        (tmp_path / "lock.lease-1").write_bytes(Holder(FAR, "a new token", "then").to_bytes(0))
        assert not wait_in_steps(lease, clock, EXPIRY_SECONDS - 1)
        assert lease.is_undecided, "a new claim does not count as a renewal"


class TestEndedProcess:
    def test_claim_of_a_killed_process_is_taken_over_at_once(self, tmp_path: Path) -> None:
        lock = tmp_path / "lock"
        with holder(lock) as process:
            assert not FileLock(lock).take()
            process.kill()
            process.wait()
            taker = FileLock(lock)
            assert taker.take()
            assert f"pid {process.pid} on {platform.node()}" in taker.lease.taken_over[0]
            assert "has ended without releasing it" in taker.lease.taken_over[0]
            taker.release()

    def test_claim_of_a_zombie_process_is_taken_over_at_once(self, tmp_path: Path) -> None:
        lock = tmp_path / "lock"
        with holder(lock) as process:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # the process stays a zombie
            assert FileLock(lock).take()

    def test_process_whose_pid_was_reused_counts_as_ended(self, tmp_path: Path) -> None:
        with subprocess.Popen(["sleep", "600"]) as process:
            here = process_identity.current()
            start = process_identity._start(process.pid)
            assert start
            assert replace(here, pid=process.pid, start=start).life() is Life.RUNNING
            assert replace(here, pid=process.pid, start="1").life() is Life.ENDED
            process.kill()
        assert replace(here, pid=process.pid, start=start).life() is Life.ENDED

    def test_claim_of_an_earlier_program_with_the_same_pid_is_taken_over_at_once(self, tmp_path: Path) -> None:
        """Leave a claim with the pid of this process, as before an exec, or in a container where each run is pid 1."""
        lock = tmp_path / "lock"
        write_claim(lock, process_identity.current())
        lease = Lease(lock)
        assert lease.take()
        assert not Lease(lock).take(), "the lease that this process took is held"
        lease.release()

    def test_life_of_a_process_in_another_pid_namespace_is_unknown(self, tmp_path: Path) -> None:
        """Compare namespaces, because two containers of one machine share the boot id and often the host name."""
        here = process_identity.current()
        assert replace(here, pid=2**22 + 1).life() is Life.ENDED
        assert replace(here, pid=2**22 + 1, namespace="1").life() is Life.UNKNOWN
        assert replace(here, namespace="").life() is Life.UNKNOWN

    def test_process_from_before_a_reboot_has_ended_only_if_host_name_and_machine_id_match(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Compare machine ids, too, because hosts that are made from one image have the same name."""
        here = replace(process_identity.current(), boot="b", namespace="n", machine="m")
        monkeypatch.setattr(process_identity, "_host_values", lambda: ("b", "n", "m"))
        assert replace(here, boot="before").life() is Life.ENDED
        assert replace(here, boot="before", host="far").life() is Life.UNKNOWN
        assert replace(here, boot="before", machine="other").life() is Life.UNKNOWN
        assert replace(here, boot="before", machine="").life() is Life.UNKNOWN
        assert replace(here, boot="").life() is Life.UNKNOWN

    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="makes a pid namespace, as root on Linux")
    def test_claim_of_a_running_process_in_another_container_is_not_taken_over(
        self, tmp_path: Path, no_flock: None
    ) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        with holder(lock, "unshare", "--pid", "--fork", "--mount-proc", "--uts"):
            identity = read_holder(lock)
            assert identity is not None
            assert identity.identity.pid == 1
            assert identity.identity.boot == process_identity.current().boot
            lease = FileLock(lock, clock)
            assert not wait_in_steps(lease, clock, 10)
            assert lease.is_undecided


class TestTakeover:
    def test_expired_lease_is_taken_by_only_one_of_two_processes_that_try_at_once(self, tmp_path: Path) -> None:
        """Let the second process act between any two file operations of the first process."""
        lock = tmp_path / "lock"
        for method in ("_create", "_confirm", "_read_claims"):
            for other_acts in (("take",), ("take", "release")):
                clock = Clock()
                write_claim(lock, FAR)
                first, second = Lease(lock, clock), Lease(lock, clock)
                for lease in (first, second):
                    assert not lease.is_free()
                for _ in range(int(EXPIRY_SECONDS)):
                    clock.now += 1
                    second.is_free()
                    first.is_free()
                run_before_method(first, method, [getattr(second, act) for act in other_acts])
                taken = [first.take(), second._claim is not None]
                assert sum(taken) <= 1, (method, other_acts)
                if "release" not in other_acts:
                    assert sum(taken) == 1 or method != "_create"
                for lease in (first, second):
                    lease.release()
                for name in claims(lock):
                    (tmp_path / name).unlink()

    def test_claim_that_is_renewed_just_before_its_expiry_is_not_taken_over(self, tmp_path: Path) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        write_claim(lock, FAR)
        lease = Lease(lock, clock)
        assert not wait_in_steps(lease, clock, EXPIRY_SECONDS - 1)
        clock.now += 1
        run_before_method(lease, "_confirm", [lambda: write_claim(lock, FAR, renewals=7)])
        assert not lease.take()
        assert claims(lock) == ["lock.lease-1"]

    def test_only_one_of_four_processes_holds_the_lock_at_a_time_without_flock(
        self, tmp_path: Path, no_flock: None
    ) -> None:
        """Let four processes each increase a number in a file ten times; the file then has 40."""
        program = (
            "import sys\nfrom pathlib import Path\nfrom provision.fs.file_lock import exclusive_lock\n"
            "path = Path(sys.argv[1])\n"
            "for _ in range(10):\n"
            "    with exclusive_lock(path):\n"
            "        count = int(path.read_text())\n"
            "        path.write_text(str(count + 1))\n"
        )
        folder = tmp_path / "volume"
        folder.mkdir()
        path = folder / "count"
        path.write_text("0")
        argv = [sys.executable, "-c", program, str(path)]
        processes = [subprocess.Popen(argv, cwd=CHECKOUT) for _ in range(4)]
        assert [process.wait() for process in processes] == [0] * 4
        assert path.read_text() == "40"
        assert [item.name for item in folder.iterdir()] == ["count"], "without flock no lock file remains"

    def test_claim_is_removed_if_a_disk_error_prevents_the_lease(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = tmp_path / "lock"
        lease = Lease(lock)

        def fail(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            lease.take()
        assert claims(lock) == []


class TestLostLease:
    def test_holder_whose_claim_was_replaced_by_another_gets_a_lost_lock_error(self, tmp_path: Path) -> None:
        lock = tmp_path / "lock"
        lease = Lease(lock)
        assert lease.take()
        lease.require()
        (tmp_path / "lock.lease-1").unlink()
        successor = write_claim(lock, FAR)
        with pytest.raises(LostLockError, match="pid 1 on far") as error:
            lease.require()
        assert (error.value.exit, error.value.kind) == (4, "locked")
        with pytest.raises(LostLockError):
            lease.renew()
        before = successor.read_bytes()
        lease.release()
        assert successor.read_bytes() == before

    def test_holder_that_renews_late_keeps_its_lease_if_no_other_process_took_over(self, tmp_path: Path) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        lease = Lease(lock, clock)
        assert lease.take()
        before = (tmp_path / "lock.lease-1").read_bytes()
        clock.now += EXPIRY_SECONDS
        lease.require()
        after = (tmp_path / "lock.lease-1").read_bytes()
        assert after != before
        assert len(after) == len(before)
        lease.release()

    def test_holder_whose_volume_is_gone_names_that(self, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()
        lease = Lease(tmp_path / "state/lock")
        assert lease.take()
        (tmp_path / "state").rename(tmp_path / "unmounted")
        with pytest.raises(LostLockError, match="does not exist any more, as on a volume that was unmounted"):
            lease.require()

    def test_holder_that_renews_late_gets_a_lost_lock_error_if_another_process_took_over(self, tmp_path: Path) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        lease = Lease(lock, clock)
        assert lease.take()
        write_claim(lock, FAR, number=2)
        lease.require()
        clock.now += EXPIRY_SECONDS
        with pytest.raises(LostLockError, match="pid 1 on far"):
            lease.require()
        lease.release()

    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system, as root on Linux")
    def test_holder_that_cannot_renew_for_half_of_the_expiry_time_gets_a_lost_lock_error(self, tmp_path: Path) -> None:
        volume = tmp_path / "volume"
        volume.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", volume], check=True)
        try:
            clock = Clock()
            lease = Lease(volume / "lock", clock)
            assert lease.take()
            subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
            with pytest.raises(OSError, match="Read-only"):
                lease.renew()
            lease.require()
            clock.now += EXPIRY_SECONDS / 2 + 1
            with pytest.raises(LostLockError, match="cannot be renewed"):
                lease.require()
            lease.release()
        finally:
            subprocess.run(["umount", volume], check=True)

    def test_lease_is_renewed_on_a_full_disk(self, tmp_path: Path) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("mounts a file system, as root on Linux")
        volume = tmp_path / "volume"
        volume.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", volume], check=True)
        try:
            lease = Lease(volume / "lock")
            assert lease.take()
            with pytest.raises(OSError, match="No space"):
                (volume / "filler").write_bytes(bytes(1 << 20))
            lease.renew()
            assert json.loads((volume / "lock.lease-1").read_bytes())["renewals"] == "000000000001"
            lease.release()
        finally:
            subprocess.run(["umount", volume], check=True)

    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="makes a pid namespace, as root on Linux")
    def test_holder_that_is_resumed_after_a_takeover_gets_a_lost_lock_error(
        self, tmp_path: Path, no_flock: None
    ) -> None:
        clock, lock = Clock(), tmp_path / "lock"
        code = HOLDER.replace(
            "lock.require()",
            "import provision.core.errors as e\ntry:\n    lock.require()\n"
            "except e.LostLockError as error:\n    print(error.exit, flush=True)",
        )
        argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", code, str(lock)]
        process = subprocess.Popen(
            argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        os.killpg(process.pid, signal.SIGSTOP)
        successor = FileLock(lock, clock)
        assert wait_in_steps(successor, clock, EXPIRY_SECONDS + 1)
        held = (tmp_path / "lock.lease-2").read_bytes()
        os.killpg(process.pid, signal.SIGCONT)
        output, _ = process.communicate("go\n", timeout=600)
        assert output == "4\n"
        assert (tmp_path / "lock.lease-2").read_bytes() == held
        successor.require()
        successor.release()


def test_record_of_a_claim_has_the_identity_of_its_process() -> None:
    identity = process_identity.current()
    row = json.loads(Holder(identity, "t", "then").to_bytes(3))
    assert row == {**asdict(identity), "token": "t", "started": "then", "renewals": "000000000003"}


def test_process_killed_before_its_claim_exists_blocks_no_other_process(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    folder.mkdir()
    lock = folder / "lock"
    code = (
        "import os, sys; from pathlib import Path; from provision.fs.lease import Lease; "
        "os.link = lambda *_: os._exit(9); Lease(Path(sys.argv[1])).take()"
    )
    assert subprocess.run([sys.executable, "-I", "-c", code, lock], check=False, cwd=CHECKOUT).returncode == 9
    assert len(list(folder.iterdir())) == 1
    lease = Lease(lock)
    assert lease.take()
    assert [path.name for path in folder.iterdir()] == ["lock.lease-1"], (
        "the temporary file of the killed process is deleted"
    )
    lease.release()
