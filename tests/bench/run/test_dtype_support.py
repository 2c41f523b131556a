"""Tests the probe that finds the dtypes for which a device has kernels; a bad kernel may crash its process."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from bench.core.result import Precision
from bench.core.worker_events import CapabilitiesRead, DeviceCapabilities, PrecisionProbed
from bench.core.worker_requests import PrecisionQuery
from bench.launch import worker_process
from bench.run import cases, dtype_support, suite_run
from bench.run.dtype_support import DtypeSupport
from bench.worker import components, device_probe
from tests.bench.fake_workers import PLAIN, WORKER, RecordedProgress
from tests.bench.run.test_suite_run import request_in, suite_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.worker_events import WorkerEvent

PROBE_PROGRAM = """
import json, os, signal, sys
request = json.loads(sys.stdin.readline())
rates = {"fp32": 100e9, "bf16": 300e9, "fp16": 1e9}
kernels = {"fp32": True, "bf16": True, "fp16": False}
faults = {}
def emit(event):
    print(json.dumps(event), flush=True)
emit({"computes": {"lanes": 16, "threads": 2}})
for dtype in request["dtypes"]:
    emit({"phase": dtype})
    state = {"dtype": dtype, "kernels": kernels[dtype]}
    emit({"precision": state})
    before(dtype)
    emit({"precision": state | (faults.get(dtype) or {"rate": rates[dtype]})})
sys.exit(0)
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DtypeSupport]:
    """Return a function that probes the CPU with PROBE_PROGRAM in place of the worker.

    Its arguments are a statement that runs before the end of each probe, code that changes the program's values, and
    the number of CPUs that the process may use.
    """

    def probe_program(before: str = "pass", *, changes: str = "", cpus: float | None = None) -> DtypeSupport:
        file = tmp_path / "probe.py"
        body = PROBE_PROGRAM.replace("def emit(", f"{changes}\ndef before(dtype):\n    {before}\ndef emit(")
        file.write_text(body)
        monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
        return dtype_support.probe(Path(sys.executable), "cpu", cpus=cpus)

    return probe_program


def test_dtype_without_kernels_is_left_out_with_its_slowness_against_fp32(probe: Callable[..., DtypeSupport]) -> None:
    support = probe()
    assert [(precision.dtype, precision.kernels) for precision in support.precisions] == [
        ("bf16", True),
        ("fp16", False),
    ]
    assert dtype_support.describe_omission(support.precisions[1], "cpu") == (
        "fp16: left out, since this CPU has no kernels for it, and it is about 100 times slower than fp32"
    )
    assert support.capabilities == cases.Capabilities("bf16", frozenset(["fp16", "tf32"]), 32)


def test_dtype_whose_probe_crashes_counts_as_without_kernels(probe: Callable[..., DtypeSupport]) -> None:
    support = probe("dtype == 'bf16' and os.kill(os.getpid(), signal.SIGILL)")
    bf16, fp16 = support.precisions
    assert not bf16.kernels
    assert "SIGILL" in (bf16.fault or "")
    assert dtype_support.describe_omission(bf16, "cpu").startswith(
        "bf16: left out, since its probe failed (the worker died in the phase 'bf16'"
    )
    assert (fp16.slower, fp16.fault) == (100.0, None), "the other dtype was probed in a new process"


@pytest.mark.parametrize(("reported", "tried"), [("True", True), ("None", True), ("False", False)])
def test_dtype_whose_probe_is_killed_or_out_of_memory_counts_as_torch_reports(
    probe: Callable[..., DtypeSupport], reported: str, *, tried: bool
) -> None:
    # A lack of memory or a driver error says nothing about the dtype.
    killed = probe("dtype == 'bf16' and os.kill(os.getpid(), signal.SIGKILL)", changes=f"kernels['bf16'] = {reported}")
    fault = "faults['bf16'] = {'fault': 'CUDA out of memory', 'unsupported': False}"
    filled = probe(changes=f"kernels['bf16'] = {reported}; {fault}")
    for support in (killed, filled):
        assert [(precision.dtype, precision.kernels) for precision in support.precisions] == [
            ("bf16", tried),
            ("fp16", False),
        ]
        assert (support.capabilities.lower == "bf16") is tried
        notes = [
            line for line in dtype_support.notes(support, cases.load_suite("quick"), ()) if line.startswith("bf16: ")
        ]
        assert [line.endswith("its cases run anyway") for line in notes] == [tried]


def test_dtype_that_torch_rejects_counts_as_without_kernels(probe: Callable[..., DtypeSupport]) -> None:
    support = probe(changes="faults['bf16'] = {'fault': 'not implemented', 'unsupported': True}")
    assert not support.precisions[0].kernels


@pytest.mark.parametrize(("has", "without"), [(True, False), (False, True), (None, False)])
def test_tf32_is_left_out_if_the_gpu_does_not_have_it(*, has: bool | None, without: bool) -> None:
    support = DtypeSupport("cuda:0", tf32=has)
    assert ("tf32" in support.capabilities.without) is without
    notes = list(dtype_support.notes(support, cases.load_suite("full"), ()))
    assert any(line.startswith("tf32: left out") for line in notes) is without


