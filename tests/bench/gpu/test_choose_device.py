"""Which device a run takes, and which of the causes it names where that one cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from bench.gpu.choose_device import choose
from bench.gpu.diagnosis import Machine, cause, supported
from provision.core.errors import BlockedError, SpecError
from provision.host.facts import Gpu, HostFacts

OLD_CARD = ("GTX 1080", "6.1")
NEW_CARD = ("H200", "9.0")


def host(driver: str | None = None, *cards: str, system: str = "linux") -> Machine:
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


def torch_says(
    *cards: tuple[str, str],
    cuda: str | None = "12.8",
    available: bool = True,
    architectures: tuple[str, ...] = ("sm_75", "sm_80", "sm_86", "sm_90"),
    mps: bool = False,
) -> dict[str, Any]:
    return {
        "torch": "2.9.0",
        "cuda": cuda,
        "available": available,
        "devices": [{"name": name, "capability": capability} for name, capability in cards],
        "architectures": list(architectures),
        "mps": mps,
    }


CPU_ONLY = torch_says(cuda=None, available=False, architectures=())
BARE = host()
WITH_H200 = host("570.86", "H200")
WITH_GTX = host("570.86", "GTX 1080")
OLD_DRIVER = host("470.10", "H200")

FAULTS = [
    pytest.param(BARE, CPU_ONLY, "no NVIDIA driver is loaded", id="no driver"),
    pytest.param(WITH_H200, CPU_ONLY, "CPU-only build", id="torch without CUDA"),
    pytest.param(OLD_DRIVER, torch_says(cuda="11.8", available=False), "cannot use H200 with driver", id="unexplained"),
    pytest.param(WITH_GTX, torch_says(OLD_CARD), "compute capability 6.1", id="old card"),
]


@pytest.mark.parametrize(("machine", "found", "told"), FAULTS)
@pytest.mark.parametrize("wanted", ["cuda", "cuda:0"])
def test_a_wanted_card_that_cannot_be_used_blocks(
    machine: Machine, found: dict[str, Any], told: str, wanted: str
) -> None:
    with pytest.raises(BlockedError, match=told) as caught:
        choose(wanted, machine, found)
    assert caught.value.exit == 4


@pytest.mark.parametrize(("machine", "found", "told"), FAULTS)
def test_auto_goes_on_with_the_cpu(machine: Machine, found: dict[str, Any], told: str) -> None:
    assert choose("auto", machine, found) == "cpu"


def test_a_fine_card_is_used() -> None:
    found = torch_says(NEW_CARD, NEW_CARD)
    assert cause(WITH_H200, found) is None
    assert choose("auto", WITH_H200, found) == "cuda:0"
    assert choose("cuda", WITH_H200, found) == "cuda:0"
    assert choose("cuda:1", WITH_H200, found) == "cuda:1"
    assert choose("cpu", WITH_H200, found) == "cpu"


@pytest.mark.parametrize(
    ("capability", "architectures", "supported_there"),
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
        # PTX is compiled for whatever comes later, never for what was before.
        ("9.0", ["compute_80"], True),
        ("12.0", ["sm_75", "compute_90"], True),
        ("7.5", ["compute_80"], False),
        # What we cannot read supports nothing; and neither does a build that names nothing.
        ("9.0", ["gfx90a"], False),
        ("9.0", [], False),
    ],
)
def test_the_cards_generation_is_compared_with_torchs(
    capability: str, architectures: list[str], supported_there: bool
) -> None:
    assert supported(capability, architectures) is supported_there
    why = cause(WITH_H200, torch_says(("a card", capability), architectures=tuple(architectures)))
    assert (why is None) is supported_there
    if why is not None:
        assert capability in why.said
        assert all(name in why.said for name in architectures)


@pytest.mark.parametrize("index", [1, 9])
def test_a_card_that_is_not_there_says_how_many_are(index: int) -> None:
    with pytest.raises(BlockedError, match=rf"no cuda:{index}.* sees 1 of them"):
        choose(f"cuda:{index}", WITH_H200, torch_says(NEW_CARD))


def test_one_unsupported_card_leaves_the_others_usable() -> None:
    found = torch_says(NEW_CARD, OLD_CARD)
    machine = host("570.86", "H200", "GTX 1080")
    assert choose("cuda:0", machine, found) == "cuda:0"
    with pytest.raises(BlockedError, match="GTX 1080"):
        choose("cuda:1", machine, found)


def test_where_torch_was_not_asked_auto_is_the_cpu() -> None:
    assert choose("auto", BARE, None) == "cpu"
    assert choose("cpu", WITH_H200, None) == "cpu"


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:1", "mps"])
def test_a_torch_that_does_not_start_blocks_and_shows_what_it_said(wanted: str) -> None:
    with pytest.raises(BlockedError, match=r"libtorch\.so: cannot open"):
        choose(wanted, WITH_H200, {"error": "ImportError: libtorch.so: cannot open"})


def test_a_torch_that_does_not_start_matters_not_to_the_cpus_choice() -> None:
    assert choose("cpu", WITH_H200, {"error": "ImportError"}) == "cpu"


def test_apples_card() -> None:
    mac = host(system="darwin")
    assert choose("auto", mac, torch_says(cuda=None, available=False, mps=True)) == "mps"
    assert choose("mps", mac, torch_says(cuda=None, available=False, mps=True)) == "mps"
    with pytest.raises(BlockedError, match="MPS"):
        choose("mps", BARE, CPU_ONLY)


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cpu ", "cuda0", "cuda:0\n"])
def test_an_unknown_device_lists_what_there_is(wanted: str) -> None:
    with pytest.raises(SpecError, match="auto, cpu, cuda, cuda:N, mps") as caught:
        choose(wanted, WITH_H200, torch_says(NEW_CARD))
    assert caught.value.exit == 2
