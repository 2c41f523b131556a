"""What an NVIDIA card says of itself through its driver's library; every answer may be missing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.core import validation_records

if TYPE_CHECKING:
    from collections.abc import Callable

# Bits of nvmlClocksEventReasons (source: nvml.h). A card that is idle is well, and so is one at a clock that somebody
# has set; but that explains why it is slow.
REASONS = {
    0x2: "clocks set by hand",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
# Those that say that the card, or its cooling or supply, is not well.
UNWELL = {"hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "hardware power brake"}
_LOST = 15  # NVML_ERROR_GPU_IS_LOST: it does not answer on its bus any more (source: nvml.h)
MISMATCH = 18  # NVML_ERROR_LIB_RM_VERSION_MISMATCH: the kernel's driver and the library differ (source: nvml.h)
NO_LIBRARY = 12  # NVML_ERROR_LIBRARY_NOT_FOUND (source: nvml.h)
_OFF_THE_BUS = 79  # the number of that error in the kernel's log (source: NVIDIA's list of XIDs)
_VIRTUAL = 2  # NVML_GPU_VIRTUALIZATION_MODE_VGPU: this machine has a share of the card (source: nvml.h)
_MOST_EVENTS = 1000


def refusal() -> int | None:
    """The number with which the driver's library refuses to start; None where it starts."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return int(error.value)
    pynvml.nvmlShutdown()
    return None


def has_no_instance() -> bool:
    """Whether a card is set to be used in instances (MIG), and none of them is here: CUDA then finds no device."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        cards = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return any(_is_empty(pynvml, card) for card in cards)
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()


def _is_empty(nvml: Any, card: Any) -> bool:
    try:
        if nvml.nvmlDeviceGetMigMode(card)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return False
    except nvml.NVMLError:  # an older or smaller card, which has no such mode
        return False
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, number)
            return False
    return True


@dataclass(frozen=True)
class NvmlSample:
    """One look at a card: MHz, degrees Celsius, watts, joules since the driver came, bytes, {process: its bytes}.

    `reasons`: what keeps its clocks down; none where nothing does, None where the driver does not say.
    """

    clock_mhz: float | None = None
    temperature: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    used_bytes: int | None = None
    reasons: frozenset[str] | None = None
    processes: dict[int, int | None] | None = None


class NvmlDevice:
    """One card by its UUID. Where there is no library, no such card, or no permission, it says nothing."""

    def __init__(self, uuid: str | None) -> None:
        """Open it."""
        self._card: Any = None
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
        # torch tells a card's and a slice's alike, without what stands before it here.
        names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
        for name in names:
            if self._card is None:
                self._card = self._ask(partial(pynvml.nvmlDeviceGetHandleByUUID, name))
        if self._card is None:
            self._ask(pynvml.nvmlShutdown)
            return
        limit = self._ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self._card))
        self.power_limit_watts = limit / 1000 if limit is not None else None

    def read(self) -> NvmlSample | None:
        """Look once; a few milliseconds."""
        if self._card is None:
            return None
        nvml, card = self._nvml, self._card
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(card))
        energy = self._ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card))
        bits = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card))
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(card))
        processes = self._ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(card))
        return NvmlSample(
            clock_mhz=self._ask(lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM)),
            temperature=self._ask(lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)),
            power_watts=power / 1000 if power is not None else None,
            energy_joules=energy / 1000 if energy is not None else None,
            used_bytes=int(memory.used) if memory is not None else None,
            reasons=None if bits is None else frozenset(name for bit, name in REASONS.items() if bits & bit),
            processes=None if processes is None else {row.pid: row.usedGpuMemory for row in processes},
        )

    def watch(self) -> None:
        """Collect the critical errors (XIDs) of the card from now on; where its driver tells none, none are."""
        if self._card is None or self._events is not None:
            return
        nvml = self._nvml
        events = self._ask(nvml.nvmlEventSetCreate)
        if events is None:
            return
        try:
            nvml.nvmlDeviceRegisterEvents(self._card, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError:
            self._ask(lambda: nvml.nvmlEventSetFree(events))
            return
        self._events = events

    def describe(self, device: str, name: str = "", *, ours: int = 0) -> validation_records.DeviceFacts:
        """What the card is, as its driver tells: what it does not tell is None.

        Args:
            device: what torch calls it, "cuda:0".
            name: what torch says that it is; the driver's word comes before it.
            ours: how many of the processes on it are ours. In a container the driver tells other numbers than ours, or
                no process at all: so they are counted, not looked for.
        """
        if self._card is None:
            return validation_records.DeviceFacts(device, name, uuid=self._uuid)
        nvml, card, ask = self._nvml, self._card, self._ask
        told = {field: ask(partial(question, nvml, card)) for field, question in _QUESTIONS.items()}
        rows, pages = told.pop("rows"), told.pop("pages")
        pending, failed = told.pop("page_pending"), None
        if rows is not None:
            pages, pending, failed = rows[0] + rows[1], bool(rows[2]), bool(rows[3])
        processes = told.pop("processes")
        return validation_records.DeviceFacts(
            device,
            _text(told.pop("name") or name),
            uuid=_text(told.pop("uuid") or self._uuid),
            driver=_text(told.pop("driver")) or None,
            driver_sees=True,
            pages_retired=pages,
            rows_pending=pending,
            rows_failed=failed,
            xids=self._drain(),
            others=None if processes is None or processes < ours else processes - ours,
            **told,
        )

    def _drain(self) -> tuple[int, ...]:
        """All XIDs since the watch began."""
        nvml = self._nvml
        for _ in range(_MOST_EVENTS if self._events is not None else 0):
            event = self._ask(lambda: nvml.nvmlEventSetWait_v2(self._events, 0))  # none left is an error too: a timeout
            if event is None:
                break
            if event.eventType & nvml.nvmlEventTypeXidCriticalError:
                self._xids.append(int(event.eventData))
        return tuple(self._xids)

    def close(self) -> None:
        """Let go of the library."""
        if self._events is not None:
            self._ask(lambda: self._nvml.nvmlEventSetFree(self._events))
            self._events = None
        if self._card is not None:
            self._ask(self._nvml.nvmlShutdown)
            self._card = None

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) == _LOST and _OFF_THE_BUS not in self._xids:
                self._xids.append(_OFF_THE_BUS)
            return None


def _text(value: str | bytes | None) -> str:
    """Older libraries answer in bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _retired(nvml: Any, card: Any) -> int:
    causes = ("MULTIPLE_SINGLE_BIT_ECC_ERRORS", "DOUBLE_BIT_ECC_ERROR")
    return sum(
        len(nvml.nvmlDeviceGetRetiredPages(card, getattr(nvml, f"NVML_PAGE_RETIREMENT_CAUSE_{cause}")))
        for cause in causes
    )


