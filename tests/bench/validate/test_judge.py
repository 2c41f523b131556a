"""What the rules make of the cards that people ask about, and when a reading counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.core.errors import Exit
from bench.core.validation_records import DeviceFacts, Judgement, Reading, Verdict, VerdictState
from bench.run import verdict
from bench.run.verdict import conclude
from bench.validate.expectations import Evidence, Expected
from bench.validate.judge import doubtful, judge, merged, settled
from tests.bench.validation_samples import (
    A100,
    CALM,
    CPU_READINGS,
    FINE,
    FINE_CPU,
    GB,
    KNOWN,
    OWN,
    SLOW_BF16,
    TWO,
    T,
    card,
    one_slow,
    reading,
    sustained,
    watched,
    with_readings,
)

PASS, WARN, FAIL, OPEN = VerdictState.PASS, VerdictState.WARN, VerdictState.FAIL, VerdictState.NOT_JUDGED
T4 = replace(
    A100,
    name="Tesla T4",
    uuid="GPU-t4",
    ecc=True,
    power_limit_watts=70.0,
    power_default_watts=70.0,
    pcie_generation=3,
    pcie_generation_most=3,
)
T4_READINGS = (reading("product", "product fp16", 24 * T), reading("product", "product fp32", 4.1 * T))
T4_CAPPED = replace(FINE, cards=(T4,), before=(T4,), readings=(*T4_READINGS, reading("copy", "copy", 250 * GB)))


def verdict_of(evidence: Evidence) -> Verdict:
    return conclude(judge(evidence))


def said(evidence: Evidence, rule: str) -> list[Judgement]:
    return [each for each in judge(evidence) if each.rule == rule]


@pytest.mark.parametrize("evidence", [FINE, KNOWN, FINE_CPU], ids=["a card", "a card with a past", "a CPU"])
def test_what_is_well_passes_without_a_word(evidence: Evidence) -> None:
    assert verdict_of(evidence) == Verdict(PASS)


def test_what_passes_is_said_with_its_source() -> None:
    (bf16,) = [each for each in said(FINE, "product") if "bf16" in each.said]
    assert (bf16.state, bf16.value, bf16.expected, bf16.confidence) == (PASS, 268 * T, 271.2 * T, "measured")
    (fp32,) = [each for each in said(FINE, "product") if "fp32" in each.said]
    assert fp32.expected == pytest.approx(0.78 * 19.5 * T)
    assert fp32.confidence == "sheet"
    assert "78% of the 19.5 TFLOP/s on the sheet of the A100-SXM4-80GB" in str(fp32.source)


def test_a_t4_under_its_power_cap_passes() -> None:
    assert verdict_of(watched(T4_CAPPED, software_power_cap=1.0)).state is PASS
    fp16 = replace(T4_CAPPED, readings=(reading("product", "product fp16", 18 * T),))
    assert verdict_of(watched(fp16, software_power_cap=1.0)).state is PASS, "69 % of what its 70 W are known to give"
    assert verdict_of(watched(fp16)).state is WARN, "nothing caps it"
    third = with_readings(fp16, reading("product", "product fp16", 9 * T))
    assert verdict_of(watched(third, software_power_cap=1.0)).state is WARN, "its cap explains no third"
    assert verdict_of(watched(third)).state is FAIL


def test_a_t4_may_fall_to_its_power_limit() -> None:
    fading = with_readings(T4_CAPPED, sustained(30 * T, 22 * T))
    assert verdict_of(watched(fading, software_power_cap=0.9)).state is PASS
    assert verdict_of(watched(fading, hardware_slowdown=0.9)).state is WARN


@pytest.mark.parametrize(
    ("name", "value", "cap", "state"),
    [
        ("Tesla T4", 18 * T, 0.6, PASS),
        ("Tesla T4", 14 * T, 0.6, PASS),  # 54 %: under the line of a failure, and still what 70 W explain
        ("Tesla T4", 14 * T, 0.4, WARN),  # not most of the time
        ("Tesla T4", 9 * T, 1.0, WARN),
        ("Tesla T4", 14 * T, 0.0, FAIL),
        ("NVIDIA A10", 40 * T, 1.0, WARN),  # not sold at its limit
    ],
)
def test_how_far_a_power_cap_excuses(name: str, value: float, cap: float, state: VerdictState) -> None:
    low = replace(T4_CAPPED, cards=(replace(T4, name=name),), readings=(reading("product", "product fp16", value),))
    assert verdict_of(watched(low, software_power_cap=cap)).state is state


@pytest.mark.parametrize(("cap", "spoken"), [(0.9, 0), (0.4, 1), (0.0, 1)])
def test_a_soak_of_a_t4_ends_at_its_power_limit(cap: float, spoken: int) -> None:
    later = [reading("product", "product fp16", value * T, round=number) for number, value in ((1, 24), (2, 19))]
    soaked = replace(T4_CAPPED, readings=(*T4_CAPPED.readings, *later))
    assert len(said(watched(soaked, software_power_cap=cap), "drift")) == spoken


def test_clocks_that_somebody_has_set_explain_a_low_figure() -> None:
    slow = with_readings(watched(clocks_set_by_hand=1.0), SLOW_BF16, reading("copy", "copy", 700 * GB))
    assert {each.state for each in judge(slow) if each.rule in {"product", "copy"}} == {WARN, PASS}
    (bf16,) = [each for each in said(slow, "product") if "bf16" in each.said]
    assert "clocks set by hand 100% of the time" in bf16.said
    assert not said(slow, "slowed"), "it is no sign of an unwell card"


@pytest.mark.parametrize("told", [False, None])
def test_where_nothing_says_what_caps_a_card_a_low_figure_is_not_judged(told: bool | None) -> None:
    silent = replace(with_readings(FINE, SLOW_BF16), watched={"cuda:0": replace(CALM, reasons_told=told)})
    (bf16,) = [each for each in said(silent, "product") if "bf16" in each.said]
    assert bf16.state is OPEN
    assert "does not say what keeps its clocks down" in bf16.said
    fine = replace(FINE, watched={"cuda:0": replace(CALM, reasons_told=told)})
    assert verdict_of(fine).state is PASS, "a good figure needs no excuse"


def test_a_throttled_a100_is_warned_of_and_not_failed() -> None:
    hot = with_readings(watched(hardware_thermal_slowdown=0.6), SLOW_BF16)
    found = verdict_of(hot)
    assert found.state is WARN
    assert any("44% of the 271.2 TFLOP/s" in each and "hardware thermal slowdown 60%" in each for each in found.reasons)
    capped = with_readings(watched(software_power_cap=0.9), SLOW_BF16)
    assert verdict_of(capped).state is WARN, "a power cap is no failure of the card, and no A100 is sold at one"


def test_what_another_process_takes_fails_no_card() -> None:
    assert verdict_of(with_readings(card(others=1), SLOW_BF16)).state is WARN
    seen = replace(with_readings(FINE, SLOW_BF16), watched={"cuda:0": replace(CALM, others=1)})
    assert verdict_of(seen).state is WARN


def test_without_clocks_a_low_figure_is_not_judged() -> None:
    unseen = with_readings(replace(FINE, watched={}), SLOW_BF16)
    (bf16,) = [each for each in said(unseen, "product") if "bf16" in each.said]
    assert bf16.state is OPEN
    assert "its clocks cannot be read" in bf16.said
    hidden = with_readings(replace(card(driver_sees=False), watched={"cuda:0": CALM}), SLOW_BF16)
    assert verdict_of(hidden).state is OPEN


def test_a_figure_of_a_disturbed_machine_is_not_judged_where_it_is_low() -> None:
    busy = with_readings(
        replace(FINE, disturbed={"cuda:0": "its threads waited"}), SLOW_BF16, sustained(255 * T, 1 * T)
    )
    assert {each.state for each in said(busy, "product")} == {OPEN, PASS}
    assert verdict_of(busy).state is OPEN
    assert not said(busy, "fade")
    slow = replace(with_readings(FINE_CPU, reading("threads", "scaling", 0.3, device="cpu")), disturbed={"cpu": "busy"})
    assert not said(slow, "scaling")


def test_a_fault_is_one_on_a_disturbed_machine_too() -> None:
    wrong = with_readings(FINE_CPU, reading("memory", "memory", None, device="cpu", fault="1 byte"))
    assert verdict_of(replace(wrong, disturbed={"cpu": "it had 50%"})).state is FAIL


def test_an_unchecked_figure_warns_and_never_fails() -> None:
    a800 = with_readings(card(name="NVIDIA A800 80GB PCIe"), SLOW_BF16)
    (bf16,) = [each for each in said(a800, "product") if "bf16" in each.said]
    assert (bf16.state, bf16.confidence) == (WARN, "unchecked")
    assert "which no source confirms" in bf16.said


def test_a_cards_own_best_comes_before_the_table() -> None:
    slower = with_readings(KNOWN, reading("product", "product bf16", 225 * T))
    (bf16,) = [each for each in said(slower, "product") if "bf16" in each.said]
    assert (bf16.state, bf16.expected, bf16.confidence) == (WARN, 268 * T, "own")
    other = replace(slower, own={("GPU-other", name): best for (_, name), best in OWN.items()})
    (bf16,) = [each for each in said(other, "product") if "bf16" in each.said]
    assert (bf16.expected, bf16.confidence) == (271.2 * T, "measured"), "another card's past is none of its own"


def test_a_card_that_was_slow_from_its_first_day_is_no_measure_of_itself() -> None:
    low = replace(FINE, own={("GPU-a100", "product bf16"): Expected(121 * T, "its own best, run 1", "own")})
    assert verdict_of(with_readings(low, SLOW_BF16)).state is FAIL
    # A card that is sold at its power limit is the measure of itself there, and so is one of a figure without a source.
    l4 = replace(A100, name="NVIDIA L4", uuid="GPU-l4")
    own = {("GPU-l4", "product bf16"): Expected(60 * T, "its own best, run 1", "own")}
    evidence = replace(FINE, cards=(l4,), own=own, readings=(reading("product", "product bf16", 59 * T),))
    assert {each.confidence for each in said(evidence, "product")} == {"own"}
    a800 = replace(low, cards=(replace(A100, name="NVIDIA A800 80GB PCIe"),))
    (bf16,) = [each for each in said(a800, "product") if "bf16" in each.said]
    assert bf16.confidence == "own"


def test_an_unknown_card_gets_no_other_cards_figures() -> None:
    strange = card(name="NVIDIA GeForce RTX 4090 D")
    assert not [each for each in judge(strange) if each.expected is not None and each.unit]
    assert [each.rule for each in judge(strange)] == ["unknown-card"]


def test_a_slice_has_no_reference_not_even_its_cards_own() -> None:
    part = card(KNOWN, slice=True)
    assert [each.rule for each in judge(part)] == ["part-of-a-card"]


def test_a_loop_at_batch_one_judges_no_card() -> None:
    slow = with_readings(KNOWN, reading("loop", "loop ddpm-cat-256 fp16 batch 1", 0.2))
    assert verdict_of(slow).state is PASS


def test_the_slowest_of_several_is_named_where_all_are_well() -> None:
    (found,) = said(one_slow(266 * T), "slowest")
    assert (found.device, found.state) == ("cuda:1", PASS)
    mixed = replace(TWO, cards=(A100, replace(A100, device="cuda:1", name="Tesla T4")))
    assert not said(mixed, "slowest"), "two kinds are not compared"


def test_what_cards_reach_at_once_is_no_round_of_what_each_reaches_alone() -> None:
    at_once = tuple(replace(each, probe="together", value=(each.value or 0.0) * 0.85) for each in TWO.readings)
    found = judge(replace(TWO, readings=TWO.readings + at_once))
    assert {each.rule for each in found if each.state is not PASS} == {"together"}
    assert not said(replace(TWO, readings=at_once), "together"), "there is nothing to hold it against"
    busy = replace(TWO, readings=TWO.readings + at_once, disturbed={"cuda:0": "busy", "cuda:1": "busy"})
    assert not said(busy, "together")


def test_a_soak_of_several_is_held_against_itself() -> None:
    rounds = [[replace(each, round=number) for each in one_slow(230 * T).readings] for number in (1, 2)]
    soaked = replace(TWO, readings=(*TWO.readings, *rounds[0], *rounds[1]))
    assert not said(soaked, "drift"), "both rounds are as the host feeds two cards"
    later = reading("product", "product bf16", 200 * T, device="cuda:1", round=3)
    (found,) = said(replace(soaked, readings=(*soaked.readings, later)), "drift")
    assert (found.device, found.value, found.expected) == ("cuda:1", 200 * T, 230 * T)


def test_a_card_that_is_slow_beside_the_others_alone_is_named() -> None:
    slow = reading("together", "product bf16", 100 * T, device="cuda:1")
    at_once = replace(TWO, readings=(*TWO.readings, reading("together", "product bf16", 250 * T), slow))
    (found,) = said(at_once, "slowest")
    assert (found.device, found.state, found.value, found.expected) == ("cuda:1", WARN, 100 * T, 250 * T)
    assert "product bf16, all at once at 100.0 TFLOP/s" in found.said


def test_cards_are_beside_each_other_in_products_alone() -> None:
    slow = reading("together", "host to device", 9 * GB, unit="B/s", device="cuda:1")
    at_once = replace(TWO, readings=(*TWO.readings, replace(slow, device="cuda:0", value=25 * GB), slow))
    (found,) = said(at_once, "slowest")
    assert "product" in found.said
    assert found.state is PASS


@pytest.mark.parametrize(
    ("name", "unit", "value", "state"),
    [
        ("product bf16", "FLOP/s", 200 * T, WARN),
        ("sustained bf16", "FLOP/s", 200 * T, WARN),
        ("loop ddpm-cat-256 fp16 batch 4", "s", 0.08, WARN),
        ("loop ddpm-cat-256 fp16 batch 1", "s", 0.08, None),
        ("host to device", "B/s", 12 * GB, PASS),
        ("host to device", "B/s", 24 * GB, None),
    ],
)
def test_what_is_lost_all_at_once(name: str, unit: str, value: float, state: VerdictState | None) -> None:
    at_once = with_readings(FINE, reading("together", name, value, unit=unit))
    found = [each for each in judge(at_once) if each.rule.startswith("together")]
    assert [each.state for each in found] == ([state] if state is not None else [])
    assert verdict_of(at_once).state is (WARN if state is WARN else PASS)


def test_what_the_driver_does_not_tell_is_not_held_against_a_card() -> None:
    silent = replace(FINE, cards=(DeviceFacts("cuda:0", A100.name, driver_sees=True),))
    assert verdict_of(silent).state is PASS


def test_the_worst_decides_and_comes_first() -> None:
    both = replace(card(others=1, ecc_uncorrected=1), disturbed={"cuda:0": "busy"})
    found = verdict_of(both)
    assert found.state is FAIL
    assert [reason.partition(".")[0] for reason in found.reasons] == [
        "cuda:0: uncorrectable memory errors since its driver was loaded: 1",
        "cuda:0: it was not alone: busy",
        "cuda:0: other processes on the card: 1",
    ]
    assert "ask for another card" in found.reasons[0], "what to do"
    assert [verdict.exit_of(Verdict(state)) for state in (PASS, WARN, FAIL, OPEN)] == [
        Exit.GOOD, Exit.GOOD, Exit.VERDICT_FAIL, Exit.NOT_JUDGED,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("evidence", "phases"),
    [
        (FINE, ()),
        (with_readings(FINE, SLOW_BF16), ("product",)),
        (with_readings(replace(FINE, watched={}), SLOW_BF16), ("product",)),
        (with_readings(FINE, SLOW_BF16, reading("memory", "memory", None, fault="1 byte")), ("product", "memory")),
        (with_readings(FINE, reading("numerics", "matrix product bf16", 0.4, limit=5e-3)), ("numerics",)),
        (with_readings(FINE, sustained(255 * T, 204 * T)), ("sustained",)),
        (with_readings(KNOWN, reading("loop", "loop ddpm-cat-256 fp16 batch 4", 0.090)), ("loop",)),
        # What no second asking changes is not asked for.
        (card(ecc_uncorrected=2, others=1), ()),
        (card(name="NVIDIA GeForce RTX 4090 D"), ()),
    ],
)
def test_what_speaks_against_a_device_is_asked_again(evidence: Evidence, phases: tuple[str, ...]) -> None:
    assert doubtful(judge(evidence), evidence.readings) == phases


def test_only_the_device_that_is_in_doubt_is_asked_again() -> None:
    low = one_slow(120 * T)
    found = judge(low)
    assert doubtful(found, [each for each in low.readings if each.device == "cuda:0"]) == ()
    assert doubtful(found, [each for each in low.readings if each.device == "cuda:1"]) == ("product",)


FAULTY = reading("memory", "memory", None, fault="1 byte did not come back")
WHOLE = reading("memory", "memory", 0.88)


@pytest.mark.parametrize(
    ("first", "again", "counts"),
    [
        (SLOW_BF16, reading("product", "product bf16", 260 * T), reading("product", "product bf16", 260 * T)),
        (reading("copy", "copy", 9 * GB), reading("copy", "copy", 8 * GB), reading("copy", "copy", 9 * GB)),
        (reading("loop", "loop", 0.2), reading("loop", "loop", 0.1), reading("loop", "loop", 0.1)),
        (reading("loop", "loop", 0.1), reading("loop", "loop", 0.2), reading("loop", "loop", 0.1)),
        (SLOW_BF16, reading("product", "product bf16", None, why_not="no time"), SLOW_BF16),
        (reading("product", "product bf16", None, why_not="no time"), SLOW_BF16, SLOW_BF16),
        (sustained(9 * T, 5 * T), sustained(8 * T, 7 * T), sustained(8 * T, 7 * T)),
        (FAULTY, replace(FAULTY, fault="2 bytes"), replace(FAULTY, fault="2 bytes")),
        (FAULTY, replace(FAULTY, fault=None, why_not="no time"), FAULTY),  # nothing speaks against the fault
        (replace(FAULTY, fault=None, why_not="no time"), FAULTY, FAULTY),
        (FAULTY, WHOLE, replace(WHOLE, figures={"once": 1.0})),
        (WHOLE, FAULTY, replace(WHOLE, figures={"once": 1.0})),
        (
            reading("numerics", "n", 0.4, limit=0.1),
            reading("numerics", "n", 0.01, limit=0.1),
            reading("numerics", "n", 0.01, limit=0.1, figures={"once": 1.0}),
        ),
        (
            reading("numerics", "n", 0.02, limit=0.1),
            reading("numerics", "n", 0.01, limit=0.1),
            reading("numerics", "n", 0.01, limit=0.1),
        ),
    ],
)
def test_a_reading_that_was_asked_twice(first: Reading, again: Reading, counts: Reading) -> None:
    assert settled(first, again) == counts


def test_what_was_asked_again_stands_in_its_own_place_alone() -> None:
    fine = replace(SLOW_BF16, value=260 * T)
    later, other = replace(SLOW_BF16, round=1), replace(SLOW_BF16, device="cuda:1")
    at_once = replace(SLOW_BF16, probe="together")
    first = (SLOW_BF16, WHOLE, later, other, at_once)
    fp8 = reading("product", "product fp8", 500 * T)
    assert merged(first, [fp8, fine]) == (fine, WHOLE, later, other, at_once, fp8)
    error = reading("numerics", "convolution bf16", 1e-3, limit=5e-3)
    rate = reading("convolution", "convolution bf16", 180 * T)
    assert merged([error, rate], [replace(rate, value=190 * T)]) == (error, replace(rate, value=190 * T))
    assert merged([fine], [SLOW_BF16]) == (fine,), "of two the better counts"
    assert merged(first, []) == first


def test_a_cpu_is_held_against_no_table() -> None:
    slow = [replace(each, value=1e9) for each in CPU_READINGS if each.probe == "product"]
    assert judge(with_readings(FINE_CPU, *slow)) == ()
