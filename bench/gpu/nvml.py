"""Read facts and the present state of an NVIDIA GPU through NVML, the driver's library; every value may be missing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.core import validation_records

if TYPE_CHECKING:
    from collections.abc import Callable

# {bit of nvmlClocksEventReasons: its name} (source: nvml.h), without the bit for an idle GPU. A clock that was set by
# hand is no fault, but explains a slow GPU.
REASONS = {
    0x2: "clocks set by hand",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
# Throttle reasons that show a fault of the GPU, its cooling or its power supply.
FAULT_REASONS = {"hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "hardware power brake"}
_LOST = 15  # NVML_ERROR_GPU_IS_LOST: the GPU no longer answers on its bus (source: nvml.h)
MISMATCH = 18  # NVML_ERROR_LIB_RM_VERSION_MISMATCH: kernel driver and library have other versions (source: nvml.h)
NO_LIBRARY = 12  # NVML_ERROR_LIBRARY_NOT_FOUND (source: nvml.h)
_OFF_THE_BUS = 79  # the XID of a lost GPU in the kernel's log (source: NVIDIA's list of XIDs)
_VIRTUAL = 2  # NVML_GPU_VIRTUALIZATION_MODE_VGPU: this machine has a share of the GPU (source: nvml.h)
_MAX_EVENTS = 1000


def start_error() -> int | None:
    """Return the error number of nvmlInit; None if it succeeds."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return int(error.value)
    pynvml.nvmlShutdown()
    return None


def lacks_mig_instance() -> bool:
    """Return whether a GPU is in MIG mode and has no instance; CUDA then finds no device."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return any(_is_empty(pynvml, handle) for handle in handles)
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()


def _is_empty(nvml: Any, handle: Any) -> bool:
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return False
    except nvml.NVMLError:  # the GPU has no MIG mode
        return False
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            return False
    return True


@dataclass(frozen=True)
class NvmlSample:
    """Record the state of a GPU at one time; None for a value that the driver does not report.

    `clock_mhz`: the clock of the SMs. `temperature`: degrees Celsius. `energy_joules`: since the driver was loaded.
    `reasons`: the reasons (values of REASONS) that lower the clocks now; empty if nothing lowers them. `processes`:
    {process id: the bytes that it uses on the GPU}.
    """

    clock_mhz: float | None = None
    temperature: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    used_bytes: int | None = None
    reasons: frozenset[str] | None = None
    processes: dict[int, int | None] | None = None


class NvmlDevice:
    """Read one GPU, addressed by its UUID.

    Every value is None if NVML does not start, does not list the GPU, or refuses the permission.
    """

    def __init__(self, uuid: str | None) -> None:
        """Open the GPU with this UUID; None opens no GPU, and every value is then None."""
        self._handle: Any = None
        self._uuid = uuid
        self._events: Any = None
        self._xids: list[int] = []
        self.power_limit_watts: float | None = None
        if uuid is None:
            return
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        # torch reports the UUID of a GPU and of a MIG instance without the prefix that NVML needs.
        names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
        for name in names:
            if self._handle is None:
                self._handle = self._call(partial(pynvml.nvmlDeviceGetHandleByUUID, name))
        if self._handle is None:
            self._call(pynvml.nvmlShutdown)
            return
        limit = self._call(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle))
        self.power_limit_watts = limit / 1000 if limit is not None else None

    def read(self) -> NvmlSample | None:
        """Return the present state of the GPU after a few milliseconds; None if the GPU is not open."""
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        power = self._call(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        energy = self._call(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        bits = self._call(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        memory = self._call(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        processes = self._call(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return NvmlSample(
            clock_mhz=self._call(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            temperature=self._call(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            power_watts=power / 1000 if power is not None else None,
            energy_joules=energy / 1000 if energy is not None else None,
            used_bytes=int(memory.used) if memory is not None else None,
            reasons=None if bits is None else frozenset(name for bit, name in REASONS.items() if bits & bit),
            processes=None if processes is None else {row.pid: row.usedGpuMemory for row in processes},
        )

    def watch(self) -> None:
        """Start to collect the critical errors (XIDs) of the GPU.

        This has no effect where the driver does not report them.
        """
        if self._handle is None or self._events is not None:
            return
        nvml = self._nvml
        events = self._call(nvml.nvmlEventSetCreate)
        if events is None:
            return
        try:
            nvml.nvmlDeviceRegisterEvents(self._handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError:
            self._call(lambda: nvml.nvmlEventSetFree(events))
            return
        self._events = events

    def describe(self, device: str, name: str = "", *, ours: int = 0) -> validation_records.DeviceFacts:
        """Return the facts of the GPU that the driver reports; a fact that the driver does not report is None.

        Args:
            device: the name of the device in torch, such as "cuda:0".
            name: the name of the GPU model by torch; used if the driver reports none.
            ours: the number of firstlight's own processes on the GPU. In a container the driver reports other process
                ids, or no process at all. So this number is subtracted, and the ids are not compared.
        """
        if self._handle is None:
            return validation_records.DeviceFacts(device, name, uuid=self._uuid)
        nvml, handle, call = self._nvml, self._handle, self._call
        facts = {field: call(partial(function, nvml, handle)) for field, function in _READERS.items()}
        rows, pages = facts.pop("rows"), facts.pop("pages")
        pending, failed = facts.pop("page_pending"), None
        if rows is not None:
            pages, pending, failed = rows[0] + rows[1], bool(rows[2]), bool(rows[3])
        processes = facts.pop("processes")
        return validation_records.DeviceFacts(
            device,
            _text(facts.pop("name") or name),
            uuid=_text(facts.pop("uuid") or self._uuid),
            driver=_text(facts.pop("driver")) or None,
            driver_sees=True,
            pages_retired=pages,
            rows_pending=pending,
            rows_failed=failed,
            xids=self._drain(),
            others=None if processes is None or processes < ours else processes - ours,
            **facts,
        )

    def _drain(self) -> tuple[int, ...]:
        """Return all XIDs since `watch` was called."""
        nvml = self._nvml
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            event = self._call(lambda: nvml.nvmlEventSetWait_v2(self._events, 0))  # an empty queue raises a timeout
            if event is None:
                break
            if event.eventType & nvml.nvmlEventTypeXidCriticalError:
                self._xids.append(int(event.eventData))
        return tuple(self._xids)

    def close(self) -> None:
        """Free the queue of XIDs and shut NVML down."""
        if self._events is not None:
            self._call(lambda: self._nvml.nvmlEventSetFree(self._events))
            self._events = None
        if self._handle is not None:
            self._call(self._nvml.nvmlShutdown)
            self._handle = None

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) == _LOST and _OFF_THE_BUS not in self._xids:
                self._xids.append(_OFF_THE_BUS)
            return None


def _text(value: str | bytes | None) -> str:
    """Return a string; older versions of the library return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _retired_pages(nvml: Any, handle: Any) -> int:
    causes = ("MULTIPLE_SINGLE_BIT_ECC_ERRORS", "DOUBLE_BIT_ECC_ERROR")
    return sum(
        len(nvml.nvmlDeviceGetRetiredPages(handle, getattr(nvml, f"NVML_PAGE_RETIREMENT_CAUSE_{cause}")))
        for cause in causes
    )


