"""Tests the rules with the rates that people have published for real cards, and with all names that drivers report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.core import verdict
from bench.core.errors import Exit
from bench.core.verdict import Judgement, VerdictState, conclude
from bench.gpu import measured
from bench.validate.judge import judge
from tests.bench.validation_samples import FINE, T, card, reading
from tests.conftest import CHECKOUT

ROWS = [
    line.split("\t")
    for line in measured.TABLE.read_text(encoding="utf-8").splitlines()
    if line and not line.startswith(("#", "kind\t"))
]
# Names of cards and slices that drivers report, collected from public logs.
NAMES = (CHECKOUT / "tests/data/cards/names.txt").read_text(encoding="utf-8").splitlines()


def judged(row: list[str], share: float) -> list[Judgement]:
    """Return the judgements on a card whose product rates are this share of the rates in a row, without a power cap."""
    products = [
        reading("product", f"product {dtype}", float(cell) * share * T)
        for dtype, cell in zip(measured.DTYPES, row[1:5], strict=True)
        if cell
    ]
    evidence = replace(card(name=row[0]), readings=tuple(products))
    return [item for item in judge(evidence) if item.rule == "product"]


def test_table_has_119_rows_with_416_rates() -> None:
    assert len(ROWS) == 119, "118 public rows, and our own H100"
    assert sum(bool(cell) for row in ROWS for cell in row[1:5]) == 416


@pytest.mark.parametrize("row", ROWS, ids=[f"{number} {row[0]}" for number, row in enumerate(ROWS)])
def test_card_with_the_rates_of_a_published_row_passes(row: list[str]) -> None:
    items = judged(row, 1.0)
    assert items
    assert {item.state for item in items} == {VerdictState.PASS}, [item.said for item in items]
    assert {item.confidence for item in items} == {"measured"}


def test_card_at_90_percent_of_the_published_rates_is_no_pass_in_95_percent_of_the_rows() -> None:
    found = [any(item.state is not VerdictState.PASS for item in judged(row, 0.9)) for row in ROWS]
    assert sum(found) / len(found) >= 0.95, [row[5] for row, is_found in zip(ROWS, found, strict=True) if not is_found]


def test_card_at_half_of_the_published_rates_fails() -> None:
    for row in ROWS:
        assert VerdictState.FAIL in {item.state for item in judged(row, 0.5)}, row


@pytest.mark.parametrize("name", NAMES)
def test_healthy_card_of_any_name_passes(name: str) -> None:
    # The other readings are those of an A100; products and copies, which are compared by model, are replaced.
    healthy = card(FINE, name=name, slice=any(word in name for word in ("MIG", "GRID", "vGPU")) or None)
    fine = replace(healthy, readings=tuple(item for item in FINE.readings if item.probe not in {"product", "copy"}))
    figures = [
        reading("product", f"product {dtype}", kind.median)
        for dtype in ("fp32", "fp16", "bf16")
        if (kind := measured.find(name, dtype)) is not None
    ]
    products = figures or [reading("product", "product fp16", 1000 * T)]
    copy = reading("copy", "copy", 9e12)
    result = conclude(judge(replace(fine, readings=(*fine.readings, *products, copy))))
    assert (result.state, verdict.exit_code(result)) == (VerdictState.PASS, Exit.GOOD), result.reasons


def test_list_of_names_has_104_lines() -> None:
    assert len(NAMES) == 104
