"""Distributes the tests over processes: by file, the longest files first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# Files that use the same session fixture: on two workers it would be built twice.
TOGETHER = {"tests/bench/worker/test_sampling.py": "tests/bench/worker/test_measurement.py"}
# The files that take longest. They begin first, so that the last file to end is a short one.
LONGEST = (
    "tests/test_examples.py",
    "tests/torture/test_two_hosts.py",
    "tests/docs/test_snippets.py",
    "tests/provision/environments/test_conda_packages.py",
    "tests/provision/environments/test_killed_build.py",
    "tests/bench/worker/checks/test_run.py",
    "tests/bench/worker/test_measurement.py",
    "tests/provision/cli/test_env.py",
    "tests/provision/cli/test_env_lock.py",
    "tests/bench/run/test_recipe.py",
    "tests/bench/cli/test_main.py",
    "tests/bench/run/test_suite_run.py",
    "tests/bench/run/test_tune.py",
)


def unit(nodeid: str) -> str:
    """Return what goes to one worker as a whole: a test's file, or the file that it shares a fixture with."""
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file, file)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests; those of a unit stay together and in their order."""
    ranks = {file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(unit(item.nodeid), len(ranks)))
