"""Tests readings without a value (gaps), and readings that are lower bounds because time or memory ran out.

They are reported and measured again, and no other value is compared with them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.core.validation_records import CUT, UNABLE, Reading
from bench.core.verdict import VerdictState, conclude
from bench.validate import history
from bench.validate.expectations import Evidence, reading_key
from bench.validate.judge import judge, phases_to_repeat
from bench.validate.merge_readings import settle
from tests.bench.validation_samples import (
    A100,
    FINE,
    FINE_CPU,
    GB,
    KNOWN,
    OWN,
    READINGS,
    TWO,
    T,
    linked,
    reading,
    validated,
    with_readings,
)

PASS, WARN, FAIL, OPEN = VerdictState.PASS, VerdictState.WARN, VerdictState.FAIL, VerdictState.NOT_JUDGED


def bf16(value: float, *, cut: bool = False, **changes: Any) -> Reading:
    """Return the reading of the bf16 product; with `cut`, it is marked as a lower bound."""
    return reading("product", "product bf16", value, figures={CUT: 1.0} if cut else {}, **changes)


def gap(probe: str, name: str, reason: str = "no time", **changes: Any) -> Reading:
    """Return a reading without a value, with the reason why it has none."""
    return reading(probe, name, None, why_not=reason, **changes)


def memory(share: float | None, patterns: float, **changes: Any) -> Reading:
    """Return the reading of the memory test: the tested share of the free memory, and the number of patterns."""
    return reading("memory", "memory", share, figures={"patterns": patterns}, **changes)


def cpu_gap(probe: str, name: str, reason: str = "no time") -> Evidence:
    return with_readings(FINE_CPU, gap(probe, name, reason, device="cpu"))


@pytest.mark.parametrize(
    ("evidence", "state", "phases"),
    [
        (with_readings(FINE, gap("numerics", "convolution fp16")), OPEN, ("numerics",)),
        (with_readings(FINE, gap("product", "product bf16")), OPEN, ("product",)),
        (with_readings(FINE, gap("memory", "memory", "no room")), OPEN, ("memory",)),
        (with_readings(FINE, gap("copy", "copy")), WARN, ("copy",)),
        (with_readings(FINE, gap("sustained", "sustained bf16")), WARN, ("sustained",)),
        (with_readings(FINE, gap("loop", "loop ddpm-cat-256 fp16 batch 4", "no room")), PASS, ()),
        (with_readings(FINE, gap("start", "process", "CUDA error: busy or unavailable")), OPEN, ()),
        (with_readings(FINE, gap("links", "all-reduce of 2", "no shared memory")), WARN, ("links",)),
        # A dtype that the device does not support is not a gap.
        (with_readings(FINE, gap("product", "product fp8", "no kernel", figures={UNABLE: 1.0})), PASS, ()),
        # The end of a worker is not a gap. The reading "once" says that a second worker has completed the phase.
        (with_readings(FINE, gap("loop", "process", "it was killed")), OPEN, ()),
        (with_readings(FINE, reading("loop", "process", None, figures={"once": 1.0})), WARN, ()),
        (cpu_gap("numerics", "attention fp32"), OPEN, ("numerics",)),
        (cpu_gap("product", "product fp32"), OPEN, ("product",)),
        (
            with_readings(cpu_gap("product", "product fp32"), gap("numerics", "n fp16", device="cpu")),
            OPEN,
            ("product",),
        ),
        (cpu_gap("memory", "memory"), WARN, ("memory",)),
        # Gaps of a CPU in fp16 do not count: without fp16 instructions it takes a hundred times as long.
        (cpu_gap("numerics", "convolution fp16"), PASS, ()),
        (cpu_gap("product", "product fp16"), PASS, ()),
        (cpu_gap("loop", "loop stable-diffusion-v1-5 bf16 batch 4"), PASS, ()),
        (with_readings(FINE, memory(0.88, 3.0)), OPEN, ("memory",)),
        (with_readings(FINE, memory(0.79, 4.0)), OPEN, ("memory",)),
        (with_readings(FINE, memory(0.80, 4.0)), PASS, ()),
        (with_readings(FINE_CPU, memory(0.1, 2.0, device="cpu")), PASS, ()),
        (with_readings(FINE, memory(None, 1.0, fault="1 word")), FAIL, ("memory",)),
    ],
    ids=[
        "numerics",
        "product",
        "memory",
        "copy",
        "sustained load",
        "sampling loop",
        "GPU busy",
        "links",
        "dtype without kernels",
        "worker killed",
        "worker repeated",
        "CPU numerics",
        "CPU product",
        "CPU product and fp16 numerics",
        "CPU memory",
        "CPU fp16 numerics",
        "CPU fp16 product",
        "CPU bf16 loop",
        "memory with 3 of 4 patterns",
        "79 % of the memory",
        "80 % of the memory",
        "CPU with 10 % of the memory",
        "memory fault",
    ],
)
def test_missing_value_changes_the_verdict_and_its_phase_is_repeated_where_it_matters(
    evidence: Evidence, state: VerdictState, phases: tuple[str, ...]
) -> None:
    judgements = judge(evidence)
    assert conclude(judgements).state is state, judgements
    assert phases_to_repeat(judgements, evidence.readings) == phases


def test_value_is_missing_if_the_reading_has_neither_value_nor_fault() -> None:
    wrong = judge(with_readings(FINE, reading("memory", "memory", None, fault="1 word")))
    assert [item.rule for item in wrong if item.state is not PASS] == ["fault"]
    silent = judge(with_readings(FINE, reading("memory", "memory", None)))
    assert [item.said for item in silent if item.state is not PASS] == ["not measured: memory (no reason is known)"]


def test_missing_value_does_not_count_if_a_later_round_has_it() -> None:
    first = with_readings(FINE, gap("product", "product bf16"), memory(0.4, 4.0))
    later = (bf16(268 * T, round=1), memory(0.88, 4.0, round=1))
    assert conclude(judge(replace(first, readings=(*first.readings, *later)))).state is PASS
    still = (gap("product", "product bf16", round=1), memory(0.5, 4.0, round=1))
    judgements = judge(replace(first, readings=(*first.readings, *still)))
    assert [item.rule for item in judgements if item.state is OPEN] == ["missing", "untested-memory"]


def test_low_value_that_is_only_a_lower_bound_could_not_be_judged_and_is_repeated() -> None:
    low = with_readings(FINE, bf16(120 * T, cut=True))
    (bf16_judgement,) = [item for item in judge(low) if item.rule == "product" and "bf16" in item.said]
    assert (bf16_judgement.state, bf16_judgement.value) == (OPEN, 120 * T)
    assert "its largest shapes had no time or no memory" in bf16_judgement.said
    assert phases_to_repeat(judge(low), low.readings) == ("product",)
    assert conclude(judge(with_readings(FINE, bf16(260 * T, cut=True)))).state is PASS, (
        "even the lower bound reaches the limit"
    )
    whole = replace(low, readings=(*low.readings, bf16(110 * T, round=1)))
    assert conclude(judge(whole)).state is FAIL, "another round has measured all shapes"


@pytest.mark.parametrize(
    ("first", "again", "counts"),
    [
        (bf16(120 * T, cut=True), bf16(110 * T), bf16(120 * T)),
        (bf16(110 * T), bf16(120 * T, cut=True), bf16(120 * T)),
        (bf16(120 * T, cut=True), bf16(130 * T, cut=True), bf16(130 * T, cut=True)),
        (memory(0.5, 4.0), memory(0.87, 4.0), memory(0.87, 4.0)),
        (memory(0.87, 1.0), memory(0.6, 4.0), memory(0.6, 4.0)),
        (memory(0.87, 4.0), memory(0.88, 3.0), memory(0.87, 4.0)),
    ],
    ids=[
        "higher lower bound first",
        "higher lower bound second",
        "two lower bounds",
        "more memory second",
        "more patterns second",
        "fewer patterns second",
    ],
)
def test_of_two_incomplete_readings_the_more_complete_or_better_one_counts(
    first: Reading, again: Reading, counts: Reading
) -> None:
    assert settle(first, again) == counts


@pytest.mark.parametrize(
    ("evidence", "rule"),
    [
        (replace(FINE, readings=(*READINGS, bf16(200 * T, cut=True, round=1))), "drift"),
        (with_readings(FINE, replace(bf16(200 * T, cut=True), probe="together")), "together"),
        (replace(TWO, readings=(*READINGS, bf16(225 * T, cut=True, device="cuda:1"))), "slowest"),
    ],
)
def test_lower_bound_is_not_used_by_the_rules_that_compare_values(evidence: Evidence, rule: str) -> None:
    assert not [item for item in judge(evidence) if item.rule == rule]
    whole = tuple(replace(item, figures={}) if CUT in item.figures else item for item in evidence.readings)
    assert [item.state for item in judge(replace(evidence, readings=whole)) if item.rule == rule] == [WARN]


def test_lower_bound_is_not_stored_as_best_value() -> None:
    kept = [validated(2, bf16(240 * T)), validated(3, bf16(268 * T, cut=True))]
    assert history.best_figures(kept, "2.9.0")["GPU-a100", "product bf16"].value == 240 * T


PAIR = (A100, replace(A100, device="cuda:1", uuid="GPU-b"))
SWAPPED = (replace(PAIR[1], device="cuda:0"), replace(PAIR[0], device="cuda:1"))
OTHER_PAIR = (A100, replace(A100, device="cuda:1", uuid="GPU-c"))


@pytest.mark.parametrize(
    ("name", "cards", "key"),
    [
        ("peer cuda:0 to cuda:1", PAIR, "peer GPU-a100 to GPU-b 256000000 bytes"),
        ("peer cuda:1 to cuda:0", SWAPPED, "peer GPU-a100 to GPU-b 256000000 bytes"),
        ("peer cuda:0 to cuda:1", OTHER_PAIR, "peer GPU-a100 to GPU-c 256000000 bytes"),
        ("all-reduce of 2", PAIR, "all-reduce of 2 GPU-a100 GPU-b 256000000 bytes"),
        ("all-reduce of 2", SWAPPED, "all-reduce of 2 GPU-a100 GPU-b 256000000 bytes"),
        ("all-reduce of 2", OTHER_PAIR, "all-reduce of 2 GPU-a100 GPU-c 256000000 bytes"),
    ],
)
def test_key_of_a_link_reading_has_the_uuids_of_its_gpus_in_fixed_order(name: str, cards: Any, key: str) -> None:
    assert reading_key(linked(name, 1 * GB), cards) == key


@pytest.mark.parametrize(
    ("link", "cards", "is_slow"),
    [
        (linked("all-reduce of 2", 90 * GB), PAIR, True),
        (linked("all-reduce of 2", 90 * GB, 16e6), PAIR, False),  # another transfer size has another key
        (linked("all-reduce of 2", 90 * GB), OTHER_PAIR, False),
        (linked("peer cuda:0 to cuda:1", 12 * GB), PAIR, True),
        (linked("peer cuda:0 to cuda:1", 12 * GB), OTHER_PAIR, False),
    ],
)
def test_link_is_compared_only_with_earlier_values_of_the_same_gpus_and_size(
    link: Reading, cards: Any, is_slow: bool
) -> None:
    evidence = with_readings(replace(KNOWN, cards=cards, before=cards), link)
    assert (
        [item.state for item in judge(evidence) if item.rule == "host-copy" and link.name in item.said] == [WARN]
    ) is is_slow


def test_best_value_of_a_link_is_stored_under_the_uuids_of_its_gpus() -> None:
    links = (linked("peer cuda:0 to cuda:1", 24 * GB), linked("all-reduce of 2", 180 * GB))
    run = validated(2, *links)
    assert run.validation is not None
    run = replace(run, validation=replace(run.validation, cards=PAIR, before=PAIR))
    assert {key: best.value for key, best in history.best_figures([run], "2.9.0").items()} == {
        key: OWN[key].value for key in OWN if key[1].endswith("bytes")
    }
