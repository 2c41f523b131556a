"""Charts of a run, as SVG that stands alone: matplotlib draws, no font and no script is asked for."""

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
    """How the single steps lie: a box for the middle half, a line at the median, a dot for each outlier."""
    shown = [(label(result.case), _milliseconds(result)) for result in results if _milliseconds(result)]
    if not shown:
        return None
    shown.reverse()  # the first case on top
    figure, axes = _figure(max(_LEAST, _ROW * len(shown) + 0.7))
    axes.boxplot(
        [values for _, values in shown],
        orientation="horizontal",
        widths=0.55,
        flierprops={"markersize": 2.5},
        medianprops={"color": "#c0392b"},
    )
    axes.set_yticks(range(1, len(shown) + 1), [_short(name) for name, _ in shown])
    if _spans_decades([value for _, values in shown for value in values]):
        _logarithmic(axes)
    axes.set_xlabel("milliseconds a step")
    axes.grid(visible=True, axis="x", alpha=0.3)
    return _svg(figure)


def batch_scaling(results: Sequence[Result], label: Callable[[Case], str]) -> str | None:
    """Images a second over the batch, for the cases that differ by it alone; None where there are none."""
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
    return _lines(figure, axes, "batch", "images a second")


def memory_over_time(results: Sequence[Result], label: Callable[[Case], str]) -> str | None:
    """The memory of the worker, or of the card where there is one, from its start to its end."""
    shown = [result for result in results if len(result.timeline) > 1]
    if not shown:
        return None
    figure, axes = _figure(max(3.4, _LEGEND_ROW * len(shown)))
    for result in shown:
        on_card = any(moment.device_bytes for moment in result.timeline)
        moments = [
            (moment.at, ((moment.device_bytes if on_card else moment.host_bytes) or 0) / _GIGABYTE)
            for moment in result.timeline
        ]
        axes.plot(*zip(*moments, strict=True), linewidth=1.2, label=_short(label(result.case)))
    return _lines(figure, axes, "seconds since the case began", "GB")


def errors_over_time(longest: Result, found: Sequence[SchedulerAccuracy], label: Callable[[Case], str]) -> str:
    """What each scheduler costs and how far it is from the longest solution: the lower left is best."""
    figure, axes = _figure(4.2)
    schedulers = sorted({each.result.case.scheduler for each in found})
    for number, scheduler in enumerate(schedulers):
        points = sorted(
            (summary.median, each.error, each.result.case.steps)
            for each in found
            if each.result.case.scheduler == scheduler and (summary := stats.image_seconds(each.result)) is not None
        )
        seconds, errors, steps = zip(*points, strict=True)
        marker = "osD^vPX*<>h"[number % 11]
        axes.plot(seconds, errors, marker=marker, linewidth=1, label=f"{scheduler} {'/'.join(map(str, steps))} steps")
    axes.set_xlabel("seconds an image")
    axes.set_ylabel(f"distance from {_short(label(longest.case))}", fontsize=7)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    _legend(axes)
    return _svg(figure)


def against(found: Comparison) -> str | None:
    """Each case over the same of a baseline: the change of its time with its interval, and what it must exceed."""
    rows = [(row, row.ratio) for row in reversed(found.rows) if row.ratio is not None]
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
    axes.set_xlabel("change of the seconds an image, per cent; grey: within the noise")
    return _svg(figure)


def trend(found: Sequence[Trend]) -> str | None:
    """Each figure of one card over time, as a part of the best that it ever was; None where nothing was asked twice."""
    shown = [each for each in found if len(each.points) > 1]
    if not shown:
        return None
    figure, axes = _figure(max(3.2, _LEGEND_ROW * len(shown) + 0.9))
    for number, each in enumerate(shown):
        shares, times = [100 * share for share in each.shares], [point.at for point in each.points]
        style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
        axes.plot(times, shares, style, marker="o", markersize=3, label=_short(each.name))
    axes.tick_params(axis="x", labelsize=7, labelrotation=20)
    return _lines(figure, axes, "when it was validated (UTC)", "per cent of its best")


def _lines(figure: Any, axes: Any, across: str, upward: str) -> str:
    """A chart of lines, from zero on, with its legend."""
    axes.set_xlabel(across)
    axes.set_ylabel(upward)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    _legend(axes)
    return _svg(figure)


def _legend(axes: Any) -> None:
    """Beside the lines, never over them."""
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _logarithmic(axes: Any) -> None:
    """A scale of decades whose ticks are plain numbers."""
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
    return short.replace("$", r"\$")  # between two of them matplotlib would read a formula


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
    # Text stays text, so that it can be searched; and the same run gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "firstlight", "font.family": "sans-serif"}):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]
