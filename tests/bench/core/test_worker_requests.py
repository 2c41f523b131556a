"""Tests that the requests to a worker keep the JSON form of the golden files, which an earlier version has written."""

from __future__ import annotations

import typing

import pytest

from bench.core import worker_requests
from bench.core.worker_requests import (
    CaseRequest,
    Examination,
    LinkTest,
    PrecisionQuery,
    Preparation,
    RepeatPhases,
    TorchQuery,
)
from tests.bench.conftest import a_case
from tests.conftest import CHECKOUT

GOLDEN = CHECKOUT / "tests" / "data" / "worker_requests"
REQUESTS: dict[str, worker_requests.WorkerRequest] = {
    "query": TorchQuery(),
    "prepare": Preparation(),
    "precisions": PrecisionQuery("cpu", ("fp32", "bf16", "fp16"), 1.5),
    "links": LinkTest(("cuda:0", "cuda:1"), 1767322800.25, 12.0),
    "examine": Examination("cuda:0", 1767322800.25, 60.0, ("numerics", "product")),
    "case": CaseRequest(
        a_case(dtype="bf16", threads=2),
        1767322800.25,
        20.0,
        90.0,
        {"tiny-ddpm": "/data/models/tïny"},
        "/data/out/tiny.png",
        paced=True,
        compare=False,
        find_max=True,
        rate_known=1e11,
        rate_fp32=5e10,
        checks_seconds=60.0,
        cpus=1.5,
    ),
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_request_is_encoded_to_the_line_of_the_golden_file_and_decoded_from_it(name: str) -> None:
    line = (GOLDEN / f"{name}.json").read_text(encoding="utf-8")
    assert worker_requests.encode(REQUESTS[name]) + "\n" == line
    assert worker_requests.decode(line) == REQUESTS[name]


def test_golden_files_hold_a_request_of_every_kind() -> None:
    assert {type(request) for request in REQUESTS.values()} == set(typing.get_args(worker_requests.WorkerRequest))


@pytest.mark.parametrize("line", ["", "{", "{}", '{"examine": 3}', '{"links": {}}', '{"precisions": 3}'])
def test_line_that_is_no_request_is_rejected(line: str) -> None:
    with pytest.raises(ValueError):
        worker_requests.decode(line)


def test_control_line_again_holds_seconds_and_phases_and_other_words_decode_to_none() -> None:
    again = RepeatPhases(("copy", "memory"), 7.5)
    assert again.line == "again 7.5 copy memory"
    assert worker_requests.decode_repeat_phases("again 7.5 copy memory\n") == again
    assert [worker_requests.decode_repeat_phases(line) for line in ("", "\n", "enough\n", "go\n")] == [None] * 4
    with pytest.raises(ValueError):
        worker_requests.decode_repeat_phases("again\n")
