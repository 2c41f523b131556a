"""One run against another: slower only where nothing else explains it."""

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
    """A case whose images take about so long."""
    chance = random.Random(seed)  # noqa: S311 (noise)
    samples = tuple(Sample(seconds * chance.gauss(1, noise), (), 1.0) for _ in range(count))
    usual: dict[str, Any] = {"case": a_case(device="cuda:0"), "samples": samples}
    return a_result(**usual | changes)


def held(before: Result, after: Result, **changes: Any) -> compare.ComparedCase:
    (row,) = compare.compare(a_run(before), a_run(after, **changes)).rows
    return row


@pytest.mark.parametrize(
    ("factor", "state"),
    [(1.05, compare.SLOWER), (0.95, compare.FASTER), (1.0, compare.SAME), (1.02, compare.SAME), (0.985, compare.SAME)],
)
def test_a_difference_is_named_from_three_percent_on(factor: float, state: str) -> None:
    row = held(noisy(2.0), noisy(2.0 * factor, seed=1))
    assert row.state == state
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(factor, abs=0.006)
    assert row.ratio.low <= row.ratio.median <= row.ratio.high


def test_the_smallest_effect_can_be_chosen() -> None:
    before, after = a_run(noisy(2.0)), a_run(noisy(2.12, seed=1))
    assert compare.compare(before, after).exit is Exit.VERDICT_FAIL
    assert compare.compare(before, after, least=0.10).exit is Exit.GOOD


def test_an_effect_within_the_noise_is_none() -> None:
    # 6 % slower, and each run is known within no more than that.
    row = held(noisy(2.0, noise=0.15, count=6), noisy(2.12, seed=1, noise=0.15, count=6))
    assert row.state == compare.SAME
    assert row.floor > 0.03


def test_two_processes_on_a_cpu_differ_by_the_place_of_their_weights() -> None:
    on_cpu = a_case()
    before = noisy(2.0, case=on_cpu)
    row = held(before, noisy(2.2, case=on_cpu, seed=1))
    assert (row.state, row.floor) == (compare.SAME, 0.15)
    assert "run --interleave finds less" in row.reason
    assert held(before, noisy(2.02, case=on_cpu, seed=1)).reason == ""
    assert held(before, noisy(2.4, case=on_cpu, seed=1)).state == compare.SLOWER
    one, two = (noisy(seconds, case=on_cpu, seed=seed) for seed, seconds in enumerate((2.0, 2.2)))
    (pair,) = compare.pairs(a_run(one, two, interleaved=True)).rows
    assert pair.state == compare.SLOWER, "in turns, every image has its weights elsewhere"


def test_a_machine_that_itself_became_slower_explains_as_much() -> None:
    def with_peak(result: Result, peak: float) -> Result:
        return replace(result, work=Work(flops_per_step=1, peak_flops_per_second={"matrix product": peak, "x": 1.0}))

    before = with_peak(noisy(2.0), 100e9)
    assert held(before, with_peak(noisy(2.2, seed=1), 100e9)).state == compare.SLOWER
    row = held(before, with_peak(noisy(2.2, seed=1), 88e9))
    assert (row.state, round(row.floor, 2)) == (compare.SAME, 0.14)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trust": Trust("contended", ("its threads waited 20% of the time for a core",))}, "its threads waited 20%"),
        ({"host": a_host(steal_share=0.3)}, "the hypervisor took 30%"),
        ({"status": Status.OOM}, "oom"),
    ],
)
@pytest.mark.parametrize("which", ["before", "after"])
def test_a_case_that_was_disturbed_or_failed_gets_no_verdict(changes: dict[str, Any], reason: str, which: str) -> None:
    results = {"before": noisy(2.0), "after": noisy(3.0, seed=1)}
    results[which] = replace(results[which], **changes)
    row = held(results["before"], results["after"])
    assert row.state == compare.NOT_JUDGED
    assert row.reason.startswith(f"{which}: {reason}")
    assert compare.Comparison((row,), (), ()).exit is Exit.NOT_JUDGED


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (machine("Another CPU"), "another machine: cpu A CPU, then Another CPU"),
        (machine("A CPU", ["NVIDIA T4"]), "another machine: gpus none, then NVIDIA T4"),
        ({**machine("A CPU"), "cores": 64}, "another machine: cores 2, then 64"),
        ({**machine("A CPU"), "nvidia_driver": "580.1"}, "another machine: nvidia_driver None, then 580.1"),
    ],
)
def test_another_machine_gets_no_verdict(after: dict[str, Any], said: str) -> None:
    row = held(noisy(2.0), noisy(3.0, seed=1), machine=after)
    assert (row.state, row.reason) == (compare.NOT_JUDGED, said)


