"""What is kept of a host's validations: read again, the best of each card, and how its figures change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.validation_records import Judgement, Reading, VerdictState
from bench.report import charts, tables
from bench.validate import history
from bench.validate.expectations import Expected
from provision.core.errors import BlockedError
from tests.bench.conftest import a_run
from tests.bench.validation_samples import A100, CPU, GB, READINGS, T, reading, validated

if TYPE_CHECKING:
    from pathlib import Path

    from bench.core.result import Run

BF16 = ("GPU-a100", "product bf16")


ONE_IMAGE = reading("loop", "loop stable-diffusion-v1-5 fp16 batch 1", 0.3)


def bf16(value: float | None, **changes: Any) -> Reading:
    return reading("product", "product bf16", value, **changes)


def judged(state: VerdictState, rule: str = "product", device: str = "cuda:0") -> tuple[Judgement, ...]:
    return (Judgement(rule, device, state, "as it was found"),)


def test_what_is_kept_is_read_again_oldest_first(tmp_path: Path) -> None:
    late, early = validated(9), replace(validated(2), id="validate-that-was-renamed")
    for run in (late, early):
        assert history.keep(run, tmp_path / "validations").name == f"{run.id}.json"
    assert history.load(tmp_path / "validations") == history.ValidationHistory((early, late))
    assert history.load(tmp_path / "none") == history.ValidationHistory(())


def test_what_cannot_be_read_is_named_and_hides_nothing(tmp_path: Path) -> None:
    history.keep(validated(2), tmp_path)
    (tmp_path / "half.json").write_text('{"schema": 2,')
    (tmp_path / "folder.json").mkdir()
    history.keep(a_run(id="cases"), tmp_path)
    history.keep(replace(validated(3), id="timeless", started="yesterday"), tmp_path)
    history.keep(replace(validated(3), id="zoneless", started="2026-01-03T03:04:05"), tmp_path)
    kept = history.load(tmp_path)
    assert [run.id for run in kept.runs] == ["20260102T030405Z-validate-abcdef"]
    names = ["cases", "folder", "half", "timeless", "zoneless"]
    assert [name for name in names for why in kept.unread if f"{name}.json" in why] == names


def test_a_folder_that_cannot_be_written_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BlockedError, match="another --root"):
        history.keep(validated(2), tmp_path / "file" / "validations")


def test_the_best_of_a_card_is_held_with_its_run() -> None:
    kept = [validated(2, bf16(260 * T)), validated(3, bf16(268 * T)), validated(4, bf16(250 * T))]
    source = "its own best, run 20260103T030405Z-validate-abcdef, torch 2.9.0"
    assert history.bests(kept, "2.9.0") == {BF16: Expected(268 * T, source, "own")}
    steps = [validated(day, reading("loop", "loop", seconds)) for day, seconds in ((2, 0.05), (3, 0.04), (4, 0.06))]
    assert history.bests(steps, "2.9.0")["GPU-a100", "loop"].value == 0.04, "of seconds the fewest"


@pytest.mark.parametrize(
    "changes",
    [
        {"disturbed": {"cuda:0": "busy"}},
        {"judgements": judged(VerdictState.FAIL)},
        {"judgements": judged(VerdictState.NOT_JUDGED, "driver-hidden")},
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
def test_what_is_no_measure_of_a_card_is_not_held_against_it(changes: dict[str, Any]) -> None:
    kept = [validated(2, bf16(240 * T)), validated(3, **({"readings": (bf16(268 * T),)} | changes))]
    assert {each.value for each in history.bests(kept, "2.9.0").values()} == {240 * T}


@pytest.mark.parametrize(
    "changes",
    [
        {"judgements": judged(VerdictState.WARN)},
        {"judgements": judged(VerdictState.FAIL, device="cuda:1")},
        {"judgements": judged(VerdictState.NOT_JUDGED, "unknown-card")},
        {"disturbed": {"cuda:1": "busy"}},
        {"software": {"torch": "2.9.1+cu128"}},
    ],
)
def test_what_speaks_not_against_a_card_leaves_its_best(changes: dict[str, Any]) -> None:
    kept = [validated(2, bf16(240 * T)), validated(3, bf16(268 * T), **changes)]
    assert history.bests(kept, "2.9.0")[BF16].value == 268 * T


def test_nothing_is_alike_to_a_torch_that_is_not_known() -> None:
    assert history.bests([validated(2, software={})], None) == {}


def test_a_card_stays_itself_where_its_number_changes_and_a_processor_is_of_its_host() -> None:
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
    assert [each.whose for each in history.trends([here, there])] == ["A CPU", "there A CPU"]


def test_of_several_rounds_the_best_counts_and_an_error_is_no_figure() -> None:
    rounds = [bf16(value * T, round=number) for number, value in enumerate((250, 261, 240))]
    (trend,) = history.trends([validated(2, *rounds, reading("numerics", "matrix product bf16", 1e-3, limit=1.0))])
    assert [point.value for point in trend.points] == [261 * T]


def test_a_host_is_known_by_its_name_or_its_cards() -> None:
    def on(name: str, day: int, uuid: str) -> Run:
        run = validated(day, card=replace(A100, uuid=uuid))
        return replace(run, machine=run.machine | {"hostname": name})

    renamed, other, mine = on("old", 2, "GPU-1"), on("other", 3, "GPU-2"), on("new", 4, "GPU-1")
    assert history.of_host([renamed, other, mine], {"hostname": "new"}) == (renamed, mine)
    assert history.of_host([renamed, other], {"hostname": "new"}) == ()


def test_a_line_holds_what_tells_most_of_a_device() -> None:
    kept = [
        validated(2, bf16(200 * T), reading("product", "product fp32", 18 * T), reading("copy", "copy", 1500 * GB)),
        validated(
            3, *READINGS, ONE_IMAGE, judgements=judged(VerdictState.WARN) + judged(VerdictState.FAIL, device="cuda:7")
        ),
        validated(4, bf16(None, why_not="no time")),
    ]
    first, second, third = history.lines(kept)
    assert (first.product, first.loop) == (bf16(200 * T), None)
    assert (first.against_first, first.against_best) == (1.0, 200 / 268)
    assert (second.product, second.verdict) == (reading("product", "product fp16", 270 * T), VerdictState.WARN)
    assert second.loop == reading("loop", "loop ddpm-cat-256 fp16 batch 4", 0.045)
    assert (third.product, third.against_first, third.against_best) == (None, None, None)


def test_a_change_is_of_the_same_product() -> None:
    kept = [validated(day, bf16(value * T)) for day, value in ((2, 200), (3, 250), (4, 225))]
    assert [(line.against_first, line.against_best) for line in history.lines(kept)] == [
        (1.0, 0.8), (1.25, 1.0), (1.125, 0.9),
    ]  # fmt: skip


def test_the_table_says_each_figure_and_its_change() -> None:
    runs = (validated(2), validated(3, bf16(135 * T)), validated(4, *READINGS[:-2], bf16(None, why_not="no time")))
    rows = tables.trend_rows(runs)
    device = "cuda:0 NVIDIA A100-SXM4-80GB"
    assert rows[0] == (
        "2026-01-02 03:04", device, "pass", "270.0 TFLOP/s (fp16)", "1700.0 GB/s",
        "45.0 ms (ddpm-cat-256 fp16 batch 4)", "+0.0%", "+0.0%",
    )  # fmt: skip
    assert rows[1] == ("2026-01-03 03:04", device, "pass", "135.0 TFLOP/s (bf16)", "", "", "-49.6%", "-49.6%")
    assert {len(row) for row in rows} == {len(tables.TREND)}
    shown = tables.trend(history.ValidationHistory(runs, ("half.json is none",)), color=False, width=200)
    assert all(cell in shown for row in rows for cell in row)
    assert "passed over: half.json is none" in shown


def test_a_chart_has_a_line_for_what_was_asked_twice() -> None:
    fewer = [each for each in READINGS if each.name != "copy"]
    kept = [validated(2), validated(3, *fewer)]
    drawn = charts.trend(history.trends(kept))
    assert drawn is not None
    assert all(f">{name}<" in drawn for name in ("product bf16", "host to device", "per cent of its best"))
    assert ">copy<" not in drawn
    assert charts.trend(history.trends(kept[:1])) is None


def test_a_share_is_of_the_best_whether_more_or_less_is_better() -> None:
    kept = [validated(day, reading("loop", "loop", s), bf16(v)) for day, s, v in ((2, 0.05, 4 * T), (3, 0.1, 3 * T))]
    assert [each.shares for each in history.trends(kept)] == [(1.0, 0.5), (1.0, 0.75)]
