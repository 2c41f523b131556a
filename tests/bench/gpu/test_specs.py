"""Tests the table of GPUs: a name that a driver reports finds the entry of that GPU, and of no other one."""

from __future__ import annotations

import pytest

from bench.gpu import specs


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-SXM2"),
        ("Tesla V100S-PCIE-32GB", "V100S-PCIE"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIE-80GB"),
        ("NVIDIA A800-SXM4-80GB", "A800-SXM4-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA H800 PCIe", "H800-PCIe"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_name_that_a_driver_reports_finds_the_entry_of_that_gpu(name: str, key: str) -> None:
    match = specs.find(name)
    assert match is not None
    assert match[0] == key


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA L40",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10-24Q",
        "GRID T4-16Q",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_name_of_a_gpu_without_an_entry_or_of_a_slice_finds_nothing(name: str) -> None:
    assert specs.find(name) is None


def test_name_that_two_entries_match_finds_the_entry_with_the_longer_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = specs.table()["A10"]
    both = {"short": plain.model_copy(update={"match": "X1"}), "long": plain.model_copy(update={"match": "X1 Super"})}
    monkeypatch.setattr(specs, "table", lambda: both)
    assert [(specs.find(name) or ("",))[0] for name in ("NVIDIA X1", "NVIDIA X1 Super")] == ["short", "long"]


def test_every_entry_has_sources_and_existing_unchecked_fields_and_measured_rates_below_the_peak() -> None:
    for name, gpu in specs.table().items():
        assert all(source.strip() for source in gpu.sources), name
        assert set(gpu.unchecked) <= {*gpu.tflops, "bandwidth_gbs", "memory_gb", "power_watts", "pcie"}, name
        for dtype, figure in gpu.measured.items():
            assert figure < gpu.tflops[dtype], f"{name}: the measured rate is above the peak"


def test_peak_rate_of_fp16_is_twice_that_of_tf32_in_every_entry() -> None:
    """Find a rate with structured sparsity, which data sheets print too, and which is twice the dense rate."""
    for name, gpu in specs.table().items():
        if "tf32" in gpu.tflops and "fp16" in gpu.tflops:
            assert gpu.tflops["fp16"] / gpu.tflops["tf32"] == pytest.approx(2, rel=0.03), name


def test_peak_flops_of_a_card_are_found_by_dtype_or_none() -> None:
    (_, t4) = specs.find("Tesla T4") or pytest.fail("T4")
    assert t4.flops("fp16") == 65e12
    assert t4.flops("bf16") is None
    assert t4.flops("fp64") is None
