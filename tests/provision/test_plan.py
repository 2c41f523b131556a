"""What the plan holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from provision import plan, spec
from provision.errors import SpecError
from provision.facts import Facts
from provision.journal import Journal
from provision.paths import Root
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path


def machine() -> Facts:
    return Facts("linux", "x86_64", "host", "a CPU", 2, None, 1 << 30, None, ())


def test_the_steps_stand_in_order(tmp_path: Path, home: Path) -> None:
    wish = plan.Wish(Root(tmp_path), spec.HostSpec(), CHECKOUT / "envs", home, offline=False, retry=False)
    steps = plan.steps(wish, machine(), Journal(tmp_path), lambda _, __: None)
    assert [step.name for step in steps] == [
        "volume",
        "relocate huggingface",
        "environment diffusers",
        "model ddpm-cat-256",
        "model stable-diffusion-v1-5",
        "smoke",
    ]
    assert all(step.describe() for step in steps)


def test_what_is_not_wished_for_is_not_planned(tmp_path: Path, home: Path) -> None:
    wish = plan.Wish(
        Root(tmp_path), spec.HostSpec(relocate=[], models=[]), CHECKOUT / "envs", home, offline=False, retry=False
    )
    steps = plan.steps(wish, machine(), Journal(tmp_path), lambda _, __: None)
    assert [step.name for step in steps] == ["volume", "environment diffusers", "smoke"]


def test_a_root_inside_what_it_relocates_is_refused(home: Path) -> None:
    """Its files would move into a folder inside themselves."""
    root = Root(home / ".cache/huggingface/hub/firstlight")
    wish = plan.Wish(root, spec.HostSpec(), CHECKOUT / "envs", home, offline=False, retry=False)
    with pytest.raises(SpecError, match="lies inside"):
        plan.steps(wish, machine(), Journal(root.path), lambda _, __: None)
