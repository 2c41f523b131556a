"""A lease: a lock that one process of all hosts of a volume holds, and that expires if the process does not renew it.

A lease needs no flock. The file `NAME.lease-N` is a claim on the lock NAME. The claim's content, its record, identifies
the process and has a random token and a counter. A thread of the process increases the counter every `RENEWAL_SECONDS`.
A process takes the lock in four steps:

1. It reads all claims, and waits while the process of a claim may be alive.
2. It creates the claim with the next number, exclusively, so that only one of several processes succeeds.
3. It reads all claims again. If a new claim has appeared, or a dead claim was renewed, it deletes its own claim.
4. It deletes the dead claims. A process that holds a deleted claim detects this before its next change.

If two processes create claims, the later one reads the other's claim in its third step. So two processes never hold
the lock at once, even if one is suspended between two steps. A claim is dead if its process has ended, or if its record
has not changed for `EXPIRY_SECONDS`. The waiting process measures this time with its own clock, because the clocks of
two hosts may differ.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from provision.core.errors import LostLockError
from provision.fs import claim_file, durable, process_identity, records
from provision.fs.process_identity import Life, ProcessIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

RENEWAL_SECONDS = 10.0
# NFS clients keep the attributes of a file for up to 60 s (acregmax), and a saturated volume delays a renewal.
EXPIRY_SECONDS = 120.0
# The most seconds without a renewal that one read can add: the waiting process may itself have been suspended.
_LONGEST_GAP = 5.0
_held_tokens: set[str] = set()  # the leases of this process


def steady_clock() -> float:
    """Return the seconds of a clock that no program can set; on Linux it also runs while the machine is suspended."""
    boot_clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot_clock is None else time.clock_gettime(boot_clock)


@dataclass(frozen=True)
class Holder:
    """Describe the process of a claim: its identity, the token of the claim, and the time when it took the lease.

    `token` is a random text. `started` is a UTC time such as "2026-11-28 09:30:46Z", for messages only.
    """

    identity: ProcessIdentity
    token: str
    started: str

    def __str__(self) -> str:
        """Return the process and the time in words, such as "pid 7 on host-1, at work since TIME,", for messages."""
        return f"pid {self.identity.pid} on {self.identity.host}, at work since {self.started},"

    def to_bytes(self, renewals: int) -> bytes:
        """Return the record of the claim as a line of JSON; `renewals` is the value of the counter.

        The length does not depend on the counter, so that a renewal overwrites the record in place.
        """
        row = {**asdict(self.identity), "token": self.token, "started": self.started, "renewals": f"{renewals:012d}"}
        return (json.dumps(row) + "\n").encode()


@dataclass
class _Observation:
    """Hold the last record of a claim that this process has read, and the seconds for which it has not changed."""

    record: bytes
    seen_at: float
    silent_seconds: float = 0.0
    is_renewed: bool = False

    def update(self, record: bytes, now: float) -> None:
        if record == self.record:
            self.silent_seconds += min(now - self.seen_at, _LONGEST_GAP)
        else:
            self.is_renewed = _token(record) is not None and _token(record) == _token(self.record)
            self.record, self.silent_seconds = record, 0.0
        self.seen_at = now


class Lease:
    """Takes, renews and releases the lease of one lock.

    `blocking` are the claims that prevented the last `take`: {file name: holder, or None if its record is unreadable}.
    `is_undecided` is True if none of these processes is known to be alive. A later `take` may then succeed although no
    process has released the lease. `taken_over` lists, after `take` has returned True, the deleted dead claims: for
    each a clause with its holder and the reason.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = steady_clock, older_marker: Path | None = None) -> None:
        """Take the path of the lock file.

        Args:
            path: the lock file; the claims lie in the same folder.
            clock: returns seconds; tests replace it.
            older_marker: the lock file of older versions; if it is not empty, it counts as a claim without renewals.
        """
        self.path = path
        self.blocking: dict[str, Holder | None] = {}
        self.is_undecided = True
        self.taken_over: list[str] = []
        self._clock = clock
        self._older_marker = older_marker
        self._observations: dict[str, _Observation] = {}
        self._mutex = threading.Lock()
        self._stopped = threading.Event()
        self._claim: Path | None = None
        self._holder: Holder | None = None
        self._renewals = 0
        self._renewed_at = 0.0

    def is_free(self) -> bool:
        """Read the claims, and return whether all of them are dead. `take` does this again."""
        return self._judge(self._read_claims())

    def take(self) -> bool:
        """Take the lease without waiting. Return False if a claim may be alive, or if another process took it first.

        Raises:
            OSError: a claim cannot be read, created or deleted.
        """
        dead = self._read_claims()
        if not self._judge(dead):
            return False
        started = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
        holder = Holder(process_identity.current(), secrets.token_hex(16), started)
        claim = self._claim_path(1 + max(map(self._number, dead), default=0))
        _held_tokens.add(holder.token)
        try:
            is_taken = self._create(claim, holder.to_bytes(0)) and self._confirm(claim, dead)
        except BaseException:
            _held_tokens.discard(holder.token)
            raise
        if not is_taken:
            _held_tokens.discard(holder.token)
            self._judge(self._read_claims())
            return False
        self._claim, self._holder, self._renewals, self._renewed_at = claim, holder, 0, self._clock()
        self._stopped = threading.Event()  # a thread of an earlier `take` may not have ended yet
        threading.Thread(target=self._keep_renewing, args=(self._stopped,), daemon=True).start()
        return True

    def renew(self) -> None:
        """Increase the counter in the record of this process's claim; do nothing if the lease is not held.

        Raises:
            LostLockError: another process has deleted or replaced the claim.
            OSError: the record cannot be written.
        """
        with self._mutex:
            if self._claim is None or self._holder is None:
                return
            try:
                with self._claim.open("r+b") as file:  # never creates a file: the claim may be deleted
                    if _token(file.read()) != self._holder.token:
                        raise self._lost()
                    self._renewals += 1
                    file.seek(0)
                    file.write(self._holder.to_bytes(self._renewals))
                    file.flush()
                    durable.sync_descriptor(file.fileno())
            except FileNotFoundError:
                raise self._lost() from None
            self._renewed_at = self._clock()

    def require(self) -> None:
        """Check that this process still holds the lease. Call this method before each change that the lock protects.

        Raises:
            LostLockError: another process has taken the lease, or may take it because the record cannot be renewed.
            OSError: the record cannot be read.
        """
        if self._claim is None or self._holder is None:
            return
        if self._clock() - self._renewed_at > EXPIRY_SECONDS / 2:
            # A waiting process may be about to delete this claim. It reads the record once more after it has created
            # its own claim. So either it reads this renewal, or this process reads its claim here.
            try:
                self.renew()
                others = set(self._read_claims()) - {self._claim.name}
            except OSError as error:
                raise self._lost(f"its record cannot be renewed ({error.strerror or error})") from error
            if others:
                raise self._lost()
        try:
            is_own = _token(self._claim.read_bytes()) == self._holder.token
        except FileNotFoundError:
            is_own = False
        if not is_own:
            raise self._lost()

    def release(self) -> None:
        """Delete the claim if it still belongs to this process. A claim that cannot be deleted expires later."""
        with self._mutex:
            self._stopped.set()
            if self._claim is None or self._holder is None:
                return
            with contextlib.suppress(OSError):
                if _token(self._claim.read_bytes()) == self._holder.token:
                    self._claim.unlink()
            _held_tokens.discard(self._holder.token)
            self._claim = self._holder = None

    @property
    def seconds_to_expiry(self) -> float:
        """Return the seconds until the last blocking claim is dead if none of them is renewed."""
        silences = [self._observations[name].silent_seconds for name in self.blocking if name in self._observations]
        return EXPIRY_SECONDS - min(silences, default=0.0)

    @property
    def _new_claim_prefix(self) -> str:
        """Return the start of the names of new records, before they become claims. A killed process may leave one."""
        return f"{self.path.name}.new-lease-"

    def _read_claims(self) -> dict[str, bytes]:
        """Return {file name: record} of all claims on this lock, including the lock file of an older version."""
        prefix = self._claim_path("").name
        names = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path.parent) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(prefix)]
        claims = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                claims[name] = claim_file.read(self.path.with_name(name))
        if self._older_marker is not None:
            with contextlib.suppress(FileNotFoundError):
                if content := claim_file.read(self._older_marker):
                    claims[self._older_marker.name] = content
        return claims

    def _judge(self, claims: Mapping[str, bytes]) -> bool:
        """Update `blocking`, `taken_over` and the observations from {file name: record}; return if all are dead."""
        now = self._clock()
        self._observations = {name: kept for name, kept in self._observations.items() if name in claims}
        self.blocking, self.taken_over, self.is_undecided = {}, [], True
        for name, record in claims.items():
            observation = self._observations.setdefault(name, _Observation(record, now))
            observation.update(record, now)
            holder = _holder(record)
            life = _life(holder)
            if life is Life.ENDED:
                self.taken_over.append(f"{holder} has ended without releasing it")
            elif life is Life.UNKNOWN and observation.silent_seconds >= EXPIRY_SECONDS:
                self.taken_over.append(
                    f"{holder or 'another run'} has not renewed it for {EXPIRY_SECONDS:.0f} s, so it has expired"
                )
            else:
                self.blocking[name] = holder
                self.is_undecided &= life is Life.UNKNOWN and not observation.is_renewed
        return not self.blocking

    def _create(self, claim: Path, record: bytes) -> bool:
        """Create a claim with its record; return False if the claim exists already.

        If hard links work, the claim is never visible without its record. Without hard links, a process that is killed
        between the creation and the write leaves an empty claim, which must expire.
        """
        new = self.path.with_name(f"{self._new_claim_prefix}{secrets.token_hex(8)}")
        try:
            claim_file.create(new, record)
            try:
                os.link(new, claim)
            except FileExistsError:
                return False
            except FileNotFoundError:  # another process has just taken the lease, and has deleted the file `new`
                return False
            except OSError:
                claim_file.create(claim, record)
        except FileExistsError:
            return False
        except BaseException:
            with contextlib.suppress(OSError):
                if claim.read_bytes() == record:
                    claim.unlink()
            raise
        finally:
            new.unlink(missing_ok=True)
        return True

    def _confirm(self, claim: Path, dead: Mapping[str, bytes]) -> bool:
        """Delete the dead claims and return True; if the claims have changed since `dead`, delete `claim` instead."""
        try:
            claims = self._read_claims()
            claims.pop(claim.name, None)
            is_confirmed = all(dead.get(name) == record for name, record in claims.items())
            if is_confirmed:
                for name in claims:
                    self.path.with_name(name).unlink(missing_ok=True)
                for unborn in self.path.parent.glob(f"{glob.escape(self._new_claim_prefix)}*"):
                    unborn.unlink(missing_ok=True)
        except BaseException:
            claim.unlink(missing_ok=True)
            raise
        if not is_confirmed:
            claim.unlink(missing_ok=True)
        return is_confirmed

    def _keep_renewing(self, stopped: threading.Event) -> None:
        while not stopped.wait(RENEWAL_SECONDS):
            # Errors are ignored here: `require` reports a lost lease, or a full disk, in the thread that does the work.
            with contextlib.suppress(OSError, LostLockError):
                self.renew()

    def _lost(self, reason: str = "") -> LostLockError:
        if not self.path.parent.is_dir():
            reason = reason or f"{self.path.parent} does not exist any more, as on a volume that was unmounted"
        own_token = self._holder.token if self._holder else None
        with contextlib.suppress(OSError):
            records = [record for record in self._read_claims().values() if _token(record) != own_token]
            holders = [str(_holder(record) or "another run") for record in records]
            reason = reason or (f"{holders[0]} has taken it over" if holders else "")
        return LostLockError(
            f"This run no longer holds {self.path}: {reason or 'another run has taken it over'}. A lock expires when "
            f"its run is suspended or cannot write for {EXPIRY_SECONDS:.0f} s. This run has stopped and changes "
            "nothing more. Wait for the end of the other run, then run the same command again."
        )

    def _claim_path(self, number: int | str) -> Path:
        return self.path.with_name(f"{self.path.name}.lease-{number}")

    def _number(self, name: str) -> int:
        digits = name.removeprefix(self._claim_path("").name)
        return int(digits) if digits.isdecimal() else 0


