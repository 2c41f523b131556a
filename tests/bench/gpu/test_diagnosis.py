"""Tests the diagnosis of a GPU that torch cannot use: each cause is recognized, and has its own remedy."""

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
from bench.gpu.diagnosis import Machine, diagnose, inspect_machine
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


def host(
    driver: str | None = "570.86", *cards: str, visibility: GpuVisibility = FINE, system: str = "linux"
) -> Machine:
    """Return a machine with this driver version and an H100, or GPUs of these names; without a driver, it has none."""
    names = (cards or ("NVIDIA H100",)) if driver is not None else ()
    gpus = tuple(Gpu(name, {"NVIDIA H100": "9.0", "B200": "10.0", "GTX 1080": "6.1"}.get(name)) for name in names)
    facts = HostFacts(system, "x86_64", "here", "A CPU", 2, None, 8_000_000_000, driver, gpus)
    return Machine(facts, visibility, TORCH, LOCKED)


def torch_answer(*devices: tuple[str, str], **changes: Any) -> dict[str, Any]:
    """Return torch's answer to a query: it can use only GPUs of these (name, compute capability)."""
    return {
        "torch": "2.9.0",
        "cuda": "12.8",
        "available": bool(devices),
        "devices": [{"name": name, "capability": capability} for name, capability in devices],
        "architectures": ["sm_75", "sm_80", "sm_86", "sm_90"],
        "mps": False,
        "refusal": None,
    } | changes


NONE = torch_answer()
CPU_ONLY = torch_answer(cuda=None, architectures=[])
NEWER = torch_answer(torch="2.13.0", cuda="13.0")
BARE = replace(host(None), visibility=GpuVisibility())
ON_BUS = GpuVisibility(on_bus=("0000:65:00.0",))
MISMATCH = replace(FINE, nvml_error=18)
NO_NODES = replace(FINE, nodes=())
NO_CUDA = "torch without CUDA"


def cause_of(machine: Machine, torch_facts: dict[str, Any]) -> str:
    """Return the name of the diagnosed cause; "" if there is none."""
    diagnosis = diagnose(machine, torch_facts)
    return diagnosis.name if diagnosis is not None else ""


def faulty(name: str, fault: str) -> GpuVisibility:
    """Return what the system shows of an H100 whose device node /dev/NAME fails to open with an errno name."""
    shut = DeviceNode(name, fault, "0660", "owner 0, group 44")
    return replace(FINE, nodes=tuple(shut if node.name == name else node for node in OPEN))


