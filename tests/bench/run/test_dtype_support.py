"""Which dtypes a device has kernels for: asked in a process that a kernel may end."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from bench.core.protocol import PrecisionQuery
from bench.core.result import Precision
from bench.core.worker_events import CapabilitiesRead, DeviceCapabilities, PrecisionProbed
from bench.launch import worker_process
from bench.run import cases, dtype_support, suite_run
from bench.run.dtype_support import DtypeSupport
from bench.worker import components, device_probe
from tests.bench.fake_workers import PLAIN, WORKER, Quiet
from tests.bench.run.test_suite_run import suite_in, wish_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.worker_events import WorkerEvent

ASKED = """
import json, os, signal, sys
request = json.loads(sys.stdin.readline())
rates = {"fp32": 100e9, "bf16": 300e9, "fp16": 1e9}
kernels = {"fp32": True, "bf16": True, "fp16": False}
faults = {}
def say(event):
    print(json.dumps(event), flush=True)
say({"computes": {"lanes": 16, "threads": 2}})
for dtype in request["dtypes"]:
    say({"phase": dtype})
    found = {"dtype": dtype, "kernels": kernels[dtype]}
    say({"precision": found})
    before(dtype)
    say({"precision": found | (faults.get(dtype) or {"rate": rates[dtype]})})
sys.exit(0)
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DtypeSupport]:
    def ask_program(before: str = "pass", *, changes: str = "", cpus: float | None = None) -> DtypeSupport:
        file = tmp_path / "asked.py"
        body = ASKED.replace("def say(", f"{changes}\ndef before(dtype):\n    {before}\ndef say(")
        file.write_text(body)
        monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
        return dtype_support.ask(Path(sys.executable), "cpu", cpus=cpus)

    return ask_program


def test_a_dtype_without_kernels_is_told_with_its_factor(ask: Callable[..., DtypeSupport]) -> None:
    found = ask()
    assert [(each.dtype, each.kernels) for each in found.precisions] == [("bf16", True), ("fp16", False)]
    assert dtype_support.left_out(found.precisions[1], "cpu") == (
        "fp16: no kernels on this CPU, about 100 times slower than fp32, left out"
    )
    assert found.means == cases.Capabilities("bf16", frozenset(["fp16", "tf32"]), 32)


def test_a_probe_that_crashes_is_a_fact_of_its_dtype(ask: Callable[..., DtypeSupport]) -> None:
    found = ask("dtype == 'bf16' and os.kill(os.getpid(), signal.SIGILL)")
    bf16, fp16 = found.precisions
    assert not bf16.kernels
    assert "SIGILL" in (bf16.fault or "")
    assert dtype_support.left_out(bf16, "cpu").startswith("bf16: its probe ended (the worker died in the phase 'bf16'")
    assert (fp16.slower, fp16.fault) == (100.0, None), "it was asked in another process"


@pytest.mark.parametrize(("claimed", "tried"), [("True", True), ("None", True), ("False", False)])
def test_what_is_no_fact_of_a_dtype_leaves_it_to_torchs_word(
    ask: Callable[..., DtypeSupport], claimed: str, *, tried: bool
) -> None:
    """The memory ran out, or the driver did not start: of the dtype that says nothing."""
    killed = ask("dtype == 'bf16' and os.kill(os.getpid(), signal.SIGKILL)", changes=f"kernels['bf16'] = {claimed}")
    fault = "faults['bf16'] = {'fault': 'CUDA out of memory', 'unsupported': False}"
    filled = ask(changes=f"kernels['bf16'] = {claimed}; {fault}")
    for found in (killed, filled):
        assert [(each.dtype, each.kernels) for each in found.precisions] == [("bf16", tried), ("fp16", False)]
        assert (found.means.lower == "bf16") is tried
        said = [
            line for line in dtype_support.notes(found, cases.load_suite("quick"), ()) if line.startswith("bf16: its")
        ]
        assert [line.endswith("tried all the same") for line in said] == [tried]


def test_a_dtype_that_torch_refuses_has_no_kernels(ask: Callable[..., DtypeSupport]) -> None:
    found = ask(changes="faults['bf16'] = {'fault': 'not implemented', 'unsupported': True}")
    assert not found.precisions[0].kernels


@pytest.mark.parametrize(("has", "without"), [(True, False), (False, True), (None, False)])
def test_a_card_before_ampere_has_no_tf32(*, has: bool | None, without: bool) -> None:
    known = DtypeSupport("cuda:0", tf32=has)
    assert ("tf32" in known.means.without) is without
    said = list(dtype_support.notes(known, cases.load_suite("full"), ()))
    assert any(line.startswith("tf32: a format") for line in said) is without


