"""Applies the rules about a device's readings: faults, and speed against the expected value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.core.validation_records import CUT, PROCESS, UNABLE
from bench.core.verdict import Judgement, VerdictState
from bench.validate.expectations import OWN, POWER_CAP, TOGETHER, UNCHECKED, expected, gpu_table_name, share_of, shown
from bench.validate.rules import SETUP
from provision.core import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.core.validation_records import DeviceFacts, Reading
    from bench.validate.expectations import Evidence, Expected
    from bench.validate.rules import Rule

ONCE = "once"  # the mark of a reading that was wrong in one of two attempts


def judgement(name: str, rule: Rule, device: str, values: dict[str, Any], **changes: Any) -> Judgement:
    """Return the judgement of a rule on a device.

    Args:
        name: the name of the rule.
        rule: the rule, whose texts are filled in.
        device: the device.
        values: {name in the rule's texts: its value}.
        changes: further fields of the judgement; `state` replaces the state of the rule.
    """
    state = changes.pop("state", VerdictState(rule.state))
    values = values | {SETUP: layout.next_command("setup")}
    return Judgement(name, device, state, rule.says.format(**values), rule.advice.format(**values), **changes)


def is_wrong(reading: Reading) -> bool:
    """Return whether a reading shows a faulty device: it has a fault, or an error above its limit."""
    return reading.fault is not None or _is_over(reading)


def is_gap(reading: Reading) -> bool:
    """Return whether a reading has no value although the device could have given one."""
    is_empty = reading.value is None and reading.fault is None
    return is_empty and UNABLE not in reading.figures and reading.name != PROCESS


def missing(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on the readings that have no value in any round, one for each reason."""
    names_by_reason: dict[str, list[str]] = {}
    for rounds in evidence.rounds(card.device).values():
        if rule.is_about(rounds[0]) and all(is_gap(reading) for reading in rounds):
            names_by_reason.setdefault(rounds[-1].why_not or "no reason is known", []).append(rounds[0].name)
    for reason, names in names_by_reason.items():
        yield judgement(name, rule, card.device, {"names": ", ".join(names), "why": reason})


def _is_over(reading: Reading) -> bool:
    return reading.value is not None and reading.limit is not None and not reading.value <= reading.limit


def of_readings(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield the judgements of one rule on a device's readings, at most one for each name.

    The rule's kind is in KINDS.
    """
    for rounds in evidence.rounds(card.device).values():
        if rule.is_about(rounds[0]):
            item = _CHECKS[rule.kind](name, rule, evidence, card, rounds)
            if item is not None:
                yield item


def _fault(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on the first fault among the rounds of a reading; None without a fault."""
    faulty = next((reading for reading in rounds if reading.fault is not None), None)
    return None if faulty is None else judgement(name, rule, card.device, {"name": faulty.name, "fault": faulty.fault})


def _limit(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on the first error above its limit among the rounds of a reading; None if all are below."""
    wrong = next((reading for reading in rounds if _is_over(reading)), None)
    if wrong is None:
        return None
    values = {"name": wrong.name, "value": f"{wrong.value:.2g}", "limit": f"{wrong.limit:.2g}"}
    return judgement(name, rule, card.device, values, value=wrong.value, expected=wrong.limit)


def _once(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on a reading that was wrong in one of two attempts; None for any other."""
    if not any(ONCE in reading.figures for reading in rounds):
        return None
    return judgement(name, rule, card.device, {"name": rounds[0].name})


def _ended(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on a process of the examination that ended early; None if it did not."""
    reasons = [reading.why_not for reading in rounds if reading.name == PROCESS and reading.why_not is not None]
    return judgement(name, rule, card.device, {"why": reasons[0].partition("\n")[0]}) if reasons else None


def _untested(name: str, rule: Rule, _: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on a memory test that covered less than the rule requires, with fewer patterns or less memory.

    None if a round covered enough, or none has a value.
    """
    measured = [reading for reading in rounds if reading.value is not None]
    if not measured or any(_is_tested_enough(rule, reading) for reading in measured):
        return None
    last = measured[-1]
    patterns = last.figures.get("patterns", rule.fewest)
    values = {"name": last.name, "share": last.value, "patterns": patterns, "fewest": rule.fewest}
    return judgement(name, rule, card.device, values, value=last.value, expected=rule.below)


def _is_tested_enough(rule: Rule, reading: Reading) -> bool:
    """Return whether a memory test covered as much of the memory, with as many patterns, as the rule requires.

    For a test without a value this is true; another rule reports it.
    """
    share, patterns = reading.value, reading.figures.get("patterns")
    is_short = share is not None and rule.below is not None and share < rule.below
    return not is_short and (patterns is None or rule.fewest is None or patterns >= rule.fewest)


def _best(rounds: Sequence[Reading]) -> Reading | None:
    """Return the best reading of the rounds; None if none has a value."""
    measured = [reading for reading in rounds if reading.value]
    return max(measured, key=lambda reading: share_of(reading, reading.value or 1.0, 1.0), default=None)


def _without_lower_bounds(rounds: Sequence[Reading]) -> list[Reading]:
    """Return the readings without the mark CUT: a low value that is only a lower bound is no evidence of a fault."""
    return [reading for reading in rounds if CUT not in reading.figures]


def _rate(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on the best value of the rounds against the expected value, "pass" if it is high enough.

    None if there is no value or no expected value.
    """
    best = _best(rounds)
    target = expected(rule, card, best, evidence) if best is not None else None
    if best is None or best.value is None or target is None:
        return None
    share = share_of(best, best.value, target.value)
    state, why = VerdictState.PASS, ""
    own_below = rule.own_below if target.confidence == OWN else None
    limit = target.warn_below or own_below or rule.warn_below
    if limit is not None and share < limit:
        doubt = _doubt(evidence, card, rounds)
        state, why = (VerdictState.NOT_JUDGED, doubt) if doubt else _shortfall(rule, evidence, card, share, target)
    values = {
        "name": best.name,
        "value": shown(best.value, best.unit),
        "expected": shown(target.value, best.unit),
        "share": share,
        "source": target.source,
        "why": why and f"; {why}",
    }
    figures = {"value": best.value, "expected": target.value, "unit": best.unit}
    origin = {"source": target.source, "confidence": target.confidence}
    return judgement(name, rule, card.device, values, state=state, **figures, **origin)


def _doubt(evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> str | None:
    """Return the reason for which a low value is no evidence against the device; None if it is evidence."""
    if all(CUT in reading.figures for reading in rounds if reading.value):
        return "its largest shapes had no time or no memory, so this value is a lower bound"
    watched = evidence.watched.get(card.device)
    if not card.driver_sees or watched is None:
        return "its clocks cannot be read, so a power cap may be the cause"
    if not watched.reasons_told:
        return "its driver does not report throttle reasons, so a power cap may be the cause"
    return "other work disturbed it" if card.device in evidence.disturbed else None


def _shortfall(
    rule: Rule, evidence: Evidence, card: DeviceFacts, share: float, target: Expected
) -> tuple[VerdictState, str]:
    """Return the state of the judgement on a low value, and the reason for this state.

    `share`: the value over the expected value.
    """
    device = card.device
    caps = _excusing_reasons(rule, evidence, device)
    reason = ", ".join(f"{name} {part:.0%} of the time" for name, part in caps.items())
    if _is_capped_as_sold(rule, evidence, card, share):
        return VerdictState.PASS, f"{reason}, which is the limit that this card is sold with"
    if rule.fail_below is None or share >= rule.fail_below:
        return VerdictState.WARN, reason
    if not reason and (card.others or evidence.watched[device].others):
        reason = "another process uses the card"
    if not reason and target.confidence == UNCHECKED:
        reason = "the expected figure is not confirmed by a source, so it cannot fail a card"
    if reason:
        return VerdictState.WARN, reason
    return VerdictState.FAIL, "neither a power cap nor heat explains it"


def _excusing_reasons(rule: Rule, evidence: Evidence, device: str) -> dict[str, float]:
    """Return {throttle reason: its share of the time under load} of those that excuse a low value by this rule."""
    watched = evidence.watched.get(device)
    if watched is None or rule.capped_above is None:
        return {}
    shares = {reason: watched.throttled.get(reason, 0.0) for reason in rule.capped_by}
    return {reason: share for reason, share in shares.items() if share >= rule.capped_above}


def _is_capped_as_sold(rule: Rule, evidence: Evidence, card: DeviceFacts, share: float) -> bool:
    """Return whether a low value is normal for a GPU that is sold with a power limit.

    That is so if the power limit was active most of the time, and the value is high enough for such a GPU.
    """
    capped = _excusing_reasons(rule, evidence, card.device).get(POWER_CAP, 0.0)
    return (
        gpu_table_name(card) in rule.capped_as_sold
        and capped >= (rule.sold_from or 1.0)
        and share >= (rule.sold_below or 1.0)
    )


def _fade(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement if the last quarter of the sustained load is slower than the first by more than allowed.

    Otherwise None. The rule has the limit.
    """
    last = rounds[-1]
    first_quarter, last_quarter = last.figures.get("first_quarter"), last.figures.get("last_quarter")
    if not first_quarter or last_quarter is None:
        return None
    is_capped = _is_capped_as_sold(rule, evidence, card, last_quarter / first_quarter)
    return (
        None
        if is_capped or card.device in evidence.disturbed
        else _judge_share(name, rule, card, last, (last_quarter, first_quarter))
    )


def _drift(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement if the last round of a soak is slower than the best one by more than the rule allows.

    Otherwise None.
    """
    # In a soak all devices work at the same time, so their values are not compared with those of a device alone.
    comparable = [reading for reading in rounds if reading.round or len(evidence.cards) == 1]
    best, last = _best(comparable), rounds[-1]
    if best is None or best.value is None or not last.value or CUT in last.figures:
        return None
    if (
        _is_capped_as_sold(rule, evidence, card, share_of(last, last.value, best.value))
        or card.device in evidence.disturbed
    ):
        return None
    return _judge_share(name, rule, card, last, (last.value, best.value))


def _least(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on a share (such as the scaling over threads) below the limit of the rule; otherwise None."""
    best = _best(rounds)
    if best is None or best.value is None or card.device in evidence.disturbed:
        return None
    return _judge_share(name, rule, card, best, (best.value, 1.0))


def _crowd(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, rounds: Sequence[Reading]) -> Judgement | None:
    """Return a judgement on a device that is too slow while all devices work; otherwise None.

    Its value is compared with its best value of the same quantity, alone or not.
    """
    together = _best(_without_lower_bounds(rounds))
    if together is None or not together.value or card.device in evidence.disturbed:
        return None
    key = (card.device, together.name, together.unit)
    same = [reading for reading in evidence.readings if (reading.device, reading.name, reading.unit) == key]
    best = _best(same) or together
    return _judge_share(name, rule, card, together, (together.value, best.value or 0.0))


def _judge_share(
    name: str, rule: Rule, card: DeviceFacts, reading: Reading, pair: tuple[float, float]
) -> Judgement | None:
    """Return a judgement if the first value of `pair` over the second is below the limit of the rule.

    Otherwise None.
    """
    value, target = pair
    share = share_of(reading, value, target)
    if rule.below is None or share >= rule.below:
        return None
    texts = {"value": shown(value, reading.unit), "expected": shown(target, reading.unit)}
    values = {"name": reading.name, "share": share, **texts}
    return judgement(name, rule, card.device, values, value=value, expected=target, unit=reading.unit)


def slowest(name: str, rule: Rule, evidence: Evidence) -> Iterator[Judgement]:
    """Yield, for each GPU model of which the host has several, a judgement on the slowest GPU.

    It is "pass" if that GPU is about as fast as the fastest one.
    """
    kinds: dict[str, list[DeviceFacts]] = {}
    for card in evidence.cards:
        kinds.setdefault(card.name, []).append(card)
    for cards in kinds.values():
        shares = list(_shares_of_fastest(rule, evidence, cards)) if len(cards) > 1 else []
        if not shares:
            continue
        share, device, reading, fastest = min(shares, key=lambda entry: entry[0])
        value = reading.value or 0.0
        texts = {"value": shown(value, reading.unit), "expected": shown(fastest, reading.unit)}
        title = f"{reading.name}, all at once" if reading.probe == TOGETHER else reading.name
        values = {"name": title, "count": len(cards), "share": share, **texts}
        state = VerdictState.WARN if rule.below is not None and share < rule.below else VerdictState.PASS
        yield judgement(name, rule, device, values, state=state, value=value, expected=fastest, unit=reading.unit)


def _shares_of_fastest(
    rule: Rule, evidence: Evidence, cards: Sequence[DeviceFacts]
) -> Iterator[tuple[float, str, Reading, float]]:
    """Yield (share of the fastest, device, its reading, the fastest value) of each reading that all these GPUs have."""
    rounds_by_card = [evidence.rounds(card.device) for card in cards]
    for key in sorted(set.intersection(*map(set, rounds_by_card))):
        candidates = [_best(_without_lower_bounds(readings[key])) for readings in rounds_by_card]
        if not rule.is_about(rounds_by_card[0][key][0]) or None in candidates:
            continue
        best = _best([reading for reading in candidates if reading is not None])
        for reading in candidates:
            if best is not None and best.value and reading is not None and reading.value:
                yield share_of(reading, reading.value, best.value), reading.device, reading, best.value


_CHECKS: dict[str, Callable[[str, Rule, Evidence, DeviceFacts, Sequence[Reading]], Judgement | None]] = {
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
KINDS = frozenset(_CHECKS)
