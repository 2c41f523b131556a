"""The forms in which a kept run is shown: tables, Markdown, a page, files of other programs, a ticket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.core.result import Run


@dataclass(frozen=True)
class ReportContext:
    """How a run is shown: its folder, what an hour costs, what it is held against, all validations of its host."""

    folder: Path
    cost: float | None = None
    baseline: Run | None = None
    no_color: bool = False
    kept: Sequence[Run] = ()


def terminal(run: Run, shown: ReportContext) -> str:
    """Tables for a terminal."""
    from bench.report import tables, validation_tables
    from bench.report import terminal as report_terminal

    color, width = report_terminal.paper(shown.no_color)
    show = tables.terminal if run.validation is None else validation_tables.terminal
    return show(run, color=color, width=width)


def markdown(run: Run, _: ReportContext) -> str:
    """Markdown."""
    from bench.report import tables, validation_tables

    return tables.markdown(run) if run.validation is None else validation_tables.markdown(run)


def html(run: Run, shown: ReportContext) -> str:
    """One page that needs nothing else.

    Raises:
        SpecError: what is wished for beside it a validation does not have.
    """
    from bench.report import html_page

    _without_cases(run, "has no image that could cost something", shown.cost is not None)
    _without_cases(run, "is held against earlier ones by itself", shown.baseline is not None)
    return html_page.html(run, shown.folder, shown.cost, shown.baseline, shown.kept)


def csv(run: Run, shown: ReportContext) -> str:
    """A row a case, or a row a reading."""
    from bench.report import export

    _without_cases(run, "has no image that could cost something", shown.cost is not None)
    return export.csv_text(run, shown.cost) if run.validation is None else export.readings_csv(run.validation)


def json(run: Run, _: ReportContext) -> str:
    """The run as it is kept."""
    from bench.core.codec import dumps

    return dumps(run)


def pytest_benchmark(run: Run, _: ReportContext) -> str:
    """What `pytest-benchmark compare` reads."""
    import json

    from bench.report import export

    _without_cases(run, "has no cases; for its readings: --format csv", True)
    return json.dumps(export.pytest_benchmark(run), indent=1)


def ticket(run: Run, _: ReportContext) -> str:
    """What a user can send to whoever owns the host."""
    from bench.report import support_ticket

    return support_ticket.text(run)


def schema_text() -> str:
    """What describes run.json."""
    import json

    from bench.report import json_schema

    return json.dumps(json_schema.of_run(), indent=1)


def _without_cases(run: Run, why: str, is_asked: bool) -> None:
    if run.validation is not None and is_asked:
        raise SpecError(f"{run.id} is a validation: it {why}.")


FORMS: dict[str, Callable[[Run, ReportContext], str]] = {
    "markdown": markdown,
    "terminal": terminal,
    "html": html,
    "csv": csv,
    "json": json,
    "pytest-benchmark": pytest_benchmark,
    "ticket": ticket,
    "schema": lambda *_: schema_text(),
}
