"""Tests the stored validations of a host: how they are read, and the best values and trends of each device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.verdict import Judgement, VerdictState
from bench.report import charts, tables
from bench.validate import history
from bench.validate.expectations import Expected
from provision.core.errors import BlockedError
from tests.bench.conftest import a_run
from tests.bench.validation_samples import A100, CPU, GB, READINGS, T, reading, validated

if TYPE_CHECKING:
    from pathlib import Path

    from bench.core.result import Run
    from bench.core.validation_records import Reading

BF16 = ("GPU-a100", "product bf16")


ONE_IMAGE = reading("loop", "loop stable-diffusion-v1-5 fp16 batch 1", 0.3)


def bf16(value: float | None, **changes: Any) -> Reading:
    return reading("product", "product bf16", value, **changes)


def judgements_of(state: VerdictState, rule: str = "product", device: str = "cuda:0") -> tuple[Judgement, ...]:
    return (Judgement(rule, device, state, "a judgement"),)


def test_stored_validations_are_loaded_oldest_first(tmp_path: Path) -> None:
    late, early = validated(9), replace(validated(2), id="validate-renamed")
    for run in (late, early):
        assert history.keep(run, tmp_path / "validations").name == f"{run.id}.json"
    assert history.load(tmp_path / "validations") == history.ValidationHistory((early, late))
    assert history.load(tmp_path / "none") == history.ValidationHistory(())


def test_unreadable_files_are_listed_and_the_others_are_loaded(tmp_path: Path) -> None:
    history.keep(validated(2), tmp_path)
    (tmp_path / "half.json").write_text('{"schema": 2,')
    (tmp_path / "folder.json").mkdir()
    history.keep(a_run(id="cases"), tmp_path)
    history.keep(replace(validated(3), id="timeless", started="yesterday"), tmp_path)
    history.keep(replace(validated(3), id="zoneless", started="2026-01-03T03:04:05"), tmp_path)
    kept = history.load(tmp_path)
    assert [run.id for run in kept.runs] == ["20260102T030405Z-validate-abcdef"]
    names = ["cases", "folder", "half", "timeless", "zoneless"]
    assert [name for name in names for reason in kept.unread if f"{name}.json" in reason] == names


def test_unwritable_folder_is_a_blocked_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BlockedError, match="another --root"):
        history.keep(validated(2), tmp_path / "file" / "validations")


def test_best_value_of_a_gpu_is_the_highest_rate_or_fewest_seconds_with_its_run_as_source() -> None:
    kept = [validated(2, bf16(260 * T)), validated(3, bf16(268 * T)), validated(4, bf16(250 * T))]
    source = "its own best value, run 20260103T030405Z-validate-abcdef, torch 2.9.0"
    assert history.best_figures(kept, "2.9.0") == {BF16: Expected(268 * T, source, "own")}
    steps = [validated(day, reading("loop", "loop", seconds)) for day, seconds in ((2, 0.05), (3, 0.04), (4, 0.06))]
    assert history.best_figures(steps, "2.9.0")["GPU-a100", "loop"].value == 0.04, (
        "the best of several seconds is the smallest"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"disturbed": {"cuda:0": "busy"}},
        {"judgements": judgements_of(VerdictState.FAIL)},
        {"judgements": judgements_of(VerdictState.NOT_JUDGED, "driver-hidden")},
        {"software": {"torch": "2.8.1"}},
        {"software": {}},
        {"card": replace(A100, slice=True)},
        {"card": replace(A100, uuid=None)},
        {"readings": (bf16(268 * T, fault="4 bursts differ"),)},
        {"readings": (bf16(None, why_not="no room"),)},
        {"readings": (replace(bf16(268 * T), probe="together"),)},
        {"readings": (bf16(268 * T, device="cuda:1"),)},
    ],
)
def test_reading_that_is_unreliable_or_of_another_torch_is_not_a_best_value(changes: dict[str, Any]) -> None:
    kept = [validated(2, bf16(240 * T)), validated(3, **({"readings": (bf16(268 * T),)} | changes))]
    assert {best.value for best in history.best_figures(kept, "2.9.0").values()} == {240 * T}


@pytest.mark.parametrize(
    "changes",
    [
        {"judgements": judgements_of(VerdictState.WARN)},
        {"judgements": judgements_of(VerdictState.FAIL, device="cuda:1")},
        {"judgements": judgements_of(VerdictState.NOT_JUDGED, "unknown-card")},
        {"disturbed": {"cuda:1": "busy"}},
        {"software": {"torch": "2.9.1+cu128"}},
    ],
)
def test_reading_is_a_best_value_despite_judgements_that_do_not_concern_it(changes: dict[str, Any]) -> None:
    kept = [validated(2, bf16(240 * T)), validated(3, bf16(268 * T), **changes)]
    assert history.best_figures(kept, "2.9.0")[BF16].value == 268 * T


def test_there_are_no_best_values_if_the_torch_version_is_unknown() -> None:
    assert history.best_figures([validated(2, software={})], None) == {}


def test_trend_belongs_to_the_uuid_of_a_gpu_or_to_the_host_of_a_cpu() -> None:
    moved = replace(A100, device="cuda:1")
    kept = [validated(2, bf16(260 * T)), validated(3, bf16(250 * T, device="cuda:1"), card=moved)]
    (trend,) = history.trends(kept)
    assert (trend.whose, trend.name, trend.first, trend.best) == ("GPU-a100", "product bf16", 260 * T, 260 * T)
    assert [(point.at.day, point.value, point.torch) for point in trend.points] == [
        (2, 260 * T, "2.9.0"),
        (3, 250 * T, "2.9.0"),
    ]
    here = validated(2, reading("threads", "scaling", 0.9, device="cpu"), card=CPU)
    there = replace(here, machine=here.machine | {"hostname": "there"})
    assert [trend.whose for trend in history.trends([here, there])] == ["A CPU", "there A CPU"]


def test_trend_has_the_best_value_of_several_rounds_and_no_numerics() -> None:
    rounds = [bf16(value * T, round=number) for number, value in enumerate((250, 261, 240))]
    (trend,) = history.trends([validated(2, *rounds, reading("numerics", "matrix product bf16", 1e-3, limit=1.0))])
    assert [point.value for point in trend.points] == [261 * T]


def test_runs_of_a_host_are_those_with_its_name_or_with_one_of_its_gpus() -> None:
    def on(name: str, day: int, uuid: str) -> Run:
        run = validated(day, card=replace(A100, uuid=uuid))
        return replace(run, machine=run.machine | {"hostname": name})

    renamed, other, mine = on("old", 2, "GPU-1"), on("other", 3, "GPU-2"), on("new", 4, "GPU-1")
    assert history.runs_of_host([renamed, other, mine], {"hostname": "new"}) == (renamed, mine)
    assert history.runs_of_host([renamed, other], {"hostname": "new"}) == ()


def test_history_line_has_the_fastest_product_and_a_loop_and_the_worst_judgement_of_its_device() -> None:
    kept = [
        validated(2, bf16(200 * T), reading("product", "product fp32", 18 * T), reading("copy", "copy", 1500 * GB)),
        validated(
            3,
            *READINGS,
            ONE_IMAGE,
            judgements=judgements_of(VerdictState.WARN) + judgements_of(VerdictState.FAIL, device="cuda:7"),
        ),
        validated(4, bf16(None, why_not="no time")),
    ]
    first, second, third = history.history_lines(kept)
    assert (first.product, first.loop) == (bf16(200 * T), None)
    assert (first.against_first, first.against_best) == (1.0, 200 / 268)
    assert (second.product, second.verdict) == (reading("product", "product fp16", 270 * T), VerdictState.WARN)
    assert second.loop == reading("loop", "loop ddpm-cat-256 fp16 batch 4", 0.045)
    assert (third.product, third.against_first, third.against_best) == (None, None, None)


def test_history_line_has_the_ratio_to_the_first_and_to_the_best_value() -> None:
    kept = [validated(day, bf16(value * T)) for day, value in ((2, 200), (3, 250), (4, 225))]
    assert [(line.against_first, line.against_best) for line in history.history_lines(kept)] == [
        (1.0, 0.8), (1.25, 1.0), (1.125, 0.9),
    ]  # fmt: skip


def test_trend_table_shows_the_readings_of_each_validation_and_their_change() -> None:
    runs = (validated(2), validated(3, bf16(135 * T)), validated(4, *READINGS[:-2], bf16(None, why_not="no time")))
    rows = tables.trend_rows(runs)
    device = "cuda:0 NVIDIA A100-SXM4-80GB"
    assert rows[0] == (
        "2026-01-02 03:04", device, "pass", "270.0 TFLOP/s (fp16)", "1700.0 GB/s",
        "45.0 ms (ddpm-cat-256 fp16 batch 4)", "+0.0%", "+0.0%",
    )  # fmt: skip
    assert rows[1] == ("2026-01-03 03:04", device, "pass", "135.0 TFLOP/s (bf16)", "", "", "-49.6%", "-49.6%")
    assert {len(row) for row in rows} == {len(tables.TREND)}
    shown = tables.trend(history.ValidationHistory(runs, ("half.json cannot be read",)), color=False, width=200)
    assert all(cell in shown for row in rows for cell in row)
    assert "skipped: half.json cannot be read" in shown


def test_trend_chart_has_a_line_for_each_reading_that_two_runs_have() -> None:
    fewer = [item for item in READINGS if item.name != "copy"]
    kept = [validated(2), validated(3, *fewer)]
    chart = charts.trend(history.trends(kept))
    assert chart is not None
    assert all(f">{name}<" in chart for name in ("product bf16", "host to device", "per cent of its best"))
    assert ">copy<" not in chart
    assert charts.trend(history.trends(kept[:1])) is None


def test_share_of_the_best_value_is_at_most_one_for_rates_and_for_seconds() -> None:
    kept = [validated(day, reading("loop", "loop", s), bf16(v)) for day, s, v in ((2, 0.05, 4 * T), (3, 0.1, 3 * T))]
    assert [trend.shares for trend in history.trends(kept)] == [(1.0, 0.5), (1.0, 0.75)]