def _errors(nvml: Any, card: Any, kind: str) -> int:
    kind = getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{kind}")
    return int(nvml.nvmlDeviceGetTotalEccErrors(card, kind, nvml.NVML_VOLATILE_ECC))


def _is_slice(nvml: Any, card: Any) -> bool | None:
    """Whether it is a part of a card: a slice, a card that is cut into slices, or a share that a hypervisor gave."""
    found: list[bool] = []
    for question in (
        lambda: bool(nvml.nvmlDeviceIsMigDeviceHandle(card)),
        lambda: nvml.nvmlDeviceGetMigMode(card)[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        lambda: nvml.nvmlDeviceGetVirtualizationMode(card) == _VIRTUAL,
    ):
        try:
            found.append(question())
        except nvml.NVMLError:
            continue  # what a card does not know it is not
    return any(found) if found else None


# {field of a description: how the driver is asked for it}. Watts are told as milliwatts.
_QUESTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "name": lambda nvml, card: nvml.nvmlDeviceGetName(card),
    "uuid": lambda nvml, card: nvml.nvmlDeviceGetUUID(card),
    "driver": lambda nvml, _: nvml.nvmlSystemGetDriverVersion(),
    "compute_capability": lambda nvml, card: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(card)),
    "memory_bytes": lambda nvml, card: int(nvml.nvmlDeviceGetMemoryInfo(card).total),
    "slice": _is_slice,
    "ecc": lambda nvml, card: nvml.nvmlDeviceGetEccMode(card)[0] == nvml.NVML_FEATURE_ENABLED,
    "ecc_corrected": lambda nvml, card: _errors(nvml, card, "CORRECTED"),
    "ecc_uncorrected": lambda nvml, card: _errors(nvml, card, "UNCORRECTED"),
    "rows": lambda nvml, card: nvml.nvmlDeviceGetRemappedRows(card),
    "pages": _retired,
    "page_pending": lambda nvml, card: nvml.nvmlDeviceGetRetiredPagesPendingStatus(card) == nvml.NVML_FEATURE_ENABLED,
    "persistence": lambda nvml, card: nvml.nvmlDeviceGetPersistenceMode(card) == nvml.NVML_FEATURE_ENABLED,
    "power_limit_watts": lambda nvml, card: nvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
    "power_default_watts": lambda nvml, card: nvml.nvmlDeviceGetPowerManagementDefaultLimit(card) / 1000,
    "pcie_generation": lambda nvml, card: nvml.nvmlDeviceGetCurrPcieLinkGeneration(card),
    "pcie_width": lambda nvml, card: nvml.nvmlDeviceGetCurrPcieLinkWidth(card),
    "pcie_generation_most": lambda nvml, card: nvml.nvmlDeviceGetMaxPcieLinkGeneration(card),
    "pcie_width_most": lambda nvml, card: nvml.nvmlDeviceGetMaxPcieLinkWidth(card),
    "processes": lambda nvml, card: len(nvml.nvmlDeviceGetComputeRunningProcesses(card)),
}
