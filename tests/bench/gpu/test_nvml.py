"""Tests reading a GPU through pynvml: with recorded answers, and with the real pynvml without a driver."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pynvml
import pytest

from bench.core.validation_records import DeviceFacts
from bench.gpu import nvml, specs
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable

CARDS = CHECKOUT / "tests" / "data" / "cards"
_UNPATCHED = ("nvmlErrorString",)  # works without a driver


def raise_not_found(*_: Any) -> Any:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


class Driver:
    """Replaces pynvml's functions by the recorded answers of a card; one without an answer raises "not found"."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Any] = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))["answers"]
        self.calls: list[str] = []
        for function in dir(pynvml):
            if function.startswith("nvml") and callable(getattr(pynvml, function)) and function not in _UNPATCHED:
                patch.setattr(pynvml, function, self._function(function))

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            if name not in self.answers:
                return raise_not_found()
            answer = self.answers[name]
            if name == "nvmlEventSetWait_v2":
                return SimpleNamespace(**answer.pop(0)) if answer else self.fail(pynvml.NVML_ERROR_TIMEOUT)
            if name == "nvmlDeviceGetHandleByUUID":
                return answer[args[0]] if args[0] in answer else self.fail(pynvml.NVML_ERROR_NOT_FOUND)
            if isinstance(answer, dict) and set(answer) <= {"0", "1"}:
                return answer[str(args[1])]
            if isinstance(answer, dict):
                return SimpleNamespace(**answer)
            return answer if answer != "lost" else self.fail(pynvml.NVML_ERROR_GPU_IS_LOST)

        return call

    @staticmethod
    def fail(number: int) -> Any:
        raise pynvml.NVMLError(number)

    @property
    def uuid(self) -> str:
        return str(self.answers["nvmlDeviceGetUUID"])


def recorded_facts(name: str, patch: pytest.MonkeyPatch, *, ours: int = 0) -> DeviceFacts:
    """Return the facts that NvmlDevice reads of the recorded card `name`; `ours` is the number of own processes."""
    driver = Driver(name, patch)
    card = nvml.NvmlDevice(driver.uuid)
    card.watch()
    return card.describe("cuda:0", "name from torch", ours=ours)


def test_facts_of_a_t4_hold_what_its_driver_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded_facts("t4", monkeypatch) == DeviceFacts(
        device="cuda:0",
        name="Tesla T4",
        uuid="GPU-00000000-0000-0000-0000-000000000004",
        driver="535.183.01",
        driver_sees=True,
        compute_capability="7.5",
        memory_bytes=16_106_127_360,
        slice=False,
        ecc=True,
        ecc_corrected=3,
        ecc_uncorrected=0,
        pages_retired=1,
        rows_pending=True,
        persistence=False,
        power_limit_watts=70.0,
        power_default_watts=70.0,
        pcie_generation=3,
        pcie_width=8,
        pcie_generation_most=3,
        pcie_width_most=16,
        others=1,
    )


def test_facts_of_an_a100_with_memory_errors_hold_remapped_rows_and_xids(monkeypatch: pytest.MonkeyPatch) -> None:
    card = recorded_facts("a100", monkeypatch)
    assert (card.ecc, card.ecc_corrected, card.ecc_uncorrected) == (True, 0, 2)
    assert (card.pages_retired, card.rows_pending) == (3, True), (
        "three remapped rows, and a remap that waits for a reset"
    )
    assert card.xids == (63, 48)
    assert (specs.find(card.name) or ("",))[0] == "A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("rows", "pending", "failed"),
    [([0, 1, 0, 0], False, False), ([0, 1, 1, 0], True, False), ([0, 1, 0, 1], False, True)],
)
def test_failed_row_remap_is_not_reported_as_pending(
    monkeypatch: pytest.MonkeyPatch, rows: list[int], *, pending: bool, failed: bool
) -> None:
    driver = Driver("h100", monkeypatch)
    driver.answers["nvmlDeviceGetRemappedRows"] = rows
    card = nvml.NvmlDevice(driver.uuid).describe("cuda:0")
    assert (card.rows_pending, card.rows_failed) == (pending, failed)


def test_facts_of_an_rtx_4090_d_have_no_ecc_counts_and_the_table_has_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    card = recorded_facts("rtx4090d", monkeypatch)
    assert (card.ecc, card.ecc_corrected, card.ecc_uncorrected) == (False, None, None)
    assert (card.pages_retired, card.rows_pending, card.rows_failed) == (None, None, None)
    assert (card.power_limit_watts, card.power_default_watts) == (350.0, 425.0)
    assert specs.find(card.name) is None


def test_mig_instance_is_opened_by_uuid_and_marked_as_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("h100-mig", monkeypatch)
    card = nvml.NvmlDevice(driver.uuid.removeprefix("MIG-")).describe("cuda:0")
    assert (card.driver_sees, card.slice, card.ecc) == (True, True, None)
    assert (card.power_limit_watts, card.pcie_width) == (None, None)


@pytest.mark.parametrize(
    ("function", "answer"), [("nvmlDeviceGetMigMode", [1, 1]), ("nvmlDeviceGetVirtualizationMode", 2)]
)
def test_gpu_in_mig_mode_or_vgpu_is_marked_as_slice(
    monkeypatch: pytest.MonkeyPatch, function: str, answer: Any
) -> None:
    driver = Driver("h100", monkeypatch)
    assert nvml.NvmlDevice(driver.uuid).describe("cuda:0").slice is False
    driver.answers[function] = answer
    assert nvml.NvmlDevice(driver.uuid).describe("cuda:0").slice is True


