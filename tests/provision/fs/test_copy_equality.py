"""Tests the comparison of a copy with its original, before the original is deleted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from provision.fs.copy_tree import TreeCopy
from provision.fs.open_dir import OpenDir

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    "make",
    [lambda _: None, lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("file")],
    ids=["absent", "folder", "fifo", "link"],
)
def test_absent_copy_or_copy_of_another_kind_is_not_equal_to_the_file(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    for name in ("original", "copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "original/file").write_text("years of work")
    make(tmp_path / "copy/file")
    with OpenDir.at(tmp_path / "original") as original, OpenDir.at(tmp_path / "copy") as copy:
        assert not TreeCopy([]).is_equal(original, copy, "file", "file")
