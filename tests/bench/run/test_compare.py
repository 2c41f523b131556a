"""Tests the comparison of two runs: a slowdown is reported unless noise or a disturbance may explain it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import stats
from bench.core.errors import Exit
from bench.core.result import Run, Sample, Status, Trust, Work
from bench.report import charts, tables
from bench.run import compare
from tests.bench.conftest import a_case, a_host, a_result, a_run, machine

if TYPE_CHECKING:
    from bench.core.result import Result


def noisy(seconds: float, *, seed: int = 0, count: int = 12, noise: float = 0.004, **changes: Any) -> Result:
    """Return the result of a case on a GPU whose images take about `seconds` each, with relative `noise`."""
    generator = random.Random(seed)  # noqa: S311 (noise)
    samples = tuple(Sample(seconds * generator.gauss(1, noise), (), 1.0) for _ in range(count))
    defaults: dict[str, Any] = {"case": a_case(device="cuda:0"), "samples": samples}
    return a_result(**defaults | changes)


def compared_case(before: Result, after: Result, **changes: Any) -> compare.ComparedCase:
    (row,) = compare.compare(a_run(before), a_run(after, **changes)).rows
    return row


@pytest.mark.parametrize(
    ("factor", "state"),
    [(1.05, compare.SLOWER), (0.95, compare.FASTER), (1.0, compare.SAME), (1.02, compare.SAME), (0.985, compare.SAME)],
)
def test_case_is_slower_or_faster_only_from_a_difference_of_three_percent(factor: float, state: str) -> None:
    row = compared_case(noisy(2.0), noisy(2.0 * factor, seed=1))
    assert row.state == state
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(factor, abs=0.006)
    assert row.ratio.low <= row.ratio.median <= row.ratio.high


def test_least_sets_the_smallest_difference_that_is_reported() -> None:
    before, after = a_run(noisy(2.0)), a_run(noisy(2.12, seed=1))
    assert compare.compare(before, after).exit is Exit.VERDICT_FAIL
    assert compare.compare(before, after, least=0.10).exit is Exit.GOOD


def test_difference_within_the_noise_of_the_samples_is_not_reported() -> None:
    # The case is 6 % slower, but the confidence interval of each run is wider than 6 %.
    row = compared_case(noisy(2.0, noise=0.15, count=6), noisy(2.12, seed=1, noise=0.15, count=6))
    assert row.state == compare.SAME
    assert row.floor > 0.03


def test_difference_below_15_percent_on_a_cpu_is_reported_only_for_interleaved_cases() -> None:
    on_cpu = a_case()
    before = noisy(2.0, case=on_cpu)
    row = compared_case(before, noisy(2.2, case=on_cpu, seed=1))
    assert (row.state, row.floor) == (compare.SAME, 0.15)
    assert "`bench run --interleave` finds smaller differences" in row.reason
    assert compared_case(before, noisy(2.02, case=on_cpu, seed=1)).reason == ""
    assert compared_case(before, noisy(2.4, case=on_cpu, seed=1)).state == compare.SLOWER
    one, two = (noisy(seconds, case=on_cpu, seed=seed) for seed, seconds in enumerate((2.0, 2.2)))
    (pair,) = compare.compare_pairs(a_run(one, two, interleaved=True)).rows
    assert pair.state == compare.SLOWER, "interleaved cases move their weights in memory before each image"


def test_slowdown_is_not_reported_if_the_peak_rate_of_the_machine_fell_as_much() -> None:
    def with_peak(result: Result, peak: float) -> Result:
        return replace(result, work=Work(flops_per_step=1, peak_flops_per_second={"matrix product": peak, "x": 1.0}))

    before = with_peak(noisy(2.0), 100e9)
    assert compared_case(before, with_peak(noisy(2.2, seed=1), 100e9)).state == compare.SLOWER
    row = compared_case(before, with_peak(noisy(2.2, seed=1), 88e9))
    assert (row.state, round(row.floor, 2)) == (compare.SAME, 0.14)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trust": Trust("contended", ("its threads waited 20% of the time for a core",))}, "its threads waited 20%"),
        ({"host": a_host(steal_share=0.3)}, "the hypervisor took 30%"),
        ({"status": Status.OOM}, "oom"),
    ],
)
@pytest.mark.parametrize("side", ["before", "after"])
def test_comparison_with_a_disturbed_or_failed_case_is_not_judged(
    changes: dict[str, Any], reason: str, side: str
) -> None:
    results = {"before": noisy(2.0), "after": noisy(3.0, seed=1)}
    results[side] = replace(results[side], **changes)
    row = compared_case(results["before"], results["after"])
    assert row.state == compare.NOT_JUDGED
    assert row.reason.startswith(f"{side}: {reason}")
    assert compare.Comparison((row,), (), ()).exit is Exit.NOT_JUDGED


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (machine("Another CPU"), "the machines differ: cpu was A CPU, now Another CPU"),
        (machine("A CPU", ["NVIDIA T4"]), "the machines differ: gpus was none, now NVIDIA T4"),
        ({**machine("A CPU"), "cores": 64}, "the machines differ: cores was 2, now 64"),
        ({**machine("A CPU"), "nvidia_driver": "580.1"}, "the machines differ: nvidia_driver was None, now 580.1"),
    ],
)
def test_comparison_of_cases_on_different_machines_is_not_judged(after: dict[str, Any], reason: str) -> None:
    row = compared_case(noisy(2.0), noisy(3.0, seed=1), machine=after)
    assert (row.state, row.reason) == (compare.NOT_JUDGED, reason)


def test_runs_with_different_software_are_compared_and_the_versions_listed() -> None:
    after = replace(noisy(2.5, seed=1), software={"python": "3.11.7", "torch": "2.13.0"})
    comparison = compare.compare(a_run(noisy(2.0)), a_run(after))
    assert comparison.differs == ("torch 2.9.0, then 2.13.0", "diffusers 0.35.0, then absent")
    assert comparison.exit is Exit.VERDICT_FAIL


def test_cases_that_only_one_run_has_are_listed_and_not_compared() -> None:
    other = noisy(1.0, case=a_case(dtype="bf16", device="cuda:0"))
    comparison = compare.compare(a_run(noisy(2.0), other), a_run(noisy(2.0, seed=1)))
    assert comparison.alone == (other.case.name,)
    assert [row.name for row in comparison.rows] == [a_case(device="cuda:0").name]
    assert compare.compare(a_run(other), a_run(noisy(2.0))).exit is Exit.NOT_JUDGED, "no case in common"


def pair(drift: float, factor: float, count: int = 12) -> Run:
    """Return an interleaved run of two cases on a machine that slows down by the share `drift` during the run.

    The second case takes `factor` times as long as the first one.
    """
    generator = random.Random(5)  # noqa: S311 (noise)
    drifts = [1 + drift * number / count for number in range(count)]
    one = tuple(Sample(2.0 * drift_factor * generator.gauss(1, 0.004), (), 1.0) for drift_factor in drifts)
    two = tuple(Sample(2.0 * factor * drift_factor * generator.gauss(1, 0.004), (), 1.0) for drift_factor in drifts)
    results = (a_result(samples=one), a_result(a_case(layout="channels_last"), samples=two))
    return a_run(*results, interleaved=True)


@pytest.mark.parametrize(("factor", "state"), [(1.05, compare.SLOWER), (1.0, compare.SAME), (0.9, compare.FASTER)])
def test_interleaved_run_detects_a_difference_on_a_machine_that_slows_down(factor: float, state: str) -> None:
    run = pair(0.5, factor)
    (row,) = compare.compare_pairs(run).rows
    assert row.state == state
    assert row.ratio is not None
    assert row.ratio.high - row.ratio.low < 0.01
    unpaired = stats.ratio(*([sample.seconds for sample in result.samples] for result in run.results))
    assert unpaired.high - unpaired.low > 0.1, (
        "without pairing, the interval would be too wide to detect the difference"
    )
    assert "channels-last" in row.name


def test_pairs_of_images_are_formed_by_position_including_the_warm_up() -> None:
    # One case may have a longer warm-up than the other. Image n of one must still be paired with image n of the other.
    run = pair(0.5, 1.05)
    one, two = run.results
    shifted = replace(one, warmups=one.samples[:2], samples=one.samples[2:])
    assert (
        compare.compare_pairs(replace(run, results=(shifted, two))).rows[0].ratio
        == compare.compare_pairs(run).rows[0].ratio
    )


def test_table_of_a_comparison_shows_changes_and_the_cases_of_only_one_run() -> None:
    comparison = compare.compare(a_run(noisy(2.0)), a_run(noisy(2.5, seed=1), a_result(a_case(dtype="bf16"))))
    text = tables.comparison(comparison, color=False, width=160)
    assert "+25." in text
    assert "slower" in text
    assert f"only in one of the runs: {a_case(dtype='bf16').name}" in text
    assert "\x1b" not in text
    assert "no case in common" in tables.comparison(compare.Comparison((), (), ()), color=False, width=160)


def test_slowdown_is_not_reported_if_the_copy_rate_changed_more() -> None:
    # The copy rate changed by half, which may explain that the case became a quarter slower.
    before, after = (
        a_run(a_result(samples=(Sample(seconds, (seconds / 4,) * 4, seconds),) * 6)) for seconds in (2.0, 2.5)
    )
    changed = [
        replace(run, results=(replace(result, work=replace(result.work, copy_bytes_per_second=(rate,))),))
        for run, rate in ((before, 32e9), (after, 50e9))
        for result in run.results
    ]
    assert [row.state for row in compare.compare(before, after).rows] == [compare.SLOWER]
    (row,) = compare.compare(*changed).rows
    assert row.state == compare.SAME
    assert row.floor == pytest.approx(50 / 32 - 1)


def test_chart_of_a_comparison_draws_the_interval_and_the_band_of_unreported_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(charts, "_svg", lambda figure: figure)
    rows = [compared_case(noisy(2.0), noisy(seconds, seed=1, noise=0.02)) for seconds in (2.6, 1.8)]
    figure: Any = charts.comparison_chart(compare.Comparison(tuple(rows), (), ()))
    (axes,) = figure.axes
    bands, segments = axes.patches, [collection.get_segments()[0] for collection in axes.collections]
    for row, band, segment in zip(reversed(rows), bands, segments, strict=True):
        assert row.ratio is not None
        assert (band.get_x(), band.get_width()) == (-100 * row.floor, 200 * row.floor)
        interval = [100 * (row.ratio.low - 1), 100 * (row.ratio.high - 1)]
        assert [x for x, _ in segment] == pytest.approx(interval)
