"""Runs and baselines that are kept, and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.codec import dumps, plain
from bench.core.result import SCHEMA
from bench.run import store
from bench.validate import history
from provision.core.errors import FirstlightError, SpecError
from tests.bench.conftest import a_result, a_run
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["results"][0]["samples"][0].update(seconds=0),
        lambda told: told["results"][0]["samples"][0].update(seconds=float("nan")),
        lambda told: told["results"][0]["samples"][0].update(seconds=1e999),
        lambda told: told["results"][0]["case"].update(batch=0),
        lambda told: told["results"][0]["work"].update(peak_flops_per_second={"matrix product": 0.0}),
        lambda told: told["machine"].update(gpus=None),
        lambda told: told["machine"].update(gpus=[{}]),
        lambda told: told["machine"].update(memory_bytes="much"),
        lambda told: told["machine"].update(cpu_quota="2"),
        lambda told: told.update(interleaved=True),
        lambda told: told.update(suite="\ud800"),
    ],
)
def test_a_run_that_no_reader_could_show_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    told = json.loads(dumps(a_run()))
    change(told)
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(FirstlightError, match="not a run that this version can read"):
        store.load(str(tmp_path / "run.json"), tmp_path)


def test_brackets_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 200_000)
    with pytest.raises(FirstlightError, match="not a run that this version can read"):
        store.load(str(tmp_path / "run.json"), tmp_path)


def test_a_run_is_found_by_its_id_folder_file_and_as_the_last_one(tmp_path: Path) -> None:
    first, last = a_run(id="20260101T000000Z-quick-aaaaaa"), a_run(id="20260102T000000Z-quick-bbbbbb")
    for run in (first, last):
        store.keep(run, tmp_path / run.id)
    for name in (first.id, str(tmp_path / first.id), str(tmp_path / first.id / "run.json")):
        assert store.load(name, tmp_path) == first
    assert store.load("", tmp_path) == last
    assert [path.name for path in (tmp_path / first.id).iterdir()] == ["run.json"], "nothing is left beside it"


def test_a_baseline_has_a_name_and_outlives_its_run(tmp_path: Path) -> None:
    run = a_run()
    kept = store.keep_baseline(run, "before-the-upgrade", tmp_path)
    assert kept == tmp_path / "baselines" / "before-the-upgrade.json"
    assert store.load("before-the-upgrade", tmp_path) == run
    newer = a_run(seconds=1.0)
    store.keep_baseline(newer, "before-the-upgrade", tmp_path)
    assert store.load("before-the-upgrade", tmp_path) == newer
    assert store.baselines(tmp_path) == ["before-the-upgrade"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 65])
def test_a_name_that_is_none_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is no name for a baseline"):
        store.keep_baseline(a_run(), name, tmp_path)
    assert not (tmp_path / "baselines").exists()


def test_what_there_is_is_told_where_a_name_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FirstlightError, match="no run is kept"):
        store.load("", tmp_path)
    store.keep_baseline(a_run(), "mine", tmp_path)
    with pytest.raises(FirstlightError, match=r"no run 'yours'.*there is: mine"):
        store.load("yours", tmp_path)


def test_a_run_of_the_first_schema_is_read_as_it_is(tmp_path: Path) -> None:
    told = plain(a_run(a_result()))
    told["schema"] = 1
    for name in ("command", "interleaved"):
        del told[name]
    for name in ("warmups", "shares", "shares_of_seconds", "timeline", "trust", "fit", "attempts"):
        del told["results"][0][name]
    for name in ("task", "attention", "compile", "offload", "vae", "threads"):
        del told["results"][0]["case"][name]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps(told))
    found = store.load("old", tmp_path)
    assert found.schema == 1
    assert found.results == a_run(a_result()).results


@pytest.mark.parametrize("schema", [0, SCHEMA + 1])
def test_a_schema_of_another_version_is_told(tmp_path: Path, schema: int) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(dumps(a_run(schema=schema)))
    with pytest.raises(FirstlightError, match=f"has schema {schema}, this version reads 1 to {SCHEMA}"):
        store.load("x", tmp_path)


def test_a_place_that_takes_nothing_is_told() -> None:
    with pytest.raises(FirstlightError, match=r"/proc/self/firstlight"):
        store.keep(a_run(), Path("/proc/self/firstlight"))


@pytest.mark.parametrize("name", ["schema-3", "validation-schema-3"])
def test_a_run_file_of_schema_3_is_read_and_written_unchanged(tmp_path: Path, name: str) -> None:
    """The files were written before the worker's events had types."""
    golden = CHECKOUT / "tests" / "data" / "runs" / f"{name}.json"
    run = store.load(str(golden), tmp_path)
    assert run.schema == 3
    assert store.write(run, tmp_path / "run.json").read_bytes() == golden.read_bytes()


def test_a_validation_file_of_schema_3_counts_in_the_history(tmp_path: Path) -> None:
    golden = CHECKOUT / "tests" / "data" / "runs" / "validation-schema-3.json"
    (tmp_path / golden.name).write_bytes(golden.read_bytes())
    kept = history.load(tmp_path)
    assert kept.unread == ()
    assert [run.id for run in kept.runs] == ["20260109T030405Z-validate-abcdef"]
