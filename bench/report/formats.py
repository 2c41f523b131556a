"""Convert a stored run to each format of `bench report`: tables, Markdown, HTML, CSV, JSON, a ticket."""

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
    """Hold what a report needs besides the run.

    `folder`: the folder of the run and its pictures. `cost`: the price of an hour of the machine; None: no costs.
    `baseline`: the run to compare with. `no_color`: do not use colours. `kept`: all validations of the run's host.
    """

    folder: Path
    cost: float | None = None
    baseline: Run | None = None
    no_color: bool = False
    kept: Sequence[Run] = ()


def terminal(run: Run, context: ReportContext) -> str:
    """Return the run as tables for a terminal."""
    from bench.report import tables, validation_tables
    from bench.report import terminal as report_terminal

    color, width = report_terminal.color_and_width(context.no_color)
    render = tables.terminal if run.validation is None else validation_tables.terminal
    return render(run, color=color, width=width)


def markdown(run: Run, _: ReportContext) -> str:
    """Return the run as Markdown."""
    from bench.report import tables, validation_tables

    return tables.markdown(run) if run.validation is None else validation_tables.markdown(run)


def html(run: Run, context: ReportContext) -> str:
    """Return the run as one HTML page that needs no other file.

    Raises:
        SpecError: a price or a baseline is given, but the run is a validation.
    """
    from bench.report import html_page

    _check_has_cases(run, "no images to price. Leave out --price", context.cost is not None)
    _check_has_cases(run, "no cases to compare. Leave out --against", context.baseline is not None)
    return html_page.html(run, context.folder, context.cost, context.baseline, context.kept)


def csv(run: Run, context: ReportContext) -> str:
    """Return the run as CSV with a row per case; a validation as CSV with a row per reading.

    Raises:
        SpecError: a price is given, but the run is a validation.
    """
    from bench.report import export

    _check_has_cases(run, "no images to price. Leave out --price", context.cost is not None)
    return export.csv_text(run, context.cost) if run.validation is None else export.readings_csv(run.validation)


def json(run: Run, _: ReportContext) -> str:
    """Return the run as the JSON of its file."""
    from bench.core.codec import dumps

    return dumps(run)


def pytest_benchmark(run: Run, _: ReportContext) -> str:
    """Return the run as JSON that `pytest-benchmark compare` reads.

    Raises:
        SpecError: the run is a validation.
    """
    import json

    from bench.report import export

    _check_has_cases(run, "no cases. Use --format csv for its readings", True)
    return json.dumps(export.pytest_benchmark(run), indent=1)


def ticket(run: Run, _: ReportContext) -> str:
    """Return the text for the support of the host's provider.

    Raises:
        SpecError: the run is not a validation.
    """
    from bench.report import support_ticket

    return support_ticket.text(run)


def schema_text() -> str:
    """Return the JSON Schema of run.json."""
    import json

    from bench.report import json_schema

    return json.dumps(json_schema.of_run(), indent=1)


def _check_has_cases(run: Run, missing_part: str, is_needed: bool) -> None:
    """Check that a run has cases if the report needs them (`is_needed`).

    Args:
        run: the run.
        missing_part: what a validation does not have, as the end of the message.
        is_needed: the report needs cases.

    Raises:
        SpecError: the report needs cases, but the run is a validation.
    """
    if run.validation is not None and is_needed:
        raise SpecError(f"{run.id} is a validation, which has {missing_part}.")


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
