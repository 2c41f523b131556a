"""Tests that a merge of two hub caches keeps the right blob under its name, whichever version is newer."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from provision.core.progress import no_progress
from provision.core.step import converge
from provision.setup import undo
from provision.volume.journal import Journal
from provision.volume.owner import current
from tests.provision.fake_hub import git_sha1
from tests.provision.folder_moves import relocation_step, target

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = b"weights" * 1000
DAMAGED = CONTENT[:-1] + b"!"


def write(path: Path, content: bytes, mtime: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))


@pytest.mark.parametrize("name", [hashlib.sha256(CONTENT).hexdigest(), git_sha1(CONTENT)], ids=["sha256", "git sha1"])
@pytest.mark.parametrize("is_home_damaged", [True, False])
@pytest.mark.parametrize("is_damaged_newer", [True, False])
def test_merge_of_a_right_and_a_damaged_blob_keeps_the_right_one_under_the_name(
    source: Path, volume: Path, name: str, is_home_damaged: bool, is_damaged_newer: bool
) -> None:
    step = relocation_step(source, volume)
    blob = f"models--a--b/blobs/{name}"
    damaged, right = (source, target(step)) if is_home_damaged else (target(step), source)
    write(damaged / blob, DAMAGED, 2000 if is_damaged_newer else 1000)
    write(right / blob, CONTENT, 1000 if is_damaged_newer else 2000)
    write(source / "models--a--b/refs/main", b"x", 1000)
    step.apply()
    merged = target(step)
    assert (merged / blob).read_bytes() == CONTENT
    others = [path for path in (merged / blob).parent.iterdir() if path.name != name]
    assert [path.read_bytes() for path in others] == [DAMAGED], "the damaged version is kept under another name"


def test_merge_of_files_outside_of_the_blobs_folder_keeps_the_newer_one_under_the_name(
    source: Path, volume: Path
) -> None:
    step = relocation_step(source, volume)
    name = f"models--a--b/other/{hashlib.sha256(CONTENT).hexdigest()}"
    write(source / name, DAMAGED, 2000)
    write(target(step) / name, CONTENT, 1000)
    step.apply()
    assert (target(step) / name).read_bytes() == DAMAGED


def test_undo_of_a_merge_returns_the_damaged_blob_to_the_home_and_keeps_the_right_one(
    source: Path, volume: Path
) -> None:
    step = relocation_step(source, volume)
    blob = f"models--a--b/blobs/{hashlib.sha256(CONTENT).hexdigest()}"
    write(source / blob, DAMAGED, 2000)
    write(target(step) / blob, CONTENT, 1000)
    step.apply()
    chosen = undo.choose(step.root, None, current(step.home))
    steps = undo.steps(chosen, step.root, step.home, Journal(step.root.journal, "undo"), no_progress)
    outcomes = converge(steps, listen=lambda *_: None)
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert (source / blob).read_bytes() == DAMAGED
    assert (target(step) / blob).read_bytes() == CONTENT