def test_other_software_is_told_and_may_be_what_is_compared() -> None:
    after = replace(noisy(2.5, seed=1), software={"python": "3.11.7", "torch": "2.13.0"})
    found = compare.compare(a_run(noisy(2.0)), a_run(after))
    assert found.differs == ("torch 2.9.0, then 2.13.0", "diffusers 0.35.0, then absent")
    assert found.exit is Exit.VERDICT_FAIL


def test_cases_of_one_run_alone_are_named() -> None:
    other = noisy(1.0, case=a_case(dtype="bf16", device="cuda:0"))
    found = compare.compare(a_run(noisy(2.0), other), a_run(noisy(2.0, seed=1)))
    assert found.alone == (other.case.name,)
    assert [row.name for row in found.rows] == [a_case(device="cuda:0").name]
    assert compare.compare(a_run(other), a_run(noisy(2.0))).exit is Exit.NOT_JUDGED, "nothing in common"


def pair(drift: float, factor: float, count: int = 12) -> Run:
    """Images in turns on a machine that drifts by far more than the two differ."""
    chance = random.Random(5)  # noqa: S311 (noise)
    slow = [1 + drift * number / count for number in range(count)]
    one = tuple(Sample(2.0 * each * chance.gauss(1, 0.004), (), 1.0) for each in slow)
    two = tuple(Sample(2.0 * factor * each * chance.gauss(1, 0.004), (), 1.0) for each in slow)
    results = (a_result(samples=one), a_result(a_case(layout="channels_last"), samples=two))
    return a_run(*results, interleaved=True)


@pytest.mark.parametrize(("factor", "state"), [(1.05, compare.SLOWER), (1.0, compare.SAME), (0.9, compare.FASTER)])
def test_images_in_turns_see_through_a_machine_that_drifts(factor: float, state: str) -> None:
    run = pair(0.5, factor)
    (row,) = compare.pairs(run).rows
    assert row.state == state
    assert row.ratio is not None
    assert row.ratio.high - row.ratio.low < 0.01
    alone = stats.ratio(*([each.seconds for each in result.samples] for result in run.results))
    assert alone.high - alone.low > 0.1, "apart, nothing could be said"
    assert "channels-last" in row.name


def test_a_pair_is_compared_with_the_images_of_its_warm_up() -> None:
    """One of the two may have had a longer warm-up: image n stays beside image n."""
    run = pair(0.5, 1.05)
    one, two = run.results
    shifted = replace(one, warmups=one.samples[:2], samples=one.samples[2:])
    assert compare.pairs(replace(run, results=(shifted, two))).rows[0].ratio == compare.pairs(run).rows[0].ratio


def test_the_tables_of_a_comparison() -> None:
    found = compare.compare(a_run(noisy(2.0)), a_run(noisy(2.5, seed=1), a_result(a_case(dtype="bf16"))))
    text = tables.comparison(found, color=False, width=160)
    assert "+25." in text
    assert "slower" in text
    assert f"only in one of the runs: {a_case(dtype='bf16').name}" in text
    assert "\x1b" not in text
    assert "no case in common" in tables.comparison(compare.Comparison((), (), ()), color=False, width=160)


def test_a_virtual_machine_whose_cores_were_moved_is_another_one() -> None:
    """What a copy moves changed by a third: a case that became a quarter slower may owe it to that."""
    before, after = (
        a_run(a_result(samples=(Sample(seconds, (seconds / 4,) * 4, seconds),) * 6)) for seconds in (2.0, 2.5)
    )
    moved = [
        replace(run, results=(replace(each, work=replace(each.work, copy_bytes_per_second=(rate,))),))
        for run, rate in ((before, 32e9), (after, 50e9))
        for each in run.results
    ]
    assert [row.state for row in compare.compare(before, after).rows] == [compare.SLOWER]
    (row,) = compare.compare(*moved).rows
    assert row.state == compare.SAME
    assert row.floor == pytest.approx(50 / 32 - 1)


def test_the_chart_draws_the_interval_and_what_it_must_exceed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "_svg", lambda figure: figure)
    rows = [held(noisy(2.0), noisy(seconds, seed=1, noise=0.02)) for seconds in (2.6, 1.8)]
    figure: Any = charts.comparison_chart(compare.Comparison(tuple(rows), (), ()))
    (axes,) = figure.axes
    bands, drawn = axes.patches, [each.get_segments()[0] for each in axes.collections]
    for row, band, segment in zip(reversed(rows), bands, drawn, strict=True):
        assert row.ratio is not None
        assert (band.get_x(), band.get_width()) == (-100 * row.floor, 200 * row.floor)
        interval = [100 * (row.ratio.low - 1), 100 * (row.ratio.high - 1)]
        assert [x for x, _ in segment] == pytest.approx(interval)
