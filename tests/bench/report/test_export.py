"""Tests the formats into which a run is exported, with the reader of each format."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.core.codec import plain
from bench.core.result import Host, Phases, Result, Status
from bench.core.validation_records import GpuLoadStats
from bench.report import export, json_schema
from bench.run import store
from tests.bench.conftest import a_case, a_result, a_run, command, environment
from tests.conftest import CHECKOUT


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_row_for_each_case_and_empty_cells_for_missing_figures() -> None:
    bad = a_result(a_case(dtype="fp16"), status=Status.SKIPPED, reason='too "slow",\nby far', samples=(), host=None)
    one, two = csv_rows(export.csv_text(a_run(a_result(), bad), 3.6))
    assert (one["case"], one["dtype"], one["status"], one["trust"]) == (a_case().name, "fp32", "ok", "clean")
    assert float(one["image_seconds_median"]) == 2.0
    assert float(one["images_per_second"]) == 0.5
    assert float(one["cost_per_1000_images"]) == pytest.approx(2.0)  # 3.6 per hour is 0.001 per second
    assert one["image_seconds_p90"] == "", "fewer than 20 images have no p90"
    assert (two["status"], two["reason"], two["image_seconds_median"]) == ("skipped", 'too "slow",', "")
    assert "cost_per_1000_images" not in csv_rows(export.csv_text(a_run()))[0]


def test_two_exported_runs_are_compared_by_the_command_of_pytest_benchmark(tmp_path: Path) -> None:
    """Run `pytest-benchmark compare` on both files."""
    names = []
    for name, seconds in (("one", 2.0), ("two", 3.0)):
        result = a_result(samples=tuple(plain_sample(seconds * (1 + number / 100)) for number in range(8)))
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(export.pytest_benchmark(a_run(result, id=name))))
        names.append(str(file))
    argv = [str(Path(sys.executable).with_name("pytest-benchmark")), "compare", "--csv", str(tmp_path / "out"), *names]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(a_case().name) >= 2
    rows = csv_rows((tmp_path / "out.csv").read_text())
    assert [float(row["median"]) for row in rows] == pytest.approx([2.07, 3.105])
    assert [int(row["rounds"]) for row in rows] == [8, 8]


def plain_sample(seconds: float) -> Any:
    from bench.core.result import Sample

    return Sample(seconds, (), 1.0)


def test_statistics_in_the_export_equal_those_of_pytest_benchmark() -> None:
    from pytest_benchmark.stats import Stats

    seconds = [2.0, 2.1, 2.05, 2.2, 2.02, 2.08, 9.0]
    expected = Stats()
    for sample in seconds:
        expected.update(sample)
    result = a_result(samples=tuple(plain_sample(sample) for sample in seconds))
    exported = export.pytest_benchmark(a_run(result))["benchmarks"][0]["stats"]
    for name in ("min", "max", "mean", "stddev", "rounds", "median", "ops", "total", "stddev_outliers"):
        assert exported[name] == pytest.approx(getattr(expected, name)), name


def test_json_schema_in_docs_equals_the_schema_of_the_records() -> None:
    published = CHECKOUT / "docs" / "schema" / "run-3.json"
    assert json.loads(published.read_text()) == json.loads(json.dumps(json_schema.of_run())), (
        "generate it again: bench report --format schema --to docs/schema/run-3.json"
    )


KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def fits(value: Any, kind: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Return whether a JSON value fits a schema; only the keywords that the schema of a run uses are supported."""
    if "$ref" in kind:
        return fits(value, definitions[kind["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in kind:
        return any(fits(value, option, definitions) for option in kind["anyOf"])
    if "enum" in kind or not kind:
        return not kind or value in kind["enum"]
    if kind["type"] == "object":
        return isinstance(value, dict) and fits_object(value, kind, definitions)
    if kind["type"] == "array":
        return isinstance(value, list) and all(fits(item, kind["items"], definitions) for item in value)
    return isinstance(value, KINDS[kind["type"]]) and (kind["type"] == "boolean" or not isinstance(value, bool))


def fits_object(value: dict[str, Any], kind: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Return whether a JSON object fits a schema of the type "object"."""
    additional = kind["additionalProperties"]
    for key, item in value.items():
        property_kind = kind.get("properties", {}).get(key, additional)
        if property_kind is False or not fits(item, property_kind, definitions):
            return False
    return set(kind.get("required", [])) <= set(value)


def test_run_fits_the_schema_and_a_run_with_an_unknown_status_or_key_does_not() -> None:
    schema = json_schema.of_run()
    host = Host(2, 0.9, None, None, gpu=GpuLoadStats(throttled={"x": 0.1}))
    run = plain(a_run(a_result(host=host), Result(a_case(), Status.ERROR, phases=Phases(1.0))))
    assert fits(run, schema, schema["$defs"])
    run["results"][0]["status"] = "fine"
    assert not fits(run, schema, schema["$defs"])
    run["results"][0]["status"] = "ok"
    run["results"][1]["unknown"] = 1
    assert not fits(run, schema, schema["$defs"])


@pytest.mark.parametrize(
    ("form", "begins"),
    [
        ("markdown", "# tiny:"),
        ("terminal", "tiny:"),
        ("html", "<!doctype html>"),
        ("csv", "case,model,"),
        ("json", '{"schema": 3'),
        ("pytest-benchmark", "{"),
        ("schema", "{"),
    ],
)
def test_report_prints_or_writes_a_stored_run_in_each_format(tmp_path: Path, form: str, begins: str) -> None:
    store.keep(a_run(), tmp_path / "results" / a_run().id)
    argv = command("report", "--format", form, "--out", tmp_path / "results")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(begins)
    to_file = subprocess.run(
        [*argv, "--to", tmp_path / "x"], capture_output=True, text=True, check=True, env=environment()
    )
    assert to_file.stdout == ""
    assert (tmp_path / "x").read_text().rstrip("\n") == done.stdout.rstrip("\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "pdf"], "unknown format 'pdf'; available: markdown, terminal, html"),
        (["--price", "cheap"], "--price cheap is not a price per hour"),
        (["--format", "csv", "--price", "-1"], "--price -1 is not a price per hour"),
        (["--price", "2.5/h"], "--price is only for the formats csv and html"),
    ],
)
def test_report_with_an_invalid_format_or_price_exits_with_2_and_the_reason(
    tmp_path: Path, words: list[str], message: str
) -> None:
    argv = command("report", *words, "--out", tmp_path)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_baseline_is_stored_and_compared_by_its_name(tmp_path: Path) -> None:
    store.keep(a_run(), tmp_path / a_run().id)

    def bench(*words: object) -> subprocess.CompletedProcess[str]:
        argv = command(*words, "--out", tmp_path)
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=environment())

    kept = bench("keep", "mine")
    assert (kept.returncode, kept.stdout) == (0, f"kept: {tmp_path}/baselines/mine.json\n")
    done = bench("compare", "mine")
    assert (done.returncode, "same" in done.stdout) == (0, True), done.stderr
    report = json.loads(bench("compare", "mine", a_run().id, "--json").stdout)
    assert (report["exit"], report["rows"][0]["state"]) == (0, "same")
    assert bench("compare", "mine", "--fail-over", "much").returncode == 2
