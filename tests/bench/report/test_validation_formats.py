"""Tests the formats of a validation: table, Markdown, page, CSV and ticket."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import verdict
from bench.core.codec import dumps, loads, plain
from bench.core.result import Run
from bench.core.validation_records import CUT, DeviceFacts, GpuLoadStats, Reading
from bench.report import export, formats, json_schema, terminal, validation_tables
from bench.validate import judge
from bench.validate.expectations import TOGETHER
from bench.validate.reading_checks import ONCE
from provision.core.errors import SpecError
from tests.bench.conftest import a_run
from tests.bench.report.test_export import fits
from tests.bench.validation_samples import (
    A100,
    CPU,
    FINE,
    READINGS,
    SLOW_BF16,
    T,
    card,
    reading,
    validated,
    with_readings,
)
from tests.bench.validation_samples import A100 as HEALTHY

if TYPE_CHECKING:
    from pathlib import Path

    from bench.validate.expectations import Evidence

SIZES = {"tested_bytes": 35e9, "free_bytes": 70e9}


def run_of(evidence: Evidence, **changes: Any) -> Run:
    """Return the run of a validation that the rules have judged; `changes` replace fields of the validation."""
    judgements = judge.judge(evidence)
    fields = {"watched": dict(evidence.watched), "judgements": judgements, "seconds": {"product": 9.04, "copy": 3.0}}
    run = validated(2, *evidence.readings, card=evidence.cards[0], **fields | changes)
    return replace(run, verdict=verdict.conclude(judgements))


def cells(run: Run, name: str) -> tuple[str, ...]:
    """Return the cells of the row of the reading with this name."""
    (row,) = [row for row in validation_tables.rows(run) if row[1] == name]
    return row


def test_row_of_a_reading_has_its_value_and_expected_figure_with_source_and_share() -> None:
    run = run_of(with_readings(FINE, SLOW_BF16))
    assert cells(run, "product bf16") == ("cuda:0", "product bf16", "120.0 TFLOP/s", "264.5 TFLOP/s (measured)", "45%")
    assert cells(run, "copy")[3:] == ("1529.2 GB/s (sheet)", "111%")
    assert cells(run, "convolution bf16")[3:] == ("", ""), "no table has an expected figure"
    assert cells(run, "matrix product bf16")[2:] == ("off by 1.1e-03", "at most 5.0e-03", "")


@pytest.mark.parametrize(
    ("reading_", "text"),
    [
        (reading("memory", "memory", None, fault="1 word\nand more"), "FAULT: 1 word"),
        (reading("product", "product bf16", 120 * T, figures={CUT: 1.0}), "at least 120.0 TFLOP/s"),
        (
            reading("memory", "memory", 0.5, figures={"tested_bytes": 35e9, "free_bytes": 70e9}),
            "35.0 of 70.0 GB free, no error",
        ),
        (reading("product", "product fp8", None, why_not="no kernel"), "no value: no kernel"),
        (reading("product", "process", None, figures={ONCE: 1.0}), "wrong once, right when it was repeated"),
        (reading("threads", "scaling", 0.5), "50%"),
        (reading("loop", "loop", 0.045), "45.0 ms a step"),
    ],
)
def test_reading_is_printed_as_fault_or_lower_bound_or_reason_or_value_with_unit(reading_: Reading, text: str) -> None:
    assert validation_tables.figure_text(reading_) == text


def test_notes_list_the_worst_judgement_first_with_its_advice() -> None:
    run = run_of(replace(with_readings(card(persistence=False, power_limit_watts=300.0), SLOW_BF16)))
    lines = validation_tables.notes(run)
    assert lines[0] == "verdict: fail"
    assert lines[1].startswith("  fail, cuda:0: product bf16: 120.0 TFLOP/s is 45%")
    assert "ticket" in lines[2]
    warned = next(n for n, line in enumerate(lines) if line.startswith("  warn, cuda:0: its power limit is 300 W"))
    remark = lines.index("  cuda:0: persistence mode is off: the first process on the card waits for its driver")
    assert 2 < warned < remark
    assert "seconds a phase: product 9.0, copy 3.0" in lines
    assert lines[-1] == "whole run: 42 s"


def test_line_of_a_card_has_driver_power_limit_link_and_memory_errors() -> None:
    assert validation_tables.card_line(HEALTHY) == (
        "cuda:0: NVIDIA A100-SXM4-80GB, driver 570.86, power limit 400 W, PCIe 4 x16, "
        "ECC on, 0 corrected and 0 uncorrectable errors"
    )
    assert "XID 48, 63" in validation_tables.card_line(replace(HEALTHY, xids=(48, 63)))
    assert validation_tables.card_line(replace(HEALTHY, ecc=False)).endswith("ECC off")
    assert validation_tables.card_line(DeviceFacts("cuda:0", "A card")).endswith("NVML does not list it")
    assert validation_tables.card_line(CPU) == ""


def test_notes_have_clock_temperature_power_and_throttling_under_load() -> None:
    load = GpuLoadStats(clock_mhz_median=1410, clock_mhz_minimum=1300, temperature_maximum=61, power_watts_mean=395.2)
    run = validated(
        2, watched={"cuda:0": replace(load, throttled={"software power cap": 0.25}), "cuda:1": GpuLoadStats()}
    )
    lines = validation_tables.notes(run)
    slowed = "slowed by software power cap 25% of the time"
    assert f"cuda:0 under load: 1410 MHz (median), lowest 1300 MHz, highest 61 °C, 395 W (mean), {slowed}" in lines
    assert "cuda:1 under load: no data" in lines
    unreported = validated(2, watched={"cuda:0": GpuLoadStats(clock_mhz_median=1410, reasons_told=False)})
    assert "cuda:0 under load: 1410 MHz (median), throttle reasons are not reported" in validation_tables.notes(
        unreported
    )


def test_soak_rounds_are_summarized_in_the_notes_and_are_not_in_the_table() -> None:
    rounds = [
        replace(each, round=number)
        for number, value in enumerate((250 * T, 240 * T, 245 * T), 1)
        for each in (
            reading("product", "product bf16", value),
            reading("memory", "memory", 0.88, figures={"tested_bytes": 7e10}),
        )
    ]
    run = validated(2, *READINGS, *rounds, soak_seconds=1800.4)
    assert len(validation_tables.rows(run)) == len(READINGS)
    lines = validation_tables.notes(run)
    assert "soak: 3 rounds in 1800 s" in lines
    assert "  cuda:0 product bf16: 240.0 TFLOP/s to 250.0 TFLOP/s, last 245.0 TFLOP/s" in lines
    assert "  cuda:0 memory: 210 GB tested in all" in lines
    assert not any("soak" in line for line in validation_tables.notes(validated(2)))


def test_row_of_a_reading_with_all_devices_at_once_says_so() -> None:
    run = validated(2, reading("product", "product bf16", 250 * T), reading(TOGETHER, "product bf16", 200 * T))
    assert [row[1] for row in validation_tables.rows(run)] == ["product bf16", "product bf16, all at once"]


@pytest.mark.parametrize("form", ["terminal", "markdown", "html"])
def test_terminal_markdown_and_html_contain_every_reading_and_note(form: str, tmp_path: Path) -> None:
    run = run_of(with_readings(FINE, SLOW_BF16))
    text = formats.FORMS[form](run, formats.ReportContext(tmp_path))
    flat = " ".join(text.replace("&gt;", ">").replace("&#39;", "'").split())
    for row in validation_tables.rows(run):
        assert all(" ".join(cell.split()) in flat for cell in row)
    assert all(" ".join(note.split()) in flat for note in validation_tables.notes(run))


def test_column_separator_in_a_reason_is_escaped_in_markdown(tmp_path: Path) -> None:
    run = validated(2, reading("product", "product bf16", None, why_not="a | b"))
    assert "a \\| b" in formats.markdown(run, formats.ReportContext(tmp_path))


def test_csv_of_a_validation_has_a_row_for_each_reading() -> None:
    run = run_of(FINE)
    assert run.validation is not None
    rows = list(csv.DictReader(io.StringIO(export.readings_csv(run.validation))))
    assert [(row["name"], float(row["value"])) for row in rows] == [(each.name, each.value) for each in READINGS]
    assert json.loads(rows[0]["samples"]) == [1.1e-3]
    assert json.loads(rows[9]["figures"])["unequal"] == 0


@pytest.mark.parametrize(
    ("form", "changes"),
    [("pytest-benchmark", {}), ("csv", {"cost": 2.5}), ("html", {"cost": 2.5}), ("html", {"baseline": a_run()})],
)
def test_format_or_option_that_is_only_for_suite_runs_is_rejected_for_a_validation(
    form: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="is a validation"):
        formats.FORMS[form](run_of(FINE), formats.ReportContext(tmp_path, **changes))


def test_ticket_format_accepts_a_validation_and_rejects_a_suite_run(tmp_path: Path) -> None:
    assert "120.0 TFLOP/s" in formats.ticket(run_of(with_readings(FINE, SLOW_BF16)), formats.ReportContext(tmp_path))
    with pytest.raises(SpecError, match="is not a validation"):
        formats.ticket(a_run(), formats.ReportContext(tmp_path))


def test_written_validation_is_read_back_equal_and_fits_the_json_schema() -> None:
    run = run_of(with_readings(FINE, SLOW_BF16))
    assert loads(dumps(run), Run) == run
    kind = json_schema.of_run()
    assert fits(plain(run), kind, kind["$defs"])


def test_terminal_format_of_a_validation_with_no_color_has_no_control_codes(tmp_path: Path) -> None:
    assert terminal.color_and_width(no_color=True)[0] is False
    assert "\x1b" not in formats.terminal(run_of(FINE), formats.ReportContext(tmp_path, no_color=True))
    assert A100.device in formats.terminal(run_of(FINE), formats.ReportContext(tmp_path))
