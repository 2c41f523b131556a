"""Which build of torch a machine gets, and what the plan holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from provision import plan, spec
from provision.errors import SpecError
from provision.facts import Facts, Gpu
from provision.journal import Journal
from provision.paths import Root
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

TORCH = spec.load(CHECKOUT / "envs/torch.toml", spec.TorchSpec)
LOCKED = ["cpu", "cu130"]


def machine(driver: str | None = None, *cards: Gpu, system: str = "linux") -> Facts:
    return Facts(system, "x86_64", "host", "a CPU", 2, None, 1 << 30, driver, cards)


@pytest.mark.parametrize(
    ("facts", "variant", "reason"),
    [
        (machine(), "cpu", "none is here"),
        (machine("580.65.06", Gpu("NVIDIA H200", "9.0")), "cu130", "the first that fits"),
        (machine("580.65.06", Gpu("Tesla T4", "7.5")), "cu130", "the first that fits"),
        (machine("580.65.06", Gpu("unknown NVIDIA card")), "cu130", "the first that fits"),
        (machine("580.65.06"), "cpu", "none is here"),
        (machine("535.129.03", Gpu("NVIDIA A100", "8.0")), "cpu", "needs driver 580, here is 535.129.03"),
        (machine("580.65.06", Gpu("Tesla V100", "7.0")), "cpu", "compute capability 7.5, Tesla V100 has 7.0"),
    ],
)
def test_the_first_variant_that_fits(facts: Facts, variant: str, reason: str) -> None:
    chosen, why = plan.choose_variants(facts, TORCH, "auto", LOCKED)
    assert chosen[0].name == variant
    assert reason in why


def test_the_cpu_build_has_a_stand_in() -> None:
    chosen, _ = plan.choose_variants(machine(), TORCH, "auto", LOCKED)
    assert [variant.name for variant in chosen] == ["cpu", "cu130"]


def test_a_person_overrules() -> None:
    chosen, why = plan.choose_variants(machine(), TORCH, "cu130", LOCKED)
    assert (chosen[0].name, why) == ("cu130", "chosen by you")


def test_another_system_is_told_that_there_is_no_lock() -> None:
    with pytest.raises(SpecError, match="no lock fits this machine"):
        plan.choose_variants(machine(system="darwin"), TORCH, "auto", LOCKED)


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
