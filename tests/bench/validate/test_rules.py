"""The rules of verdict.toml: each speaks in its case, and what would be no rule is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core.validation_records import UNABLE, DeviceFacts, VerdictState
from bench.gpu import nvml, specs
from bench.gpu.nvml import FAULT_REASONS
from bench.run.verdict import conclude
from bench.validate import rules
from bench.validate.judge import judge
from bench.validate.rule_checks import judgement
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
# What is seen; the rule that speaks; the whole verdict; words that only the right figures give.
CASES = [
    pytest.param(
        with_readings(FINE, reading("memory", "memory", None, fault="3 bytes did not come back")),
        "fault", FAIL, "memory: 3 bytes did not come back", id="memory",
    ),
    pytest.param(
        with_readings(FINE, reading("numerics", "attention fp16", None, fault="a NaN", limit=1e-3)),
        "fault", FAIL, "attention fp16: a NaN", id="a NaN",
    ),
    pytest.param(
        with_readings(FINE, sustained(255 * T, 252 * T, fault="4 of 90 bursts gave another result")),
        "fault", FAIL, "4 of 90 bursts", id="unequal repeats",
    ),
    pytest.param(
        with_readings(FINE, reading("numerics", "matrix product bf16", 0.4, limit=5e-3)),
        "numerics", FAIL, "is off by 0.4, where rounding explains at most 0.005", id="a wrong product",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("numerics", "matrix product fp32", 2e-5, limit=1e-5, device="cpu")),
        "numerics", FAIL, "is off by 2e-05", id="a wrong product of a CPU",
    ),
    pytest.param(
        with_readings(FINE, reading("memory", "memory", 0.88, figures={"once": 1.0})),
        "passing-fault", WARN, "memory was wrong once", id="a fault that does not repeat",
    ),
    pytest.param(
        replace(FINE, unusable={"cuda:1": "it has compute capability 3.5"}),
        "unusable", FAIL, "torch cannot use it: it has compute capability 3.5", id="no code for the card",
    ),
    pytest.param(card(ecc_uncorrected=2), "ecc-uncorrectable", FAIL, "driver was loaded: 2", id="ECC"),
    pytest.param(
        replace(card(ecc_uncorrected=5), before=(replace(A100, ecc_uncorrected=2),)),
        "ecc-uncorrectable-growth", FAIL, "came while it was validated: 3", id="ECC that grows",
    ),
    pytest.param(
        replace(card(ecc_corrected=9), before=(replace(A100, ecc_corrected=2),)),
        "ecc-corrected-growth", WARN, "corrected while it was validated: 7", id="corrected ECC that grows",
    ),
    pytest.param(card(rows_pending=True), "rows-pending", FAIL, "waits for a reset", id="a row to be remapped"),
    pytest.param(card(rows_failed=True), "rows-failed", FAIL, "could not be replaced", id="a row that stays bad"),
    pytest.param(card(xids=(79, 31)), "xid-hardware", FAIL, "XID 79 while", id="a card that fell off the bus"),
    pytest.param(card(xids=(31, 13)), "xid-application", WARN, "XID 13, 31 while", id="a program's XID"),
    pytest.param(card(xids=(109,)), "xid-application", WARN, "XID 109 while", id="a context that did not switch"),
    pytest.param(
        with_readings(FINE, SLOW_BF16),
        "product", FAIL, "120.0 TFLOP/s is 44% of the 271.2 TFLOP/s that is expected (the best that was measured",
        id="slow without a cause",
    ),
    pytest.param(
        with_readings(FINE, reading("product", "product bf16", 200 * T)),
        "product", WARN, "200.0 TFLOP/s is 74% of the 271.2", id="slowish",
    ),
    pytest.param(
        with_readings(FINE, reading("copy", "copy", 900 * GB)),
        "copy", WARN, "900.0 GB/s is 59% of the 1529.2 GB/s that is expected (75% of the 2039.0 GB/s on the sheet",
        id="slow memory",
    ),
    pytest.param(
        with_readings(FINE, reading("copy", "copy", 700 * GB)), "copy", FAIL, "46% of", id="half of the memory",
    ),
    pytest.param(
        with_readings(KNOWN, reading("pinned", "host to device", 6 * GB)),
        "host-copy", WARN, "24% of the 25.0 GB/s that is expected (its own best, run 1)", id="a slower link",
    ),
    pytest.param(
        with_readings(replace(TWO, own=OWN), linked("peer cuda:0 to cuda:1", 12 * GB)),
        "host-copy", WARN, "peer cuda:0 to cuda:1: 12.0 GB/s is 50% of the 24.0 GB/s", id="a slower peer",
    ),
    pytest.param(
        with_readings(KNOWN, reading("convolution", "convolution bf16", 90 * T)),
        "convolution", WARN, "50% of the 180.0 TFLOP/s", id="a slower convolution",
    ),
    pytest.param(
        with_readings(KNOWN, reading("loop", "loop ddpm-cat-256 fp16 batch 4", 0.090)),
        "loop", WARN, "90.0 ms a step, 50% as fast as the 45.0 ms", id="a slower loop",
    ),
    pytest.param(
        with_readings(FINE, sustained(255 * T, 204 * T)),
        "fade", WARN, "ran at 204.0 TFLOP/s, 80% of the first quarter's 255.0", id="it fades",
    ),
    pytest.param(
        replace(FINE, readings=(*READINGS, reading("product", "product bf16", 231 * T, round=1))),
        "drift", WARN, "the last round gave 231.0 TFLOP/s, 86% of the best round's 268.0", id="a soak that drifts",
    ),
    pytest.param(
        one_slow(220 * T), "slowest", WARN, "slowest of 2 cards of its kind: product bf16 at 220.0 TFLOP/s, 82%",
        id="one of two is slow",
    ),
    pytest.param(
        with_readings(FINE, TOGETHER), "together", WARN,
        "product bf16: 201.0 TFLOP/s while all devices work, 75% of the 268.0 TFLOP/s that it reaches alone",
        id="a host that does not feed all",
    ),
    pytest.param(
        with_readings(FINE, reading("together", "host to device", 12 * GB, unit="B/s")), "together-copies", PASS,
        "host to device: 12.0 GB/s while all devices copy, 48% of the 25.0 GB/s that it reaches alone",
        id="two cards behind a switch",
    ),
    pytest.param(
        watched(hardware_thermal_slowdown=0.4), "slowed", WARN, "40% of the time under load (hardware thermal",
        id="throttled",
    ),
    pytest.param(watched(clocks_set_by_hand=1.0), "clocks-set", PASS, "set by hand 100% of the", id="set clocks"),
    pytest.param(card(power_limit_watts=300.0), "power-limit", WARN, "is 300 W, where its default is 400", id="watts"),
    pytest.param(card(pcie_generation=1), "pcie-generation", WARN, "generation 1 under load, where 4", id="slow link"),
    pytest.param(card(pcie_width=8), "pcie-width", WARN, "has 8 lanes under load, where 16", id="a narrow link"),
    pytest.param(card(others=2), "others", WARN, "other processes on the card: 2", id="somebody else's process"),
    pytest.param(card(persistence=False), "persistence", PASS, "persistence mode is off", id="no persistence"),
    pytest.param(
        replace(FINE_CPU, cores=64, cpu_quota=8.0),
        "quota", WARN, "64 cores are to be seen, and the control group grants 8 of",
        id="the cloud's trap",
    ),
    pytest.param(
        replace(FINE, cores=64, cpu_quota=8.0),
        "quota", PASS, "64 cores are to be seen", id="a card with part of a host",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("threads", "scaling", 0.3, device="cpu")),
        "scaling", WARN, "reach 30% of", id="threads that do not add up",
    ),
    pytest.param(
        replace(FINE_CPU, hosts={"cpu": a_host(steal_share=0.2)}),
        "steal", WARN, "took 20% of the CPU", id="stolen time",
    ),
    pytest.param(
        replace(FINE_CPU, disturbed={"cpu": "it had 50% of its 2 threads"}),
        "contended", OPEN, "not alone: it had 50%", id="a contended CPU",
    ),
    pytest.param(
        card(name="NVIDIA GeForce RTX 4090 D"), "unknown-card", OPEN, "no NVIDIA GeForce RTX 4090 D", id="4090 D",
    ),
    pytest.param(
        replace(card(driver_sees=False), watched={}), "driver-hidden", OPEN, "(NVML) does not answer", id="NVML hidden",
    ),
    pytest.param(
        card(slice=True, name="NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
        "part-of-a-card", OPEN, "a slice of a card (NVIDIA A100-SXM4-80GB MIG 1g.10gb)", id="MIG",
    ),
    pytest.param(
        with_readings(
            FINE,
            reading("product", "product bf16", None, why_not="no time"),
            reading("product", "product fp32", None, why_not="no time"),
            reading("numerics", "convolution fp16", None, why_not="no room", limit=1e-3),
        ),
        "missing", OPEN, "not measured: product bf16, product fp32 (no time)", id="gaps",
    ),
    pytest.param(
        with_readings(FINE, reading("sustained", "sustained bf16", None, why_not="no time")),
        "missing-part", WARN, "not measured: sustained bf16 (no time)", id="no load",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("numerics", "matrix product fp32", None, device="cpu", why_not="no time")),
        "missing-on-a-cpu", OPEN, "not measured: matrix product fp32 (no time)", id="a gap of a CPU",
    ),
    pytest.param(
        with_readings(FINE_CPU, reading("memory", "memory", None, device="cpu", why_not="no time")),
        "missing-memory-on-a-cpu", WARN, "not measured: memory (no time)", id="memory of a CPU",
    ),
    pytest.param(
        with_readings(FINE, reading("memory", "memory", 0.88, figures={"patterns": 2.0})),
        "untested-memory", OPEN, "memory: 88% of what was free was tested, with 2 of 4 patterns", id="two patterns",
    ),
    pytest.param(
        with_readings(FINE, reading("memory", "memory", 0.45, figures={"patterns": 4.0})),
        "untested-memory", OPEN, "memory: 45% of what was free was tested, with 4 of 4 patterns", id="half the memory",
    ),
    pytest.param(
        with_readings(FINE, reading("loop", "process", None, why_not="its host ended it (SIGKILL)\nits last words")),
        "ended", OPEN, "it could not be asked to the end: its host ended it (SIGKILL)", id="ended by its host",
    ),
    pytest.param(
        replace(FINE, readings=(reading("product", "product bf16", None, why_not="no kernel", figures={UNABLE: 1.0}),)),
        "unmeasured", OPEN, "could be held against anything; no kernel", id="nothing measured",
    ),
    pytest.param(replace(FINE_CPU, readings=()), "unmeasured", OPEN, "none of its", id="nothing measured of a CPU"),
]  # fmt: skip


@pytest.mark.parametrize(("evidence", "rule", "state", "words"), CASES)
def test_a_rule_speaks_and_decides(evidence: Evidence, rule: str, state: VerdictState, words: str) -> None:
    spoken = [each for each in judge(evidence) if each.rule == rule]
    assert [each.said for each in spoken if words in each.said], [each.said for each in spoken]
    assert conclude(judge(evidence)).state is state


def test_advice_names_the_setup_command_of_a_checkout() -> None:
    rule = rules.table()["numerics"]
    found = judgement("numerics", rule, "cpu", {"name": "matmul", "value": "2", "limit": "1"})
    assert "(`make setup`)" in found.advice


def test_every_rule_has_its_case() -> None:
    assert {case.values[1] for case in CASES} == set(rules.table())


FINE_RULE = """[r]
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
    ("text", "old", "new", "told"),
    [
        (FINE_RULE, "below = 0.4\n", "", "line 1, key r: a rule of the kind least needs below"),
        (FINE_RULE, "below = 0.4", "below = 1.4", "line 5, key r.below"),
        (FINE_RULE, "below = 0.4", "below = 0.4\nabove = 0.1", "above means nothing to the kind least"),
        (FINE_RULE, "{share:.0%}", "{shares:.0%}", "{shares} is nothing that the kind least tells"),
        (FINE_RULE, '"why"', '""', "line 6, key r.reason"),
        (FINE_RULE, '"least"', '"most"', "line 2, key r.kind"),
        (FINE_RULE, '"warn"', '"worse"', "line 3, key r.state"),
        (FINE_RULE, "probes", "phases", "Known keys: kind, state"),
        (RATE, "fail_below = 0.6\n", "", "a rate that can fail has a fail_below"),
        (RATE, '"fail"', '"warn"', "a rate that can fail has a fail_below"),
        (RATE, "fail_below = 0.6", "fail_below = 0.9", "fail_below lies under warn_below"),
        (RATE, '["own"]', '["sheet"]', "reach is needed where a sheet is a reference"),
        (RATE, "fail_below = 0.6", "fail_below = 0.6\nreach = 0.7", "reach is needed where a sheet is a reference"),
        (RATE, "fail_below = 0.6", 'fail_below = 0.6\ncapped_as_sold = ["T4"]', "capped_as_sold needs both"),
        (RATE, "fail_below = 0.6", 'fail_below = 0.6\ncapped_by = ["heat"]', "capped_by and capped_above go together"),
        (
            RATE,
            "fail_below = 0.6",
            'fail_below = 0.6\ncapped_by = ["heat"]\ncapped_above = 0.1\ncapped_as_sold = ["T4"]\nsold_from = 0.5',
            "capped_as_sold, sold_from and sold_below go together",
        ),
        (
            RATE,
            "fail_below = 0.6",
            "fail_below = 0.6\nsold_from = 0.5\nsold_below = 0.3",
            "sold_from and sold_below go",
        ),
    ],
)
def test_what_is_no_rule_is_refused_by_its_line(tmp_path: Path, text: str, old: str, new: str, told: str) -> None:
    file = tmp_path / "verdict.toml"
    file.write_text(text, encoding="utf-8")
    assert set(toml.load_tables(file, rules.Rule)) == {"r"}
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        toml.load_tables(file, rules.Rule)
    assert told in str(caught.value)


def test_every_reason_that_a_rule_names_is_one_of_the_drivers() -> None:
    named = {reason for rule in rules.table().values() for reason in (*rule.reasons, *rule.capped_by)}
    assert named <= set(nvml.REASONS.values())
    assert {reason for rule in rules.table().values() for reason in rule.reasons} >= FAULT_REASONS


def test_every_field_that_a_rule_names_is_a_cards() -> None:
    fields = {field.name for field in dataclasses.fields(DeviceFacts)}
    assert {name for rule in rules.table().values() for name in (rule.field, rule.most) if name} <= fields


def test_every_card_that_a_rule_names_is_in_the_table() -> None:
    named = {name for rule in rules.table().values() for name in (*rule.capped_as_sold, *rule.reach_of)}
    assert named <= set(specs.table())


def test_the_reach_of_a_sheet_is_the_least_that_the_table_shows() -> None:
    shares = [best / gpu.tflops[dtype] for gpu in specs.table().values() for dtype, best in gpu.measured.items()]
    assert rules.table()["product"].reach == pytest.approx(min(shares), abs=0.005)
