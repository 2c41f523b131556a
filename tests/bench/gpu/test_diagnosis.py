"""A card that is there and cannot be used: each cause by what the machine shows, with the fix that is its own."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu import device_nodes, nvml
from bench.gpu.device_nodes import DeviceNode, GpuVisibility
from bench.gpu.diagnosis import Machine, cause, site
from bench.worker import device_probe
from provision.config import toml
from provision.config import torch as torch_config
from provision.core.errors import SpecError
from provision.host.facts import Gpu, HostFacts
from tests.bench.gpu.test_nvml import Driver
from tests.conftest import CHECKOUT

ENVS = CHECKOUT / "envs"
TORCH = toml.load(ENVS / "torch.toml", torch_config.TorchSpec)
LOCKED = ("cpu", "cu126", "cu128", "cu130")
OPEN = (DeviceNode("nvidia0"), DeviceNode("nvidia-uvm"), DeviceNode("nvidiactl"))
FINE = GpuVisibility(on_bus=("0000:01:00.0",), loaded=True, nodes=OPEN)


def host(driver: str | None = "570.86", *cards: str, seen: GpuVisibility = FINE, system: str = "linux") -> Machine:
    """A machine with a card of 2022, or with others."""
    names = (cards or ("NVIDIA H100",)) if driver is not None else ()
    gpus = tuple(Gpu(name, {"NVIDIA H100": "9.0", "B200": "10.0", "GTX 1080": "6.1"}.get(name)) for name in names)
    facts = HostFacts(system, "x86_64", "here", "A CPU", 2, None, 8_000_000_000, driver, gpus)
    return Machine(facts, seen, TORCH, LOCKED)


def torch_says(*devices: tuple[str, str], **changes: Any) -> dict[str, Any]:
    """What torch answers: that it can use these cards; without any, that it can use none."""
    return {
        "torch": "2.9.0",
        "cuda": "12.8",
        "available": bool(devices),
        "devices": [{"name": name, "capability": capability} for name, capability in devices],
        "architectures": ["sm_75", "sm_80", "sm_86", "sm_90"],
        "mps": False,
        "refusal": None,
    } | changes


NONE = torch_says()
CPU_ONLY = torch_says(cuda=None, architectures=[])
NEWER = torch_says(torch="2.13.0", cuda="13.0")
BARE = replace(host(None), seen=GpuVisibility())
ON_BUS = GpuVisibility(on_bus=("0000:65:00.0",))
MISMATCH = replace(FINE, library=18)
NO_NODES = replace(FINE, nodes=())
NO_CUDA = "torch without CUDA"


def name_of(place: Machine, found: dict[str, Any]) -> str:
    why = cause(place, found)
    return why.name if why is not None else ""


def closed(name: str, fault: str) -> GpuVisibility:
    shut = DeviceNode(name, fault, "0660", "owner 0, group 44")
    return replace(FINE, nodes=tuple(shut if node.name == name else node for node in OPEN))


# What the machine shows, what torch says; the cause; words of its message, and of its fix.
CASES = [
    (BARE, CPU_ONLY, "no card", "no NVIDIA driver is loaded on this machine, and no card", "Use --device cpu"),
    (
        replace(host(None, system="windows"), seen=GpuVisibility()),
        NONE,
        "no card",
        "on this machine.",
        "Use --device cpu",
    ),
    (replace(BARE, seen=ON_BUS), NONE, "no driver", "(0000:65:00.0)", "Install NVIDIA's driver here"),
    (
        replace(BARE, seen=replace(ON_BUS, contained=True)),
        NONE, "no driver", "no driver is loaded", "driver on the container's host",
    ),
    (host(seen=MISMATCH), NONE, "driver mismatch", "driver 570.86, and its libraries", "Restart the machine"),
    (host(seen=replace(MISMATCH, contained=True)), NONE, "driver mismatch", "mismatch", "Start the container anew"),
    (host(seen=NO_NODES), NONE, "no node", "no /dev/nvidia0, /dev/nvidiactl, /dev/nvidia-uvm.", "nvidia-modprobe"),
    (
        host(seen=replace(NO_NODES, contained=True)),
        CPU_ONLY, "no node", "no card is in reach", "Start the container with its GPUs (`docker run --gpus all`",
    ),
    (host(seen=replace(FINE, nodes=OPEN[::2])), NONE, "no node", "no /dev/nvidia-uvm.", "nvidia-modprobe -c 0 -u"),
    (host(seen=closed("nvidia0", "EACCES")), NONE, "permission", "nvidia0 is not for this user (mode 0660", "usermod"),
    (host(seen=closed("nvidiactl", "EACCES")), CPU_ONLY, "permission", "/dev/nvidiactl is not for", "chmod 666"),
    (host(seen=closed("nvidia-uvm", "EPERM")), NONE, "device rules", "this container may not use it", "--gpus all"),
    (host(seen=closed("nvidia0", "EIO")), NONE, "dead node", "/dev/nvidia0 does not open (EIO)", "grep -i nvrm"),
    (host(seen=replace(FINE, nodes=OPEN[:1])), CPU_ONLY, NO_CUDA, "CPU-only", "cu128`"),
    (host(), CPU_ONLY, NO_CUDA, "NVIDIA H100 is here, but torch 2.9.0 is a CPU-only", "cu128` (torch 2.10.0)"),
    (host("580.65"), CPU_ONLY, NO_CUDA, "CPU-only", "--variant cu130`"),
    (host("570.86", "GTX 1080"), CPU_ONLY, NO_CUDA, "GTX 1080 is here", "--variant cu126`"),
    (host("470.10"), CPU_ONLY, NO_CUDA, "CPU-only", "cu130: needs driver 580 or newer, here is 470.10"),
    (replace(host(), torch=None), CPU_ONLY, NO_CUDA, "CPU-only", "CUDA that runs with driver 570.86"),
    (replace(host(), locked=()), CPU_ONLY, NO_CUDA, "CPU-only", "No build that is locked here fits: no lock fits"),
    (host(), NEWER, "driver too old", "CUDA 13.0, which needs driver 580 or newer; here is 570.86", "--variant cu128`"),
    (host("520.61"), NONE, "driver too old", "CUDA 12.8, which needs driver 525.60.13", "Update the driver to 525"),
    (host("520.61"), torch_says(cuda="12.1"), "driver too old", "needs driver 525.60.13", "Update the driver"),
    (host("440.33"), torch_says(cuda="11.8"), "driver too old", "needs driver 450.80.02", "Update the driver"),
    (host(seen=replace(FINE, visible="")), NONE, "hidden by a variable", "CUDA_VISIBLE_DEVICES is ''", "`unset CUDA"),
    (host(seen=replace(FINE, visible="-1")), NONE, "hidden by a variable", "is '-1'", "`unset CUDA"),
    (host(seen=replace(FINE, uncut=True)), NONE, "no instance", "in instances (MIG), and none", "Make one here (`sudo"),
    (host(seen=replace(FINE, uncut=True, contained=True)), NONE, "no instance", "(MIG)", "on the container's host (`"),
    (
        host(), torch_says(refusal="Error 802: system not yet initialized"),
        "fabric manager", "joined by switches", "start nvidia-fabricmanager",
    ),
    (host(seen=replace(FINE, library=12)), NONE, "no libraries", "not the driver's libraries", "compute,utility"),
    (
        host(seen=replace(FINE, visible="0,1")), torch_says(refusal="CUDA unknown error"),
        "unexplained", "it says: CUDA unknown error", "nvidia-smi",
    ),
    (host(), torch_says(cuda="10.2"), "unexplained", "it does not say why", "nvidia-smi"),
    (host("570.86", seen=GpuVisibility(), system="windows"), CPU_ONLY, NO_CUDA, "CPU-only", "no lock fits"),
    (
        host("570.86", "GTX 1080"), torch_says(("GTX 1080", "6.1")),
        "card too old", "GTX 1080 has compute capability 6.1 and is too old for torch 2.9.0", "--variant cu126`",
    ),
    (
        host("570.86", "B200"), torch_says(("B200", "10.0")),
        "no code for the card", "B200 has compute capability 10.0 and is too new for torch 2.9.0", "--variant cu128`",
    ),
    (host("570.86", "A card"), torch_says(("A card", "6.1")), "card too old", "capability 6.1", "--variant cu126`"),
    (
        host(), torch_says(("NVIDIA H100", "9.0"), architectures=["sm_80", "sm_100"]),
        "no code for the card", "has no code in torch 2.9.0, which carries machine code for sm_80, sm_100.", "cu128`",
    ),
    (
        host("570.86", "Tesla K80"), torch_says(("Tesla K80", "3.7")),
        "card too old", "3.7 and is too old", "has no code for Tesla K80 (compute capability 3.7)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("place", "found", "name", "said", "fix"), CASES)
def test_each_cause_is_told_apart_with_its_fix(
    place: Machine, found: dict[str, Any], name: str, said: str, fix: str
) -> None:
    why = cause(place, found)
    assert why is not None
    assert (why.name, said in f"{why.said}.", fix in why.fix) == (name, True, True), why.text
    assert "--device cpu" in why.fix


def test_every_cause_has_its_case() -> None:
    source = (CHECKOUT / "bench" / "gpu" / "diagnosis.py").read_text(encoding="utf-8")
    named = {case[2] for case in CASES}
    assert all(f'"{name}"' in source for name in named)
    assert source.count("return Diagnosis(") + 1 == len(named), (
        "of the two of a dead card's architecture one place makes both"
    )


@pytest.mark.parametrize("seen", [FINE, GpuVisibility(library=12), replace(FINE, nodes=(), library=18)])
def test_what_torch_can_use_is_not_asked_further(seen: GpuVisibility) -> None:
    assert cause(host(seen=seen), torch_says(("NVIDIA H100", "9.0"))) is None


def test_of_several_cards_the_one_that_is_asked_for_counts() -> None:
    found = torch_says(("NVIDIA H100", "9.0"), ("GTX 1080", "6.1"))
    place = host("570.86", "NVIDIA H100", "GTX 1080")
    assert cause(place, found, 0) is None
    assert "GTX 1080" in str(cause(place, found, 1))
    assert cause(place, found, 2) is None, "that there is none is said elsewhere"
    assert "GTX 1080 is here" in str(cause(place, CPU_ONLY, 1))


def test_one_node_that_opens_is_enough() -> None:
    shut = replace(FINE, nodes=(*OPEN, DeviceNode("nvidia1", "EACCES")))
    assert name_of(host(seen=shut), CPU_ONLY) == NO_CUDA


def test_a_driver_that_the_kernel_does_not_show_needs_no_nodes() -> None:
    wsl = host(seen=GpuVisibility())
    assert name_of(wsl, CPU_ONLY) == NO_CUDA
    bare = replace(wsl, machine=replace(wsl.machine, gpus=()))
    assert name_of(bare, CPU_ONLY) == "no node"


def pci(root: Path, address: str, vendor: str, kind: str) -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_a_machine_is_looked_at(tmp_path: Path) -> None:
    pci(tmp_path, "0000:65:00.0", "0x10de", "0x030200")
    pci(tmp_path, "0000:17:00.0", "0x10de", "0x030000")
    pci(tmp_path, "0000:65:00.1", "0x10de", "0x040300")  # its sound
    pci(tmp_path, "0000:00:02.0", "0x8086", "0x030000")
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps", "nvram"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "dev/nvidiactl").mkdir(mode=0o755)
    seen = device_nodes.look(tmp_path, {"CUDA_VISIBLE_DEVICES": "3"})
    status = (tmp_path / "dev/nvidiactl").stat()
    owner = f"owner {status.st_uid}, group {status.st_gid}"
    assert seen == GpuVisibility(
        on_bus=("0000:17:00.0", "0000:65:00.0"),
        loaded=True,
        nodes=(DeviceNode("nvidia-uvm"), DeviceNode("nvidia0"), DeviceNode("nvidiactl", "EISDIR", "0755", owner)),
        library=nvml.refusal(),
        visible="3",
        contained=False,
    )


def test_what_the_drivers_library_says_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("h100", monkeypatch)
    driver.answers |= {"nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "card"}
    assert device_nodes.look(tmp_path, {}) == GpuVisibility()
    driver.answers |= {"nvmlDeviceGetMigMode": [1, 1], "nvmlDeviceGetMaxMigDeviceCount": 7}
    assert device_nodes.look(tmp_path, {}) == GpuVisibility(uncut=True)


def test_a_machine_without_anything_shows_nothing(tmp_path: Path) -> None:
    assert device_nodes.look(tmp_path, {}) == GpuVisibility(library=nvml.refusal())


def test_a_node_behind_which_nothing_is_says_so(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(tmp_path / "dev/nvidia0"))
        (tmp_path / "dev/nvidia1").symlink_to("nowhere")
        found = device_nodes.look(tmp_path, {}).nodes
    assert [(node.name, node.fault) for node in found] == [("nvidia0", "ENXIO"), ("nvidia1", "ENOENT")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_node_of_another_user_is_closed() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "dev").mkdir(mode=0o755)
        (root / "dev/nvidia0").touch()
        (root / "dev/nvidia0").chmod(0o600)
        os.seteuid(65534)
        try:
            found = device_nodes.look(root, {}).nodes
        finally:
            os.seteuid(0)
    assert found == (DeviceNode("nvidia0", "EACCES", "0600", "owner 0, group 0"),)


@pytest.mark.parametrize(
    ("made", "environ", "contained"),
    [
        (".dockerenv", {}, True),
        ("run/.containerenv", {}, True),
        ("etc/hostname", {"container": "podman"}, True),
        ("etc/hostname", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ("etc/hostname", {}, False),
        ("proc/driver/nvidia/version", {}, False),
    ],
)
def test_a_container_is_known_by_what_it_shows(
    tmp_path: Path, made: str, environ: dict[str, str], contained: bool
) -> None:
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).touch()
    seen = device_nodes.look(tmp_path, environ)
    assert (seen.contained, seen.loaded) == (contained, "nvidia" in made)


def test_the_builds_of_a_site_are_those_with_a_lock(tmp_path: Path) -> None:
    found = site(host().machine, ENVS)
    assert (found.torch, found.seen) == (TORCH, device_nodes.look())
    assert found.seen != GpuVisibility(), "there is either a card or a reason of the library's"
    assert set(LOCKED) <= set(found.locked)
    assert site(host().machine, tmp_path) == replace(found, torch=None, locked=())
    (tmp_path / "torch.toml").write_text("python = 3")
    with pytest.raises(SpecError, match=r"torch\.toml"):
        site(host().machine, tmp_path)


def test_the_numbers_of_the_library_are_its_own() -> None:
    import pynvml

    assert (nvml.MISMATCH, nvml.NO_LIBRARY) == (
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    )


def test_the_library_says_why_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    ended: list[bool] = []
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: ended.append(True))
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert (nvml.refusal(), ended) == (18, [])
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    assert (nvml.refusal(), ended) == (None, [True])


def test_a_torch_with_cuda_says_why_it_finds_no_card() -> None:
    """The build that is measured here has no CUDA: one that has is put in its place."""

    def refuse() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    cuda = SimpleNamespace(is_available=lambda: False, get_arch_list=lambda: ["sm_90"], init=refuse)
    mps = SimpleNamespace(is_available=lambda: False)
    torch = SimpleNamespace(
        __version__="2.9.0", version=SimpleNamespace(cuda="12.8"), cuda=cuda, backends=SimpleNamespace(mps=mps)
    )
    found = device_probe.query(torch)
    assert found == NONE | {"architectures": ["sm_90"], "refusal": "Found no NVIDIA driver on your system."}
    cuda.init = lambda: None
    assert device_probe.query(torch)["refusal"] is None
    torch.version.cuda = None
    cuda.init = refuse
    assert device_probe.query(torch)["refusal"] is None


def test_every_fault_is_named_as_the_system_names_it() -> None:
    assert {case[0].seen.nodes[0].fault for case in CASES if case[0].seen.nodes} <= {None, *errno.errorcode.values()}
