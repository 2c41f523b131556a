"""Tests the Markdown table, the terminal table and the notes of a run."""

from __future__ import annotations

import re

import pytest

from bench.core.result import Memory, Numerics, Phases, Result, Run, Sample, Status
from bench.core.verdict import Verdict, VerdictState
from bench.report import tables
from tests.bench.conftest import a_case, a_host, a_result, a_run, machine

CLEAN = a_result(
    samples=tuple(Sample(2.0, (0.123456,) * 4, 4.0) for _ in range(3)),
    phases=Phases(imports_seconds=4.0, load_seconds=12.3456, first_image_seconds=0.0123456),
)
DISTURBED = a_result(a_case(dtype="bf16"), host=a_host(cpu_share=0.5), weights="real")
SKIPPED = a_result(
    a_case(model="tiny-sd", dtype="fp16"),
    status=Status.SKIPPED,
    reason="predicted 9 s a step, 99 s for the shortest run; the budget leaves 5 s",
    samples=(),
    numerics=None,
    host=None,
)
FAILED = a_result(
    a_case(model="tiny-sd"), status=Status.OOM, reason="killed | for memory\nlast output", samples=(), weights=None
)
REASON = f"{tables.label(FAILED.case)}: killed | for memory"
ALL = (CLEAN, DISTURBED, SKIPPED, FAILED)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture
def run() -> Run:
    return a_run(*ALL, verdict=Verdict(VerdictState.FAIL, (REASON,)))


