"""Provides invented facts and readings of healthy GPUs and CPUs; a test changes the field that it tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.core.validation_records import DeviceFacts, GpuLoadStats, Reading, Validation
from bench.validate.expectations import Evidence, Expected
from tests.bench.conftest import a_run

if TYPE_CHECKING:
    from bench.core.result import Run

T = 1e12
GB = 1e9

# Drivers report these names. The rates below were not measured; they are typical of a healthy card.
A100 = DeviceFacts(
    device="cuda:0",
    name="NVIDIA A100-SXM4-80GB",
    uuid="GPU-a100",
    driver="570.86",
    driver_sees=True,
    compute_capability="8.0",
    slice=False,
    ecc=True,
    ecc_corrected=0,
    ecc_uncorrected=0,
    pages_retired=0,
    rows_pending=False,
    rows_failed=False,
    persistence=True,
    power_limit_watts=400.0,
    power_default_watts=400.0,
    pcie_generation=4,
    pcie_width=16,
    pcie_generation_most=4,
    pcie_width_most=16,
    others=0,
)
CPU = DeviceFacts("cpu", "A CPU")


def reading(probe: str, name: str, value: float | None, **changes: Any) -> Reading:
    """Return a reading of the first GPU, with the unit of its probe; `changes` replace fields."""
    units = {"copy": "B/s", "pinned": "B/s", "links": "B/s", "loop": "s"}
    unit = units.get(probe, "FLOP/s" if probe in {"product", "convolution", "sustained", "together"} else "")
    return replace(Reading(probe, name, "cuda:0", unit, value, (value,) if value is not None else ()), **changes)


def sustained(first: float, last: float, **changes: Any) -> Reading:
    """Return the reading of a sustained load whose rate goes from `first` to `last` FLOP/s."""
    figures = {"first_quarter": first, "last_quarter": last, "unequal": 0.0}
    return reading("sustained", "sustained bf16", (first + last) / 2, figures=figures, **changes)


READINGS = (
    reading("numerics", "matrix product bf16", 1.1e-3, limit=5e-3),
    reading("numerics", "convolution fp16", 2e-4, limit=1e-3),
    reading("product", "product bf16", 268 * T),
    reading("product", "product fp16", 270 * T),
    reading("product", "product fp32", 18.5 * T),
    reading("convolution", "convolution bf16", 180 * T),
    reading("copy", "copy", 1700 * GB),
    reading("pinned", "host to device", 25 * GB),
    reading("memory", "memory", 0.88, figures={"errors": 0.0, "patterns": 4.0}),
    sustained(255 * T, 252 * T),
    reading("loop", "loop ddpm-cat-256 fp16 batch 1", 0.020),
    reading("loop", "loop ddpm-cat-256 fp16 batch 4", 0.045),
)
CPU_READINGS = (
    reading("numerics", "matrix product fp32", 1e-7, limit=1e-5, device="cpu"),
    reading("product", "product fp32", 1.2e11, device="cpu"),
    reading("memory", "memory", 0.5, device="cpu"),
    reading("threads", "scaling", 0.95, device="cpu", figures={"1": 6.0e10, "2": 1.14e11}),
)
CALM = GpuLoadStats(throttled={}, reasons_told=True, others=0)
FINE = Evidence((A100,), READINGS, before=(A100,), watched={"cuda:0": CALM}, cores=16)
FINE_CPU = Evidence((CPU,), CPU_READINGS, before=(CPU,), cores=2)


def card(evidence: Evidence = FINE, **changes: Any) -> Evidence:
    """Return the evidence with changed facts of the GPU, before and after the examination; the readings stay."""
    changed = (replace(evidence.cards[0], **changes),)
    return replace(evidence, cards=changed, before=changed)


def watched(evidence: Evidence = FINE, **shares: float) -> Evidence:
    """Return the evidence with {throttle reason: share of the time}; an underscore in a name stands for a space."""
    throttled = {name.replace("_", " "): share for name, share in shares.items()}
    return replace(evidence, watched={"cuda:0": replace(CALM, throttled=throttled)})


def with_readings(evidence: Evidence, *changed: Reading) -> Evidence:
    """Return the evidence in which each of `changed` replaces the reading of the same name, or is added at the end."""
    names = {(item.probe, item.name): item for item in changed}
    unchanged = tuple(names.pop((item.probe, item.name), item) for item in evidence.readings)
    return replace(evidence, readings=(*unchanged, *names.values()))


OWN = {
    ("GPU-a100", name): Expected(value, "its own best, run 1", "own")
    for name, value in {
        "product bf16": 268 * T,
        "host to device": 25 * GB,
        "peer GPU-a100 to GPU-b 256000000 bytes": 24 * GB,
        "all-reduce of 2 GPU-a100 GPU-b 256000000 bytes": 180 * GB,
        "convolution bf16": 180 * T,
        "loop ddpm-cat-256 fp16 batch 1": 0.020,
        "loop ddpm-cat-256 fp16 batch 4": 0.045,
    }.items()
}
KNOWN = replace(FINE, own=OWN)
SLOW_BF16 = reading("product", "product bf16", 120 * T)
TWO = replace(
    FINE,
    cards=(A100, replace(A100, device="cuda:1", uuid="GPU-b")),
    readings=(*READINGS, *(replace(item, device="cuda:1") for item in READINGS)),
    watched={"cuda:0": CALM, "cuda:1": CALM},
)


def linked(name: str, value: float, size: float = 256e6, **changes: Any) -> Reading:
    """Return the reading of a link between GPUs: `value` in B/s, for transfers of `size` bytes."""
    return reading("links", name, value, figures={"bytes": size}, **changes)


def one_slow(value: float) -> Evidence:
    """Return the evidence of two GPUs, of which the second multiplies bf16 matrices at `value` FLOP/s."""
    slow = tuple(
        replace(item, value=value) if (item.device, item.name) == ("cuda:1", "product bf16") else item
        for item in TWO.readings
    )
    return replace(TWO, readings=slow)


def validated(day: int, *readings: Reading, card: DeviceFacts = A100, **changes: Any) -> Run:
    """Return the run of a validation on a day of January 2026, with torch 2.9.0; `changes` replace its fields."""
    validation = Validation((card,), (card,), readings or READINGS, (), software={"torch": "2.9.0"})
    return a_run(
        id=f"202601{day:02}T030405Z-validate-abcdef",
        started=f"2026-01-{day:02}T03:04:05+00:00",
        suite="validate",
        results=(),
        validation=replace(validation, **changes),
    )