@pytest.mark.parametrize(("total", "ours", "others"), [(1, 0, 1), (1, 1, 0), (3, 1, 2), (0, 0, 0), (0, 1, None)])
def test_other_processes_are_those_beside_our_own(
    monkeypatch: pytest.MonkeyPatch, total: int, ours: int, others: int | None
) -> None:
    driver = Driver("h100", monkeypatch)
    driver.answers["nvmlDeviceGetComputeRunningProcesses"] = [object()] * total
    assert nvml.NvmlDevice(driver.uuid).describe("cuda:0", ours=ours).others == others


@pytest.mark.parametrize(
    ("changes", "is_empty"),
    [
        ({}, False),
        ({"nvmlDeviceGetMigMode": [1, 1]}, True),
        ({"nvmlDeviceGetMigMode": [0, 1]}, False),  # MIG mode is pending until the next reset
        ({"nvmlDeviceGetMigMode": "lost"}, False),
        ({"nvmlDeviceGetMigMode": [1, 1], "nvmlDeviceGetMigDeviceHandleByIndex": "slice"}, False),
        ({"nvmlDeviceGetMigMode": [1, 1], "nvmlDeviceGetCount": "lost"}, False),
    ],
)
def test_gpu_in_mig_mode_lacks_an_instance_only_if_the_driver_finds_none(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], *, is_empty: bool
) -> None:
    driver = Driver("h100", monkeypatch)
    driver.answers |= {
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "card",
        "nvmlDeviceGetMaxMigDeviceCount": 2,
    }
    driver.answers |= changes
    assert nvml.lacks_mig_instance() is is_empty
    assert driver.calls[-1] == "nvmlShutdown"


def test_xids_are_collected_only_after_watch_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("a100", monkeypatch)
    card = nvml.NvmlDevice(driver.uuid)
    assert card.describe("cuda:0").xids == (), "the watch has not begun"
    card.watch()
    card.watch()
    assert driver.calls.count("nvmlEventSetCreate") == 1
    assert card.describe("cuda:0").xids == (63, 48)
    driver.answers["nvmlEventSetWait_v2"] = [{"eventType": 2, "eventData": 5}, {"eventType": 8, "eventData": 79}]
    assert card.describe("cuda:0").xids == (63, 48, 79), "earlier XIDs stay, and events of other types are ignored"
    card.close()
    assert driver.calls[-2:] == ["nvmlEventSetFree", "nvmlShutdown"]


def test_facts_have_no_xids_if_the_driver_does_not_support_events(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("a100", monkeypatch)
    del driver.answers["nvmlDeviceRegisterEvents"]
    card = nvml.NvmlDevice(driver.uuid)
    card.watch()
    assert driver.calls[-1] == "nvmlEventSetFree"
    assert card.describe("cuda:0").xids == ()


def test_lost_gpu_is_reported_as_xid_79(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("a100", monkeypatch)
    card = nvml.NvmlDevice(driver.uuid)
    for name in driver.answers:
        if name.startswith("nvmlDeviceGet") and "Handle" not in name:
            driver.answers[name] = "lost"
    facts = card.describe("cuda:0", "NVIDIA A100-SXM4-80GB")
    assert (facts.xids, facts.ecc_uncorrected, facts.driver_sees) == ((79,), None, True)
    assert (facts.name, facts.uuid) == ("NVIDIA A100-SXM4-80GB", "GPU-00000000-0000-0000-0000-0000000000a1")


def test_names_that_pynvml_returns_as_bytes_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("t4", monkeypatch)
    driver.answers["nvmlDeviceGetName"] = b"Tesla T4"
    driver.answers["nvmlSystemGetDriverVersion"] = b"418.87"
    card = nvml.NvmlDevice(driver.uuid).describe("cuda:0")
    assert (card.name, card.driver) == ("Tesla T4", "418.87")


def test_facts_without_a_driver_have_only_the_given_name_and_uuid() -> None:
    """Use the real pynvml with a UUID that no GPU has."""
    card = nvml.NvmlDevice("GPU-none")
    card.watch()
    assert card.describe("cuda:0", "Tesla T4", ours=1) == DeviceFacts("cuda:0", "Tesla T4", uuid="GPU-none")
    card.close()
    assert nvml.NvmlDevice(None).describe("cpu", "A CPU") == DeviceFacts("cpu", "A CPU")


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [(0, frozenset()), (0x2 | 0x4, {"clocks set by hand", "software power cap"}), (0x1, frozenset()), ("lost", None)],
)
def test_throttle_reason_bits_become_their_names_and_an_error_becomes_none(
    monkeypatch: pytest.MonkeyPatch, bits: Any, reasons: set[str] | None
) -> None:
    driver = Driver("h100", monkeypatch)
    driver.answers |= {"nvmlDeviceGetCurrentClocksThrottleReasons": bits, "nvmlDeviceGetComputeRunningProcesses": []}
    sample = nvml.NvmlDevice(driver.uuid).read()
    assert sample is not None
    assert sample.reasons == reasons


def test_every_nvml_function_that_the_code_calls_exists_in_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the real functions with an invalid handle: a missing function would raise another error than NVMLError."""
    real = {name: getattr(pynvml, name) for name in ("nvmlInit", "nvmlShutdown")}
    assert all(callable(function) for function in real.values())
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda _: pynvml.c_nvmlDevice_t())
    card = nvml.NvmlDevice("GPU-x")
    card.watch()
    assert card.read() == nvml.NvmlSample()
    assert card.describe("cuda:0", "a name") == DeviceFacts("cuda:0", "a name", uuid="GPU-x", driver_sees=True)
    card.close()