def test_probe_of_a_gpu_reports_tf32_and_tells_unsupported_dtypes_from_other_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[WorkerEvent] = []
    precisions: list[str] = []

    def rate(*_: object) -> float:
        raise RuntimeError("CUDA out of memory" if precisions[-1] == "bf16" else "not implemented for Half")

    monkeypatch.setattr(device_probe, "rate", rate)
    monkeypatch.setattr(components, "set_precision", lambda _, dtype: precisions.append(dtype))
    torch = SimpleNamespace(
        set_grad_enabled=lambda _: None, cuda=SimpleNamespace(get_device_capability=lambda _: (7, 5))
    )
    device_probe.precisions(torch, PrecisionQuery("cuda:0", ("fp32", "bf16"), None), events.append)
    assert events[0] == CapabilitiesRead(DeviceCapabilities(tf32=0))
    probes = [event.precision for event in events if isinstance(event, PrecisionProbed)]
    ends = [(probe.dtype, probe.unsupported) for probe in probes if probe.is_finished]
    assert ends == [("fp32", True), ("bf16", False)]
    assert precisions == ["fp32", "bf16"], "torch's own default for a convolution in fp32 is TF32"


def test_other_dtypes_are_probed_after_a_crash_in_fp32(probe: Callable[..., DtypeSupport]) -> None:
    support = probe("dtype == 'fp32' and os.kill(os.getpid(), signal.SIGILL)")
    assert [(precision.dtype, precision.kernels, precision.slower) for precision in support.precisions] == [
        ("bf16", True, None),
        ("fp16", False, None),
    ]


def test_very_slow_dtype_counts_as_without_kernels_even_if_torch_reports_some(
    probe: Callable[..., DtypeSupport],
) -> None:
    support = probe(changes="kernels['fp16'] = True")
    assert not support.precisions[1].kernels


def test_dtype_without_reported_kernels_counts_as_supported_only_if_it_is_as_fast_as_fp32(
    probe: Callable[..., DtypeSupport],
) -> None:
    assert probe(changes="kernels['bf16'] = False").precisions[0].kernels
    assert not probe(changes="kernels['bf16'] = False; rates['bf16'] = 50e9").precisions[0].kernels
    assert probe(changes="kernels['bf16'] = None; rates['bf16'] = 50e9").precisions[0].kernels, "torch reports nothing"


def test_cpu_quota_of_one_core_halves_the_lanes_of_two_threads(probe: Callable[..., DtypeSupport]) -> None:
    assert probe(cpus=1.0).lanes == 16


def test_failed_probe_leaves_no_dtype_out() -> None:
    support = dtype_support.probe(Path(sys.executable), "cpu")
    assert support.precisions == ()
    assert "without a result" in (support.fault or "")
    assert support.capabilities == cases.Capabilities("bf16", frozenset(["tf32"]), None), (
        "bf16 is tried, so its cases are not missing"
    )
    (line,) = dtype_support.notes(support, cases.load_suite("quick"), ())
    assert line.endswith("The cases with bf16 run anyway")


def test_preferred_low_precision_is_fp16_on_a_gpu_and_bf16_on_a_cpu() -> None:
    both = tuple(Precision(name, kernels=True) for name in ("bf16", "fp16"))
    lower = {device: DtypeSupport(device, both).capabilities.lower for device in ("cpu", "cuda:0", "mps")}
    assert lower == {"cpu": "bf16", "cuda:0": "fp16", "mps": "fp16"}


def test_probe_is_needed_for_a_suite_with_low_precision_or_sizes_by_device(tmp_path: Path) -> None:
    suite = cases.load_suite(suite_in(tmp_path, 'dtype = "fp32"\nscheduler = "ddim"\ncpu = {size = 16, steps = 4}\n'))
    assert not dtype_support.is_needed(suite, "cpu", ())
    assert dtype_support.is_needed(cases.load_suite("quick"), "cpu", ("fp32",)), "its sizes depend on the device"
    assert dtype_support.is_needed(cases.load_suite("tiny"), "cpu", ())


def test_run_stores_the_probed_dtypes_and_has_no_case_for_one_without_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = PROBE_PROGRAM.split("\n", 3)[3].replace("def emit(", "def before(dtype): pass\ndef emit(")
    answer = "".join(f"    {line}\n" for line in answer.splitlines())
    program = WORKER.replace("case = record(", f"if 'precisions' in request:\n{answer}case = record(", 1)
    file = tmp_path / "program.py"
    file.write_text(program + PLAIN)
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
    axes = 'dtype = ["fp32", "fp16", "lower"]\nscheduler = "ddim"\ncpu = {size = 16, steps = 4}\n'
    progress = RecordedProgress()
    measured = suite_run.run(replace(request_in(tmp_path, 60.0), suite=suite_in(tmp_path, axes)), progress)
    assert [result.case.dtype for result in measured.results] == ["fp32", "bf16"]
    assert [precision.dtype for precision in measured.precisions] == ["bf16", "fp16"]
    line = "fp16: left out, since this CPU has no kernels for it, and it is about 100 times slower than fp32"
    assert line in measured.notes
    assert any(line in report for report in progress.lines)


@pytest.mark.worker
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these variables of oneDNN and torch are for x86")
def test_real_cpu_limited_to_avx2_has_no_kernels_for_bf16_and_fp16(
    measured_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These variables limit torch to AVX2, with which both dtypes are emulated, and much slower than fp32.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    support = dtype_support.probe(measured_python, "cpu", cpus=1.0)
    assert support.fault is None
    assert support.lanes == 8
    assert [(precision.dtype, precision.kernels, precision.fault) for precision in support.precisions] == [
        ("bf16", False, None),
        ("fp16", False, None),
    ]
    assert all(precision.slower is not None and precision.slower > 4 for precision in support.precisions)
    assert support.capabilities.lower is None
