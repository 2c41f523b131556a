"""Tests which variant of PyTorch is selected for recorded machines."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from provision.config import toml, torch
from provision.core.errors import SpecError
from provision.host import facts, torch_build
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

TORCH = toml.load(CHECKOUT / "envs/torch.toml", torch.TorchSpec)
LOCKED = [file.stem for file in (CHECKOUT / "envs/diffusers").glob("*.lock")]
PROC = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  5 22:23:56 UTC 2024\nGCC version:\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (d)\nGCC version:\n"


@dataclass
class Machine:
    """Describe a recorded machine and the expected choice.

    `variant`, `reason` and `warning` are the expected values. `sys` and `proc` are the texts in /sys and /proc with the
    driver version, `cards` the names of the GPUs, and `smi` the output of nvidia-smi.
    """

    variant: str
    reason: str
    sys: str | None = None
    proc: str | None = None
    cards: tuple[str, ...] = ()
    smi: str | None = None
    system: str = "Linux"
    machine: str = "x86_64"
    warning: str | None = None


MACHINES = {
    "no card": Machine("cpu", "cu130, cu128, cu126: needs an NVIDIA driver, and none is here"),
    "T4, new driver": Machine("cu130", "the first that fits", sys="580.65.06", cards=("Tesla T4",)),
    "T4, nvidia-smi": Machine(
        "cu128", "cu130: needs driver 580", sys="550.54.15", cards=("Tesla T4",), smi="Tesla T4, 7.5, 550.54.15"
    ),
    "V100, new driver": Machine(
        "cu128",
        "no code for Tesla V100-SXM2-16GB (compute capability 7.0)",
        proc=PROC.format("580.95.05"),
        cards=("Tesla V100-SXM2-16GB",),
        smi="Tesla V100-SXM2-16GB, 7.0, 580.95.05",
    ),
    "V100, container without nvidia-smi": Machine(
        "cu128", "compute capability 7.0", proc=PROC.format("580.95.05"), cards=("Tesla V100-PCIE-32GB",)
    ),
    "P100": Machine(
        "cu126",
        "cu128: has no code",
        sys="535.183.01",
        cards=("Tesla P100-PCIE-16GB",),
        smi="Tesla P100-PCIE-16GB, 6.0, 535.183.01",
    ),
    "1080 Ti, name alone": Machine("cu126", "6.1", sys="550.54.15", cards=("NVIDIA GeForce GTX 1080 Ti",)),
    "A10": Machine(
        "cu130", "first", proc=OPEN.format("580.65.06"), cards=("NVIDIA A10",), smi="NVIDIA A10, 8.6, 580.65.06"
    ),
    "A100, old driver": Machine(
        "cu128",
        "cu130: needs driver 580 or newer, here is 535.129.03",
        sys="535.129.03",
        cards=("NVIDIA A100-SXM4-80GB",) * 2,
        smi="NVIDIA A100-SXM4-80GB, 8.0, 535.129.03\nNVIDIA A100-SXM4-80GB, 8.0, 535.129.03",
    ),
    "H100": Machine(
        "cu130", "first", sys="580.82.07", cards=("NVIDIA H100 80GB HBM3",), smi="NVIDIA H100 80GB HBM3, 9.0, 580.82.07"
    ),
    "H200": Machine(
        "cu130", "first", proc=OPEN.format("580.105.08"), cards=("NVIDIA H200",), smi="NVIDIA H200, 9.0, 580.105.08"
    ),
    "3090": Machine(
        "cu128",
        "580",
        sys="570.86.10",
        cards=("NVIDIA GeForce RTX 3090",),
        smi="NVIDIA GeForce RTX 3090, 8.6, 570.86.10",
    ),
    "4090": Machine(
        "cu130",
        "first",
        sys="580.65.06",
        cards=("NVIDIA GeForce RTX 4090",),
        smi="NVIDIA GeForce RTX 4090, 8.9, 580.65.06",
    ),
    "5090": Machine(
        "cu128", "580", sys="572.16", cards=("NVIDIA GeForce RTX 5090",), smi="NVIDIA GeForce RTX 5090, 12.0, 572.16"
    ),
    "a card of a later family": Machine(
        "cpu",
        "no code for",
        sys="620.10",
        cards=("NVIDIA R100",),
        smi="NVIDIA R100, 13.0, 620.10",
        warning="NVIDIA R100, driver 620.10",
    ),
    "driver 470": Machine(
        "cpu",
        "cu128, cu126: needs driver 525.60.13 or newer, here is 470.223.02",
        sys="470.223.02",
        cards=("Tesla T4",),
        smi="Tesla T4, [N/A], 470.223.02",
        warning="the CPU variant of torch is chosen, although this machine has Tesla T4, driver 470.223.02",
    ),
    "K80": Machine(
        "cpu",
        "no code for Tesla K80 (compute capability 3.7)",
        sys="470.223.02",
        cards=("Tesla K80",),
        warning="Tesla K80",
    ),
    "two unlike cards": Machine(
        "cu128",
        "V100",
        sys="580.65.06",
        cards=("NVIDIA A100-PCIE-40GB", "Tesla V100-PCIE-32GB"),
        smi="NVIDIA A100-PCIE-40GB, 8.0, 580.65.06\nTesla V100-PCIE-32GB, 7.0, 580.65.06",
    ),
    "a driver, and no card given to the container": Machine(
        "cpu", "none is visible here", sys="580.65.06", warning="driver 580.65.06, no card"
    ),
    "GH200": Machine(
        "cu130",
        "first",
        sys="580.65.06",
        cards=("NVIDIA GH200 480GB",),
        smi="NVIDIA GH200 480GB, 9.0, 580.65.06",
        machine="aarch64",
    ),
    "GH200, old driver": Machine(
        "cpu",
        "cu128, cu126: is for linux x86_64",
        sys="560.35.03",
        cards=("NVIDIA GH200 480GB",),
        smi="NVIDIA GH200 480GB, 9.0, 560.35.03",
        machine="aarch64",
        warning="GH200",
    ),
    "a Mac": Machine("macos", "first", system="Darwin", machine="arm64"),
    "Windows": Machine("windows", "first", system="Windows", machine="AMD64"),
}


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that writes the files of a `Machine`, and returns the facts that firstlight probes."""

    def probe(machine: Machine) -> facts.HostFacts:
        root, bin_folder = tmp_path / "root", tmp_path / "bin"
        for path, text in (("sys/module/nvidia/version", machine.sys), ("proc/driver/nvidia/version", machine.proc)):
            if text:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(f"{text}\n")
        for number, name in enumerate(machine.cards):
            card = root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information"
            card.parent.mkdir(parents=True)
            card.write_text(f"Model: \t\t {name}\nIRQ:   \t\t 10\n")
            (root / "dev").mkdir(exist_ok=True)
            (root / f"dev/nvidia{number}").touch()
        bin_folder.mkdir()
        if machine.smi:
            program = bin_folder / "nvidia-smi"
            program.write_text(f"#!/bin/sh\n/bin/cat <<'E'\n{machine.smi}\nE\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(bin_folder))
        monkeypatch.setattr(platform, "system", lambda: machine.system)
        monkeypatch.setattr(platform, "machine", lambda: machine.machine)
        return facts.probe(root)

    return probe


@pytest.mark.parametrize("name", MACHINES)
def test_first_variant_that_runs_on_the_machine_is_selected(probed: Any, name: str) -> None:
    machine = MACHINES[name]
    choice = torch_build.choose(probed(machine), TORCH, "auto", LOCKED)
    assert choice.variants[0].name == machine.variant, choice
    assert machine.reason in choice.reason
    assert (machine.warning is None) == (choice.warning is None)
    assert machine.warning is None or machine.warning in (choice.warning or "")


def test_every_variant_in_torch_toml_has_a_lock_file() -> None:
    assert sorted(LOCKED) == sorted(variant.name for variant in TORCH.variant)


def test_machine_without_a_gpu_gets_the_cpu_variant_with_cu130_as_its_fallback(probed: Any) -> None:
    choice = torch_build.choose(probed(Machine("", "")), TORCH, "auto", LOCKED)
    assert [variant.name for variant in choice.variants] == ["cpu", "cu130"]


def test_variant_that_the_user_requests_is_used(probed: Any) -> None:
    choice = torch_build.choose(probed(Machine("", "")), TORCH, "cu126", LOCKED)
    assert (choice.variants[0].name, choice.reason) == ("cu126", "chosen by you")


@pytest.mark.parametrize(
    ("requested", "machine", "message"),
    [
        (
            "auto",
            Machine("", "", system="Darwin", machine="x86_64"),
            r"no lock file fits this machine \(darwin x86_64\).*macos",
        ),
        ("cu999", Machine("", ""), "unknown variant 'cu999'; available: .*cu126"),
        ("macos", Machine("", ""), "is for darwin, but this machine runs linux"),
    ],
)
def test_unknown_variant_or_variant_for_another_system_is_rejected(
    probed: Any, requested: str, machine: Machine, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        torch_build.choose(probed(machine), TORCH, requested, LOCKED)
