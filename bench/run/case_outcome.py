"""Describes the outcome of a case: its text, whether other work disturbed it, and its comparison with fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.result import Status
from bench.run import disturbance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.result import Result


def with_comparison_of(result: Result, before: Result) -> Result:
    """Return a result with the comparison with fp32 of an earlier result, if it has none of its own."""
    one, two = before.numerics, result.numerics
    if one is None or two is None or one.forward_error is None or two.forward_error is not None:
        return result
    return replace(
        result,
        numerics=replace(two, forward_error=one.forward_error, tolerance=one.tolerance, not_compared=None),
    )


def is_clean(result: Result) -> bool:
    """Return whether a case was measured and no other work disturbed it."""
    return result.status is Status.OK and disturbance.of_case(result) is None


def is_disturbed_pair(pair: Sequence[Result]) -> bool:
    """Return whether both results of a pair were measured and other work disturbed at least one of them."""
    return all(result.status is Status.OK for result in pair) and not all(map(is_clean, pair))


def text(result: Result) -> str:
    """Return the outcome of a case as a short text, such as "0.31 s/step over 6 images" or "skipped: no time"."""
    steps = stats.step_seconds(result)
    if result.status is Status.OK and steps is not None:
        disturbed = disturbance.of_case(result)
        return f"{steps.median:.3g} s/step over {len(result.samples)} images{f' ({disturbed})' if disturbed else ''}"
    return f"{result.status.value}: {result.cause}".removesuffix(": ")
