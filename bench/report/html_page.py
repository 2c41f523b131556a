"""Render a run as one HTML page that needs no other file and no network, and that can be printed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core import stats
from bench.core.result import Status
from bench.report import charts, tables, validation_tables
from bench.run import compare, disturbance, image_quality, judge_cases
from bench.validate import history

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.result import Result, Run
    from bench.run.image_quality import PrecisionPair
    from bench.validate.history import Trend

_TEMPLATES = Path(__file__).parent / "templates"
_WORDS = {"pass": "Pass", "warn": "Pass, with warnings", "fail": "Fail", "could not judge": "Could not be judged"}


def html(
    run: Run,
    folder: Path,
    price_per_hour: float | None = None,
    baseline: Run | None = None,
    kept: Sequence[Run] = (),
) -> str:
    """Return the HTML page of a run.

    Args:
        run: the run.
        folder: the folder of its pictures; a picture that is not there is left out.
        price_per_hour: the price of an hour of the machine, for the cost of a thousand images; None: no costs.
        baseline: the run to compare with, in a chart.
        kept: the validations of the run's host, including this one, for a table and one chart per device.
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
        ("Time per step", charts.step_times(measured, tables.label)),
        ("Images per second over the batch", charts.batch_scaling(measured, tables.label)),
        ("Memory over time", charts.memory_over_time(run.results, tables.label)),
        *(
            (
                f"Schedulers: time against error, {longest.case.model}",
                charts.errors_over_time(longest, solutions, tables.label),
            )
            for longest, solutions in image_quality.scheduler_accuracies(measured, folder)
        ),
    ]
    figures += _trends(kept)
    if baseline is not None:
        figures.insert(0, (f"Compared with {baseline.id}", charts.comparison_chart(compare.compare(baseline, run))))
    return environment.get_template("run.html").render(
        run=run,
        word=_WORDS[run.verdict.state.value],
        machine=tables.machine_line(run),
        rows=[_row(result, price_per_hour) for result in measured],
        parts=sorted({part for result in measured for part in result.shares}),
        left=[result for result in run.results if result not in measured],
        label=tables.label,
        charts=[(title, svg) for title, svg in figures if svg is not None],
        twins=[_twin(twin, folder) for twin in image_quality.precision_pairs(measured, folder)],
        pictures=[picture for result in run.results if (picture := _picture(result, folder))],
        facts=_facts(run),
        notes=validation_tables.notes(run) if run.validation is not None else tables.notes(run),
        readings=validation_tables.rows(run),
        columns=validation_tables.COLUMNS,
        gained=tables.gain_lines(run.tuning) if run.tuning is not None else [],
        priced=price_per_hour is not None,
        on_sheet=any(judge_cases.spec_share(result) is not None for result in measured),
        trend=tables.trend_rows(kept),
        trend_columns=tables.TREND,
        fits=[result for result in measured if result.fit is not None],
    )


def _trends(kept: Sequence[Run]) -> Iterator[tuple[str, str | None]]:
    """Yield (title, chart) for each device that was validated; the chart is None if it was validated only once."""
    trends_of: dict[str, list[Trend]] = {}
    for trend in history.trends(kept):
        trends_of.setdefault(trend.whose, []).append(trend)
    for device, trends in trends_of.items():
        name = trends[0].card if device.endswith(trends[0].card) else f"{trends[0].card}, {device}"
        yield f"Over time: {name}", charts.trend(trends)


def _row(result: Result, price_per_hour: float | None) -> dict[str, Any]:
    """Return the values of one case for the tables of the page; the template formats them."""
    steps, images = stats.step_seconds(result), stats.image_seconds(result)
    disturbed = disturbance.of_case(result)
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
        "spec_share": judge_cases.spec_share(result),
        "memory": tables.memory_of(result),
        "disturbed": disturbed,
        "shares": {name: seconds / whole for name, seconds in result.shares.items()} if whole else {},
        "cost": stats.cost_of_1000(result, price_per_hour) if price_per_hour is not None else None,
        "joules": stats.joules_an_image(result),
    }


def _picture(result: Result, folder: Path) -> dict[str, str] | None:
    content = image_quality.read_image(result, folder)
    return {"name": tables.label(result.case), "data": _encoded(content)} if content is not None else None


def _twin(twin: PrecisionPair, folder: Path) -> dict[str, str]:
    """Return the picture of a case, its picture in fp32 (both base64) and a text on their distance."""
    one, two = (image_quality.read_image(result, folder) or b"" for result in (twin.result, twin.plain))
    distance = "equal" if twin.psnr == float("inf") else f"PSNR {twin.psnr:.1f} dB"
    return {"name": tables.label(twin.result.case), "one": _encoded(one), "two": _encoded(two), "psnr": distance}


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
        (
            "processor",
            f"{machine.get('cpu')}, {machine.get('cores')} cores{f', {quota:g} of them granted' if quota else ''}",
        ),
        ("memory", f"{machine.get('memory_bytes', 0) / 1e9:.1f} GB"),
        ("cards", gpus),
        ("driver", machine.get("nvidia_driver")),
        *software.items(),
    ]
    return [(name, str(value)) for name, value in facts if value]
