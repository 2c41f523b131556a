"""Judges a host's devices by all rules of rules.toml, and selects the phases to repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.core.verdict import VerdictState
from bench.validate import device_checks, reading_checks, rules
from bench.validate.reading_checks import is_gap, is_wrong, judgement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.validation_records import DeviceFacts, Reading
    from bench.core.verdict import Judgement
    from bench.validate.expectations import Evidence
    from bench.validate.rules import Rule


def judge(evidence: Evidence) -> tuple[Judgement, ...]:
    """Return the judgements of all rules, device by device.

    A value that is as good as expected is a judgement too, with "pass". A rule gives no judgement if its phase did not
    run or has no reading. Other rules then report what could not be judged.
    """
    judgements = [item for card in evidence.cards for item in _of_device(evidence, card)]
    for name, rule in rules.table().items():
        if rule.kind == "unusable":
            judgements += [judgement(name, rule, device, {"why": cause}) for device, cause in evidence.unusable.items()]
        elif rule.kind == "slowest":
            judgements += reading_checks.slowest(name, rule, evidence)
        elif rule.kind == "quota":
            judgements += device_checks.cpu_quota(name, rule, evidence)
    return tuple(judgements)


def phases_to_repeat(judgements: Sequence[Judgement], readings: Sequence[Reading]) -> tuple[str, ...]:
    """Return the phases with a reading that violates a rule with `again`, in the order of the readings.

    Args:
        judgements: the judgements on the readings.
        readings: the readings of one or more devices.
    """
    bad = {(item.rule, item.device) for item in judgements if item.state is not VerdictState.PASS}
    table = rules.table()
    phases: dict[str, None] = {}
    for reading in readings:
        for name, rule in table.items():
            if rule.again and (name, reading.device) in bad and _is_about(rule, reading):
                phases[reading.probe] = None
    return tuple(phases)


def _is_about(rule: Rule, reading: Reading) -> bool:
    if rule.kind in {"fault", "limit"}:
        return is_wrong(reading)
    return rule.is_about(reading) and (rule.kind != "missing" or is_gap(reading))


def _of_device(evidence: Evidence, card: DeviceFacts) -> Iterator[Judgement]:
    judgements: list[Judgement] = []
    for name, rule in rules.table().items():
        if rule.kind in reading_checks.KINDS:
            judgements += reading_checks.of_readings(name, rule, evidence, card)
        elif rule.kind in device_checks.KINDS:
            judgements += device_checks.of_device(name, rule, evidence, card)
        elif rule.kind == "missing":
            judgements += reading_checks.missing(name, rule, evidence, card)
        elif rule.kind == "unmeasured":
            judgements += device_checks.unmeasured(name, rule, evidence, card, judgements)
        elif rule.kind == "unknown":
            judgements += device_checks.unknown_gpu(name, rule, evidence, card, judgements)
    yield from judgements
