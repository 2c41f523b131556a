"""Distributes the tests over worker processes: whole files, and first those that take longest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# {file: the file that uses the same session fixture}. In two processes, the fixture would be built twice.
TOGETHER = {"tests/bench/worker/test_sampling.py": "tests/bench/worker/test_measurement.py"}
# The files that take longest, in the order of their start. They start first, so that no process works alone at the end.
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


def group(nodeid: str) -> str:
    """Return the file that stands for a test's group; all tests of a group run in one process.

    The group is the test's own file, or the file with which it shares a session fixture (`TOGETHER`).
    """
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file, file)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests in place: the groups in `LONGEST` first, in that order; the order within a group stays."""
    ranks = {file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(group(item.nodeid), len(ranks)))
