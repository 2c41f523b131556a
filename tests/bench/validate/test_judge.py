"""Tests the judgement of typical devices, and which of two readings of the same thing counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.core import verdict
from bench.core.errors import Exit
from bench.core.validation_records import DeviceFacts, Reading
from bench.core.verdict import Judgement, Verdict, VerdictState, conclude
from bench.validate.expectations import Evidence, Expected
from bench.validate.judge import judge, phases_to_repeat
from bench.validate.merge_readings import merge, settle
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


def judgements_of(evidence: Evidence, rule: str) -> list[Judgement]:
    return [item for item in judge(evidence) if item.rule == rule]


@pytest.mark.parametrize("evidence", [FINE, KNOWN, FINE_CPU], ids=["GPU", "GPU with earlier runs", "CPU"])
def test_healthy_device_passes_without_reasons(evidence: Evidence) -> None:
    assert verdict_of(evidence) == Verdict(PASS)


def test_judgement_of_a_good_value_names_the_source_of_the_expected_value() -> None:
    (bf16,) = [item for item in judgements_of(FINE, "product") if "bf16" in item.said]
    assert (bf16.state, bf16.value, bf16.expected, bf16.confidence) == (PASS, 268 * T, 264.53 * T, "measured")
    assert "the median of 1 measured on this kind of card (one figure; a100 sxm4 in bench/gpu" in str(bf16.source)
    a10 = card(name="NVIDIA A10")
    (fp32,) = [item for item in judgements_of(a10, "product") if "fp32" in item.said]
    assert fp32.expected == pytest.approx(0.61 * 31.2 * T)
    assert fp32.confidence == "sheet"
    assert "61% of the 31.2 TFLOP/s on the data sheet of the A10" in str(fp32.source)


def test_low_rate_of_a_t4_is_excused_by_its_power_cap_within_limits() -> None:
    assert verdict_of(watched(T4_CAPPED, software_power_cap=1.0)).state is PASS
    fp16 = replace(T4_CAPPED, readings=(reading("product", "product fp16", 18 * T),))
    assert verdict_of(watched(fp16, software_power_cap=1.0)).state is PASS, "69 % of the figure at 70 W"
    assert verdict_of(watched(fp16)).state is FAIL, "43 % of the measured figures, and no power cap was active"
    slower = with_readings(fp16, reading("product", "product fp16", 38 * T))
    assert verdict_of(watched(slower)).state is WARN
    third = with_readings(fp16, reading("product", "product fp16", 9 * T))
    assert verdict_of(watched(third, software_power_cap=1.0)).state is WARN, (
        "the power cap does not explain a third of the figure"
    )
    assert verdict_of(watched(third)).state is FAIL


def test_t4_that_slows_down_under_load_passes_only_if_its_power_cap_was_active() -> None:
    fading = with_readings(T4_CAPPED, sustained(30 * T, 22 * T))
    assert verdict_of(watched(fading, software_power_cap=0.9)).state is PASS
    assert verdict_of(watched(fading, hardware_slowdown=0.9)).state is WARN


@pytest.mark.parametrize(
    ("name", "value", "cap", "state"),
    [
        ("Tesla T4", 18 * T, 0.6, PASS),
        (
            "Tesla T4",
            14 * T,
            0.6,
            PASS,
        ),  # 54 % of the figure: below the limit of failure, but the cap at 70 W explains it
        ("Tesla T4", 14 * T, 0.4, WARN),  # the cap was active less than half of the time
        ("Tesla T4", 9 * T, 1.0, WARN),
        ("Tesla T4", 14 * T, 0.0, FAIL),
        ("NVIDIA A10", 40 * T, 1.0, WARN),  # an A10 does not reach its power limit by design
    ],
)
def test_low_rate_is_excused_by_a_power_cap_of_the_model_within_limits(
    name: str, value: float, cap: float, state: VerdictState
) -> None:
    low = replace(T4_CAPPED, cards=(replace(T4, name=name),), readings=(reading("product", "product fp16", value),))
    assert verdict_of(watched(low, software_power_cap=cap)).state is state


@pytest.mark.parametrize(("cap", "count"), [(0.9, 0), (0.4, 1), (0.0, 1)])
def test_drift_of_a_t4_in_a_soak_is_reported_only_if_its_power_cap_was_mostly_inactive(cap: float, count: int) -> None:
    later = [reading("product", "product fp16", value * T, round=number) for number, value in ((1, 24), (2, 19))]
    soaked = replace(T4_CAPPED, readings=(*T4_CAPPED.readings, *later))
    assert len(judgements_of(watched(soaked, software_power_cap=cap), "drift")) == count


def test_low_rate_with_clocks_set_by_hand_is_a_warning() -> None:
    slow = with_readings(watched(clocks_set_by_hand=1.0), SLOW_BF16, reading("copy", "copy", 700 * GB))
    assert {item.state for item in judge(slow) if item.rule in {"product", "copy"}} == {WARN, PASS}
    (bf16,) = [item for item in judgements_of(slow, "product") if "bf16" in item.said]
    assert "clocks set by hand 100% of the time" in bf16.said
    assert not judgements_of(slow, "slowed"), "clocks set by hand are not a fault of the GPU"


@pytest.mark.parametrize("reported", [False, None])
def test_low_rate_is_not_judged_if_the_driver_does_not_report_throttle_reasons(reported: bool | None) -> None:
    silent = replace(with_readings(FINE, SLOW_BF16), watched={"cuda:0": replace(CALM, reasons_told=reported)})
    (bf16,) = [item for item in judgements_of(silent, "product") if "bf16" in item.said]
    assert bf16.state is OPEN
    assert "does not report throttle reasons" in bf16.said
    fine = replace(FINE, watched={"cuda:0": replace(CALM, reasons_told=reported)})
    assert verdict_of(fine).state is PASS, "a good value is judged without throttle reasons"


def test_low_rate_of_a_throttled_a100_is_a_warning() -> None:
    hot = with_readings(watched(hardware_thermal_slowdown=0.6), SLOW_BF16)
    judgements = verdict_of(hot)
    assert judgements.state is WARN
    assert any(
        "45% of the expected 264.5 TFLOP/s" in item and "hardware thermal slowdown 60%" in item
        for item in judgements.reasons
    )
    capped = with_readings(watched(software_power_cap=0.9), SLOW_BF16)
    assert verdict_of(capped).state is WARN, (
        "a power cap is not a fault, but an A100 does not reach its power limit by design"
    )


def test_low_rate_with_another_process_on_the_card_is_a_warning() -> None:
    assert verdict_of(with_readings(card(others=1), SLOW_BF16)).state is WARN
    seen = replace(with_readings(FINE, SLOW_BF16), watched={"cuda:0": replace(CALM, others=1)})
    assert verdict_of(seen).state is WARN


def test_low_rate_is_not_judged_if_the_clocks_cannot_be_read() -> None:
    unseen = with_readings(replace(FINE, watched={}), SLOW_BF16)
    (bf16,) = [item for item in judgements_of(unseen, "product") if "bf16" in item.said]
    assert bf16.state is OPEN
    assert "its clocks cannot be read" in bf16.said
    hidden = with_readings(replace(card(driver_sees=False), watched={"cuda:0": CALM}), SLOW_BF16)
    assert verdict_of(hidden).state is OPEN


def test_low_rate_of_a_device_disturbed_by_other_work_is_not_judged() -> None:
    busy = with_readings(
        replace(FINE, disturbed={"cuda:0": "its threads waited"}), SLOW_BF16, sustained(255 * T, 1 * T)
    )
    assert {item.state for item in judgements_of(busy, "product")} == {OPEN, PASS}
    assert verdict_of(busy).state is OPEN
    assert not judgements_of(busy, "fade")
    slow = replace(with_readings(FINE_CPU, reading("threads", "scaling", 0.3, device="cpu")), disturbed={"cpu": "busy"})
    assert not judgements_of(slow, "scaling")


def test_memory_fault_of_a_device_disturbed_by_other_work_fails() -> None:
    wrong = with_readings(FINE_CPU, reading("memory", "memory", None, device="cpu", fault="1 byte"))
    assert verdict_of(replace(wrong, disturbed={"cpu": "it had 50%"})).state is FAIL


def test_low_rate_against_an_unconfirmed_expected_value_is_a_warning_and_no_failure() -> None:
    a800 = with_readings(card(name="NVIDIA A800 80GB PCIe"), SLOW_BF16)
    (bf16,) = [item for item in judgements_of(a800, "product") if "bf16" in item.said]
    assert (bf16.state, bf16.confidence) == (WARN, "unchecked")
    assert "which is not confirmed by a source" in bf16.said


def test_expected_value_is_the_best_value_of_the_same_gpu_or_else_that_of_the_table() -> None:
    slower = with_readings(KNOWN, reading("product", "product bf16", 225 * T))
    (bf16,) = [item for item in judgements_of(slower, "product") if "bf16" in item.said]
    assert (bf16.state, bf16.expected, bf16.confidence) == (WARN, 268 * T, "own")
    other = replace(slower, own={("GPU-other", name): best for (_, name), best in OWN.items()})
    (bf16,) = [item for item in judgements_of(other, "product") if "bf16" in item.said]
    assert (bf16.expected, bf16.confidence) == (264.53 * T, "measured"), "the best value of another GPU is not used"


def test_best_value_of_the_same_gpu_below_the_limit_of_the_table_is_not_used() -> None:
    low = replace(FINE, own={("GPU-a100", "product bf16"): Expected(121 * T, "its own best value, run 1", "own")})
    assert verdict_of(with_readings(low, SLOW_BF16)).state is FAIL
    # Exceptions: a GPU that reaches its power limit by design, and one whose figure in the table is unconfirmed.
    l4 = replace(A100, name="NVIDIA L4", uuid="GPU-l4")
    own = {("GPU-l4", "product bf16"): Expected(60 * T, "its own best value, run 1", "own")}
    evidence = replace(FINE, cards=(l4,), own=own, readings=(reading("product", "product bf16", 59 * T),))
    assert {item.confidence for item in judgements_of(evidence, "product")} == {"own"}
    a800 = replace(low, cards=(replace(A100, name="NVIDIA A800 80GB PCIe"),))
    (bf16,) = [item for item in judgements_of(a800, "product") if "bf16" in item.said]
    assert bf16.confidence == "own"


def test_gpu_without_an_entry_in_the_table_has_no_expected_values() -> None:
    unknown = card(name="NVIDIA GeForce RTX 4080 SUPER")
    assert not [item for item in judge(unknown) if item.expected is not None and item.unit]
    assert [item.rule for item in judge(unknown)] == ["unknown-card"]


def test_slice_of_a_gpu_has_no_expected_values() -> None:
    part = card(KNOWN, slice=True)
    assert [item.rule for item in judge(part)] == ["part-of-a-card"]


def test_slow_sampling_loop_at_batch_1_is_not_judged() -> None:
    slow = with_readings(KNOWN, reading("loop", "loop ddpm-cat-256 fp16 batch 1", 0.2))
    assert verdict_of(slow).state is PASS


def test_slowest_of_two_healthy_gpus_of_a_model_passes() -> None:
    (judgements,) = judgements_of(one_slow(266 * T), "slowest")
    assert (judgements.device, judgements.state) == ("cuda:1", PASS)
    mixed = replace(TWO, cards=(A100, replace(A100, device="cuda:1", name="Tesla T4")))
    assert not judgements_of(mixed, "slowest"), "different models are not compared"


def test_readings_with_all_gpus_at_once_do_not_count_as_drift() -> None:
    at_once = tuple(replace(item, probe="together", value=(item.value or 0.0) * 0.85) for item in TWO.readings)
    judgements = judge(replace(TWO, readings=TWO.readings + at_once))
    assert {item.rule for item in judgements if item.state is not PASS} == {"together"}
    assert not judgements_of(replace(TWO, readings=at_once), "together"), "there is no value of one GPU alone"
    busy = replace(TWO, readings=TWO.readings + at_once, disturbed={"cuda:0": "busy", "cuda:1": "busy"})
    assert not judgements_of(busy, "together")


def test_drift_of_several_gpus_is_the_change_between_soak_rounds() -> None:
    rounds = [[replace(item, round=number) for item in one_slow(230 * T).readings] for number in (1, 2)]
    soaked = replace(TWO, readings=(*TWO.readings, *rounds[0], *rounds[1]))
    assert not judgements_of(soaked, "drift"), "both rounds have the speed of two GPUs at once"
    later = reading("product", "product bf16", 200 * T, device="cuda:1", round=3)
    (judgements,) = judgements_of(replace(soaked, readings=(*soaked.readings, later)), "drift")
    assert (judgements.device, judgements.value, judgements.expected) == ("cuda:1", 200 * T, 230 * T)


def test_gpu_that_is_slow_only_while_the_others_work_is_a_warning_that_names_it() -> None:
    slow = reading("together", "product bf16", 100 * T, device="cuda:1")
    at_once = replace(TWO, readings=(*TWO.readings, reading("together", "product bf16", 250 * T), slow))
    (judgements,) = judgements_of(at_once, "slowest")
    assert (judgements.device, judgements.state, judgements.value, judgements.expected) == (
        "cuda:1",
        WARN,
        100 * T,
        250 * T,
    )
    assert "product bf16, all at once at 100.0 TFLOP/s" in judgements.said


def test_gpus_are_compared_with_each_other_by_matrix_products_only() -> None:
    slow = reading("together", "host to device", 9 * GB, unit="B/s", device="cuda:1")
    at_once = replace(TWO, readings=(*TWO.readings, replace(slow, device="cuda:0", value=25 * GB), slow))
    (judgements,) = judgements_of(at_once, "slowest")
    assert "product" in judgements.said
    assert judgements.state is PASS


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
def test_loss_of_speed_with_all_devices_at_once_is_a_warning_for_computations_only(
    name: str, unit: str, value: float, state: VerdictState | None
) -> None:
    at_once = with_readings(FINE, reading("together", name, value, unit=unit))
    judgements = [item for item in judge(at_once) if item.rule.startswith("together")]
    assert [item.state for item in judgements] == ([state] if state is not None else [])
    assert verdict_of(at_once).state is (WARN if state is WARN else PASS)


def test_gpu_facts_that_the_driver_does_not_report_are_not_judged() -> None:
    silent = replace(FINE, cards=(DeviceFacts("cuda:0", A100.name, driver_sees=True),))
    assert verdict_of(silent).state is PASS


def test_worst_judgement_decides_the_verdict_and_is_its_first_reason() -> None:
    both = replace(card(others=1, ecc_uncorrected=1), disturbed={"cuda:0": "busy"})
    judgements = verdict_of(both)
    assert judgements.state is FAIL
    assert [reason.partition(".")[0] for reason in judgements.reasons] == [
        "cuda:0: uncorrectable memory errors since its driver was loaded: 1",
        "cuda:0: other work disturbed it: busy",
        "cuda:0: other processes on the card: 1",
    ]
    assert "ask for another card" in judgements.reasons[0], "the advice"
    assert [verdict.exit_code(Verdict(state)) for state in (PASS, WARN, FAIL, OPEN)] == [
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
        # A repetition would not change these, so no phase is repeated.
        (card(ecc_uncorrected=2, others=1), ()),
        (card(name="NVIDIA GeForce RTX 4080 SUPER"), ()),
    ],
    ids=["good", "slow", "no clocks", "slow, memory fault", "wrong", "fading", "slow loop", "ECC", "new card"],
)
def test_phases_whose_judgement_may_change_are_repeated(evidence: Evidence, phases: tuple[str, ...]) -> None:
    assert phases_to_repeat(judge(evidence), evidence.readings) == phases


def test_phases_are_repeated_only_on_the_device_that_was_slow() -> None:
    low = one_slow(120 * T)
    judgements = judge(low)
    assert phases_to_repeat(judgements, [item for item in low.readings if item.device == "cuda:0"]) == ()
    assert phases_to_repeat(judgements, [item for item in low.readings if item.device == "cuda:1"]) == ("product",)


FAULTY = reading("memory", "memory", None, fault="1 byte did not come back")
TESTED = reading("memory", "memory", 0.88)


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
        (FAULTY, replace(FAULTY, fault=None, why_not="no time"), FAULTY),  # a missing value contradicts no fault
        (replace(FAULTY, fault=None, why_not="no time"), FAULTY, FAULTY),
        (FAULTY, TESTED, replace(TESTED, figures={"once": 1.0})),
        (TESTED, FAULTY, replace(TESTED, figures={"once": 1.0})),
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
def test_better_reading_counts_and_a_single_fault_is_marked(first: Reading, again: Reading, counts: Reading) -> None:
    assert settle(first, again) == counts


def test_merge_replaces_only_readings_of_the_same_probe_name_device_and_round() -> None:
    fine = replace(SLOW_BF16, value=260 * T)
    later, other = replace(SLOW_BF16, round=1), replace(SLOW_BF16, device="cuda:1")
    at_once = replace(SLOW_BF16, probe="together")
    first = (SLOW_BF16, TESTED, later, other, at_once)
    fp8 = reading("product", "product fp8", 500 * T)
    assert merge(first, [fp8, fine]) == (fine, TESTED, later, other, at_once, fp8)
    error = reading("numerics", "convolution bf16", 1e-3, limit=5e-3)
    rate = reading("convolution", "convolution bf16", 180 * T)
    assert merge([error, rate], [replace(rate, value=190 * T)]) == (error, replace(rate, value=190 * T))
    assert merge([fine], [SLOW_BF16]) == (fine,), "the better of two values counts"
    assert merge(first, []) == first


def test_slow_products_of_a_cpu_are_not_judged() -> None:
    slow = [replace(item, value=1e9) for item in CPU_READINGS if item.probe == "product"]
    assert judge(with_readings(FINE_CPU, *slow)) == ()