def table_rows(markdown: str) -> dict[str, list[str]]:
    """Return {label of a case: the cells of its row} of a Markdown table."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {cells[0].removesuffix(", real weights"): cells for cells in split}


def test_markdown_table_has_a_row_with_all_columns_for_each_case(run: Run) -> None:
    rows = table_rows(tables.markdown(run))
    for result in ALL:
        assert len(rows[tables.label(result.case)]) == len(tables.COLUMNS), rows


def test_figures_in_the_table_have_three_digits(run: Run) -> None:
    assert table_rows(tables.markdown(run))[tables.label(CLEAN.case)][1:] == [
        "0.123 ± 0.0%",
        "0.5",
        "12.3",
        "0.0123",
        "1.23 GB",
    ]


def test_row_of_a_case_without_figures_has_the_reason(run: Run) -> None:
    rows = table_rows(tables.markdown(run))
    assert rows[tables.label(SKIPPED.case)][1] == f"skipped: {SKIPPED.reason}"
    assert rows[tables.label(FAILED.case)][1] == r"oom: killed \| for memory"


def test_terminal_table_shows_each_case_and_each_reason(run: Run) -> None:
    shown = tables.terminal(run, color=False, width=160)
    for result in ALL:
        assert tables.label(result.case) in shown
    assert f"skipped {tables.label(SKIPPED.case)}: {SKIPPED.reason}" in shown
    assert REASON in shown


def test_cases_for_which_no_time_was_left_share_one_line_below_the_table() -> None:
    late = [
        a_result(a_case(scheduler=name), status=Status.SKIPPED, reason="the budget leaves 2 s, and", samples=())
        for name in ("ddpm", "euler")
    ]
    shown = tables.terminal(a_run(CLEAN, *late), color=False, width=200)
    (line,) = [line for line in shown.splitlines() if tables.label(late[0].case) in line]
    assert line.startswith("not measured for lack of time")
    assert tables.label(late[1].case) in line
    assert shown.count(tables.label(late[1].case)) == 1


def test_notes_have_the_reason_why_a_dtype_was_left_out() -> None:
    line = "bf16: no kernels on this CPU, about 90 times slower than fp32, left out"
    assert line in tables.notes(a_run(CLEAN, notes=(line,)))


@pytest.mark.parametrize("width", [200, 160, 120, 100, 80])
def test_terminal_table_shows_all_figures_at_every_width_from_80_columns(width: int) -> None:
    long = a_case(
        model="stable-diffusion-v1-5", device="cuda:0", scheduler="dpmpp-karras", steps=20, height=512, width=512
    )
    result = a_result(
        long,
        samples=(Sample(20.0, (0.123456,) * 4, 4.0),) * 3,
        phases=Phases(imports_seconds=4.0, load_seconds=12.3456, first_image_seconds=0.0123456),
    )
    shown = tables.terminal(a_run(result), color=False, width=width)
    for figure in ("0.123", "0.05", "12.3", "0.0123", "1.23"):
        assert figure in shown, f"{figure} is missing:\n{shown}"


def test_output_without_colour_has_no_control_codes_even_if_variables_force_colours(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CI services set these variables to get colours in logs. color=False must override them.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    assert not CONTROL.search(tables.terminal(run, color=False, width=120))
    assert not CONTROL.search(tables.markdown(run))


def test_output_with_colour_has_control_codes(run: Run) -> None:
    assert "\x1b[" in tables.terminal(run, color=True, width=120)


def test_disturbed_case_is_marked_in_the_table_and_explained_in_the_notes(run: Run) -> None:
    rows = table_rows(tables.markdown(run))
    assert rows[tables.label(DISTURBED.case)][1].endswith("!")
    assert not rows[tables.label(CLEAN.case)][1].endswith("!")
    assert tables.ADVICE in tables.notes(run)
    assert "--interleave" in tables.ADVICE
    assert tables.SPINNING in tables.notes(run)
    on_card = a_result(a_case(device="cuda:0"), host=a_host(steal_share=0.5))
    assert tables.SPINNING not in tables.notes(a_run(on_card))
    assert not any(note.startswith("!") for note in tables.notes(a_run(CLEAN)))


def test_notes_say_that_weights_are_random_only_if_a_case_used_such(run: Run) -> None:
    assert any("weights: random" in note for note in tables.notes(run))
    assert not any("weights: random" in note for note in tables.notes(a_run(DISTURBED)))


def test_notes_have_the_verdict_the_number_of_images_and_the_total_time(run: Run) -> None:
    notes = "\n".join(tables.notes(run))
    assert notes.startswith(f"verdict: fail\n  {REASON}\n")
    assert "3 to 3 images per case (median 3)" in notes
    assert "whole run: 42 s" in notes


def test_tables_of_a_run_without_a_measured_case_say_so() -> None:
    run = a_run(SKIPPED, verdict=Verdict(VerdictState.NOT_JUDGED, ("no case was measured",)))
    assert "images per case" not in tables.markdown(run)
    assert "no case was measured" in tables.terminal(run, color=False, width=100)


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (a_result(memory=Memory(host_run_peak_bytes=7_000_000_000)), "7.00 GB"),
        (a_result(memory=Memory(None, 7_000_000_000, 2_000_000_000, 3_210_000_000)), "3.21 GB"),
        (a_result(memory=Memory()), "not readable"),
    ],
    ids=[
        "host peak",
        "device peak",
        "no peak",
    ],
)
def test_peak_memory_in_the_table_is_that_of_the_device_or_else_of_the_host(result: Result, shown: str) -> None:
    assert tables.row(result)[5] == shown


def test_markdown_links_to_the_pictures_that_were_stored(run: Run) -> None:
    other = a_result(numerics=Numerics(finite=True, image=None, image_sha256="1" * 64))
    assert f"![{CLEAN.case.name}](picture.png)" in tables.markdown(run)
    assert "![" not in tables.markdown(a_run(other))


def test_machine_line_names_hardware_and_software_versions() -> None:
    run = a_run(SKIPPED, CLEAN, machine=machine("A CPU", ["H200", "H200"]))
    line = tables.machine_line(run)
    assert line == "A CPU, 2 cores, 8 GB; H200, H200; python 3.11.7, torch 2.9.0, diffusers 0.35.0"
    assert line in tables.markdown(run)


@pytest.mark.parametrize("word", ["[red]", "[/]", "[bold]A[/bold]", ":smile:"])
def test_machine_name_with_brackets_is_printed_unchanged(word: str) -> None:
    shown = tables.terminal(a_run(machine=machine(f"CPU {word}")), color=False, width=160)
    assert f"CPU {word}" in shown