def _ecc_errors(nvml: Any, handle: Any, kind: str) -> int:
    kind = getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{kind}")
    return int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC))


def _is_slice(nvml: Any, handle: Any) -> bool | None:
    """Return whether the GPU is a MIG instance, is in MIG mode, or is a vGPU.

    None if the driver reports none of these.
    """
    answers: list[bool] = []
    for function in (
        lambda: bool(nvml.nvmlDeviceIsMigDeviceHandle(handle)),
        lambda: nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        lambda: nvml.nvmlDeviceGetVirtualizationMode(handle) == _VIRTUAL,
    ):
        try:
            answers.append(function())
        except nvml.NVMLError:
            continue  # a GPU that does not support this call has no such mode
    return any(answers) if answers else None


# {field of DeviceFacts, or a value from which `describe` computes fields: the call that reads it}. NVML reports power
# in milliwatts.
_READERS: dict[str, Callable[[Any, Any], Any]] = {
    "name": lambda nvml, handle: nvml.nvmlDeviceGetName(handle),
    "uuid": lambda nvml, handle: nvml.nvmlDeviceGetUUID(handle),
    "driver": lambda nvml, _: nvml.nvmlSystemGetDriverVersion(),
    "compute_capability": lambda nvml, handle: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
    "memory_bytes": lambda nvml, handle: int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    "slice": _is_slice,
    "ecc": lambda nvml, handle: nvml.nvmlDeviceGetEccMode(handle)[0] == nvml.NVML_FEATURE_ENABLED,
    "ecc_corrected": lambda nvml, handle: _ecc_errors(nvml, handle, "CORRECTED"),
    "ecc_uncorrected": lambda nvml, handle: _ecc_errors(nvml, handle, "UNCORRECTED"),
    "rows": lambda nvml, handle: nvml.nvmlDeviceGetRemappedRows(handle),
    "pages": _retired_pages,
    "page_pending": lambda nvml, handle: (
        nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle) == nvml.NVML_FEATURE_ENABLED
    ),
    "persistence": lambda nvml, handle: nvml.nvmlDeviceGetPersistenceMode(handle) == nvml.NVML_FEATURE_ENABLED,
    "power_limit_watts": lambda nvml, handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
    "power_default_watts": lambda nvml, handle: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1000,
    "pcie_generation": lambda nvml, handle: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
    "pcie_width": lambda nvml, handle: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
    "pcie_generation_most": lambda nvml, handle: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
    "pcie_width_most": lambda nvml, handle: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
    "processes": lambda nvml, handle: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
}
