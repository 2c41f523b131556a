"""Tests that a damaged file gives a valid record or firstlight's own error, and nothing else."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from provision.core.errors import FirstlightError
from provision.models.safetensors import WeightsError
from provision.setup import undo_paths
from tests.fuzz import kept_inputs, mutations
from tests.fuzz.parsers import PARSERS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _any_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every path of a journal: else no damaged journal would get as far as the steps of its undo."""
    monkeypatch.setattr(undo_paths, "require_own", lambda *_: None)


@pytest.mark.parametrize("name", PARSERS)
def test_valid_file_is_accepted(name: str, tmp_path: Path) -> None:
    PARSERS[name].run(tmp_path / "root", PARSERS[name].sample)


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_file_gives_a_record_or_an_own_error(name: str, tmp_path: Path) -> None:
    parser, folder = PARSERS[name], tmp_path / "root"

    def read(content: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(FirstlightError, WeightsError):
            parser.run(folder, content)

    for content in kept_inputs.of(name):
        read(content)
    mutations.fuzzed(30)(given(parser.inputs)(read))()
