"""Defines the evidence on a host, and the expected value of a reading: from earlier runs, its kind or a data sheet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.gpu import measured, specs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.core.result import Host
    from bench.core.validation_records import DeviceFacts, GpuLoadStats, Reading
    from bench.validate.rules import Rule

OWN, MEASURED, SHEET, UNCHECKED = "own", "measured", "sheet", "unchecked"
TOGETHER = "together"  # the phase with all devices at once; its readings have the same names as those of a device alone
POWER_CAP = "software power cap"
LINKS = "links"  # the phase that tests the links between devices
_SCALES = {"FLOP/s": [(1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")], "B/s": [(1e9, "GB/s"), (1e6, "MB/s")]}


@dataclass(frozen=True)
class Expected:
    """Hold the expected value of a reading in its unit, a text on the source of the value, and the confidence in it.

    `confidence`: OWN, MEASURED, SHEET or UNCHECKED. `warn_below`: the share of the value below which a device is too
    slow; None: the `warn_below` of the rule is used.
    """

    value: float
    source: str
    confidence: str
    warn_below: float | None = None


@dataclass(frozen=True)
class Evidence:
    """Hold all data for the verdict on a host and its devices.

    `cards`, `before`, `readings`, `watched` and `disturbed` are those of a `Validation`. `hosts`: {device: host load}.
    `cores`: the cores of the host. `cpu_quota`: the quota of the control group, in cores. `unusable`: {device: why
    torch cannot use it}. `own`: {(uuid, `reading_key` of a reading): the GPU's own best value in earlier validations}.
    """

    cards: tuple[DeviceFacts, ...]
    readings: tuple[Reading, ...]
    before: tuple[DeviceFacts, ...] = ()
    watched: Mapping[str, GpuLoadStats] = field(default_factory=dict)
    disturbed: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)
    cores: int | None = None
    cpu_quota: float | None = None
    unusable: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[tuple[str, str], Expected] = field(default_factory=dict)

    def rounds(self, device: str) -> dict[tuple[str, str], list[Reading]]:
        """Return {(phase, name of the measured quantity): its readings, oldest first} of a device.

        A quantity has more than one reading only after a soak.
        """
        rounds: dict[tuple[str, str], list[Reading]] = {}
        for reading in self.readings:
            if reading.device == device:
                rounds.setdefault((reading.probe, reading.name), []).append(reading)
        return rounds


def gpu_table_name(card: DeviceFacts) -> str | None:
    """Return the GPU's name in specs.toml; None if it is not there, or if the device is a slice of a GPU."""
    spec = None if card.slice else specs.find(card.name)
    return spec[0] if spec is not None else None


def reading_key(reading: Reading, cards: Sequence[DeviceFacts]) -> str:
    """Return a name under which a reading is compared with those of other runs.

    It is the reading's own name, except for links between GPUs. The numbers of GPUs change with CUDA_VISIBLE_DEVICES,
    so UUIDs replace them; an all-reduce over all GPUs gets all UUIDs. The number of copied bytes is added, since the
    rate depends on it.
    """
    if reading.probe != LINKS:
        return reading.name
    uuids = {card.device: card.uuid or card.device for card in cards}
    words = reading.name.split()
    all_uuids = [] if uuids.keys() & set(words) else sorted(uuids.values())
    size = f"{reading.figures.get('bytes', 0.0):.0f} bytes"
    return " ".join([*(uuids.get(word, word) for word in words), *all_uuids, size])


def expected(rule: Rule, card: DeviceFacts, reading: Reading, evidence: Evidence) -> Expected | None:
    """Return the value that a rule expects of a GPU's reading; None if there is no expected value.

    The first of these that exists is used: the GPU's own best value in earlier validations, the rates that were
    measured on GPUs of its kind, a share of its data sheet. But a GPU that was slow from the first validation on must
    not be its own reference. So if its own best value is below the warning limit of the second or third, that one is
    used. This does not apply if that one is unchecked, or if the GPU is in `capped_as_sold` of the rule.
    """
    if card.slice:
        return None
    key = reading_key(reading, evidence.cards)
    best = evidence.own.get((card.uuid, key)) if card.uuid is not None and OWN in rule.references else None
    table_value = _of_kind(rule, card, reading, evidence) or _of_table(rule, card, reading)
    if best is None or table_value is None:
        return best or table_value
    is_reliable = table_value.confidence != UNCHECKED and gpu_table_name(card) not in rule.capped_as_sold
    is_slow = best.value < (table_value.warn_below or rule.warn_below or 0) * table_value.value
    return table_value if is_reliable and is_slow else best


def _of_kind(rule: Rule, card: DeviceFacts, reading: Reading, evidence: Evidence) -> Expected | None:
    """Return the median of the rates that were measured on GPUs of this kind; None if there are none.

    A GPU that is sold with a power limit is not compared with them if that limit slowed it down.
    """
    if MEASURED not in rule.references or reading.unit != "FLOP/s":
        return None
    watched = evidence.watched.get(card.device)
    capped = watched.throttled.get(POWER_CAP, 0.0) if watched is not None else 0.0
    if gpu_table_name(card) in rule.capped_as_sold and capped >= (rule.sold_from or 1.0):
        return None
    figures = measured.find(card.name, reading.name.rpartition(" ")[2])
    if figures is None:
        return None
    rates = figures.rates
    span = f"{shown(rates[0], reading.unit)} to {shown(rates[-1], reading.unit)}" if len(rates) > 1 else "one figure"
    source = (
        f"the median of {len(rates)} measured on this kind of card ({span}; {figures.kind} in bench/gpu/measured.tsv)"
    )
    return Expected(figures.median, source, MEASURED, figures.limit / figures.median)


def _of_table(rule: Rule, card: DeviceFacts, reading: Reading) -> Expected | None:
    spec = specs.find(card.name)
    if spec is None:
        return None
    name, gpu = spec
    dtype = reading.name.rpartition(" ")[2]
    best = {str(key): figure for key, figure in gpu.measured.items()}.get(dtype)
    if MEASURED in rule.references and best is not None:
        source = next((text for text in gpu.sources if text.startswith(("mamf=", "measured:"))), gpu.sources[0])
        return Expected(best * 1e12, f"the best value measured on this model ({name}): {source}", MEASURED)
    if SHEET not in rule.references or rule.reach is None:
        return None
    is_copy = reading.unit == "B/s"
    bandwidth = gpu.bandwidth_gbs * 1e9 if gpu.bandwidth_gbs is not None else None
    figure = bandwidth if is_copy else gpu.flops(dtype)
    if figure is None:
        return None
    names = (name, f"{gpu.architecture} {dtype}", gpu.architecture)
    reach = next((rule.reach_of[key] for key in names if key in rule.reach_of), rule.reach)
    is_checked = ("bandwidth_gbs" if is_copy else dtype) not in gpu.unchecked
    doubt = "" if is_checked else ", which is not confirmed by a source"
    source = f"{reach:.0%} of the {shown(figure, reading.unit)} on the data sheet of the {name}{doubt}"
    return Expected(figure * reach, source, SHEET if is_checked else UNCHECKED)


def share_of(reading: Reading, value: float, reference: float) -> float:
    """Return the speed of a value relative to a reference, in the unit of the reading; above 1 if the value is better.

    In seconds, less is better.
    """
    return reference / value if reading.unit == "s" else value / reference


def shown(value: float, unit: str) -> str:
    """Return a value with its unit as text, such as "260.0 TFLOP/s"."""
    if unit == "s":
        return f"{value * 1000:.1f} ms"
    for scale, name in _SCALES.get(unit, []):
        if value >= scale:
            return f"{value / scale:.1f} {name}"
    return f"{value:.3g} {unit}".rstrip()
