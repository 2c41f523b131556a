"""What was not measured, or not whole: it is said, it is asked again, and it is no measure of anything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.core.validation_records import CUT, UNABLE, Reading, VerdictState
from bench.run.verdict import conclude
from bench.validate import history
from bench.validate.expectations import Evidence, known_as
from bench.validate.judge import doubtful, judge, settled
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
    return reading("product", "product bf16", value, figures={CUT: 1.0} if cut else {}, **changes)


def gap(probe: str, name: str, why: str = "no time", **changes: Any) -> Reading:
    return reading(probe, name, None, why_not=why, **changes)


def memory(share: float | None, patterns: float, **changes: Any) -> Reading:
    return reading("memory", "memory", share, figures={"patterns": patterns}, **changes)


def of_cpu(probe: str, name: str, why: str = "no time") -> Evidence:
    return with_readings(FINE_CPU, gap(probe, name, why, device="cpu"))


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
        # A dtype that a device does not have is no gap.
        (with_readings(FINE, gap("product", "product fp8", "no kernel", figures={UNABLE: 1.0})), PASS, ()),
        # How a process ended is no question; another one took its place where nothing says why.
        (with_readings(FINE, gap("loop", "process", "it was killed")), OPEN, ()),
        (with_readings(FINE, reading("loop", "process", None, figures={"once": 1.0})), WARN, ()),
        (of_cpu("numerics", "attention fp32"), OPEN, ("numerics",)),
        (of_cpu("product", "product fp32"), OPEN, ("product",)),
        (with_readings(of_cpu("product", "product fp32"), gap("numerics", "n fp16", device="cpu")), OPEN, ("product",)),
        (of_cpu("memory", "memory"), WARN, ("memory",)),
        # A CPU without instructions for it takes a hundred times as long for fp16.
        (of_cpu("numerics", "convolution fp16"), PASS, ()),
        (of_cpu("product", "product fp16"), PASS, ()),
        (of_cpu("loop", "loop stable-diffusion-v1-5 bf16 batch 4"), PASS, ()),
        (with_readings(FINE, memory(0.88, 3.0)), OPEN, ("memory",)),
        (with_readings(FINE, memory(0.79, 4.0)), OPEN, ("memory",)),
        (with_readings(FINE, memory(0.80, 4.0)), PASS, ()),
        (with_readings(FINE_CPU, memory(0.1, 2.0, device="cpu")), PASS, ()),
        (with_readings(FINE, memory(None, 1.0, fault="1 word")), FAIL, ("memory",)),
    ],
)
def test_a_gap_is_said_and_asked_again(evidence: Evidence, state: VerdictState, phases: tuple[str, ...]) -> None:
    found = judge(evidence)
    assert conclude(found).state is state, found
    assert doubtful(found, evidence.readings) == phases


def test_a_fault_is_no_gap_and_silence_is_one() -> None:
    wrong = judge(with_readings(FINE, reading("memory", "memory", None, fault="1 word")))
    assert [each.rule for each in wrong if each.state is not PASS] == ["fault"]
    silent = judge(with_readings(FINE, reading("memory", "memory", None)))
    assert [each.said for each in silent if each.state is not PASS] == ["not measured: memory (it says nothing)"]


def test_what_a_later_round_has_measured_is_no_gap() -> None:
    first = with_readings(FINE, gap("product", "product bf16"), memory(0.4, 4.0))
    later = (bf16(268 * T, round=1), memory(0.88, 4.0, round=1))
    assert conclude(judge(replace(first, readings=(*first.readings, *later)))).state is PASS
    still = (gap("product", "product bf16", round=1), memory(0.5, 4.0, round=1))
    found = judge(replace(first, readings=(*first.readings, *still)))
    assert [each.rule for each in found if each.state is OPEN] == ["missing", "untested-memory"]


def test_a_low_figure_that_was_cut_short_is_not_judged() -> None:
    low = with_readings(FINE, bf16(120 * T, cut=True))
    (found,) = [each for each in judge(low) if each.rule == "product" and "bf16" in each.said]
    assert (found.state, found.value) == (OPEN, 120 * T)
    assert "its largest shapes had no time or no room" in found.said
    assert doubtful(judge(low), low.readings) == ("product",)
    assert conclude(judge(with_readings(FINE, bf16(260 * T, cut=True)))).state is PASS, (
        "it reaches the line all the same"
    )
    whole = replace(low, readings=(*low.readings, bf16(110 * T, round=1)))
    assert conclude(judge(whole)).state is FAIL, "another round was asked everything"


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
)
def test_of_two_that_were_cut_short_the_one_that_tells_more_counts(
    first: Reading, again: Reading, counts: Reading
) -> None:
    assert settled(first, again) == counts


@pytest.mark.parametrize(
    ("evidence", "rule"),
    [
        (replace(FINE, readings=(*READINGS, bf16(200 * T, cut=True, round=1))), "drift"),
        (with_readings(FINE, replace(bf16(200 * T, cut=True), probe="together")), "together"),
        (replace(TWO, readings=(*READINGS, bf16(225 * T, cut=True, device="cuda:1"))), "slowest"),
    ],
)
def test_a_lower_bound_is_held_against_no_other_figure(evidence: Evidence, rule: str) -> None:
    assert not [each for each in judge(evidence) if each.rule == rule]
    whole = tuple(replace(each, figures={}) if CUT in each.figures else each for each in evidence.readings)
    assert [each.state for each in judge(replace(evidence, readings=whole)) if each.rule == rule] == [WARN]


def test_a_lower_bound_is_no_best() -> None:
    kept = [validated(2, bf16(240 * T)), validated(3, bf16(268 * T, cut=True))]
    assert history.bests(kept, "2.9.0")["GPU-a100", "product bf16"].value == 240 * T


PAIR = (A100, replace(A100, device="cuda:1", uuid="GPU-b"))
TURNED = (replace(PAIR[1], device="cuda:0"), replace(PAIR[0], device="cuda:1"))
OTHERS = (A100, replace(A100, device="cuda:1", uuid="GPU-c"))


@pytest.mark.parametrize(
    ("name", "cards", "known"),
    [
        ("peer cuda:0 to cuda:1", PAIR, "peer GPU-a100 to GPU-b 256000000 bytes"),
        ("peer cuda:1 to cuda:0", TURNED, "peer GPU-a100 to GPU-b 256000000 bytes"),
        ("peer cuda:0 to cuda:1", OTHERS, "peer GPU-a100 to GPU-c 256000000 bytes"),
        ("all-reduce of 2", PAIR, "all-reduce of 2 GPU-a100 GPU-b 256000000 bytes"),
        ("all-reduce of 2", TURNED, "all-reduce of 2 GPU-a100 GPU-b 256000000 bytes"),
        ("all-reduce of 2", OTHERS, "all-reduce of 2 GPU-a100 GPU-c 256000000 bytes"),
    ],
)
def test_what_lies_between_cards_is_known_by_the_cards(name: str, cards: Any, known: str) -> None:
    assert known_as(linked(name, 1 * GB), cards) == known


@pytest.mark.parametrize(
    ("asked", "cards", "is_slow"),
    [
        (linked("all-reduce of 2", 90 * GB), PAIR, True),
        (linked("all-reduce of 2", 90 * GB, 16e6), PAIR, False),  # a smaller sum is slower
        (linked("all-reduce of 2", 90 * GB), OTHERS, False),
        (linked("peer cuda:0 to cuda:1", 12 * GB), PAIR, True),
        (linked("peer cuda:0 to cuda:1", 12 * GB), OTHERS, False),
    ],
)
def test_a_link_is_held_against_itself_alone(asked: Reading, cards: Any, is_slow: bool) -> None:
    evidence = with_readings(replace(KNOWN, cards=cards, before=cards), asked)
    assert (
        [each.state for each in judge(evidence) if each.rule == "host-copy" and asked.name in each.said] == [WARN]
    ) is is_slow


def test_the_best_of_a_link_is_kept_by_its_cards() -> None:
    links = (linked("peer cuda:0 to cuda:1", 24 * GB), linked("all-reduce of 2", 180 * GB))
    run = validated(2, *links)
    assert run.validation is not None
    run = replace(run, validation=replace(run.validation, cards=PAIR, before=PAIR))
    assert {key: each.value for key, each in history.bests([run], "2.9.0").items()} == {
        key: OWN[key].value for key in OWN if key[1].endswith("bytes")
    }
