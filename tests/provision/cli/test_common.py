"""Tests the records of flags that commands share, and the options for the output that they set."""

from __future__ import annotations

import re

import pytest

from provision.cli.common import BriefOutputFlags, OutputFlags, OutputOptions
from tests.provision.run_command import provision

PLACE = "--root --host --envs"  # PlaceFlags
BRIEF = "--wait --json --quiet --no-color"  # BriefOutputFlags
OUTPUT = "--wait --json --quiet --verbose --no-color"  # OutputFlags
FLAGS = {
    "plan": f"{PLACE} --offline --json --quiet --verbose --no-color",
    "status": f"{PLACE} --offline --json --quiet --verbose --no-color",
    "verify": f"{PLACE} --offline --json --quiet --verbose --no-color",
    "setup": f"{PLACE} --offline --adopt {OUTPUT}",
    "repair": f"{PLACE} --offline --adopt {OUTPUT} --dry-run",
    "doctor": f"{PLACE} --json",
    "relocate": f"--to {PLACE} {BRIEF} --dry-run",
    "undo": f"--list --yes --root --host --offline {BRIEF} --dry-run",
    "gc": "--yes --root --host --wait --json",
    "shellenv": "--shell --root --host",
    "mirrors list": f"{PLACE} --catalogue --json",
    "mirrors probe": f"--tool {PLACE} --catalogue --json --no-color",
    "mirrors use": f"--tool --nodefaults {PLACE} --catalogue --offline {BRIEF} --dry-run",
    "mirrors restore": f"--force --root --host {BRIEF} --dry-run",
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_lists_the_flags_of_a_command_in_order(command: str) -> None:
    text = provision(*command.split(), "--help").stdout
    assert re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE) == [*FLAGS[command].split(), "--help"]


def test_output_options_take_the_flags_and_default_the_missing_ones() -> None:
    brief = BriefOutputFlags(wait=5, json=True, quiet=True, no_color=True)
    assert OutputOptions.of(brief) == OutputOptions(json=True, quiet=True, verbose=False, no_color=True, wait=5)
    assert OutputOptions.of(OutputFlags(verbose=True)) == OutputOptions(verbose=True)


def test_flag_and_variable_turn_colors_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert OutputOptions().color
    assert not OutputOptions(no_color=True).color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not OutputOptions().color
