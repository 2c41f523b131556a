"""Tests that the commands, flags, make targets and paths that a document names exist."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.conftest import CHECKOUT
from tests.docs import markdown, programs

if TYPE_CHECKING:
    from pathlib import Path

EACH = pytest.mark.parametrize("document", markdown.DOCUMENTS, ids=map(markdown.name_of, markdown.DOCUMENTS))
FOLDERS = ("provision", "bench", "envs", "examples", "docs", "tests")


@EACH
def test_command_lines_of_a_document_name_existing_commands_flags_and_make_targets(document: Path) -> None:
    faults = {line: programs.faults(line) for line in markdown.command_lines(document)}
    assert {line: fault for line, fault in faults.items() if fault} == {}


@EACH
def test_code_spans_of_a_document_name_existing_commands_flags_and_make_targets(document: Path) -> None:
    faults = {span: programs.span_faults(span) for span in markdown.spans(document)}
    assert {span: fault for span, fault in faults.items() if fault} == {}


@EACH
def test_code_spans_of_a_document_name_existing_files(document: Path) -> None:
    paths = [span for span in markdown.spans(document) if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]+", span)]
    named = [path for path in paths if not re.search(r"\b[A-Z]{4,}\b", path)]  # NAME and the like are placeholders
    assert [path for path in named if not (CHECKOUT / path).exists()] == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("make nothing", "the Makefile has no target nothing"),
        ("make bench SIUTE=quick", "the Makefile has no variable SIUTE"),
        (".venv/bin/bench run quick --fast", "bench run has no flag --fast"),
        ("provision models fetch NAME", "provision models has no command fetch"),
        ('eval "$(.venv/bin/provision shellenv --fish)"', "provision shellenv has no flag --fish"),
        ("cd x && make nothing", "the Makefile has no target nothing"),
    ],
)
def test_absent_command_flag_target_or_variable_in_a_command_line_is_reported(line: str, fault: str) -> None:
    assert programs.faults(line) == [fault]


@pytest.mark.parametrize("span", ["--no-such-flag", "models fetch", "make nothing", "SIUTE=quick", "bench runs"])
def test_absent_command_flag_target_or_variable_in_a_code_span_is_reported(span: str) -> None:
    assert programs.span_faults(span)
