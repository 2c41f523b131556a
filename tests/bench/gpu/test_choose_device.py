"""Tests the choice of a run's device by --device, and the message about a device that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from bench.gpu.choose_device import choose
from bench.gpu.diagnosis import Machine, diagnose, supported
from provision.core.errors import BlockedError, SpecError
from provision.host.facts import Gpu, HostFacts

OLD_GPU = ("GTX 1080", "6.1")
NEW_GPU = ("H200", "9.0")


def host(driver: str | None = None, *cards: str, system: str = "linux") -> Machine:
    """Return a machine with this driver version (None: no driver) and GPUs of these names."""
    return Machine(
        HostFacts(
            system=system,
            machine="x86_64",
            hostname="here",
            cpu="A CPU",
            cores=2,
            cpu_quota=None,
            memory_bytes=8_000_000_000,
            nvidia_driver=driver,
            gpus=tuple(Gpu(card) for card in cards),
        )
    )


def torch_answer(
    *cards: tuple[str, str],
    cuda: str | None = "12.8",
    available: bool = True,
    architectures: tuple[str, ...] = ("sm_75", "sm_80", "sm_86", "sm_90"),
    mps: bool = False,
) -> dict[str, Any]:
    """Return torch's answer to a query, with GPUs of these (name, compute capability)."""
    return {
        "torch": "2.9.0",
        "cuda": cuda,
        "available": available,
        "devices": [{"name": name, "capability": capability} for name, capability in cards],
        "architectures": list(architectures),
        "mps": mps,
    }


CPU_ONLY = torch_answer(cuda=None, available=False, architectures=())
BARE = host()
WITH_H200 = host("570.86", "H200")
WITH_GTX = host("570.86", "GTX 1080")
OLD_DRIVER = host("470.10", "H200")

FAULTS = [
    pytest.param(BARE, CPU_ONLY, "no NVIDIA driver is loaded", id="no driver"),
    pytest.param(WITH_H200, CPU_ONLY, "CPU-only build", id="torch without CUDA"),
    pytest.param(
        OLD_DRIVER,
        torch_answer(cuda="11.8", available=False),
        "cannot use H200 with driver",
        id="driver that torch cannot use",
    ),
    pytest.param(WITH_GTX, torch_answer(OLD_GPU), "compute capability 6.1", id="card too old for torch"),
]


@pytest.mark.parametrize(("machine", "torch_facts", "words"), FAULTS)
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_unusable_gpu_that_the_user_names_is_a_blocked_error_with_the_cause(
    machine: Machine, torch_facts: dict[str, Any], words: str, name: str
) -> None:
    with pytest.raises(BlockedError, match=words) as caught:
        choose(name, machine, torch_facts)
    assert caught.value.exit == 4


@pytest.mark.parametrize(("machine", "torch_facts", "words"), FAULTS)
def test_auto_chooses_the_cpu_if_the_gpu_is_unusable(machine: Machine, torch_facts: dict[str, Any], words: str) -> None:
    assert choose("auto", machine, torch_facts) == "cpu"


def test_auto_and_cuda_choose_the_first_usable_gpu_and_an_index_that_gpu() -> None:
    torch_facts = torch_answer(NEW_GPU, NEW_GPU)
    assert diagnose(WITH_H200, torch_facts) is None
    assert choose("auto", WITH_H200, torch_facts) == "cuda:0"
    assert choose("cuda", WITH_H200, torch_facts) == "cuda:0"
    assert choose("cuda:1", WITH_H200, torch_facts) == "cuda:1"
    assert choose("cpu", WITH_H200, torch_facts) == "cpu"


@pytest.mark.parametrize(
    ("capability", "architectures", "is_supported"),
    [
        # Machine code sm_XY runs on GPUs of the same major version X, from the minor version Y upwards.
        ("8.6", ["sm_80"], True),
        ("8.6", ["sm_86"], True),
        ("8.6", ["sm_89"], False),
        ("9.0", ["sm_80", "sm_86"], False),
        ("10.0", ["sm_100"], True),
        ("12.0", ["sm_120"], True),
        ("12.0", ["sm_90", "sm_100"], False),
        ("9.0", ["sm_90a"], True),
        # PTX (compute_XY) is compiled for GPUs of that version or a newer one, never for older ones.
        ("9.0", ["compute_80"], True),
        ("12.0", ["sm_75", "compute_90"], True),
        ("7.5", ["compute_80"], False),
        # A name of another form, and an empty list, support no GPU.
        ("9.0", ["gfx90a"], False),
        ("9.0", [], False),
    ],
)
def test_gpu_is_usable_only_if_an_architecture_of_torch_covers_its_compute_capability(
    capability: str, architectures: list[str], is_supported: bool
) -> None:
    assert supported(capability, architectures) is is_supported
    fault = diagnose(WITH_H200, torch_answer(("a card", capability), architectures=tuple(architectures)))
    assert (fault is None) is is_supported
    if fault is not None:
        assert capability in fault.problem
        assert all(name in fault.problem for name in architectures)


@pytest.mark.parametrize("index", [1, 9])
def test_index_of_an_absent_gpu_is_a_blocked_error_with_the_number_of_gpus(index: int) -> None:
    with pytest.raises(BlockedError, match=rf"cuda:{index} does not exist: the last GPU that torch lists is cuda:0"):
        choose(f"cuda:{index}", WITH_H200, torch_answer(NEW_GPU))


def test_usable_gpu_can_be_chosen_beside_an_unsupported_one() -> None:
    torch_facts = torch_answer(NEW_GPU, OLD_GPU)
    machine = host("570.86", "H200", "GTX 1080")
    assert choose("cuda:0", machine, torch_facts) == "cuda:0"
    with pytest.raises(BlockedError, match="GTX 1080"):
        choose("cuda:1", machine, torch_facts)


def test_auto_chooses_the_cpu_if_torch_was_not_queried() -> None:
    assert choose("auto", BARE, None) == "cpu"
    assert choose("cpu", WITH_H200, None) == "cpu"


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1", "mps"])
def test_torch_that_cannot_be_imported_is_a_blocked_error_with_its_message(name: str) -> None:
    with pytest.raises(BlockedError, match=r"libtorch\.so: cannot open"):
        choose(name, WITH_H200, {"error": "ImportError: libtorch.so: cannot open"})


def test_cpu_can_be_chosen_if_torch_cannot_be_imported() -> None:
    assert choose("cpu", WITH_H200, {"error": "ImportError"}) == "cpu"


def test_auto_and_mps_choose_the_apple_gpu_on_macos_only() -> None:
    mac = host(system="darwin")
    assert choose("auto", mac, torch_answer(cuda=None, available=False, mps=True)) == "mps"
    assert choose("mps", mac, torch_answer(cuda=None, available=False, mps=True)) == "mps"
    with pytest.raises(BlockedError, match="MPS"):
        choose("mps", BARE, CPU_ONLY)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cpu ", "cuda0", "cuda:0\n"])
def test_unknown_device_name_is_rejected_with_the_valid_names(name: str) -> None:
    with pytest.raises(SpecError, match="auto, cpu, cuda, cuda:N, mps") as caught:
        choose(name, WITH_H200, torch_answer(NEW_GPU))
    assert caught.value.exit == 2
