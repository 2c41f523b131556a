"""A run in the forms of other programs, as those read them."""

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


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_row_a_case_and_a_column_a_figure() -> None:
    bad = a_result(a_case(dtype="fp16"), status=Status.SKIPPED, reason='too "slow",\nby far', samples=(), host=None)
    one, two = rows(export.csv_text(a_run(a_result(), bad), 3.6))
    assert (one["case"], one["dtype"], one["status"], one["trust"]) == (a_case().name, "fp32", "ok", "clean")
    assert float(one["image_seconds_median"]) == 2.0
    assert float(one["images_per_second"]) == 0.5
    assert float(one["cost_per_1000_images"]) == pytest.approx(2.0)  # 3.6 an hour is 0.001 a second
    assert one["image_seconds_p90"] == "", "of three images it would be one of the two largest"
    assert (two["status"], two["reason"], two["image_seconds_median"]) == ("skipped", 'too "slow",', "")
    assert "cost_per_1000_images" not in rows(export.csv_text(a_run()))[0]


def test_pytest_benchmark_compares_two_runs(tmp_path: Path) -> None:
    """By its own command."""
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
    found = rows((tmp_path / "out.csv").read_text())
    assert [float(row["median"]) for row in found] == pytest.approx([2.07, 3.105])
    assert [int(row["rounds"]) for row in found] == [8, 8]


def plain_sample(seconds: float) -> Any:
    from bench.core.result import Sample

    return Sample(seconds, (), 1.0)


def test_the_figures_are_those_of_pytest_benchmark_itself() -> None:
    from pytest_benchmark.stats import Stats

    seconds = [2.0, 2.1, 2.05, 2.2, 2.02, 2.08, 9.0]
    theirs = Stats()
    for each in seconds:
        theirs.update(each)
    result = a_result(samples=tuple(plain_sample(each) for each in seconds))
    ours = export.pytest_benchmark(a_run(result))["benchmarks"][0]["stats"]
    for name in ("min", "max", "mean", "stddev", "rounds", "median", "ops", "total", "stddev_outliers"):
        assert ours[name] == pytest.approx(getattr(theirs, name)), name


def test_the_published_schema_is_that_of_the_records() -> None:
    published = CHECKOUT / "docs" / "schema" / "run-3.json"
    assert json.loads(published.read_text()) == json.loads(json.dumps(json_schema.of_run())), (
        "write it anew: bench report --format schema --to docs/schema/run-3.json"
    )


KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def fits(value: Any, kind: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether a value is as a schema says, as far as ours go."""
    if "$ref" in kind:
        return fits(value, known[kind["$ref"].rpartition("/")[2]], known)
    if "anyOf" in kind:
        return any(fits(value, each, known) for each in kind["anyOf"])
    if "enum" in kind or not kind:
        return not kind or value in kind["enum"]
    if kind["type"] == "object":
        return isinstance(value, dict) and fits_object(value, kind, known)
    if kind["type"] == "array":
        return isinstance(value, list) and all(fits(item, kind["items"], known) for item in value)
    return isinstance(value, KINDS[kind["type"]]) and (kind["type"] == "boolean" or not isinstance(value, bool))


def fits_object(value: dict[str, Any], kind: dict[str, Any], known: dict[str, Any]) -> bool:
    rest = kind["additionalProperties"]
    for key, item in value.items():
        wanted = kind.get("properties", {}).get(key, rest)
        if wanted is False or not fits(item, wanted, known):
            return False
    return set(kind.get("required", [])) <= set(value)


def test_a_run_is_as_its_schema_says() -> None:
    whole = json_schema.of_run()
    host = Host(2, 0.9, None, None, gpu=GpuLoadStats(throttled={"x": 0.1}))
    told = plain(a_run(a_result(host=host), Result(a_case(), Status.ERROR, phases=Phases(1.0))))
    assert fits(told, whole, whole["$defs"])
    told["results"][0]["status"] = "fine"
    assert not fits(told, whole, whole["$defs"])
    told["results"][0]["status"] = "ok"
    told["results"][1]["unknown"] = 1
    assert not fits(told, whole, whole["$defs"])


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
def test_every_form_of_a_kept_run(tmp_path: Path, form: str, begins: str) -> None:
    store.keep(a_run(), tmp_path / "results" / a_run().id)
    argv = command("report", "--format", form, "--out", tmp_path / "results")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(begins)
    there = subprocess.run(
        [*argv, "--to", tmp_path / "x"], capture_output=True, text=True, check=True, env=environment()
    )
    assert there.stdout == ""
    assert (tmp_path / "x").read_text().rstrip("\n") == done.stdout.rstrip("\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "pdf"], "unknown format 'pdf'; there is: markdown, terminal, html"),
        (["--price", "cheap"], "--price cheap: an amount an hour"),
        (["--format", "csv", "--price", "-1"], "--price -1: an amount an hour"),
        (["--price", "2.5/h"], "--price is for --format csv and html; markdown shows no cost"),
    ],
)
def test_a_wrong_word_is_told(tmp_path: Path, words: list[str], said: str) -> None:
    argv = command("report", *words, "--out", tmp_path)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_baseline_is_kept_and_compared_by_name(tmp_path: Path) -> None:
    store.keep(a_run(), tmp_path / a_run().id)

    def bench(*words: object) -> subprocess.CompletedProcess[str]:
        argv = command(*words, "--out", tmp_path)
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=environment())

    kept = bench("keep", "mine")
    assert (kept.returncode, kept.stdout) == (0, f"kept: {tmp_path}/baselines/mine.json\n")
    done = bench("compare", "mine")
    assert (done.returncode, "same" in done.stdout) == (0, True), done.stderr
    told = json.loads(bench("compare", "mine", a_run().id, "--json").stdout)
    assert (told["exit"], told["rows"][0]["state"]) == (0, "same")
    assert bench("compare", "mine", "--fail-over", "much").returncode == 2
