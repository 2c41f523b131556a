"""Tests that runs and baselines are stored, found and read."""

from __future__ import annotations

import json
import re
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
        lambda content: content["results"][0]["samples"][0].update(seconds=0),
        lambda content: content["results"][0]["samples"][0].update(seconds=float("nan")),
        lambda content: content["results"][0]["samples"][0].update(seconds=1e999),
        lambda content: content["results"][0]["case"].update(batch=0),
        lambda content: content["results"][0]["work"].update(peak_flops_per_second={"matrix product": 0.0}),
        lambda content: content["machine"].update(gpus=None),
        lambda content: content["machine"].update(gpus=[{}]),
        lambda content: content["machine"].update(memory_bytes="much"),
        lambda content: content["machine"].update(cpu_quota="2"),
        lambda content: content.update(interleaved=True),
        lambda content: content.update(suite="\ud800"),
    ],
    ids=[
        "zero seconds",
        "NaN seconds",
        "infinite seconds",
        "batch of 0",
        "zero peak rate",
        "gpus is null",
        "gpu without a name",
        "memory is a text",
        "quota is a text",
        "interleaved with one case",
        "suite is a lone surrogate",
    ],
)
def test_run_file_with_an_impossible_value_is_rejected(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads(dumps(a_run()))
    change(content)
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(FirstlightError, match="not a run that this version can read"):
        store.load(str(tmp_path / "run.json"), tmp_path)


def test_run_file_of_deeply_nested_brackets_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 200_000)
    with pytest.raises(FirstlightError, match="not a run that this version can read"):
        store.load(str(tmp_path / "run.json"), tmp_path)


def test_run_is_found_by_id_or_folder_or_file_and_the_newest_without_a_name(tmp_path: Path) -> None:
    first, last = a_run(id="20260101T000000Z-quick-aaaaaa"), a_run(id="20260102T000000Z-quick-bbbbbb")
    for run in (first, last):
        store.keep(run, tmp_path / run.id)
    for name in (first.id, str(tmp_path / first.id), str(tmp_path / first.id / "run.json")):
        assert store.load(name, tmp_path) == first
    assert store.load("", tmp_path) == last
    assert [path.name for path in (tmp_path / first.id).iterdir()] == ["run.json"], "no temporary file is left"


def test_baseline_is_stored_under_its_name_and_replaced_by_a_newer_one(tmp_path: Path) -> None:
    run = a_run()
    kept = store.keep_baseline(run, "before-the-upgrade", tmp_path)
    assert kept == tmp_path / "baselines" / "before-the-upgrade.json"
    assert store.load("before-the-upgrade", tmp_path) == run
    newer = a_run(seconds=1.0)
    store.keep_baseline(newer, "before-the-upgrade", tmp_path)
    assert store.load("before-the-upgrade", tmp_path) == newer
    assert store.baselines(tmp_path) == ["before-the-upgrade"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 65])
def test_invalid_baseline_name_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is not a baseline name"):
        store.keep_baseline(a_run(), name, tmp_path)
    assert not (tmp_path / "baselines").exists()


def test_unknown_run_is_rejected_with_the_names_of_stored_runs(tmp_path: Path) -> None:
    with pytest.raises(FirstlightError, match="has no run"):
        store.load("", tmp_path)
    store.keep_baseline(a_run(), "mine", tmp_path)
    with pytest.raises(FirstlightError, match=r"there is no run 'yours'.*are: mine"):
        store.load("yours", tmp_path)


def test_run_file_of_schema_1_without_later_fields_is_read(tmp_path: Path) -> None:
    content = plain(a_run(a_result()))
    content["schema"] = 1
    for name in ("command", "interleaved"):
        del content[name]
    for name in ("warmups", "shares", "shares_of_seconds", "timeline", "trust", "fit", "attempts"):
        del content["results"][0][name]
    for name in ("task", "attention", "compile", "offload", "vae", "threads"):
        del content["results"][0]["case"][name]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps(content))
    run = store.load("old", tmp_path)
    assert run.schema == 1
    assert run.results == a_run(a_result()).results


@pytest.mark.parametrize("schema", [0, SCHEMA + 1])
def test_run_file_of_an_unknown_schema_is_rejected(tmp_path: Path, schema: int) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(dumps(a_run(schema=schema)))
    with pytest.raises(FirstlightError, match=f"has schema {schema}, but this version reads only 1 to {SCHEMA}"):
        store.load("x", tmp_path)


def test_storing_a_run_in_an_unwritable_folder_is_an_error_with_its_path() -> None:
    with pytest.raises(FirstlightError, match=r"/proc/self/firstlight"):
        store.keep(a_run(), Path("/proc/self/firstlight"))


@pytest.mark.parametrize("name", ["schema-3", "validation-schema-3"])
def test_run_file_of_schema_3_is_read_and_written_unchanged_but_for_new_fields(tmp_path: Path, name: str) -> None:
    # An earlier version has written these files.
    golden = CHECKOUT / "tests" / "data" / "runs" / f"{name}.json"
    run = store.load(str(golden), tmp_path)
    assert run.schema == 3
    expected = re.sub(r'("required": \w+)}', r'\1, "notes": []}', golden.read_text(encoding="utf-8"))
    assert store.write(run, tmp_path / "run.json").read_text(encoding="utf-8") == expected


def test_validation_file_of_schema_3_is_read_into_the_history(tmp_path: Path) -> None:
    golden = CHECKOUT / "tests" / "data" / "runs" / "validation-schema-3.json"
    (tmp_path / golden.name).write_bytes(golden.read_bytes())
    kept = history.load(tmp_path)
    assert kept.unread == ()
    assert [run.id for run in kept.runs] == ["20260109T030405Z-validate-abcdef"]
