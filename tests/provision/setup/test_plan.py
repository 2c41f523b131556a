"""Tests the list of setup steps: their order, where their messages go, and which steps host.toml turns off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from provision.cli.output import Screen
from provision.config import host as host_config
from provision.core.errors import SpecError
from provision.core.progress import no_progress
from provision.host import facts, provider
from provision.host.facts import HostFacts
from provision.models.step import ModelStep
from provision.setup import plan
from provision.setup.host_plan import HostDefinition, HostPlan
from provision.volume.journal import Journal
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the facts of the machine by those of a machine without a GPU."""
    machine = HostFacts("linux", "x86_64", "host", "a CPU", 2, None, 1 << 30, None, ())
    monkeypatch.setattr(facts, "probe", lambda: machine)


def host_plan(root: Path, home: Path, **host: Any) -> HostPlan:
    spec = host_config.HostSpec(**host)
    chosen = provider.choose(str(root), spec, CHECKOUT / "envs", {}, home)
    return HostPlan(HostDefinition(spec, CHECKOUT / "envs"), chosen, home, False, False, spec.mirror)


def test_setup_steps_of_a_host_with_default_settings_are_in_the_fixed_order(tmp_path: Path, home: Path) -> None:
    host = host_plan(tmp_path, home)
    steps = plan.steps(host, Journal(tmp_path), no_progress)
    assert [step.name for step in steps] == [
        "volume",
        "relocate huggingface",
        "mirrors",
        "environment diffusers",
        "mirror settings",
        "relink.sh",
        "hub in use",
        "hub cache",
        "model ddpm-cat-256",
        "model stable-diffusion-v1-5",
        "smoke",
    ]
    assert all(step.describe() for step in steps)


def test_model_steps_print_their_messages_on_the_screen_and_have_all_pinned_revisions(
    tmp_path: Path, home: Path
) -> None:
    screen = Screen(json_output=False, quiet=False, color=False)
    steps = plan.steps(host_plan(tmp_path, home), Journal(tmp_path), no_progress, screen.emit)
    models = [step for step in steps if isinstance(step, ModelStep)]
    assert [model.pull.health.tell for model in models] == [screen.emit] * 2
    assert all(model.pull.spec.revision in model.pull.pinned for model in models)


def test_message_on_the_screen_goes_to_stderr_unless_the_screen_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        Screen(json_output=False, quiet=quiet, color=False).emit("waiting 300 s")
    assert tuple(capsys.readouterr()) == ("", "  waiting 300 s\n")


def test_steps_that_host_toml_turns_off_are_not_planned(tmp_path: Path, home: Path) -> None:
    host = host_plan(tmp_path, home, relocate=[], models=[], mirror="keep")
    steps = plan.steps(host, Journal(tmp_path), no_progress)
    assert [step.name for step in steps] == ["volume", "environment diffusers", "smoke"]


def test_plan_with_a_root_inside_a_relocated_folder_is_rejected(home: Path) -> None:
    """Reject a folder that would move into itself."""
    root = home / ".cache/huggingface/hub/firstlight"
    host = host_plan(root, home)
    with pytest.raises(SpecError, match="lies inside"):
        plan.steps(host, Journal(root), no_progress)
