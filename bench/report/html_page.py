"""A run as one HTML page that needs nothing else: it opens from a mail, without a network, and prints well."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core import stats
from bench.core.result import Status
from bench.report import charts, tables, validation_tables
from bench.run import compare, image_quality, verdict
from bench.validate import history

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.result import Result, Run
    from bench.run.image_quality import PrecisionPair
    from bench.validate.history import Trend

_TEMPLATES = Path(__file__).parent / "templates"
_WORDS = {"pass": "Pass", "warn": "Pass, with doubts", "fail": "Fail", "could not judge": "Could not be judged"}


def html(
    run: Run,
    folder: Path,
    price_per_hour: float | None = None,
    baseline: Run | None = None,
    kept: Sequence[Run] = (),
) -> str:
    """The page.

    Args:
        run: the run.
        folder: where its pictures lie; one that is not there is left out.
        price_per_hour: of the machine, for the cost of a thousand images.
        baseline: what it is held against, for a chart.
        kept: validations of its host, this one among them, for a table of them and a chart of each card.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = [result for result in run.results if result.status is Status.OK and result.samples]
    figures = [
        ("Time of a step", charts.step_times(measured, tables.label)),
        ("Images a second over the batch", charts.batch_scaling(measured, tables.label)),
        ("Memory over time", charts.memory_over_time(run.results, tables.label)),
        *(
            (
                f"Schedulers: time against error, {longest.case.model}",
                charts.errors_over_time(longest, found, tables.label),
            )
            for longest, found in image_quality.solved(measured, folder)
        ),
    ]
    figures += _trends(kept)
    if baseline is not None:
        figures.insert(0, (f"Against {baseline.id}", charts.against(compare.compare(baseline, run))))
    return environment.get_template("run.html").render(
        run=run,
        word=_WORDS[run.verdict.state.value],
        machine=tables.machine_line(run),
        rows=[_row(result, price_per_hour) for result in measured],
        parts=sorted({part for result in measured for part in result.shares}),
        left=[result for result in run.results if result not in measured],
        label=tables.label,
        charts=[(title, svg) for title, svg in figures if svg is not None],
        twins=[_twin(twin, folder) for twin in image_quality.twins(measured, folder)],
        pictures=[picture for result in run.results if (picture := _picture(result, folder))],
        facts=_facts(run),
        notes=validation_tables.notes(run) if run.validation is not None else tables.notes(run),
        readings=validation_tables.rows(run),
        columns=validation_tables.COLUMNS,
        gained=tables.gained(run.tuning) if run.tuning is not None else [],
        priced=price_per_hour is not None,
        on_sheet=any(verdict.spec_share(result) is not None for result in measured),
        trend=tables.trend_rows(kept),
        trend_columns=tables.TREND,
        fits=[result for result in measured if result.fit is not None],
    )


def _trends(kept: Sequence[Run]) -> Iterator[tuple[str, str | None]]:
    """A chart for each card (or processor) that was validated more than once."""
    found: dict[str, list[Trend]] = {}
    for each in history.trends(kept):
        found.setdefault(each.whose, []).append(each)
    for whose, trends in found.items():
        name = trends[0].card if whose.endswith(trends[0].card) else f"{trends[0].card}, {whose}"
        yield f"Over time: {name}", charts.trend(trends)


def _row(result: Result, price_per_hour: float | None) -> dict[str, Any]:
    """What the tables show of one case, as numbers: the template forms them."""
    steps, images = stats.step_seconds(result), stats.image_seconds(result)
    disturbed = verdict.contended(result)
    whole = result.shares_of_seconds
    return {
        "result": result,
        "name": tables.label(result.case),
        "steps": steps,
        "images": images,
        "rate": stats.images_per_second(result),
        "p90": stats.p90([sample.seconds / result.case.batch for sample in result.samples]),
        "drift": stats.drift(result.samples),
        "achieved": stats.achieved_flops(result),
        "peak_share": stats.peak_share(result),
        "spec_share": verdict.spec_share(result),
        "memory": tables.memory_of(result),
        "disturbed": disturbed,
        "shares": {name: seconds / whole for name, seconds in result.shares.items()} if whole else {},
        "cost": stats.cost_of_1000(result, price_per_hour) if price_per_hour is not None else None,
        "joules": stats.joules_an_image(result),
    }


def _picture(result: Result, folder: Path) -> dict[str, str] | None:
    content = image_quality.read(result, folder)
    return {"name": tables.label(result.case), "data": _encoded(content)} if content is not None else None


def _twin(twin: PrecisionPair, folder: Path) -> dict[str, str]:
    """Both pictures of a pair, and how far they are apart."""
    one, two = (image_quality.read(result, folder) or b"" for result in (twin.result, twin.plain))
    far = "equal" if twin.psnr == float("inf") else f"PSNR {twin.psnr:.1f} dB"
    return {"name": tables.label(twin.result.case), "one": _encoded(one), "two": _encoded(two), "psnr": far}


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _facts(run: Run) -> list[tuple[str, str]]:
    machine = run.machine
    gpus = ", ".join(str(gpu.get("name")) for gpu in machine.get("gpus", [])) or "none"
    software = tables.software_of(run)
    quota = machine.get("cpu_quota")
    facts = [
        ("host", machine.get("hostname")),
        ("system", f"{machine.get('system')} {machine.get('machine')}"),
        ("processor", f"{machine.get('cpu')}, {machine.get('cores')} cores{f', {quota:g} granted' if quota else ''}"),
        ("memory", f"{machine.get('memory_bytes', 0) / 1e9:.1f} GB"),
        ("cards", gpus),
        ("driver", machine.get("nvidia_driver")),
        *software.items(),
    ]
    return [(name, str(value)) for name, value in facts if value]
