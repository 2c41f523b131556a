"""Tests blob locks: a lock that is not renewed is taken over, and a pull that lost its lock stores no blob."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import LostLockError
from provision.fs.lease import EXPIRY_SECONDS
from tests.provision import hub_server
from tests.provision.claims import FAR, claims, write_claim
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, is_complete, pull_of

if TYPE_CHECKING:
    from provision.core.layout import Root


def test_blob_lock_that_another_host_does_not_renew_is_taken_over_and_reported(root: Root, serve: Any) -> None:
    server = hub_server.start(serve, REPO, FILES)
    work = pull_of(root, server.url)
    plan = work.plan()
    name = next(target.content for target in plan.fetched if target.file.path == WEIGHTS)
    lock = root.hub_in_use / ".locks" / work.spec.folder / f"{name}.lock"
    lock.parent.mkdir(parents=True)
    write_claim(lock, FAR)
    messages: list[str] = []

    def let_the_lease_expire(text: str) -> None:
        messages.append(text)
        for observation in work._locks[name]._lock.lease._observations.values():
            observation.silent_seconds = EXPIRY_SECONDS

    work.health.tell = let_the_lease_expire
    work.run(plan, lambda *_: None)
    assert is_complete(work)
    assert messages[0] == f"{WEIGHTS} is being downloaded by another process; waiting for it"
    assert f"{WEIGHTS}: the lock of an earlier process was taken over: pid 1 on far" in messages[1]
    assert claims(lock) == []


def test_pull_that_lost_its_blob_locks_fails_and_places_no_file_in_the_snapshot(root: Root, serve: Any) -> None:
    server = hub_server.start(serve, REPO, FILES)
    work = pull_of(root, server.url)

    def lose_the_locks(*_: object) -> None:
        for claim in (root.hub_in_use / ".locks").rglob("*.lease-*"):
            claim.unlink(missing_ok=True)

    with pytest.raises(LostLockError, match="has taken it over"):
        work.run(work.plan(), lose_the_locks)
    assert not list(work.snapshot.rglob("*.*"))
