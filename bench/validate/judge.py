"""The verdict on a host's devices: each rule of verdict.toml held against what is known, and all of them summed up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.core.validation_records import CUT, Judgement, VerdictState
from bench.validate import rules
from bench.validate.expectations import row, share_of
from bench.validate.rule_checks import OF_READINGS, ONCE, is_gap, is_wrong, judgement, missing, of_readings, slowest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.core.validation_records import DeviceFacts, Reading
    from bench.validate.expectations import Evidence
    from bench.validate.rules import Rule


def judge(evidence: Evidence) -> tuple[Judgement, ...]:
    """What the rules say of a host, device by device; a figure that is as expected is said too, and passes.

    A rule says nothing where what it is about was not asked or not told: what could not be judged has its own rules.
    """
    found = [each for card in evidence.cards for each in _of_card(evidence, card)]
    for name, rule in rules.table().items():
        if rule.kind == "unusable":
            found += [judgement(name, rule, device, {"why": why}) for device, why in evidence.unusable.items()]
        elif rule.kind == "slowest":
            found += slowest(name, rule, evidence)
        elif rule.kind == "quota":
            found += _quota(name, rule, evidence)
    return tuple(found)


def doubtful(judgements: Sequence[Judgement], readings: Sequence[Reading]) -> tuple[str, ...]:
    """The phases of a device to be asked again before what was found there counts, in the order of the readings."""
    bad = {(each.rule, each.device) for each in judgements if each.state is not VerdictState.PASS}
    table = rules.table()
    found: dict[str, None] = {}
    for reading in readings:
        for name, rule in table.items():
            if rule.again and (name, reading.device) in bad and _is_about(rule, reading):
                found[reading.probe] = None
    return tuple(found)


def merged(first: Sequence[Reading], again: Sequence[Reading]) -> tuple[Reading, ...]:
    """All readings, each question once, where some were asked for again: what counts of them, in the first order."""
    found = {_question(reading): reading for reading in first}
    for reading in again:
        before = found.get(_question(reading))
        found[_question(reading)] = settled(before, reading) if before is not None else reading
    return tuple(found.values())


def settled(first: Reading, again: Reading) -> Reading:
    """What counts of a reading that was asked for twice.

    A fault that is there both times is one, and so is one that no other answer speaks against; a fault that is there
    once leaves the good reading, with a mark that a rule warns of. Of two figures the better counts: what disturbs a
    measurement makes it slow, never fast.
    """
    if is_wrong(first) or is_wrong(again):
        return _of_a_fault(first, again)
    if not again.value or not first.value:
        return again if again.value else first
    return again if first.limit is not None else _better(first, again)


def _of_a_fault(first: Reading, again: Reading) -> Reading:
    if is_wrong(first) and is_wrong(again):
        return again
    good, wrong = (again, first) if is_wrong(first) else (first, again)
    return wrong if good.value is None else replace(good, figures=good.figures | {ONCE: 1.0})


def _better(first: Reading, again: Reading) -> Reading:
    if "first_quarter" in first.figures and "first_quarter" in again.figures:  # what it kept, not how fast it began
        return max(again, first, key=lambda each: each.figures["last_quarter"] / (each.figures["first_quarter"] or 1.0))
    if "patterns" in first.figures and "patterns" in again.figures:  # the test that went over more
        return max(again, first, key=lambda each: (each.value or 0.0) * each.figures["patterns"])
    better = again if share_of(first, again.value or 1.0, first.value or 1.0) >= 1 else first
    if CUT in first.figures and CUT in again.figures:
        return better
    # One of the two was asked everything: the better one is no lower bound any more.
    return replace(better, figures={name: figure for name, figure in better.figures.items() if name != CUT})


def _question(reading: Reading) -> tuple[str, str, str, int]:
    return reading.device, reading.probe, reading.name, reading.round


def _is_about(rule: Rule, reading: Reading) -> bool:
    if rule.kind in {"fault", "limit"}:
        return is_wrong(reading)
    return rule.is_about(reading) and (rule.kind != "missing" or is_gap(reading))


def _of_card(evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    found: list[Judgement] = []
    for name, rule in rules.table().items():
        if rule.kind in OF_READINGS:
            found += of_readings(name, rule, evidence, card)
        elif rule.kind == "unmeasured":
            found += _unmeasured(name, rule, evidence, card, found)
        elif rule.kind in _KINDS:
            found += _KINDS[rule.kind](name, rule, evidence, card)
    yield from found


def _present(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    count = getattr(card, rule.field or "")
    if count:
        yield judgement(name, rule, card.device, {"count": float(count)}, value=float(count), expected=0.0)


def _growth(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    first = next((each for each in evidence.before if each.device == card.device), None)
    counts = [getattr(each, rule.field or "") for each in (first, card) if each is not None]
    if len(counts) == 2 and None not in counts and counts[1] > counts[0]:
        grown = float(counts[1] - counts[0])
        yield judgement(name, rule, card.device, {"count": grown}, value=grown, expected=0.0)


def _off(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if getattr(card, rule.field or "") is False:
        yield judgement(name, rule, card.device, {})


def _xids(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    found = sorted({xid for xid in card.xids if (xid in rule.xids) is rule.listed})
    if found:
        yield judgement(name, rule, card.device, {"xids": ", ".join(map(str, found))})


def _under(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    value, most = (getattr(card, field or "") for field in (rule.field, rule.most))
    if value is not None and most is not None and value < (rule.below or 0) * most:
        told = {"value": float(value), "expected": float(most)}
        yield judgement(name, rule, card.device, dict(told), **told)


def _throttled(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    seen = evidence.watched.get(card.device)
    shares = {reason: seen.throttled.get(reason, 0.0) for reason in rule.reasons} if seen is not None else {}
    worst = max(shares, key=lambda reason: shares[reason], default="")
    if worst and shares[worst] > (rule.above or 0):
        told = {"name": worst, "share": shares[worst]}
        yield judgement(name, rule, card.device, told, value=shares[worst], expected=0.0)


def _steal(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    host = evidence.hosts.get(card.device)
    share = host.steal_share if host is not None else None
    if share is not None and share > (rule.above or 0):
        yield judgement(name, rule, card.device, {"share": share}, value=share, expected=0.0)


def _disturbed(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if card.device in evidence.disturbed:
        yield judgement(name, rule, card.device, {"why": evidence.disturbed[card.device]})


def _unknown(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if card.device != "cpu" and not card.slice and row(card) is None:
        yield judgement(name, rule, card.device, {"name": card.name})


def _hidden(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if card.device.startswith("cuda") and not card.driver_sees:
        yield judgement(name, rule, card.device, {})


def _slice(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if card.slice:
        yield judgement(name, rule, card.device, {"name": card.name})


def _unmeasured(
    name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, found: Sequence[Judgement]
) -> Iterator[Judgement]:
    """A device of which nothing was judged that counts, where no other rule has said so."""
    if card.device in evidence.unusable or any(each.state is VerdictState.NOT_JUDGED for each in found):
        return
    readings = [reading for reading in evidence.readings if reading.device == card.device]
    keys = {key for key, each in rules.table().items() if each.key}
    is_cpu = card.device == "cpu"  # no figure is expected of one: that there are some is enough
    if any(reading.value is not None for reading in readings) if is_cpu else any(each.rule in keys for each in found):
        return
    causes = dict.fromkeys(reading.why_not for reading in readings if reading.probe == "product" and reading.why_not)
    yield judgement(name, rule, card.device, {"why": "".join(f"; {cause}" for cause in causes)})


def _quota(name: str, rule: Rule, evidence: Evidence) -> Iterator[Judgement]:
    """A remark where the CPU itself was not validated: most rented cards come with a part of their host's cores."""
    cores, quota = evidence.cores, evidence.cpu_quota
    if cores is None or quota is None or quota >= (rule.below or 0) * cores:
        return
    told = {"value": quota, "expected": float(cores), "whole": float(max(1, int(quota)))}
    is_meant = any(card.device == "cpu" for card in evidence.cards)
    state = VerdictState(rule.state) if is_meant else VerdictState.PASS
    yield judgement(name, rule, "cpu", told, state=state, value=quota, expected=float(cores))


_KINDS: dict[str, Callable[[str, Rule, Evidence, DeviceFacts], Iterator[Judgement]]] = {
    "missing": missing,
    "present": _present,
    "growth": _growth,
    "off": _off,
    "xids": _xids,
    "under": _under,
    "throttled": _throttled,
    "steal": _steal,
    "disturbed": _disturbed,
    "unknown": _unknown,
    "hidden": _hidden,
    "slice": _slice,
}