# (machine, torch's answer, name of the cause, text in the description of the problem, text in the remedy)
CASES = [
    (BARE, CPU_ONLY, "no card", "no NVIDIA driver is loaded on this machine, and no NVIDIA card", "Use --device cpu"),
    (
        replace(host(None, system="windows"), visibility=GpuVisibility()),
        NONE,
        "no card",
        "on this machine.",
        "Use --device cpu",
    ),
    (replace(BARE, visibility=ON_BUS), NONE, "no driver", "(0000:65:00.0)", "Install NVIDIA's driver here"),
    (
        replace(BARE, visibility=replace(ON_BUS, in_container=True)),
        NONE, "no driver", "no driver is loaded", "driver on the container's host",
    ),
    (
        host(visibility=MISMATCH), NONE,
        "driver mismatch", "driver 570.86, but the driver's libraries", "Restart the machine",
    ),
    (
        host(visibility=replace(MISMATCH, in_container=True)), NONE,
        "driver mismatch", "mismatch", "Start the container again",
    ),
    (
        host(visibility=NO_NODES), NONE,
        "no node", "missing: /dev/nvidia0, /dev/nvidiactl, /dev/nvidia-uvm.", "nvidia-modprobe",
    ),
    (
        host(visibility=replace(NO_NODES, in_container=True)),
        CPU_ONLY,
        "no node", "device nodes are missing: /dev/nvidia0", "with its GPUs (`docker run --gpus all`",
    ),
    (
        host(visibility=replace(FINE, nodes=OPEN[::2])), NONE,
        "no node", "missing: /dev/nvidia-uvm.", "nvidia-modprobe -c 0 -u",
    ),
    (
        host(visibility=faulty("nvidia0", "EACCES")), NONE,
        "permission", "permission to open /dev/nvidia0 (mode 0660", "usermod",
    ),
    (host(visibility=faulty("nvidiactl", "EACCES")), CPU_ONLY, "permission", "open /dev/nvidiactl", "chmod 666"),
    (
        host(visibility=faulty("nvidia-uvm", "EPERM")), NONE,
        "device rules", "the container's device rules forbid its use", "--gpus all",
    ),
    (host(visibility=faulty("nvidia0", "EIO")), NONE, "dead node", "/dev/nvidia0 does not open (EIO)", "grep -i nvrm"),
    (host(visibility=replace(FINE, nodes=OPEN[:1])), CPU_ONLY, NO_CUDA, "CPU-only", "cu128`"),
    (host(), CPU_ONLY, NO_CUDA, "this machine has NVIDIA H100, but torch 2.9.0 is a CPU-only", "cu128` (torch 2.10.0)"),
    (host("580.65"), CPU_ONLY, NO_CUDA, "CPU-only", "--variant cu130`"),
    (host("570.86", "GTX 1080"), CPU_ONLY, NO_CUDA, "has GTX 1080", "--variant cu126`"),
    (host("470.10"), CPU_ONLY, NO_CUDA, "CPU-only", "470.10"),
    (replace(host(), torch=None), CPU_ONLY, NO_CUDA, "CPU-only", "CUDA that runs with driver 570.86"),
    (replace(host(), locked=()), CPU_ONLY, NO_CUDA, "CPU-only", "No locked build fits: "),
    (
        host(), NEWER,
        "driver too old", "CUDA 13.0, which needs driver 580 or newer; this machine has 570.86", "--variant cu128`",
    ),
    (host("520.61"), NONE, "driver too old", "CUDA 12.8, which needs driver 525.60.13", "Update the driver to 525"),
    (host("520.61"), torch_answer(cuda="12.1"), "driver too old", "needs driver 525.60.13", "Update the driver"),
    (host("440.33"), torch_answer(cuda="11.8"), "driver too old", "needs driver 450.80.02", "Update the driver"),
    (
        host(visibility=replace(FINE, visible="")), NONE,
        "hidden by a variable", "CUDA_VISIBLE_DEVICES is ''", "`unset CUDA",
    ),
    (host(visibility=replace(FINE, visible="-1")), NONE, "hidden by a variable", "is '-1'", "`unset CUDA"),
    (
        host(visibility=replace(FINE, lacks_mig_instance=True)), NONE,
        "no instance", "NVIDIA H100 is in MIG mode and has no instance", "Create one here (`sudo",
    ),
    (
        host(visibility=replace(FINE, lacks_mig_instance=True, in_container=True)), NONE,
        "no instance", "MIG mode", "on the container's host (`",
    ),
    (
        host(), torch_answer(refusal="Error 802: system not yet initialized"),
        "fabric manager", "the NVSwitch fabric", "start nvidia-fabricmanager",
    ),
    (
        host(visibility=replace(FINE, nvml_error=12)), NONE,
        "no libraries", "the driver's libraries are missing", "compute,utility",
    ),
    (
        host(visibility=replace(FINE, visible="0,1")), torch_answer(refusal="CUDA unknown error"),
        "unexplained", "its error: CUDA unknown error", "nvidia-smi",
    ),
    (host(), torch_answer(cuda="10.2"), "unexplained", "it gives no reason", "nvidia-smi"),
    (
        host("570.86", visibility=GpuVisibility(), system="windows"), CPU_ONLY,
        NO_CUDA, "CPU-only", "No locked build fits: ",
    ),
    (
        host("570.86", "GTX 1080"), torch_answer(("GTX 1080", "6.1")),
        "card too old", "GTX 1080 has compute capability 6.1 and is too old for torch 2.9.0", "--variant cu126`",
    ),
    (
        host("570.86", "B200"), torch_answer(("B200", "10.0")),
        "no code for the card", "B200 has compute capability 10.0 and is too new for torch 2.9.0", "--variant cu128`",
    ),
    (host("570.86", "A card"), torch_answer(("A card", "6.1")), "card too old", "capability 6.1", "--variant cu126`"),
    (
        host(), torch_answer(("NVIDIA H100", "9.0"), architectures=["sm_80", "sm_100"]),
        "no code for the card", "has no code in torch 2.9.0, which contains machine code for sm_80, sm_100.", "cu128`",
    ),
    (
        host("570.86", "Tesla K80"), torch_answer(("Tesla K80", "3.7")),
        "card too old", "3.7 and is too old", "Tesla K80 (compute capability 3.7)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "torch_facts", "name", "problem", "fix"), CASES, ids=[f"{case[2]}: {case[3]}" for case in CASES]
)
def test_cause_is_diagnosed_with_its_problem_and_its_remedy(
    machine: Machine, torch_facts: dict[str, Any], name: str, problem: str, fix: str
) -> None:
    diagnosis = diagnose(machine, torch_facts)
    assert diagnosis is not None
    assert (diagnosis.name, problem in f"{diagnosis.problem}.", fix in diagnosis.fix) == (name, True, True), (
        diagnosis.text
    )
    assert "--device cpu" in diagnosis.fix


def test_every_cause_in_diagnosis_py_is_tested() -> None:
    source = (CHECKOUT / "bench" / "gpu" / "diagnosis.py").read_text(encoding="utf-8")
    named = {case[2] for case in CASES}
    assert all(f'"{name}"' in source for name in named)
    assert source.count("return Diagnosis(") + 1 == len(named), (
        "one return statement gives two causes: a card that is too old, and one without code in torch"
    )


@pytest.mark.parametrize("visibility", [FINE, GpuVisibility(nvml_error=12), replace(FINE, nodes=(), nvml_error=18)])
def test_gpu_that_torch_can_use_has_no_diagnosis(visibility: GpuVisibility) -> None:
    assert diagnose(host(visibility=visibility), torch_answer(("NVIDIA H100", "9.0"))) is None


def test_diagnosis_concerns_the_gpu_with_the_given_index() -> None:
    torch_facts = torch_answer(("NVIDIA H100", "9.0"), ("GTX 1080", "6.1"))
    machine = host("570.86", "NVIDIA H100", "GTX 1080")
    assert diagnose(machine, torch_facts, 0) is None
    assert "GTX 1080" in str(diagnose(machine, torch_facts, 1))
    assert diagnose(machine, torch_facts, 2) is None, "choose() reports an index that does not exist"
    assert "has GTX 1080" in str(diagnose(machine, CPU_ONLY, 1))


def test_device_node_of_a_second_gpu_that_does_not_open_is_not_the_cause() -> None:
    shut = replace(FINE, nodes=(*OPEN, DeviceNode("nvidia1", "EACCES")))
    assert cause_of(host(visibility=shut), CPU_ONLY) == NO_CUDA


def test_missing_device_nodes_are_no_cause_if_a_gpu_is_listed_without_a_kernel_module() -> None:
    wsl = host(visibility=GpuVisibility())
    assert cause_of(wsl, CPU_ONLY) == NO_CUDA
    bare = replace(wsl, facts=replace(wsl.facts, gpus=()))
    assert cause_of(bare, CPU_ONLY) == "no node"


def make_pci_device(root: Path, address: str, vendor: str, kind: str) -> None:
    """Create the sysfs folder of a PCI device with this vendor and device class."""
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_gpu_visibility_lists_gpus_on_the_bus_and_device_nodes_and_the_cuda_variable(tmp_path: Path) -> None:
    make_pci_device(tmp_path, "0000:65:00.0", "0x10de", "0x030200")
    make_pci_device(tmp_path, "0000:17:00.0", "0x10de", "0x030000")
    make_pci_device(tmp_path, "0000:65:00.1", "0x10de", "0x040300")  # the audio function of the first GPU
    make_pci_device(tmp_path, "0000:00:02.0", "0x8086", "0x030000")
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps", "nvram"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "dev/nvidiactl").mkdir(mode=0o755)
    visibility = device_nodes.read_visibility(tmp_path, {"CUDA_VISIBLE_DEVICES": "3"})
    status = (tmp_path / "dev/nvidiactl").stat()
    owner = f"owner {status.st_uid}, group {status.st_gid}"
    assert visibility == GpuVisibility(
        on_bus=("0000:17:00.0", "0000:65:00.0"),
        loaded=True,
        nodes=(DeviceNode("nvidia-uvm"), DeviceNode("nvidia0"), DeviceNode("nvidiactl", "EISDIR", "0755", owner)),
        nvml_error=nvml.start_error(),
        visible="3",
        in_container=False,
    )


def test_gpu_visibility_reports_a_gpu_in_mig_mode_without_an_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver("h100", monkeypatch)
    driver.answers |= {"nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "card"}
    assert device_nodes.read_visibility(tmp_path, {}) == GpuVisibility()
    driver.answers |= {"nvmlDeviceGetMigMode": [1, 1], "nvmlDeviceGetMaxMigDeviceCount": 7}
    assert device_nodes.read_visibility(tmp_path, {}) == GpuVisibility(lacks_mig_instance=True)


def test_gpu_visibility_of_a_machine_without_a_gpu_has_only_the_nvml_error(tmp_path: Path) -> None:
    assert device_nodes.read_visibility(tmp_path, {}) == GpuVisibility(nvml_error=nvml.start_error())


def test_device_node_without_a_device_has_the_errno_name_of_opening_it(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "dev/nvidia0"))
        (tmp_path / "dev/nvidia1").symlink_to("nowhere")
        nodes = device_nodes.read_visibility(tmp_path, {}).nodes
    assert [(node.name, node.fault) for node in nodes] == [("nvidia0", "ENXIO"), ("nvidia1", "ENOENT")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_device_node_of_another_user_has_the_fault_eacces_with_mode_and_owner() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "dev").mkdir(mode=0o755)
        (root / "dev/nvidia0").touch()
        (root / "dev/nvidia0").chmod(0o600)
        os.seteuid(65534)
        try:
            nodes = device_nodes.read_visibility(root, {}).nodes
        finally:
            os.seteuid(0)
    assert nodes == (DeviceNode("nvidia0", "EACCES", "0600", "owner 0, group 0"),)


@pytest.mark.parametrize(
    ("mark", "environ", "in_container"),
    [
        (".dockerenv", {}, True),
        ("run/.containerenv", {}, True),
        ("etc/hostname", {"container": "podman"}, True),
        ("etc/hostname", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ("etc/hostname", {}, False),
        ("proc/driver/nvidia/version", {}, False),
    ],
)
def test_container_is_recognized_by_its_marker_file_or_variable(
    tmp_path: Path, mark: str, environ: dict[str, str], in_container: bool
) -> None:
    (tmp_path / mark).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mark).touch()
    visibility = device_nodes.read_visibility(tmp_path, environ)
    assert (visibility.in_container, visibility.loaded) == (in_container, "nvidia" in mark)


def test_locked_builds_of_a_machine_are_the_variants_with_a_lock_file(tmp_path: Path) -> None:
    machine = inspect_machine(host().facts, ENVS)
    assert (machine.torch, machine.visibility) == (TORCH, device_nodes.read_visibility())
    assert machine.visibility != GpuVisibility(), "there is either a GPU or an NVML error"
    assert set(LOCKED) <= set(machine.locked)
    assert inspect_machine(host().facts, tmp_path) == replace(machine, torch=None, locked=())
    (tmp_path / "torch.toml").write_text("python = 3")
    with pytest.raises(SpecError, match=r"torch\.toml"):
        inspect_machine(host().facts, tmp_path)


def test_nvml_error_numbers_in_the_code_equal_those_of_pynvml() -> None:
    import pynvml

    assert (nvml.MISMATCH, nvml.NO_LIBRARY) == (
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    )


def test_start_error_is_the_number_of_the_nvml_error_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    shutdowns: list[bool] = []
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: shutdowns.append(True))
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert (nvml.start_error(), shutdowns) == (18, [])
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    assert (nvml.start_error(), shutdowns) == (None, [True])


def test_query_of_torch_with_cuda_has_the_reason_why_torch_finds_no_gpu() -> None:
    """Use an object in place of a torch with CUDA, because the torch of the tests has none."""

    def refuse() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    cuda = SimpleNamespace(is_available=lambda: False, get_arch_list=lambda: ["sm_90"], init=refuse)
    mps = SimpleNamespace(is_available=lambda: False)
    torch = SimpleNamespace(
        __version__="2.9.0", version=SimpleNamespace(cuda="12.8"), cuda=cuda, backends=SimpleNamespace(mps=mps)
    )
    query = device_probe.query(torch)
    assert query == NONE | {"architectures": ["sm_90"], "refusal": "Found no NVIDIA driver on your system."}
    cuda.init = lambda: None
    assert device_probe.query(torch)["refusal"] is None
    torch.version.cuda = None
    cuda.init = refuse
    assert device_probe.query(torch)["refusal"] is None


def test_every_fault_of_a_device_node_in_these_tests_is_an_errno_name() -> None:
    assert {case[0].visibility.nodes[0].fault for case in CASES if case[0].visibility.nodes} <= {
        None,
        *errno.errorcode.values(),
    }
