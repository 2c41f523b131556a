"""Test the choice of a run's device, and of the cause that a message names where the device cannot be used."""

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
    """Build a machine with this driver and these GPUs."""
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
    """Build torch's answer to a query, with these (name, compute capability) GPUs."""
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
        OLD_DRIVER, torch_answer(cuda="11.8", available=False), "cannot use H200 with driver", id="unexplained"
    ),
    pytest.param(WITH_GTX, torch_answer(OLD_GPU), "compute capability 6.1", id="old card"),
]


@pytest.mark.parametrize(("machine", "torch_facts", "words"), FAULTS)
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_named_gpu_that_cannot_be_used_blocks_with_cause(
    machine: Machine, torch_facts: dict[str, Any], words: str, name: str
) -> None:
    with pytest.raises(BlockedError, match=words) as caught:
        choose(name, machine, torch_facts)
    assert caught.value.exit == 4


@pytest.mark.parametrize(("machine", "torch_facts", "words"), FAULTS)
def test_auto_uses_cpu_where_gpu_cannot_be_used(machine: Machine, torch_facts: dict[str, Any], words: str) -> None:
    assert choose("auto", machine, torch_facts) == "cpu"


def test_usable_gpu_is_chosen_by_auto_and_by_name() -> None:
    torch_facts = torch_answer(NEW_GPU, NEW_GPU)
    assert diagnose(WITH_H200, torch_facts) is None
    assert choose("auto", WITH_H200, torch_facts) == "cuda:0"
    assert choose("cuda", WITH_H200, torch_facts) == "cuda:0"
    assert choose("cuda:1", WITH_H200, torch_facts) == "cuda:1"
    assert choose("cpu", WITH_H200, torch_facts) == "cpu"


@pytest.mark.parametrize(
    ("capability", "architectures", "is_supported"),
    [
        # Machine code runs on its own major version, from its minor upwards.
        ("8.6", ["sm_80"], True),
        ("8.6", ["sm_86"], True),
        ("8.6", ["sm_89"], False),
        ("9.0", ["sm_80", "sm_86"], False),
        ("10.0", ["sm_100"], True),
        ("12.0", ["sm_120"], True),
        ("12.0", ["sm_90", "sm_100"], False),
        ("9.0", ["sm_90a"], True),
        # PTX is compiled for newer versions, never for older ones.
        ("9.0", ["compute_80"], True),
        ("12.0", ["sm_75", "compute_90"], True),
        ("7.5", ["compute_80"], False),
        # Names of another form and an empty list support nothing.
        ("9.0", ["gfx90a"], False),
        ("9.0", [], False),
    ],
)
def test_compute_capability_is_compared_with_architectures_of_torch(
    capability: str, architectures: list[str], is_supported: bool
) -> None:
    assert supported(capability, architectures) is is_supported
    fault = diagnose(WITH_H200, torch_answer(("a card", capability), architectures=tuple(architectures)))
    assert (fault is None) is is_supported
    if fault is not None:
        assert capability in fault.problem
        assert all(name in fault.problem for name in architectures)


@pytest.mark.parametrize("index", [1, 9])
def test_absent_gpu_index_is_rejected_with_count_of_gpus(index: int) -> None:
    with pytest.raises(BlockedError, match=rf"cuda:{index} does not exist: the last GPU that torch lists is cuda:0"):
        choose(f"cuda:{index}", WITH_H200, torch_answer(NEW_GPU))


def test_one_unsupported_gpu_leaves_the_others_usable() -> None:
    torch_facts = torch_answer(NEW_GPU, OLD_GPU)
    machine = host("570.86", "H200", "GTX 1080")
    assert choose("cuda:0", machine, torch_facts) == "cuda:0"
    with pytest.raises(BlockedError, match="GTX 1080"):
        choose("cuda:1", machine, torch_facts)


def test_auto_is_cpu_where_torch_was_not_queried() -> None:
    assert choose("auto", BARE, None) == "cpu"
    assert choose("cpu", WITH_H200, None) == "cpu"


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1", "mps"])
def test_torch_that_does_not_start_blocks_with_its_error_output(name: str) -> None:
    with pytest.raises(BlockedError, match=r"libtorch\.so: cannot open"):
        choose(name, WITH_H200, {"error": "ImportError: libtorch.so: cannot open"})


def test_cpu_is_chosen_even_where_torch_does_not_start() -> None:
    assert choose("cpu", WITH_H200, {"error": "ImportError"}) == "cpu"


def test_apple_gpu_is_chosen_on_macos() -> None:
    mac = host(system="darwin")
    assert choose("auto", mac, torch_answer(cuda=None, available=False, mps=True)) == "mps"
    assert choose("mps", mac, torch_answer(cuda=None, available=False, mps=True)) == "mps"
    with pytest.raises(BlockedError, match="MPS"):
        choose("mps", BARE, CPU_ONLY)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cpu ", "cuda0", "cuda:0\n"])
def test_unknown_device_name_is_rejected_with_valid_names(name: str) -> None:
    with pytest.raises(SpecError, match="auto, cpu, cuda, cuda:N, mps") as caught:
        choose(name, WITH_H200, torch_answer(NEW_GPU))
    assert caught.value.exit == 2
