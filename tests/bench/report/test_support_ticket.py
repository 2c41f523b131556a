"""Tests the support ticket: it has every fault of the device, and no personal data of the user."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import verdict
from bench.core.validation_records import GpuLoadStats, Validation
from bench.core.verdict import VerdictState
from bench.report import support_ticket
from bench.validate import judge
from provision.core.errors import SpecError
from tests.bench.conftest import a_run
from tests.bench.validation_samples import A100, FINE, READINGS, SLOW_BF16, card, one_slow, validated, with_readings

if TYPE_CHECKING:
    from bench.core.result import Run
    from bench.validate.expectations import Evidence

SECRET = "hf_" + "abcdefghij" * 3
WATCHED = GpuLoadStats(
    clock_mhz_median=1200.0,
    clock_mhz_minimum=900.0,
    temperature_maximum=91.0,
    power_watts_mean=250.0,
    power_limit_watts=400.0,
    throttled={"hardware power brake": 0.6},
)


def run_of(evidence: Evidence, **changes: Any) -> Run:
    """Return the run of a validation that the rules have judged; `changes` replace fields of the run."""
    judgements = judge.judge(evidence)
    validation = Validation(
        cards=evidence.cards,
        before=evidence.before,
        readings=evidence.readings,
        judgements=judgements,
        watched=dict(evidence.watched),
        disturbed=dict(evidence.disturbed),
        software={"torch": "2.9.0"},
    )
    run = replace(validated(2), validation=validation, verdict=verdict.conclude(judgements))
    return replace(run, **({"command": "bench validate --device cuda:0"} | changes))


def test_ticket_of_a_slow_gpu_has_its_rate_and_the_expected_rate_with_its_source() -> None:
    text = support_ticket.text(run_of(with_readings(FINE, SLOW_BF16)))
    assert text.startswith("Subject: NVIDIA A100-SXM4-80GB: faulty\n")
    took = "2026-01-02 03:04:05 UTC in 42 s"
    assert f"Validated {took} by firstlight, run 20260102T030405Z-validate-abcdef: fail." in text
    elsewhere = run_of(with_readings(FINE, SLOW_BF16), started="2026-01-02T05:04:05+02:00")
    assert took in support_ticket.text(elsewhere)
    assert "Faults:\n  - cuda:0: product bf16: 120.0 TFLOP/s is 45% of the expected 264.5 TFLOP/s" in text
    assert "  product bf16: 120.0 TFLOP/s, expected 264.5 TFLOP/s (the median of 1 measured on this kind of" in text
    assert "  product fp16: 270.0 TFLOP/s, expected" in text, "good figures are listed too"
    assert all(line in text for line in ("  uuid: GPU-a100\n", "  driver: 570.86\n", "  with torch 2.9.0\n"))
    assert "How to reproduce it:\n  bench validate --device cuda:0\n  nvidia-smi -q -i GPU-a100\n" in text


def test_ticket_lists_the_errors_and_the_load_that_the_driver_reports() -> None:
    bad = replace(
        card(ecc_uncorrected=5, ecc_corrected=None, xids=(79, 31), pcie_width=8, rows_pending=True, rows_failed=False),
        before=(replace(A100, ecc_uncorrected=2, ecc_corrected=None),),
        watched={"cuda:0": WATCHED},
    )
    text = support_ticket.text(run_of(bad))
    for line in (
        "memory errors, corrected: unknown before, unknown after",
        "memory errors, uncorrectable: 2 before, 5 after",
        "faulty memory to be replaced at the next reset: yes",
        "faulty memory that could not be replaced: no",
        "XIDs during the validation: 79, 31",
        "PCIe under load: generation 4, lanes 8",
        "maximum of PCIe: generation 4, lanes 16",
        "under load: 1200 MHz (lowest 900), highest 91 °C, 250 W, limit 400 W, hardware power brake 60% of the time",
    ):
        assert f"\n  {line}\n" in text


def test_ticket_lists_faults_then_warnings_then_what_could_not_be_judged() -> None:
    text = support_ticket.text(run_of(replace(card(ecc_uncorrected=1, others=1), disturbed={"cuda:0": "busy"})))
    parts = [text.index(title) for title in ("Faults:", "Warnings:", "Could not be judged:")]
    assert parts == sorted(parts)


def test_subject_of_a_ticket_with_only_a_warning_says_warnings() -> None:
    assert support_ticket.text(run_of(card(pcie_width=8))).startswith("Subject: NVIDIA A100-SXM4-80GB: warnings\n")


def test_ticket_describes_only_the_faulty_one_of_two_gpus() -> None:
    text = support_ticket.text(run_of(one_slow(120e12)))
    assert "uuid: GPU-b" in text
    assert "GPU-a100" not in text


def test_ticket_of_a_gpu_that_torch_cannot_use_has_the_cause_and_no_figures() -> None:
    lost = replace(FINE, cards=(), unusable={"cuda:0": "its driver is 470.10"}, readings=(), before=(), watched={})
    text = support_ticket.text(run_of(lost))
    assert text.startswith("Subject: a device that cannot be used: faulty\n")
    assert "cuda:0: torch cannot use it: its driver is 470.10." in text
    assert "\ncuda:0: could not be used\n" in text


@pytest.mark.parametrize(
    ("evidence", "state"),
    [(FINE, VerdictState.PASS), (card(name="NVIDIA GeForce RTX 4080 SUPER"), VerdictState.PASS)],
    ids=["known card", "card without expected values"],
)
def test_ticket_of_a_healthy_host_is_one_sentence(evidence: Evidence, state: VerdictState) -> None:
    assert support_ticket.text(run_of(evidence)) == (
        "There is nothing to report: no fault and no warning on this host "
        f"(20260102T030405Z-validate-abcdef: {state.value}).\n"
    )


def test_ticket_of_a_suite_run_is_rejected() -> None:
    with pytest.raises(SpecError, match="`bench validate` first"):
        support_ticket.text(a_run())


def test_ticket_contains_no_user_path_token_or_host_name() -> None:
    fault = f"RuntimeError in /home/ada/firstlight/bench/probes.py: https://ada:{SECRET}@hub.example/x, box-17.internal"
    broken = with_readings(FINE, replace(READINGS[0], value=None, fault=f"{fault}, /dev/nvidia0 and /proc/self stay"))
    run = run_of(
        broken,
        machine=validated(2).machine | {"hostname": "box-17.internal"},
        command=f"bench validate --root /home/ada/volume --python=~/envs/ada/bin/python --soak 30m --token {SECRET}",
    )
    text = support_ticket.text(run)
    assert not [word for word in ("ada", SECRET, "box-17") if word in text], text
    assert "  bench validate --soak 30m --token hf_…\n" in text
    assert "/dev/nvidia0 and /proc/self stay" in text
    assert "GB/s" in text, "a unit is not taken for a path"
