"""Tests the records of flags that commands share, and the output options that are made from these flags."""

from __future__ import annotations

import re

import pytest

from provision.cli.common import BriefOutputFlags, OutputFlags, OutputOptions
from tests.provision.run_command import provision

ROOT = "--root --host --trust-volume"  # RootFlags
PLACE = "--root --host --envs --trust-volume"  # PlaceFlags
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
    "undo": f"--list --yes {ROOT} --offline {BRIEF} --dry-run",
    "gc": f"--yes {ROOT} --wait --json",
    "shellenv": f"--shell {ROOT}",
    "mirrors list": f"{PLACE} --catalogue --json",
    "mirrors probe": f"--tool {PLACE} --catalogue --json --no-color",
    "mirrors use": f"--tool --nodefaults {PLACE} --catalogue --offline {BRIEF} --dry-run",
    "mirrors restore": f"--force {ROOT} {BRIEF} --dry-run",
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_each_command_lists_its_flags_in_the_fixed_order(command: str) -> None:
    text = provision(*command.split(), "--help").stdout
    assert re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE) == [*FLAGS[command].split(), "--help"]


def test_output_options_have_the_values_of_the_flags_and_defaults_for_missing_flags() -> None:
    brief = BriefOutputFlags(wait=5, json=True, quiet=True, no_color=True)
    assert OutputOptions.of(brief) == OutputOptions(json=True, quiet=True, verbose=False, no_color=True, wait=5)
    assert OutputOptions.of(OutputFlags(verbose=True)) == OutputOptions(verbose=True)


def test_flag_no_color_and_variable_no_color_each_turn_colors_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert OutputOptions().color
    assert not OutputOptions(no_color=True).color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not OutputOptions().color
