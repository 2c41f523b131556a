"""Holds the products that people measured on real cards, and all names of drivers, against the rules."""

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
# Names that drivers report, of cards and slices, collected from public logs.
NAMES = (CHECKOUT / "tests/data/cards/names.txt").read_text(encoding="utf-8").splitlines()


def judged(row: list[str], share: float) -> list[Judgement]:
    """Return the judgements on the products of a row, each at this share of its figure, on an uncapped card."""
    products = [
        reading("product", f"product {dtype}", float(cell) * share * T)
        for dtype, cell in zip(measured.DTYPES, row[1:5], strict=True)
        if cell
    ]
    evidence = replace(card(name=row[0]), readings=tuple(products))
    return [item for item in judge(evidence) if item.rule == "product"]


def test_all_public_figures_are_in_the_table() -> None:
    assert len(ROWS) == 119, "118 public rows, and our own H100"
    assert sum(bool(cell) for row in ROWS for cell in row[1:5]) == 416


@pytest.mark.parametrize("row", ROWS, ids=[f"{number} {row[0]}" for number, row in enumerate(ROWS)])
def test_healthy_card_with_public_figures_is_not_warned(row: list[str]) -> None:
    items = judged(row, 1.0)
    assert items
    assert {item.state for item in items} == {VerdictState.PASS}, [item.said for item in items]
    assert {item.confidence for item in items} == {"measured"}


def test_card_that_is_a_tenth_too_slow_is_warned() -> None:
    found = [any(item.state is not VerdictState.PASS for item in judged(row, 0.9)) for row in ROWS]
    assert sum(found) / len(found) >= 0.95, [row[5] for row, is_found in zip(ROWS, found, strict=True) if not is_found]


def test_card_at_half_its_speed_fails() -> None:
    for row in ROWS:
        assert VerdictState.FAIL in {item.state for item in judged(row, 0.5)}, row


@pytest.mark.parametrize("name", NAMES)
def test_healthy_card_of_any_name_gets_a_verdict(name: str) -> None:
    # The readings are those of an A100, so only the rules that do not compare them with another card are looked at.
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


def test_names_are_104() -> None:
    assert len(NAMES) == 104
