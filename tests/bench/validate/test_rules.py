"""Tests the rules of rules.toml: evidence that violates each rule is judged by it, and invalid rules are rejected."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core.validation_records import UNABLE, DeviceFacts
from bench.core.verdict import VerdictState, conclude
from bench.gpu import measured, nvml, specs
from bench.gpu.nvml import FAULT_REASONS
from bench.validate import rules
from bench.validate.judge import judge
from provision.config import toml
from provision.core.errors import SpecError
from tests.bench.conftest import a_host
from tests.bench.validation_samples import (
    A100,
    FINE,
    FINE_CPU,
    GB,
    KNOWN,
    OWN,
    READINGS,
    SLOW_BF16,
    TWO,
    T,
    card,
    linked,
    one_slow,
    reading,
    sustained,
    watched,
    with_readings,
)

if TYPE_CHECKING:
    from pathlib import Path

    from bench.validate.expectations import Evidence

PASS, WARN, FAIL, OPEN = VerdictState.PASS, VerdictState.WARN, VerdictState.FAIL, VerdictState.NOT_JUDGED

TOGETHER = reading("together", "product bf16", 201 * T)
# (evidence, the rule that it violates, the verdict, a text in the judgement with its values)
CASES = [
    pytest.param(
        with_readings(FINE, reading("memory", "memory", None, fault="3 bytes did not come back")),
        "fault", FAIL, "memory: 3 bytes did not come back", id="memory error",
    ),
    pytest.param(
        with_readings(FINE, reading("numerics", "attention fp16", None, fault="a NaN", limit=1e-3)),
        "fault", FAIL, "attention fp16: a NaN", id="NaN in a result",
    ),
    pytest.param(
        with_readings(FINE, sustained(255 * T, 252 * T, fault="4 of 90 bursts gave another result")),
        "fault", FAIL, "4 of 90 bursts", id="repeats with different results",
    ),
    pytest.param(
        with_readings(FINE, reading("numerics", "matrix product bf16", 0.4, limit=5e-3)),
        "numerics", FAIL, "has an error of 0.4, but rounding explains at most 0.005", id="wrong matrix product",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("numerics", "matrix product fp32", 2e-5, limit=1e-5, device="cpu")),
        "numerics", FAIL, "has an error of 2e-05", id="wrong product of a CPU",
    ),
    pytest.param(
        with_readings(FINE, reading("memory", "memory", 0.88, figures={"once": 1.0})),
        "passing-fault", WARN, "memory was wrong once", id="fault that does not repeat",
    ),
    pytest.param(
        replace(FINE, unusable={"cuda:1": "it has compute capability 3.5"}),
        "unusable", FAIL, "torch cannot use it: it has compute capability 3.5", id="card that torch cannot use",
    ),
    pytest.param(
        card(ecc_uncorrected=2), "ecc-uncorrectable", FAIL, "driver was loaded: 2",
        id="uncorrectable memory errors",
    ),
    pytest.param(
        replace(card(ecc_uncorrected=5), before=(replace(A100, ecc_uncorrected=2),)),
        "ecc-uncorrectable-growth", FAIL, "errors during the validation: 3", id="new uncorrectable memory errors",
    ),
    pytest.param(
        replace(card(ecc_corrected=9), before=(replace(A100, ecc_corrected=2),)),
        "ecc-corrected-growth", WARN, "errors during the validation: 7", id="new corrected memory errors",
    ),
    pytest.param(
        card(rows_pending=True), "rows-pending", FAIL, "until the next reset",
        id="memory row that waits to be remapped",
    ),
    pytest.param(
        card(rows_failed=True), "rows-failed", FAIL, "could not be replaced",
        id="memory row that cannot be remapped",
    ),
    pytest.param(card(xids=(79, 31)), "xid-hardware", FAIL, "XID 79 during", id="GPU lost from the bus"),
    pytest.param(card(xids=(31, 13)), "xid-application", WARN, "XID 13, 31 during", id="XID of a program"),
    pytest.param(card(xids=(109,)), "xid-application", WARN, "XID 109 during", id="context switch timeout"),
    pytest.param(
        with_readings(FINE, SLOW_BF16),
        "product", FAIL, "120.0 TFLOP/s is 45% of the expected 264.5 TFLOP/s (the median of 1 measured",
        id="slow product without a cause",
    ),
    pytest.param(
        with_readings(FINE, reading("product", "product bf16", 200 * T)),
        "product", WARN, "200.0 TFLOP/s is 76% of the expected 264.5", id="slightly slow product",
    ),
    pytest.param(
        with_readings(FINE, reading("copy", "copy", 900 * GB)),
        "copy", WARN, "900.0 GB/s is 59% of the expected 1529.2 GB/s (75% of the 2039.0 GB/s on the data sheet",
        id="slow memory",
    ),
    pytest.param(
        with_readings(FINE, reading("copy", "copy", 700 * GB)), "copy", FAIL, "46% of",
        id="half of the memory bandwidth",
    ),
    pytest.param(
        with_readings(KNOWN, reading("pinned", "host to device", 6 * GB)),
        "host-copy", WARN, "24% of the expected 25.0 GB/s (its own best, run 1)", id="slower link to the host",
    ),
    pytest.param(
        with_readings(replace(TWO, own=OWN), linked("peer cuda:0 to cuda:1", 12 * GB)),
        "host-copy", WARN, "peer cuda:0 to cuda:1: 12.0 GB/s is 50% of the expected 24.0 GB/s", id="slower peer link",
    ),
    pytest.param(
        with_readings(KNOWN, reading("convolution", "convolution bf16", 90 * T)),
        "convolution", WARN, "50% of the expected 180.0 TFLOP/s", id="slower convolution",
    ),
    pytest.param(
        with_readings(KNOWN, reading("loop", "loop ddpm-cat-256 fp16 batch 4", 0.090)),
        "loop", WARN, "90.0 ms a step, 50% as fast as the expected 45.0 ms", id="slower loop",
    ),
    pytest.param(
        with_readings(FINE, sustained(255 * T, 204 * T)),
        "fade", WARN, "ran at 204.0 TFLOP/s, 80% of the 255.0 TFLOP/s of the first quarter", id="load that slows down",
    ),
    pytest.param(
        replace(FINE, readings=(*READINGS, reading("product", "product bf16", 231 * T, round=1))),
        "drift", WARN, "the last round reached 231.0 TFLOP/s, 86% of the 268.0", id="soak that slows down",
    ),
    pytest.param(
        one_slow(220 * T), "slowest", WARN, "slowest of 2 cards of its model: product bf16 at 220.0 TFLOP/s, 82%",
        id="one of two cards is slow",
    ),
    pytest.param(
        with_readings(FINE, TOGETHER), "together", WARN,
        "product bf16: 201.0 TFLOP/s while all devices work, 75% of the 268.0 TFLOP/s that it reaches alone",
        id="slow with all devices at once",
    ),
    pytest.param(
        with_readings(FINE, reading("together", "host to device", 12 * GB, unit="B/s")), "together-copies", PASS,
        "host to device: 12.0 GB/s while all devices copy, 48% of the 25.0 GB/s that it reaches alone",
        id="two GPUs behind a PCIe switch",
    ),
    pytest.param(
        watched(hardware_thermal_slowdown=0.4), "slowed", WARN, "40% of the time under load (hardware thermal",
        id="throttled by heat",
    ),
    pytest.param(
        watched(clocks_set_by_hand=1.0), "clocks-set", PASS, "set by hand 100% of the",
        id="clocks set by hand",
    ),
    pytest.param(
        card(power_limit_watts=300.0), "power-limit", WARN, "is 300 W, but its default is 400",
        id="power limit below the default",
    ),
    pytest.param(
        card(pcie_generation=1), "pcie-generation", WARN, "generation 1 under load, but 4",
        id="PCIe of an old generation",
    ),
    pytest.param(card(pcie_width=8), "pcie-width", WARN, "has 8 lanes under load, but 16", id="PCIe with few lanes"),
    pytest.param(card(others=2), "others", WARN, "other processes on the card: 2", id="other process on the card"),
    pytest.param(card(persistence=False), "persistence", PASS, "persistence mode is off", id="persistence mode off"),
    pytest.param(
        replace(FINE_CPU, cores=64, cpu_quota=8.0),
        "quota", WARN, "64 cores are visible, but the control group permits the use of 8",
        id="CPU quota",
    ),
    pytest.param(
        replace(FINE, cores=64, cpu_quota=8.0),
        "quota", PASS, "64 cores are visible", id="GPU with a CPU quota",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("threads", "scaling", 0.3, device="cpu")),
        "scaling", WARN, "reach 30% of", id="threads that add little",
    ),
    pytest.param(
        replace(FINE_CPU, hosts={"cpu": a_host(steal_share=0.2)}),
        "steal", WARN, "gave 20% of the CPU time", id="steal time",
    ),
    pytest.param(
        replace(FINE_CPU, disturbed={"cpu": "it had 50% of its 2 threads"}),
        "contended", OPEN, "other work disturbed it: it had 50%", id="disturbed CPU",
    ),
    pytest.param(
        card(name="NVIDIA GeForce RTX 4080 SUPER"), "unknown-card", PASS,
        "NVIDIA GeForce RTX 4080 SUPER: there are no expected values, so its speed is compared only with its own",
        id="4080 SUPER",
    ),
    pytest.param(
        replace(card(driver_sees=False), watched={}), "driver-hidden", OPEN, "(NVML) does not answer",
        id="NVML does not answer",
    ),
    pytest.param(
        card(slice=True, name="NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
        "part-of-a-card", PASS, "a slice of a card (NVIDIA A100-SXM4-80GB MIG 1g.10gb)", id="MIG slice",
    ),
    pytest.param(
        with_readings(
            FINE,
            reading("product", "product bf16", None, why_not="no time"),
            reading("product", "product fp32", None, why_not="no time"),
            reading("numerics", "convolution fp16", None, why_not="no room", limit=1e-3),
        ),
        "missing", OPEN, "not measured: product bf16, product fp32 (no time)", id="readings without a value",
    ),
    pytest.param(
        with_readings(FINE, reading("sustained", "sustained bf16", None, why_not="no time")),
        "missing-part", WARN, "not measured: sustained bf16 (no time)", id="no sustained load",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("numerics", "matrix product fp32", None, device="cpu", why_not="no time")),
        "missing-on-a-cpu", OPEN, "not measured: matrix product fp32 (no time)", id="reading of a CPU without a value",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("memory", "memory", None, device="cpu", why_not="no time")),
        "missing-memory-on-a-cpu", WARN, "not measured: memory (no time)", id="untested memory of a CPU",
    ),
    pytest.param(
        with_readings(FINE, reading("memory", "memory", 0.88, figures={"patterns": 2.0})),
        "untested-memory", OPEN, "memory: 88% of the free memory was tested, with 2 of 4 patterns",
        id="two of four memory patterns",
    ),
    pytest.param(
        with_readings(FINE, reading("memory", "memory", 0.45, figures={"patterns": 4.0})),
        "untested-memory", OPEN, "memory: 45% of the free memory was tested, with 4 of 4 patterns",
        id="half of the memory",
    ),
    pytest.param(
        with_readings(FINE, reading("loop", "process", None, why_not="its host ended it (SIGKILL)\nits last words")),
        "ended", OPEN, "the examination ended early: its host ended it (SIGKILL)", id="worker ended by its host",
    ),
    pytest.param(
        replace(FINE, readings=(reading("product", "product bf16", None, why_not="no kernel", figures={UNABLE: 1.0}),)),
        "unmeasured", OPEN, "has an expected value; no kernel", id="no product measured",
    ),
    pytest.param(replace(FINE_CPU, readings=()), "unmeasured", OPEN, "none of its", id="no product of a CPU measured"),
]  # fmt: skip


@pytest.mark.parametrize(("evidence", "rule", "state", "text"), CASES)
def test_evidence_that_violates_a_rule_has_its_judgement_and_verdict(
    evidence: Evidence, rule: str, state: VerdictState, text: str
) -> None:
    judgements = [judgement for judgement in judge(evidence) if judgement.rule == rule]
    assert [judgement.said for judgement in judgements if text in judgement.said], [
        judgement.said for judgement in judgements
    ]
    assert conclude(judge(evidence)).state is state


def test_each_rule_in_rules_toml_has_a_case_in_this_file() -> None:
    assert {case.values[1] for case in CASES} == set(rules.table())


VALID_RULE = """[r]
kind = "least"
state = "warn"
probes = ["threads"]
below = 0.4
reason = "why"
says = "{name} is at {share:.0%}"
advice = ""
"""
RATE = """[r]
kind = "rate"
state = "fail"
probes = ["product"]
references = ["own"]
warn_below = 0.8
fail_below = 0.6
reason = "why"
says = "{value}"
advice = ""
"""


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (VALID_RULE, "below = 0.4\n", "", "line 1, key r: a rule of the kind least needs below"),
        (VALID_RULE, "below = 0.4", "below = 1.4", "line 5, key r.below"),
        (VALID_RULE, "below = 0.4", "below = 0.4\nabove = 0.1", "above is not a key of the kind least"),
        (VALID_RULE, "{share:.0%}", "{shares:.0%}", "{shares} is not a value of the kind least"),
        (VALID_RULE, '"why"', '""', "line 6, key r.reason"),
        (VALID_RULE, '"least"', '"most"', "line 2, key r.kind"),
        (VALID_RULE, '"warn"', '"worse"', "line 3, key r.state"),
        (VALID_RULE, "probes", "phases", "Known keys: kind, state"),
        (RATE, "fail_below = 0.6\n", "", "a rate has a fail_below if, and only if, its state is fail"),
        (RATE, '"fail"', '"warn"', "a rate has a fail_below if, and only if, its state is fail"),
        (RATE, "fail_below = 0.6", "fail_below = 0.9", "fail_below must be less than warn_below"),
        (RATE, '["own"]', '["sheet"]', "reach is required if the sheet is a reference"),
        (RATE, "fail_below = 0.6", "fail_below = 0.6\nreach = 0.7", "reach is required if the sheet is a reference"),
        (RATE, "fail_below = 0.6", 'fail_below = 0.6\ncapped_as_sold = ["T4"]', "capped_as_sold needs both"),
        (
            RATE,
            "fail_below = 0.6",
            'fail_below = 0.6\ncapped_by = ["heat"]',
            "capped_by and capped_above need each other",
        ),
        (
            RATE,
            "fail_below = 0.6",
            'fail_below = 0.6\ncapped_by = ["heat"]\ncapped_above = 0.1\ncapped_as_sold = ["T4"]\nsold_from = 0.5',
            "capped_as_sold, sold_from and sold_below need each other",
        ),
        (
            RATE,
            "fail_below = 0.6",
            "fail_below = 0.6\nsold_from = 0.5\nsold_below = 0.3",
            "sold_from and sold_below need",
        ),
    ],
)
def test_invalid_rule_is_rejected_with_the_reason(tmp_path: Path, text: str, old: str, new: str, message: str) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(text, encoding="utf-8")
    assert set(toml.load_tables(file, rules.Rule)) == {"r"}
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        toml.load_tables(file, rules.Rule)
    assert message in str(caught.value)


def test_throttle_reasons_in_the_rules_are_reasons_of_nvml() -> None:
    named = {reason for rule in rules.table().values() for reason in (*rule.reasons, *rule.capped_by)}
    assert named <= set(nvml.REASONS.values())
    assert {reason for rule in rules.table().values() for reason in rule.reasons} >= FAULT_REASONS


def test_fields_of_the_rules_are_fields_of_device_facts() -> None:
    fields = {field.name for field in dataclasses.fields(DeviceFacts)}
    assert {name for rule in rules.table().values() for name in (rule.field, rule.most) if name} <= fields


def test_gpus_named_in_the_rules_are_in_the_table_of_gpus() -> None:
    named = {name for rule in rules.table().values() for name in (*rule.capped_as_sold, *rule.reach_of)}
    architectures = {gpu.architecture for gpu in specs.table().values()}
    groups = architectures | {f"{name} {dtype}" for name in architectures for dtype in measured.DTYPES}
    assert named <= set(specs.table()) | groups


def test_share_of_the_data_sheet_that_the_product_rule_expects_was_reached_by_every_measured_card() -> None:
    product = rules.table()["product"]
    for name, gpu in specs.table().items():
        for dtype in measured.DTYPES:
            figures, sheet = measured.find(name, dtype), gpu.flops(dtype)
            if figures is None or sheet is None:
                continue
            keys = (name, f"{gpu.architecture} {dtype}", gpu.architecture)
            reach = next((product.reach_of[key] for key in keys if key in product.reach_of), product.reach)
            assert reach is not None
            assert figures.rates[0] >= reach * sheet, (name, dtype)
