"""Distributes the tests over processes: by file, the longest files first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# Files that use the same session fixture: on two workers it would be built twice.
TOGETHER = {"tests/bench/test_sampling.py": "tests/bench/test_worker.py"}
# The files that take longest. They begin first, so that the last file to end is a short one.
LONGEST = (
    "tests/provision/test_conda_env.py",
    "tests/bench/test_examining.py",
    "tests/bench/test_worker.py",
    "tests/provision/test_env_cli.py",
    "tests/bench/test_recipe.py",
    "tests/bench/test_cli.py",
    "tests/bench/test_running.py",
    "tests/bench/test_tuning.py",
)


def unit(nodeid: str) -> str:
    """Return what goes to one worker as a whole: a test's file, or the file that it shares a fixture with."""
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file, file)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests; those of a unit stay together and in their order."""
    ranks = {file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(unit(item.nodeid), len(ranks)))
