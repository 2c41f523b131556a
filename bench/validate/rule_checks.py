"""What the rules make of a device's readings: faults, and speed against what is expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.core.validation_records import CUT, PROCESS, UNABLE, Judgement, VerdictState
from bench.validate.expectations import TOGETHER, UNCHECKED, expected, row, share_of, shown
from bench.validate.rules import SETUP
from provision.core import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.core.validation_records import DeviceFacts, Reading
    from bench.validate.expectations import Evidence, Expected
    from bench.validate.rules import Rule

ONCE = "once"  # the figure of a reading that was wrong one time of two
_POWER = "software power cap"


def judgement(name: str, rule: Rule, device: str, told: dict[str, Any], **changes: Any) -> Judgement:
    """A rule that holds, with its texts filled in; `changes` are fields of the judgement."""
    state = changes.pop("state", VerdictState(rule.state))
    filled = told | {SETUP: layout.next_command("setup")}
    return Judgement(name, device, state, rule.says.format(**filled), rule.advice.format(**filled), **changes)


def is_wrong(reading: Reading) -> bool:
    """Whether a reading speaks against its device by itself: a fault, or an error over its limit."""
    return reading.fault is not None or _is_over(reading)


def is_gap(reading: Reading) -> bool:
    """Whether a question has no answer that its device could have given."""
    is_silent = reading.value is None and reading.fault is None
    return is_silent and UNABLE not in reading.figures and reading.name != PROCESS


def missing(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """What a device was asked for and has not answered in any round, those with the same reason in one judgement."""
    found: dict[str, list[str]] = {}
    for rounds in evidence.rounds(card.device).values():
        if rule.is_about(rounds[0]) and all(is_gap(reading) for reading in rounds):
            found.setdefault(rounds[-1].why_not or "it says nothing", []).append(rounds[0].name)
    for why, names in found.items():
        yield judgement(name, rule, card.device, {"names": ", ".join(names), "why": why})


def _is_over(reading: Reading) -> bool:
    return reading.value is not None and reading.limit is not None and not reading.value <= reading.limit


def of_readings(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """What a rule about readings says of a device, of each name once."""
    for rounds in evidence.rounds(card.device).values():
        if rule.is_about(rounds[0]):
            found = _KINDS[rule.kind](name, rule, evidence, card, rounds)
            if found is not None:
                yield found


def _fault(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    found = next((reading for reading in rounds if reading.fault is not None), None)
    return None if found is None else judgement(name, rule, card.device, {"name": found.name, "fault": found.fault})


def _limit(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    found = next((reading for reading in rounds if _is_over(reading)), None)
    if found is None:
        return None
    told = {"name": found.name, "value": f"{found.value:.2g}", "limit": f"{found.limit:.2g}"}
    return judgement(name, rule, card.device, told, value=found.value, expected=found.limit)


def _once(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    if not any(ONCE in reading.figures for reading in rounds):
        return None
    return judgement(name, rule, card.device, {"name": rounds[0].name})


def _ended(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    told = [reading.why_not for reading in rounds if reading.name == PROCESS and reading.why_not is not None]
    return judgement(name, rule, card.device, {"why": told[0].partition("\n")[0]}) if told else None


def _untested(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    asked = [reading for reading in rounds if reading.value is not None]
    if not asked or any(_is_tested(rule, reading) for reading in asked):
        return None
    last = asked[-1]
    patterns = last.figures.get("patterns", rule.fewest)
    told = {"name": last.name, "share": last.value, "patterns": patterns, "fewest": rule.fewest}
    return judgement(name, rule, card.device, told, value=last.value, expected=rule.below)


def _is_tested(rule: Rule, reading: Reading) -> bool:
    """Whether a test of memory went over as much as a rule asks for; one without any answer is a gap, and none."""
    share, patterns = reading.value, reading.figures.get("patterns")
    is_short = share is not None and rule.below is not None and share < rule.below
    return not is_short and (patterns is None or rule.fewest is None or patterns >= rule.fewest)


def _best(rounds: Sequence[Reading]) -> Reading | None:
    """The best of the rounds that have a figure."""
    measured = [reading for reading in rounds if reading.value]
    return max(measured, key=lambda each: share_of(each, each.value or 1.0, 1.0), default=None)


def _whole(rounds: Sequence[Reading]) -> list[Reading]:
    """Those whose figure is no lower bound: where it is low, that says something."""
    return [reading for reading in rounds if CUT not in reading.figures]


def _rate(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    best = _best(rounds)
    wanted = expected(rule, card, best, evidence) if best is not None else None
    if best is None or best.value is None or wanted is None:
        return None
    share = share_of(best, best.value, wanted.value)
    state, why = VerdictState.PASS, ""
    if rule.warn_below is not None and share < rule.warn_below:
        doubt = _doubt(evidence, card, rounds)
        state, why = (VerdictState.NOT_JUDGED, doubt) if doubt else _shortfall(rule, evidence, card, share, wanted)
    told = {
        "name": best.name,
        "value": shown(best.value, best.unit),
        "expected": shown(wanted.value, best.unit),
        "share": share,
        "source": wanted.source,
        "why": why and f"; {why}",
    }
    figures = {"value": best.value, "expected": wanted.value, "unit": best.unit}
    whose = {"source": wanted.source, "confidence": wanted.confidence}
    return judgement(name, rule, card.device, told, state=state, **figures, **whose)


def _doubt(evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> str | None:
    """Why a low figure says nothing of its device; None where it does."""
    if all(CUT in reading.figures for reading in rounds if reading.value):
        return "its largest shapes had no time or no room, so this is the least that it can do"
    seen = evidence.watched.get(card.device)
    if not card.driver_sees or seen is None:
        return "its clocks cannot be read, so this may be a cap"
    if not seen.reasons_told:
        return "its driver does not say what keeps its clocks down, so this may be a cap"
    return "it was not alone" if card.device in evidence.disturbed else None


def _shortfall(
    rule: Rule, evidence: Evidence, card: DeviceFacts, share: float, wanted: Expected
) -> tuple[VerdictState, str]:
    """How bad a low figure is, and why no worse."""
    device = card.device
    caps = _caps(rule, evidence, device)
    why = ", ".join(f"{reason} {part:.0%} of the time" for reason, part in caps.items())
    if _is_sold(rule, evidence, card, share):
        return VerdictState.PASS, f"{why}, as such a card is sold"
    if rule.fail_below is None or share >= rule.fail_below:
        return VerdictState.WARN, why
    if not why and (card.others or evidence.watched[device].others):
        why = "another process is on the card"
    if not why and wanted.confidence == UNCHECKED:
        why = "a figure that no source confirms fails no card"
    if why:
        return VerdictState.WARN, why
    return VerdictState.FAIL, "neither its power nor its heat explains it"


def _caps(rule: Rule, evidence: Evidence, device: str) -> dict[str, float]:
    """{throttle reason that excuses a low figure: its share of the time under load}."""
    seen = evidence.watched.get(device)
    if seen is None or rule.capped_above is None:
        return {}
    shares = {reason: seen.throttled.get(reason, 0.0) for reason in rule.capped_by}
    return {reason: share for reason, share in shares.items() if share >= rule.capped_above}


def _is_sold(rule: Rule, evidence: Evidence, card: DeviceFacts, share: float) -> bool:
    """Whether a low figure is no more than what such a card is sold as: under its power cap most of the time."""
    capped = _caps(rule, evidence, card.device).get(_POWER, 0.0)
    return row(card) in rule.capped_as_sold and capped >= (rule.sold_from or 1.0) and share >= (rule.sold_below or 1.0)


def _fade(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    last = rounds[-1]
    first, end = last.figures.get("first_quarter"), last.figures.get("last_quarter")
    if not first or end is None:
        return None
    is_sold = _is_sold(rule, evidence, card, end / first)
    return None if is_sold or card.device in evidence.disturbed else _of(name, rule, card, last, (end, first))


def _drift(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    # In a soak all devices work at once: what each reached alone before is no measure of that.
    alike = [each for each in rounds if each.round or len(evidence.cards) == 1]
    best, last = _best(alike), rounds[-1]
    if best is None or best.value is None or not last.value or CUT in last.figures:
        return None
    if _is_sold(rule, evidence, card, share_of(last, last.value, best.value)) or card.device in evidence.disturbed:
        return None
    return _of(name, rule, card, last, (last.value, best.value))


def _least(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    best = _best(rounds)
    if best is None or best.value is None or card.device in evidence.disturbed:
        return None
    return _of(name, rule, card, best, (best.value, 1.0))


def _crowd(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """What a device reaches while the others work too, against the best that it reached at all."""
    together = _best(_whole(rounds))
    if together is None or not together.value or card.device in evidence.disturbed:
        return None
    asked = (card.device, together.name, together.unit)
    every = [each for each in evidence.readings if (each.device, each.name, each.unit) == asked]
    best = _best(every) or together
    return _of(name, rule, card, together, (together.value, best.value or 0.0))


def _of(name: str, rule: Rule, card: DeviceFacts, reading: Reading, pair: tuple[float, float]) -> Judgement | None:
    """A judgement where the first of two figures of a reading is too small a share of the second."""
    value, wanted = pair
    share = share_of(reading, value, wanted)
    if rule.below is None or share >= rule.below:
        return None
    texts = {"value": shown(value, reading.unit), "expected": shown(wanted, reading.unit)}
    told = {"name": reading.name, "share": share, **texts}
    return judgement(name, rule, card.device, told, value=value, expected=wanted, unit=reading.unit)


def slowest(name: str, rule: Rule, evidence: Evidence) -> Iterator[Judgement]:
    """The slowest of the cards of each kind, where a host has several; it passes where it is as the others are."""
    kinds: dict[str, list[DeviceFacts]] = {}
    for card in evidence.cards:
        kinds.setdefault(card.name, []).append(card)
    for cards in kinds.values():
        shares = list(_beside(rule, evidence, cards)) if len(cards) > 1 else []
        if not shares:
            continue
        share, device, reading, fastest = min(shares, key=lambda each: each[0])
        value = reading.value or 0.0
        texts = {"value": shown(value, reading.unit), "expected": shown(fastest, reading.unit)}
        asked = f"{reading.name}, all at once" if reading.probe == TOGETHER else reading.name
        told = {"name": asked, "count": len(cards), "share": share, **texts}
        state = VerdictState.WARN if rule.below is not None and share < rule.below else VerdictState.PASS
        yield judgement(name, rule, device, told, state=state, value=value, expected=fastest, unit=reading.unit)


def _beside(
    rule: Rule, evidence: Evidence, cards: Sequence[DeviceFacts]
) -> Iterator[tuple[float, str, Reading, float]]:
    """(share of the fastest, device, its reading, the fastest's figure) of each reading that all the cards have."""
    found = [evidence.rounds(card.device) for card in cards]
    for asked in sorted(set.intersection(*map(set, found))):
        each = [_best(_whole(readings[asked])) for readings in found]
        if not rule.is_about(found[0][asked][0]) or None in each:
            continue
        best = _best([reading for reading in each if reading is not None])
        for reading in each:
            if best is not None and best.value and reading is not None and reading.value:
                yield share_of(reading, reading.value, best.value), reading.device, reading, best.value


_KINDS: dict[str, Callable[[str, Rule, Evidence, DeviceFacts, Sequence[Reading]], Judgement | None]] = {
    "fault": _fault,
    "limit": _limit,
    "once": _once,
    "ended": _ended,
    "untested": _untested,
    "rate": _rate,
    "fade": _fade,
    "drift": _drift,
    "least": _least,
    "crowd": _crowd,
}
OF_READINGS = frozenset(_KINDS)