def test_the_interpreter_is_asked_about_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[WorkerEvent] = []
    set_to: list[str] = []

    def rate(*_: object) -> float:
        raise RuntimeError("CUDA out of memory" if set_to[-1] == "bf16" else "not implemented for Half")

    monkeypatch.setattr(device_probe, "rate", rate)
    monkeypatch.setattr(components, "set_precision", lambda _, dtype: set_to.append(dtype))
    torch = SimpleNamespace(
        set_grad_enabled=lambda _: None, cuda=SimpleNamespace(get_device_capability=lambda _: (7, 5))
    )
    device_probe.precisions(torch, PrecisionQuery("cuda:0", ("fp32", "bf16"), None), events.append)
    assert events[0] == CapabilitiesRead(DeviceCapabilities(tf32=0))
    probes = [event.precision for event in events if isinstance(event, PrecisionProbed)]
    ends = [(probe.dtype, probe.unsupported) for probe in probes if probe.is_finished]
    assert ends == [("fp32", True), ("bf16", False)]
    assert set_to == ["fp32", "bf16"], "torch's own default for a convolution in fp32 is TF32"


def test_a_crash_in_fp32_leaves_the_others_known(ask: Callable[..., DtypeSupport]) -> None:
    found = ask("dtype == 'fp32' and os.kill(os.getpid(), signal.SIGILL)")
    assert [(each.dtype, each.kernels, each.slower) for each in found.precisions] == [
        ("bf16", True, None),
        ("fp16", False, None),
    ]


def test_a_dtype_that_torch_vouches_for_and_is_slow_has_no_kernels(ask: Callable[..., DtypeSupport]) -> None:
    found = ask(changes="kernels['fp16'] = True")
    assert not found.precisions[1].kernels


def test_a_dtype_that_torch_denies_counts_where_it_is_as_fast_as_fp32(ask: Callable[..., DtypeSupport]) -> None:
    assert ask(changes="kernels['bf16'] = False").precisions[0].kernels
    assert not ask(changes="kernels['bf16'] = False; rates['bf16'] = 50e9").precisions[0].kernels
    assert ask(changes="kernels['bf16'] = None; rates['bf16'] = 50e9").precisions[0].kernels, "it has said nothing"


def test_a_group_that_grants_one_core_makes_the_device_narrower(ask: Callable[..., DtypeSupport]) -> None:
    assert ask(cpus=1.0).lanes == 16


def test_an_interpreter_without_torch_leaves_nothing_out() -> None:
    found = dtype_support.ask(Path(sys.executable), "cpu")
    assert found.precisions == ()
    assert "without a result" in (found.fault or "")
    assert found.means == cases.Capabilities("bf16", frozenset(["tf32"]), None), (
        "it is tried, so its half is not missing"
    )
    (line,) = dtype_support.notes(found, cases.load_suite("quick"), ())
    assert line.endswith("bf16 is tried")


def test_a_card_takes_fp16_and_a_cpu_bf16() -> None:
    both = tuple(Precision(name, kernels=True) for name in ("bf16", "fp16"))
    lower = {device: DtypeSupport(device, both).means.lower for device in ("cpu", "cuda:0", "mps")}
    assert lower == {"cpu": "bf16", "cuda:0": "fp16", "mps": "fp16"}


def test_a_suite_of_fp32_alone_asks_nothing(tmp_path: Path) -> None:
    suite = cases.load_suite(suite_in(tmp_path, 'dtype = "fp32"\nscheduler = "ddim"\ncpu = {size = 16, steps = 4}\n'))
    assert not dtype_support.needed(suite, "cpu", ())
    assert dtype_support.needed(cases.load_suite("quick"), "cpu", ("fp32",)), "its sizes follow the device"
    assert dtype_support.needed(cases.load_suite("tiny"), "cpu", ())


def test_a_run_keeps_what_was_found_and_has_no_row_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ASKED.split("\n", 3)[3].replace("def say(", "def before(dtype): pass\ndef say(")
    answer = "".join(f"    {line}\n" for line in answer.splitlines())
    program = WORKER.replace("case = record(", f"if 'precisions' in request:\n{answer}case = record(", 1)
    file = tmp_path / "program.py"
    file.write_text(program + PLAIN)
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
    axes = 'dtype = ["fp32", "fp16", "lower"]\nscheduler = "ddim"\ncpu = {size = 16, steps = 4}\n'
    progress = Quiet()
    done = suite_run.run(replace(wish_in(tmp_path, 60.0), suite=suite_in(tmp_path, axes)), progress)
    assert [result.case.dtype for result in done.results] == ["fp32", "bf16"]
    assert [each.dtype for each in done.precisions] == ["bf16", "fp16"]
    line = "fp16: no kernels on this CPU, about 100 times slower than fp32, left out"
    assert line in done.notes
    assert any(line in said for said in progress.lines)


@pytest.mark.worker
@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's and torch's variables of x86")
def test_a_cpu_without_avx512_has_no_kernels_for_bf16_and_fp16(
    measured_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real torch, kept to AVX2 by its own variables: both dtypes are emulated, and far slower than fp32."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    found = dtype_support.ask(measured_python, "cpu", cpus=1.0)
    assert found.fault is None
    assert found.lanes == 8
    assert [(each.dtype, each.kernels, each.fault) for each in found.precisions] == [
        ("bf16", False, None),
        ("fp16", False, None),
    ]
    assert all(each.slower is not None and each.slower > 4 for each in found.precisions)
    assert found.means.lower is None