def read_holder(path: Path) -> Holder | None:
    """Return the holder of the newest claim on a lock file whose record is readable; None if there is no such claim."""
    lease = Lease(path)
    claims = lease._read_claims()  # noqa: SLF001 (the same module)
    newest_first = sorted(claims, key=lease._number, reverse=True)  # noqa: SLF001
    return next((holder for name in newest_first if (holder := _holder(claims[name]))), None)


def _life(holder: Holder | None) -> Life:
    if holder is None:
        return Life.UNKNOWN
    if holder.identity.pid == os.getpid() and holder.token in _held_tokens:
        return Life.RUNNING
    life = holder.identity.life()
    # The claim comes from an earlier program with the same pid (exec), or from a failed release.
    return Life.ENDED if life is Life.RUNNING and holder.identity.pid == os.getpid() else life


def _holder(record: bytes) -> Holder | None:
    """Return the holder that a record describes; None if the record is incomplete, or of an unknown format."""
    try:
        row = records.table(records.parse(record))
        texts = {field.name: str(row[field.name]) for field in fields(ProcessIdentity)}
        identity = ProcessIdentity(**{**texts, "pid": records.number(row["pid"])})  # type: ignore[arg-type]
        return Holder(identity, str(row["token"]), str(row["started"]))
    except (ValueError, KeyError):
        return _older_holder(record)


def _older_holder(record: bytes) -> Holder | None:
    """Return the holder from a lock file of an older version, which has the pid and the host as lines; else None."""
    pid, *others = record.decode("utf-8", "replace").splitlines() or [""]
    if not (pid.isdecimal() and others):
        return None
    return Holder(ProcessIdentity(others[0], int(pid), "", "", "", ""), "", "an unknown time")


def _token(record: bytes) -> str | None:
    holder = _holder(record)
    return holder.token if holder else None
