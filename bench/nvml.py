"""What an NVIDIA card says of itself through its driver's library; every answer may be missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Bits of nvmlClocksEventReasons (source: nvml.h). A card that is idle, or at a clock that somebody has set, is well.
REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
# Those that say that the card, or its cooling or supply, is not well.
UNWELL = {"hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "hardware power brake"}


@dataclass(frozen=True)
class Reading:
    """One look at a card: MHz, degrees Celsius, watts, joules since the driver came, bytes, {process: its bytes}."""

    clock_mhz: float | None = None
    temperature: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    used_bytes: int | None = None
    reasons: frozenset[str] = frozenset()
    processes: dict[int, int | None] | None = None


class Card:
    """One card by its UUID. Where there is no library, no such card, or no permission, it says nothing."""

    def __init__(self, uuid: str | None) -> None:
        """Open it."""
        self._card: Any = None
        self.power_limit_watts: float | None = None
        if uuid is None:
            return
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._card = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except pynvml.NVMLError:
            return
        limit = self._ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self._card))
        self.power_limit_watts = limit / 1000 if limit is not None else None

    def read(self) -> Reading | None:
        """Look once; a few milliseconds."""
        if self._card is None:
            return None
        nvml, card = self._nvml, self._card
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(card))
        energy = self._ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card))
        bits = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)) or 0
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(card))
        processes = self._ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(card))
        return Reading(
            clock_mhz=self._ask(lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM)),
            temperature=self._ask(lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)),
            power_watts=power / 1000 if power is not None else None,
            energy_joules=energy / 1000 if energy is not None else None,
            used_bytes=int(memory.used) if memory is not None else None,
            reasons=frozenset(name for bit, name in REASONS.items() if bits & bit),
            processes=None if processes is None else {row.pid: row.usedGpuMemory for row in processes},
        )

    def close(self) -> None:
        """Let go of the library."""
        if self._card is not None:
            self._ask(self._nvml.nvmlShutdown)
            self._card = None

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nvml.NVMLError:
            return None
