"""Applies the rules about a device's facts and its host, and the rules that report a device which was not judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.core.verdict import VerdictState
from bench.validate import rules
from bench.validate.expectations import gpu_table_name
from bench.validate.reading_checks import judgement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.core.validation_records import DeviceFacts
    from bench.core.verdict import Judgement
    from bench.validate.expectations import Evidence
    from bench.validate.rules import Rule


def of_device(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield the judgements of a rule on one device; the kind of the rule is in KINDS.

    Args:
        name: the name of the rule.
        rule: the rule.
        evidence: the data of all devices and of the host.
        card: the facts of the device.
    """
    yield from _CHECKS[rule.kind](name, rule, evidence, card)


def _present(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on a count of the device (`rule.field`, such as its memory errors) that is not zero."""
    count = getattr(card, rule.field or "")
    if count:
        yield judgement(name, rule, card.device, {"count": float(count)}, value=float(count), expected=0.0)


def _growth(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on a count of the device (`rule.field`) that grew during the validation."""
    before = next((facts for facts in evidence.before if facts.device == card.device), None)
    counts = [getattr(facts, rule.field or "") for facts in (before, card) if facts is not None]
    if len(counts) == 2 and None not in counts and counts[1] > counts[0]:
        grown = float(counts[1] - counts[0])
        yield judgement(name, rule, card.device, {"count": grown}, value=grown, expected=0.0)


def _off(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on a driver setting of the device (`rule.field`) that is off."""
    if getattr(card, rule.field or "") is False:
        yield judgement(name, rule, card.device, {})


def _xids(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on hardware errors (XIDs): those in `rule.xids` if the rule is `listed`, else all others."""
    codes = sorted({xid for xid in card.xids if (xid in rule.xids) is rule.listed})
    if codes:
        yield judgement(name, rule, card.device, {"xids": ", ".join(map(str, codes))})


def _under(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on a value (`rule.field`) below a share of its possible maximum (`rule.most`)."""
    value, most = (getattr(card, field or "") for field in (rule.field, rule.most))
    if value is not None and most is not None and value < (rule.below or 0) * most:
        values = {"value": float(value), "expected": float(most)}
        yield judgement(name, rule, card.device, dict(values), **values)


def _throttled(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on the reason of `rule.reasons` that lowered the clocks for the largest share of the time."""
    watched = evidence.watched.get(card.device)
    shares = {reason: watched.throttled.get(reason, 0.0) for reason in rule.reasons} if watched is not None else {}
    worst = max(shares, key=lambda reason: shares[reason], default="")
    if worst and shares[worst] > (rule.above or 0):
        values = {"name": worst, "share": shares[worst]}
        yield judgement(name, rule, card.device, values, value=shares[worst], expected=0.0)


def _steal(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on CPU time that the hypervisor gave to other guests."""
    host = evidence.hosts.get(card.device)
    share = host.steal_share if host is not None else None
    if share is not None and share > (rule.above or 0):
        yield judgement(name, rule, card.device, {"share": share}, value=share, expected=0.0)


def _disturbed(name: str, rule: Rule, evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on a device whose examination other work disturbed."""
    if card.device in evidence.disturbed:
        yield judgement(name, rule, card.device, {"why": evidence.disturbed[card.device]})


def _hidden(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on a GPU that NVML does not list."""
    if card.device.startswith("cuda") and not card.driver_sees:
        yield judgement(name, rule, card.device, {})


def _slice(name: str, rule: Rule, _: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    """Yield a judgement on a device that is a slice of a GPU (MIG, vGPU)."""
    if card.slice:
        yield judgement(name, rule, card.device, {"name": card.name})


def unknown_gpu(
    name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, judgements: Sequence[Judgement]
) -> Iterator[Judgement]:
    """Yield a judgement on a GPU whose products were measured although no rule has an expected value for them.

    `judgements`: those of the other rules on this device.
    """
    is_known = card.device == "cpu" or card.slice or gpu_table_name(card) is not None
    if not is_known and not _is_judged_by_speed(judgements) and _has_products(evidence, card):
        yield judgement(name, rule, card.device, {"name": card.name})


def _is_judged_by_speed(judgements: Sequence[Judgement]) -> bool:
    """Return whether a rule with `key` is among the judgements."""
    keys = {key for key, table_rule in rules.table().items() if table_rule.key}
    return any(item.rule in keys for item in judgements)


def _has_products(evidence: Evidence, card: DeviceFacts) -> bool:
    """Return whether a matrix product was measured on the device."""
    readings = [reading for reading in evidence.readings if reading.device == card.device]
    return any(reading.probe == "product" and reading.value is not None for reading in readings)


def unmeasured(
    name: str, rule: Rule, evidence: Evidence, card: DeviceFacts, judgements: Sequence[Judgement]
) -> Iterator[Judgement]:
    """Yield a judgement if no rule with `key` has judged the device, and no other rule has reported why.

    `judgements`: those of the other rules on this device.
    """
    if card.device in evidence.unusable or any(item.state is VerdictState.NOT_JUDGED for item in judgements):
        return
    readings = [reading for reading in evidence.readings if reading.device == card.device]
    if card.device == "cpu":  # there are no expected values for CPUs, so any value is enough
        is_judged = any(reading.value is not None for reading in readings)
    elif card.slice or gpu_table_name(card) is None:  # another rule reports that there is no expected value for it
        is_judged = _has_products(evidence, card)
    else:
        is_judged = _is_judged_by_speed(judgements)
    if is_judged:
        return
    causes = dict.fromkeys(reading.why_not for reading in readings if reading.probe == "product" and reading.why_not)
    yield judgement(name, rule, card.device, {"why": "".join(f"; {cause}" for cause in causes)})


def cpu_quota(name: str, rule: Rule, evidence: Evidence) -> Iterator[Judgement]:
    """Yield a judgement if the CPU quota of the control group is less than the cores of the host.

    It only informs if the CPU itself is not validated: most rented GPUs come with a part of their host's cores.
    """
    cores, quota = evidence.cores, evidence.cpu_quota
    if cores is None or quota is None or quota >= (rule.below or 0) * cores:
        return
    values = {"value": quota, "expected": float(cores), "whole": float(max(1, int(quota)))}
    is_validated = any(card.device == "cpu" for card in evidence.cards)
    state = VerdictState(rule.state) if is_validated else VerdictState.PASS
    yield judgement(name, rule, "cpu", values, state=state, value=quota, expected=float(cores))


_CHECKS: dict[str, Callable[[str, Rule, Evidence, DeviceFacts], Iterator[Judgement]]] = {
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
KINDS = frozenset(_CHECKS)
