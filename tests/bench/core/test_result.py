"""Tests the JSON form of records: it is read back equal, and a wrong value is rejected with its path."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.core.codec import dumps, loads, plain
from bench.core.result import Case, Host, Memory, Numerics, Phases, Result, Run, Sample, Work
from bench.core.verdict import Verdict
from tests.bench.conftest import a_case, a_result, a_run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(),
    int: st.integers(),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    Any: JSON,
}
RECORDS = (Case, Phases, Sample, Memory, Work, Numerics, Host, Result, Verdict, Run)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return a hypothesis strategy for the values of a type, without NaN and infinity."""
    inner = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if kind in LEAVES:
        return LEAVES[kind]
    if origin in {types.UnionType, typing.Union}:
        return st.none() | values_of(inner[0])
    if origin is tuple:
        return st.lists(values_of(inner[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(), values_of(inner[1]), max_size=2)
    if issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_written_record_is_read_back_equal(kind: Any, data: st.DataObject) -> None:
    record = data.draw(values_of(kind))
    text = dumps(record)
    assert "\n" not in text
    assert loads(text, kind) == record


def test_written_run_with_two_results_is_read_back_equal() -> None:
    run = a_run(a_result(), a_result(a_case(dtype="bf16"), reason="naïve | text", numerics=None, host=None))
    assert loads(dumps(run), Run) == run


def test_integer_in_json_is_read_as_float_where_the_field_is_float() -> None:
    sample = loads('{"seconds": 2, "step_seconds": [1, 1], "cpu_seconds": 0}', Sample)
    assert sample == Sample(2.0, (1.0, 1.0), 0.0)
    assert isinstance(sample.seconds, float)


def test_field_of_a_record_cannot_be_assigned() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_case().steps = 5  # type: ignore[misc]


REMOVED = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # an unknown field
        (("results", 0, "case", "colour"), "red", r"Run\.results\[0\]\.case .*colour"),
        (("extra",), 1, r"Run .*extra"),
        # a missing field
        (("verdict",), REMOVED, r"Run: .*'verdict'"),
        (("results", 1, "case", "steps"), REMOVED, r"Run\.results\[1\]\.case: .*'steps'"),
        # a value of another type
        (("results", 0, "samples", 1, "seconds"), "fast", r"Run\.results\[0\]\.samples\[1\]\.seconds is 'fast'"),
        (("results", 0, "samples", 1, "step_seconds", 2), None, r"samples\[1\]\.step_seconds\[2\] is None"),
        (("results", 0, "case", "steps"), 1.5, r"Run\.results\[0\]\.case\.steps is 1\.5, not int"),
        (("results", 0, "case", "steps"), True, r"Run\.results\[0\]\.case\.steps is True"),
        (("results", 0, "phases", "load_seconds"), False, r"phases\.load_seconds is False"),
        (("results", 0, "numerics", "finite"), 1, r"numerics\.finite is 1, not bool"),
        (("results", 0, "software", "torch"), 2, r"software\.torch is 2, not str"),
        (("results",), {}, r"Run\.results is not a list"),
        (("results", 0), "gone", r"Run\.results\[0\] is not an object"),
        (("machine",), [], r"Run\.machine is not an object"),
        (("id",), None, r"Run\.id is None"),
        # an unknown enum value
        (("results", 1, "status"), "fine", r"Run\.results\[1\]\.status.*fine"),
        (("verdict", "state"), "great", r"Run\.verdict\.state.*great"),
    ],
)
def test_unknown_missing_or_wrong_value_in_a_run_is_rejected_with_its_path(
    path: tuple[str | int, ...], value: object, message: str
) -> None:
    run = plain(a_run(a_result(), a_result()))
    parent = run
    for part in path[:-1]:
        parent = parent[part]
    if value is REMOVED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        loads(json.dumps(run), Run)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"Run"', "[{}]"])
def test_text_that_is_no_json_object_of_a_run_is_rejected(text: str) -> None:
    with pytest.raises(ValueError):
        loads(text, Run)


def test_name_of_a_case_has_all_axes_and_no_colon() -> None:
    assert a_case(device="cuda:1").name == "tiny-ddpm-cuda1-fp32-ddim4-16x16-b1"
