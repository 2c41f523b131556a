"""Judges a host's devices by the rules of rules.toml, and merges repeated readings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.core.validation_records import CUT, Judgement, VerdictState
from bench.validate import rules
from bench.validate.expectations import gpu_table_name, share_of
from bench.validate.rule_checks import OF_READINGS, ONCE, is_gap, is_wrong, judgement, missing, of_readings, slowest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.core.validation_records import DeviceFacts, Reading
    from bench.validate.expectations import Evidence
    from bench.validate.rules import Rule


def judge(evidence: Evidence) -> tuple[Judgement, ...]:
    """Return the judgements of all rules, device by device; an expected value is a judgement too, with "pass".

    A rule has no judgement if its phase did not run or has no reading; other rules report what could not be judged.
    """
    judgements = [item for card in evidence.cards for item in _of_card(evidence, card)]
    for name, rule in rules.table().items():
        if rule.kind == "unusable":
            judgements += [judgement(name, rule, device, {"why": cause}) for device, cause in evidence.unusable.items()]
        elif rule.kind == "slowest":
            judgements += slowest(name, rule, evidence)
        elif rule.kind == "quota":
            judgements += _quota(name, rule, evidence)
    return tuple(judgements)


def phases_to_repeat(judgements: Sequence[Judgement], readings: Sequence[Reading]) -> tuple[str, ...]:
    """Return the phases of a device to repeat before their readings count, in the order of the readings."""
    bad = {(item.rule, item.device) for item in judgements if item.state is not VerdictState.PASS}
    table = rules.table()
    phases: dict[str, None] = {}
    for reading in readings:
        for name, rule in table.items():
            if rule.again and (name, reading.device) in bad and _is_about(rule, reading):
                phases[reading.probe] = None
    return tuple(phases)


def merge(first: Sequence[Reading], again: Sequence[Reading]) -> tuple[Reading, ...]:
    """Return all readings, each of its name once: of a repeated one the result of `settle`, in the order of `first`."""
    merged = {_identity(reading): reading for reading in first}
    for reading in again:
        before = merged.get(_identity(reading))
        merged[_identity(reading)] = settle(before, reading) if before is not None else reading
    return tuple(merged.values())


def settle(first: Reading, again: Reading) -> Reading:
    """Return the reading to judge, of two readings of the same quantity.

    A fault in both is a fault. A fault in one of them is a fault only if the other has no value; otherwise the good
    reading counts, with a mark that a rule turns into a warning. Of two values the better one counts: a disturbance
    makes a measurement slow, never fast.
    """
    if is_wrong(first) or is_wrong(again):
        return _settle_fault(first, again)
    if not again.value or not first.value:
        return again if again.value else first
    return again if first.limit is not None else _better(first, again)


def _settle_fault(first: Reading, again: Reading) -> Reading:
    if is_wrong(first) and is_wrong(again):
        return again
    good, wrong = (again, first) if is_wrong(first) else (first, again)
    return wrong if good.value is None else replace(good, figures=good.figures | {ONCE: 1.0})


def _better(first: Reading, again: Reading) -> Reading:
    if "first_quarter" in first.figures and "first_quarter" in again.figures:  # compare how much of the speed it kept
        return max(
            again,
            first,
            key=lambda reading: reading.figures["last_quarter"] / (reading.figures["first_quarter"] or 1.0),
        )
    if "patterns" in first.figures and "patterns" in again.figures:  # take the test that covered more
        return max(again, first, key=lambda reading: (reading.value or 0.0) * reading.figures["patterns"])
    better = again if share_of(first, again.value or 1.0, first.value or 1.0) >= 1 else first
    if CUT in first.figures and CUT in again.figures:
        return better
    # One of the two measured all shapes, so the better value is not a lower bound any more.
    return replace(better, figures={name: figure for name, figure in better.figures.items() if name != CUT})


def _identity(reading: Reading) -> tuple[str, str, str, int]:
    return reading.device, reading.probe, reading.name, reading.round


def _is_about(rule: Rule, reading: Reading) -> bool:
    if rule.kind in {"fault", "limit"}:
        return is_wrong(reading)
    return rule.is_about(reading) and (rule.kind != "missing" or is_gap(reading))


def _of_card(evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    judgements: list[Judgement] = []
    for name, rule in rules.table().items():
        if rule.kind in OF_READINGS:
            judgements += of_readings(name, rule, evidence, card)
        elif rule.kind == "unmeasured":
            judgements += _unmeasured(name, rule, evidence, card, judgements)
        elif rule.kind == "unknown":
            judgements += _unknown(name, rule, evidence, card, judgements)
        elif rule.kind in _KINDS:
            judgements += _KINDS[rule.kind](name, rule, evidence, card)
    yield from judgements


def _present(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    count = getattr(card, rule.field or "")
    if count:
        yield judgement(name, rule, card.device, {"count": float(count)}, value=float(count), expected=0.0)


def _growth(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    before = next((facts for facts in evidence.before if facts.device == card.device), None)
    counts = [getattr(facts, rule.field or "") for facts in (before, card) if facts is not None]
    if len(counts) == 2 and None not in counts and counts[1] > counts[0]:
        grown = float(counts[1] - counts[0])
        yield judgement(name, rule, card.device, {"count": grown}, value=grown, expected=0.0)


def _off(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if getattr(card, rule.field or "") is False:
        yield judgement(name, rule, card.device, {})


def _xids(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    codes = sorted({xid for xid in card.xids if (xid in rule.xids) is rule.listed})
    if codes:
        yield judgement(name, rule, card.device, {"xids": ", ".join(map(str, codes))})


def _under(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    value, most = (getattr(card, field or "") for field in (rule.field, rule.most))
    if value is not None and most is not None and value < (rule.below or 0) * most:
        values = {"value": float(value), "expected": float(most)}
        yield judgement(name, rule, card.device, dict(values), **values)


def _throttled(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    watched = evidence.watched.get(card.device)
    shares = {reason: watched.throttled.get(reason, 0.0) for reason in rule.reasons} if watched is not None else {}
    worst = max(shares, key=lambda reason: shares[reason], default="")
    if worst and shares[worst] > (rule.above or 0):
        values = {"name": worst, "share": shares[worst]}
        yield judgement(name, rule, card.device, values, value=shares[worst], expected=0.0)


def _steal(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    host = evidence.hosts.get(card.device)
    share = host.steal_share if host is not None else None
    if share is not None and share > (rule.above or 0):
        yield judgement(name, rule, card.device, {"share": share}, value=share, expected=0.0)


def _disturbed(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if card.device in evidence.disturbed:
        yield judgement(name, rule, card.device, {"why": evidence.disturbed[card.device]})


def _hidden(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if card.device.startswith("cuda") and not card.driver_sees:
        yield judgement(name, rule, card.device, {})


def _slice(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    if card.slice:
        yield judgement(name, rule, card.device, {"name": card.name})


def _unknown(
    name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, judgements: Sequence[Judgement]
) -> Iterator[Judgement]:
    """Yield a note on a GPU whose products are measured, but for which there is no expected value."""
    is_known = card.device == "cpu" or card.slice or gpu_table_name(card) is not None
    if not is_known and not _is_judged_by_speed(judgements) and _has_products(evidence, card):
        yield judgement(name, rule, card.device, {"name": card.name})


def _is_judged_by_speed(judgements: Sequence[Judgement]) -> bool:
    keys = {key for key, table_rule in rules.table().items() if table_rule.key}
    return any(item.rule in keys for item in judgements)


def _has_products(evidence: Evidence, card: DeviceFacts) -> bool:
    readings = [reading for reading in evidence.readings if reading.device == card.device]
    return any(reading.probe == "product" and reading.value is not None for reading in readings)


def _unmeasured(
    name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, judgements: Sequence[Judgement]
) -> Iterator[Judgement]:
    """Yield a judgement if no decisive rule has judged a device, and no other rule has reported that."""
    if card.device in evidence.unusable or any(item.state is VerdictState.NOT_JUDGED for item in judgements):
        return
    readings = [reading for reading in evidence.readings if reading.device == card.device]
    if card.device == "cpu":  # a CPU has no expected values, so any value is enough
        is_judged = any(reading.value is not None for reading in readings)
    elif card.slice or gpu_table_name(card) is None:  # `_unknown` notes that it is compared with itself alone
        is_judged = _has_products(evidence, card)
    else:
        is_judged = _is_judged_by_speed(judgements)
    if is_judged:
        return
    causes = dict.fromkeys(reading.why_not for reading in readings if reading.probe == "product" and reading.why_not)
    yield judgement(name, rule, card.device, {"why": "".join(f"; {cause}" for cause in causes)})


def _quota(name: str, rule: Rule, evidence: Evidence) -> Iterator[Judgement]:
    """Yield a judgement on the CPU quota of the control group.

    It only informs if the CPU itself is not validated: most rented GPUs come with a part of their host's cores.
    """
    cores, quota = evidence.cores, evidence.cpu_quota
    if cores is None or quota is None or quota >= (rule.below or 0) * cores:
        return
    values = {"value": quota, "expected": float(cores), "whole": float(max(1, int(quota)))}
    is_validated = any(card.device == "cpu" for card in evidence.cards)
    state = VerdictState(rule.state) if is_validated else VerdictState.PASS
    yield judgement(name, rule, "cpu", values, state=state, value=quota, expected=float(cores))


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
    "hidden": _hidden,
    "slice": _slice,
}
