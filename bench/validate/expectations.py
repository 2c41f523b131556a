"""What a device is judged by, and what is expected of it: its own past, what was measured on its kind, its sheet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.gpu import specs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.core.result import Host
    from bench.core.validation_records import DeviceFacts, GpuLoadStats, Reading
    from bench.validate.rules import Rule

OWN, MEASURED, SHEET, UNCHECKED = "own", "measured", "sheet", "unchecked"
TOGETHER = "together"  # the phase in which all devices of a host are asked at once, by the names of what each did alone
LINKS = "links"  # the phase in which devices talk to each other
_SCALES = {"FLOP/s": [(1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")], "B/s": [(1e9, "GB/s"), (1e6, "MB/s")]}


@dataclass(frozen=True)
class Expected:
    """What a reading is held against, in its unit; whose figure that is, and how far that can be believed."""

    value: float
    source: str
    confidence: str


@dataclass(frozen=True)
class Evidence:
    """All that is known of a host and its devices when it is judged.

    `cards`, `before`, `readings`, `watched` and `disturbed` are those of a `Validation`. `hosts`: {device:
    what else the host did}. `cores` that are to be seen, `cpu_quota` that the control group grants. `unusable`:
    {device: why torch cannot use it}. `own`: {(uuid, what `known_as` calls a reading): the best of the runs that are
    kept}.
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
        """{(phase, name): its readings, in their order} of a device; several where it was validated in rounds."""
        found: dict[tuple[str, str], list[Reading]] = {}
        for reading in self.readings:
            if reading.device == device:
                found.setdefault((reading.probe, reading.name), []).append(reading)
        return found


def row(card: DeviceFacts) -> str | None:
    """A card's name in the table of cards; None where it is not there, or a part of one."""
    found = None if card.slice else specs.find(card.name)
    return found[0] if found is not None else None


def known_as(reading: Reading, cards: Sequence[DeviceFacts]) -> str:
    """What a reading is called in every run in which the same was asked.

    Its name, but for what lies between cards: numbers of cards are of one run (CUDA_VISIBLE_DEVICES deals them out
    anew), so their uuids stand for them; a sum is of all the cards of a run; and other sizes have other speeds.
    """
    if reading.probe != LINKS:
        return reading.name
    uuids = {card.device: card.uuid or card.device for card in cards}
    words = reading.name.split()
    among = [] if uuids.keys() & set(words) else sorted(uuids.values())
    size = f"{reading.figures.get('bytes', 0.0):.0f} bytes"
    return " ".join([*(uuids.get(word, word) for word in words), *among, size])


def expected(rule: Rule, card: DeviceFacts, reading: Reading, evidence: Evidence) -> Expected | None:
    """What a reading of a card should be by a rule; None where nothing tells.

    The card's own best comes first, since it is of this card, host and software. But one that was slow from its first
    day must not become its own measure: where its best lies under the table's line, the table stays, unless its figure
    is unchecked or the card is sold at a power limit that keeps it from it.
    """
    if card.slice:
        return None
    asked = known_as(reading, evidence.cards)
    best = evidence.own.get((card.uuid, asked)) if card.uuid is not None and OWN in rule.references else None
    known = _of_table(rule, card, reading)
    if best is None or known is None:
        return best or known
    is_line = known.confidence != UNCHECKED and row(card) not in rule.capped_as_sold
    is_slow = best.value < (rule.warn_below or 0) * known.value
    return known if is_line and is_slow else best


def _of_table(rule: Rule, card: DeviceFacts, reading: Reading) -> Expected | None:
    found = specs.find(card.name)
    if found is None:
        return None
    name, gpu = found
    dtype = reading.name.rpartition(" ")[2]
    best = {str(key): figure for key, figure in gpu.measured.items()}.get(dtype)
    if MEASURED in rule.references and best is not None:
        of = next((text for text in gpu.sources if text.startswith(("mamf=", "measured:"))), gpu.sources[0])
        return Expected(best * 1e12, f"the best that was measured on one ({name}): {of}", MEASURED)
    if SHEET not in rule.references or rule.reach is None:
        return None
    is_copy = reading.unit == "B/s"
    bandwidth = gpu.bandwidth_gbs * 1e9 if gpu.bandwidth_gbs is not None else None
    figure = bandwidth if is_copy else gpu.flops(dtype)
    if figure is None:
        return None
    reach = rule.reach_of.get(name, rule.reach)
    is_checked = ("bandwidth_gbs" if is_copy else dtype) not in gpu.unchecked
    doubt = "" if is_checked else ", which no source confirms"
    source = f"{reach:.0%} of the {shown(figure, reading.unit)} on the sheet of the {name}{doubt}"
    return Expected(figure * reach, source, SHEET if is_checked else UNCHECKED)


def share_of(reading: Reading, value: float, of: float) -> float:
    """How good a figure is beside another: above one where it is better. Of seconds, fewer are."""
    return of / value if reading.unit == "s" else value / of


def shown(value: float, unit: str) -> str:
    """A figure with its unit, for people."""
    if unit == "s":
        return f"{value * 1000:.1f} ms"
    for scale, name in _SCALES.get(unit, []):
        if value >= scale:
            return f"{value / scale:.1f} {name}"
    return f"{value:.3g} {unit}".rstrip()
