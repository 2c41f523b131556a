"""Draw the charts of a run with matplotlib, as SVG that needs no font, script or other file."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.core import stats
from bench.run import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.core.result import Case, Result
    from bench.run.compare import Comparison
    from bench.run.image_quality import SchedulerAccuracy
    from bench.validate.history import Trend

_WIDTH, _ROW, _LEAST = 10.0, 0.34, 1.6  # inches
_LEGEND_ROW = 0.17
_LONG_LABEL = 58
_GIGABYTE = 1e9


def step_times(results: Sequence[Result], label: Callable[[Case], str]) -> str | None:
    """Draw the distribution of the step times of each case: a box for the middle half, a line at the median.

    A dot is an outlier. None if no result has step times.

    Args:
        results: the results of measured cases.
        label: returns the name of a case.
    """
    boxes = [(label(result.case), _milliseconds(result)) for result in results if _milliseconds(result)]
    if not boxes:
        return None
    boxes.reverse()  # so that the first case is on top
    figure, axes = _figure(max(_LEAST, _ROW * len(boxes) + 0.7))
    axes.boxplot(
        [values for _, values in boxes],
        orientation="horizontal",
        widths=0.55,
        flierprops={"markersize": 2.5},
        medianprops={"color": "#c0392b"},
    )
    axes.set_yticks(range(1, len(boxes) + 1), [_short(name) for name, _ in boxes])
    if _spans_decades([value for _, values in boxes for value in values]):
        _logarithmic(axes)
    axes.set_xlabel("milliseconds per step")
    axes.grid(visible=True, axis="x", alpha=0.3)
    return _svg(figure)


def batch_scaling(results: Sequence[Result], label: Callable[[Case], str]) -> str | None:
    """Draw images per second over the batch, for cases that differ only in the batch; None without such cases."""
    lines: dict[Case, list[tuple[int, float]]] = {}
    for result in results:
        rate = stats.images_per_second(result)
        if rate is not None:
            lines.setdefault(replace(result.case, batch=1), []).append((result.case.batch, rate))
    lines = {case: sorted(points) for case, points in lines.items() if len({batch for batch, _ in points}) > 1}
    if not lines:
        return None
    figure, axes = _figure(3.2)
    for case, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=_short(label(case)))
    axes.set_xscale("log", base=2)
    batches = sorted({batch for points in lines.values() for batch, _ in points})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    return _lines(figure, axes, "batch", "images per second")


def memory_over_time(results: Sequence[Result], label: Callable[[Case], str]) -> str | None:
    """Draw the memory of the GPU over time, on a CPU that of the worker process; None if it was not measured."""
    results_with_timeline = [result for result in results if len(result.timeline) > 1]
    if not results_with_timeline:
        return None
    figure, axes = _figure(max(3.4, _LEGEND_ROW * len(results_with_timeline)))
    for result in results_with_timeline:
        has_device = any(moment.device_bytes for moment in result.timeline)
        moments = [
            (moment.at, ((moment.device_bytes if has_device else moment.host_bytes) or 0) / _GIGABYTE)
            for moment in result.timeline
        ]
        axes.plot(*zip(*moments, strict=True), linewidth=1.2, label=_short(label(result.case)))
    return _lines(figure, axes, "seconds since the case began", "GB")


def errors_over_time(longest: Result, solutions: Sequence[SchedulerAccuracy], label: Callable[[Case], str]) -> str:
    """Draw the time per image against the error of the picture, one line per scheduler; the lower left corner is best.

    Args:
        longest: the reference result, whose picture has the most evaluations of the model.
        solutions: the errors of the other results against it.
        label: returns the name of a case.
    """
    figure, axes = _figure(4.2)
    schedulers = sorted({solution.result.case.scheduler for solution in solutions})
    for number, scheduler in enumerate(schedulers):
        points = sorted(
            (summary.median, solution.error, solution.result.case.steps)
            for solution in solutions
            if solution.result.case.scheduler == scheduler
            and (summary := stats.image_seconds(solution.result)) is not None
        )
        seconds, errors, steps = zip(*points, strict=True)
        marker = "osD^vPX*<>h"[number % 11]
        axes.plot(seconds, errors, marker=marker, linewidth=1, label=f"{scheduler} {'/'.join(map(str, steps))} steps")
    axes.set_xlabel("seconds per image")
    axes.set_ylabel(f"distance from {_short(label(longest.case))}", fontsize=7)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    _legend(axes)
    return _svg(figure)


def comparison_chart(comparison: Comparison) -> str | None:
    """Draw the change of each case's time, with its interval and the smallest change that counts.

    None without ratios.
    """
    rows = [(row, row.ratio) for row in reversed(comparison.rows) if row.ratio is not None]
    if not rows:
        return None
    figure, axes = _figure(max(_LEAST, _ROW * len(rows) + 0.9))
    colors = {compare.SLOWER: "#b3261e", compare.FASTER: "#1e7d4f", compare.SAME: "#1d2733"}
    for height, (row, ratio) in enumerate(rows):
        low, middle, high = ((value - 1) * 100 for value in (ratio.low, ratio.median, ratio.high))
        axes.barh(height, 200 * row.floor, left=-100 * row.floor, height=0.7, color="#e6eaee")
        color = colors.get(row.state, "#a66a00")
        axes.errorbar(middle, height, xerr=[[middle - low], [high - middle]], fmt="o", color=color, markersize=4)
    axes.axvline(0, color="#66727f", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_short(row.name) for row, _ in rows])
    axes.set_xlabel("change of the seconds per image, per cent; grey: too small to count")
    return _svg(figure)


def trend(trends: Sequence[Trend]) -> str | None:
    """Draw each reading of one device over time, in per cent of its best value; None if none has two values."""
    lines = [line for line in trends if len(line.points) > 1]
    if not lines:
        return None
    figure, axes = _figure(max(3.2, _LEGEND_ROW * len(lines) + 0.9))
    for number, line in enumerate(lines):
        shares, times = [100 * share for share in line.shares], [point.at for point in line.points]
        style = ("-", "--", ":")[number // 10 % 3]  # matplotlib has ten colours
        axes.plot(times, shares, style, marker="o", markersize=3, label=_short(line.name))
    axes.tick_params(axis="x", labelsize=7, labelrotation=20)
    return _lines(figure, axes, "time of the validation (UTC)", "per cent of its best")


def _lines(figure: Any, axes: Any, across: str, upward: str) -> str:
    """Add to a line chart the labels of both axes, a vertical axis from zero and a legend; return it as SVG."""
    axes.set_xlabel(across)
    axes.set_ylabel(upward)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    _legend(axes)
    return _svg(figure)


def _legend(axes: Any) -> None:
    """Put the legend beside the chart, so that it hides no line."""
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _logarithmic(axes: Any) -> None:
    """Set a logarithmic horizontal axis with plain numbers as ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _milliseconds(result: Result) -> list[float]:
    return [seconds * 1000 for sample in result.samples for seconds in sample.step_seconds]


def _spans_decades(values: Sequence[float]) -> bool:
    return max(values) > 10 * min(values) > 0


def _short(text: str) -> str:
    short = text if len(text) <= _LONG_LABEL else f"{text[: _LONG_LABEL - 1]}…"
    return short.replace("$", r"\$")  # otherwise matplotlib renders text between two dollar signs as a formula


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    sink = io.StringIO()
    # With fonttype "none" text is stored as text and can be searched. With a fixed salt equal runs give equal bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "firstlight", "font.family": "sans-serif"}):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]
