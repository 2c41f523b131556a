"""Export a run for other programs: as CSV, and as the JSON of pytest-benchmark."""

from __future__ import annotations

import csv
import io
import platform
import statistics
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from bench.core import stats
from bench.core.codec import dumps, plain
from bench.core.result import Status
from bench.core.validation_records import Reading
from bench.run import disturbance, judge_cases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.result import Result, Run
    from bench.core.validation_records import Validation

# The version of pytest-benchmark whose format is written; pytest-benchmark checks it when it reads the file.
_FORMAT_VERSION = "5.2.0"


def csv_text(run: Run, price_per_hour: float | None = None) -> str:
    """Return a run as CSV with a row per case and a column per figure, in seconds and bytes; an unknown value is empty.

    `price_per_hour`: the price of an hour of the machine; adds a column with the cost of a thousand images.
    """
    sink = io.StringIO()
    rows = [_flat(result, price_per_hour) for result in run.results]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sink, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def readings_csv(validation: Validation) -> str:
    """Return the readings of a validation as CSV with a row per reading; lists and dicts are JSON in a cell."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([field.name for field in fields(Reading)])
    for reading in validation.readings:
        values = plain(reading)
        writer.writerow([dumps(value) if isinstance(value, (list, dict)) else value for value in values.values()])
    return sink.getvalue()


def pytest_benchmark(run: Run) -> dict[str, Any]:
    """Return a run in the JSON format of pytest-benchmark; each round is one image or batch."""
    software = next((result.software for result in run.results if result.software), {})
    return {
        "machine_info": {
            "node": run.machine.get("hostname", ""),
            "processor": run.machine.get("cpu", ""),
            "machine": run.machine.get("machine", ""),
            "python_compiler": "",
            "python_implementation": platform.python_implementation(),
            "python_implementation_version": software.get("python", ""),
            "python_version": software.get("python", ""),
            "python_build": ["", ""],
            "release": "",
            "system": run.machine.get("system", ""),
            "cpu": {"brand_raw": run.machine.get("cpu", ""), "count": run.machine.get("cores")},
            "gpus": [gpu.get("name") for gpu in run.machine.get("gpus", [])],
            **software,
        },
        "commit_info": {
            "id": run.id,
            "time": run.started,
            "dirty": False,
            "project": "firstlight",
            "branch": run.suite,
        },
        "benchmarks": [_benchmark(result) for result in run.results if result.status is Status.OK],
        "datetime": run.started,
        "version": _FORMAT_VERSION,
    }


def extra_info(result: Result) -> dict[str, Any]:
    """Return the values of a case that pytest-benchmark stores beside its times, in `extra_info`."""
    return {
        "status": result.status.value,
        "trust": trust.state if (trust := result.trust or disturbance.trust(result)) else None,
        "weights": result.weights,
        "peak_share": stats.peak_share(result),
        **{name: value for name, value in asdict(result.memory).items() if value is not None},
    }


def _flat(result: Result, price_per_hour: float | None) -> dict[str, object]:
    images, steps = stats.image_seconds(result), stats.step_seconds(result)
    seconds = [sample.seconds / result.case.batch for sample in result.samples]
    numerics, host = result.numerics, result.host
    row: dict[str, object] = {
        "case": result.case.name,
        **asdict(result.case),
        "status": result.status.value,
        "reason": result.cause,
        "trust": trust.state if (trust := result.trust or disturbance.trust(result)) else "",
        "trust_reasons": disturbance.of_case(result) or "",
        "weights": result.weights or "",
        "samples": len(result.samples),
        "image_seconds_median": images and images.median,
        "image_seconds_low": images and images.low,
        "image_seconds_high": images and images.high,
        "image_seconds_minimum": images and images.minimum,
        "image_seconds_p90": stats.p90(seconds),
        "step_seconds_median": steps and steps.median,
        "images_per_second": stats.images_per_second(result),
        "drift": stats.drift(result.samples),
        "load_seconds": result.phases.load_seconds,
        "first_image_seconds": result.phases.first_image_seconds,
        **{f"memory_{name}": value for name, value in asdict(result.memory).items()},
        "evaluations": result.work.evaluations,
        "flops_per_step": result.work.flops_per_step,
        "achieved_flops_per_second": stats.achieved_flops(result),
        "peak_share": stats.peak_share(result),
        "copy_bytes_per_second": max(result.work.copy_bytes_per_second, default=None),
        "spec_share": judge_cases.spec_share(result),
        "finite": numerics and numerics.finite,
        "repeats": numerics and numerics.repeats,
        "forward_error": numerics and numerics.forward_error,
        "psnr": numerics and numerics.psnr,
        **{f"share_{name.replace(' ', '_')}_seconds": value for name, value in result.shares.items()},
        "largest_batch": result.fit and result.fit.batch,
        "largest_size": result.fit and result.fit.size,
        "cpu_share": host and host.cpu_share,
        "wait_share": host and host.wait_share,
        "steal_share": host and host.steal_share,
        "joules_per_image": stats.joules_an_image(result),
    }
    if price_per_hour is not None:
        row["cost_per_1000_images"] = stats.cost_of_1000(result, price_per_hour)
    return row


def _benchmark(result: Result) -> dict[str, Any]:
    seconds = [sample.seconds for sample in result.samples]
    case = asdict(result.case)
    return {
        "group": result.case.model,
        "name": result.case.name,
        "fullname": f"bench::{result.case.name}",
        "params": case,
        "param": result.case.name,
        "extra_info": extra_info(result),
        "options": {
            "disable_gc": False,
            "timer": "perf_counter",
            "min_rounds": 1,
            "max_time": 1.0,
            "min_time": 0.0,
            "warmup": bool(result.warmups),
        },
        "stats": _stats(seconds),
    }


def _stats(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the figures of pytest-benchmark, with its own names and definitions (source: its class Stats)."""
    ordered = sorted(seconds)
    mean, median = statistics.fmean(ordered), statistics.median(ordered)
    deviation = statistics.stdev(ordered) if len(ordered) > 1 else 0.0
    first, _, third = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    spread = third - first
    outside = [value for value in ordered if value < first - 1.5 * spread or value > third + 1.5 * spread]
    inside = [value for value in ordered if value not in outside]
    far = sum(abs(value - mean) > deviation for value in ordered)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": len(ordered),
        "median": median,
        "iqr": spread,
        "q1": first,
        "q3": third,
        "iqr_outliers": len(outside),
        "stddev_outliers": far,
        "outliers": f"{far};{len(outside)}",
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "ops": 1 / mean if mean else 0.0,
        "total": sum(ordered),
        "data": list(seconds),
        "iterations": 1,
    }
