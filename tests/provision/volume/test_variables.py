"""Tests the variables on a volume that several homes share: each home reads and restores its own."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.setup import undo
from provision.volume import variables
from provision.volume.journal import Journal
from provision.volume.owner import Owner, current

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path / "volume")
    root.state.mkdir(parents=True)
    return root


def in_shell(root: Root, name: str) -> str:
    script = f'. "{variables.shell_file(root)}"; printf %s "${name}"'
    return subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout


def test_two_homes_keep_different_values(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        monkeypatch.setenv("HOME", str(home))
        variables.set_value(root, "TORCH_HOME", str(home), Journal(root.journal))
    for home in homes:
        monkeypatch.setenv("HOME", str(home))
        assert variables.read(root) == {"TORCH_HOME": str(home)}
        assert variables.for_child(root, {}, []) == {"TORCH_HOME": str(home)}
        assert in_shell(root, "TORCH_HOME") == str(home)


def test_two_hosts_with_one_home_path_keep_different_values(root: Root, home: Path) -> None:
    for host in ("one/a", "one-a", "two"):
        variables.write(root, {"HF_ENDPOINT": host}, Owner(host, str(home)))
    values = [variables.read(root, Owner(host, str(home)))["HF_ENDPOINT"] for host in ("one/a", "one-a", "two")]
    assert values == ["one/a", "one-a", "two"]


def test_record_of_an_older_version_is_read_until_the_home_writes_its_own(root: Root, home: Path) -> None:
    old = json.dumps({"schema": 1, "variables": {"PIP_CACHE_DIR": "1", "UV_CACHE_DIR": "1"}})
    root.old_variables.write_text(old)
    other = Owner("other", str(home))
    assert variables.read(root) == variables.read(root, other) == {"PIP_CACHE_DIR": "1", "UV_CACHE_DIR": "1"}
    variables.set_value(root, "UV_CACHE_DIR", "2", Journal(root.journal))
    assert variables.read(root) == {"PIP_CACHE_DIR": "1", "UV_CACHE_DIR": "2"}
    assert variables.read(root, other) == {"PIP_CACHE_DIR": "1", "UV_CACHE_DIR": "1"}
    assert root.old_variables.read_text() == old


def test_undo_restores_the_variable_of_its_own_home_alone(root: Root, home: Path) -> None:
    other = Owner("other", str(home))
    variables.write(root, {"TORCH_HOME": "of the other"}, other)
    variables.set_value(root, "TORCH_HOME", "here", Journal(root.journal, "setup"))
    run = undo.choose(root, None, current(home))
    for step in undo.steps(run, root, home, Journal(root.journal, "undo")):
        if step.check().state.value == "drifted":
            step.apply()
    assert variables.read(root) == {}
    assert variables.read(root, other) == {"TORCH_HOME": "of the other"}
    assert os.environ["HOME"] == str(home)
