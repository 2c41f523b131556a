"""Look up the data sheet figures of a GPU by its name; specs.toml has the source of each figure."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from provision.config import toml

TABLE = Path(__file__).parent / "specs.toml"
# The names of slices of a GPU (MIG, vGPU). A slice has a part of the GPU's speed, and its name does not give the share.
_SLICE = re.compile(r"\bMIG\b|\bGRID\b|-\d+[ABCQ]\b")

Figure = Annotated[float, Field(gt=0)]
Named = Literal["fp16", "fp16_acc16", "bf16", "tf32", "fp32", "bandwidth_gbs", "memory_gb", "power_watts", "pcie"]


def _pattern(text: str) -> str:
    re.compile(text)
    return text


class PcieSpec(toml.Strict):
    """Record the PCIe link of a GPU: its generation and its number of lanes."""

    generation: int
    lanes: int


class GpuSpec(toml.Strict):
    """Record the data sheet figures of one GPU model.

    `match`: a regular expression for the name that the driver reports. `tflops`: {dtype: 1e12 FLOPs a second of dense
    products; with "acc16", accumulated in fp16}. `measured`: {dtype: the best rate of a matrix product measured on such
    a GPU, in the same unit}. `bandwidth_gbs`: 1e9 bytes a second. `memory_gb`: 2**30 bytes. `unchecked`: the names of
    the figures that no source confirms.
    """

    match: Annotated[str, AfterValidator(_pattern)]
    architecture: str
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")]
    tflops: dict[Literal["fp16", "fp16_acc16", "bf16", "tf32", "fp32"], Figure]
    measured: dict[Literal["fp16", "bf16"], Figure] = Field(default_factory=dict)
    bandwidth_gbs: Figure | None = None
    memory_gb: Figure | None = None
    power_watts: Figure | None = None
    pcie: PcieSpec
    unchecked: list[Named] = Field(default_factory=list)
    note: str = ""
    sources: Annotated[list[str], Field(min_length=1)]

    def flops(self, dtype: str) -> float | None:
        """Return the FLOPs a second for a dtype of a case by the data sheet; None if the data sheet has no figure."""
        tflops = {str(name): figure for name, figure in self.tflops.items()}.get(dtype)
        return tflops * 1e12 if tflops is not None else None


@cache
def table() -> dict[str, GpuSpec]:
    """Return {name of the GPU model: its figures} of every model in specs.toml."""
    return toml.load_tables(TABLE, GpuSpec)


def is_slice(name: str) -> bool:
    """Return whether the name of a GPU is that of a slice (MIG, vGPU)."""
    return _SLICE.search(name) is not None


def find(name: str) -> tuple[str, GpuSpec] | None:
    """Return (name in the table, figures) of a GPU, by the name that torch or the driver reports.

    None if no entry matches.

    Of several entries that match, the one that matches the longest part of the name counts. A slice (MIG, vGPU) has no
    entry, so it is never taken for the whole GPU.
    """
    if is_slice(name):
        return None
    matches = [(len(match.group()), key) for key, gpu in table().items() if (match := re.search(gpu.match, name))]
    if not matches:
        return None
    _, key = max(matches)
    return key, table()[key]
