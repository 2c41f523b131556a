"""Tests of the arguments of `provision relocate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from provision.config.host import Folder
from provision.core.errors import SpecError
from provision.host import tool_caches

HOME = Path("/home/user").absolute()


def test_folder_in_the_home_has_a_label_with_a_tilde_and_a_default_target() -> None:
    entry = Folder(path="~/data", to="relocated/data")
    assert tool_caches.parse_argument(str(HOME / "data"), None, HOME) == ("~/data", entry)


@pytest.mark.parametrize("to", ["../x", str(Path("/x").absolute()), "a\\b"], ids=["parent", "absolute", "backslash"])
def test_target_outside_of_the_root_is_rejected(to: str) -> None:
    with pytest.raises(SpecError, match="--to must be a relative path inside the root") as caught:
        tool_caches.parse_argument(str(HOME / "data"), to, HOME)
    assert repr(to) in str(caught.value)


def test_target_for_the_name_of_a_tool_is_rejected() -> None:
    with pytest.raises(SpecError, match="pip is the name of a tool"):
        tool_caches.parse_argument("pip", "x", HOME)


@pytest.mark.parametrize("to", [None, "x"], ids=["without --to", "with --to"])
def test_top_of_the_file_system_is_rejected(to: str | None) -> None:
    with pytest.raises(SpecError, match="is the top of the file system"):
        tool_caches.parse_argument(HOME.anchor, to, HOME)


def test_path_with_parent_folders_needs_a_target() -> None:
    path = str(HOME / "work" / ".." / "data")
    with pytest.raises(SpecError, match=r"contains \.\. or a backslash"):
        tool_caches.parse_argument(path, None, HOME)
    assert tool_caches.parse_argument(path, "x", HOME) == ("~/work/../data", Folder(path="~/work/../data", to="x"))
