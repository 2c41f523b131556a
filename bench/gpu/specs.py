"""Look up the data sheet figures of a GPU by its name; each figure has a source."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from provision.config import toml

TABLE = Path(__file__).parent / "specs.toml"
# A slice of a GPU (MIG, vGPU) has a part of its figures; the name does not give the share.
_SLICE = re.compile(r"\bMIG\b|\bGRID\b|-\d+[ABCQ]\b")

Figure = Annotated[float, Field(gt=0)]
Named = Literal["fp16", "fp16_acc16", "bf16", "tf32", "fp32", "bandwidth_gbs", "memory_gb", "power_watts", "pcie"]


def _pattern(text: str) -> str:
    re.compile(text)
    return text


class PcieSpec(toml.Strict):
    """Record the PCIe link of a GPU."""

    generation: int
    lanes: int


class GpuSpec(toml.Strict):
    """Record the figures of one GPU model.

    TFLOP/s are 1e12 FLOPs a second of dense products. GB/s are 1e9 bytes a second; memory is in GB of 2**30 bytes.
    `match`: a regular expression for the name. `tflops`: {dtype: the data sheet's figure}. `measured`: {dtype: the best
    rate of a matrix product that was ever measured on one}. `unchecked`: the figures that no source confirms.
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
        """Return the data sheet's FLOPs a second for the dtype of a case; None where it has no figure."""
        tflops = {str(name): figure for name, figure in self.tflops.items()}.get(dtype)
        return tflops * 1e12 if tflops is not None else None


@cache
def table() -> dict[str, GpuSpec]:
    """Return {name: figures} of every GPU in the table."""
    return toml.load_tables(TABLE, GpuSpec)


def is_slice(name: str) -> bool:
    """Return whether a name is that of a MIG or vGPU slice."""
    return _SLICE.search(name) is not None


def find(name: str) -> tuple[str, GpuSpec] | None:
    """Return the (key, figures) of a GPU by the name that torch or the driver reports; None where the table lacks it.

    Where several entries match, the one with the longest match counts. A MIG or vGPU slice is never taken for the whole
    GPU.
    """
    if is_slice(name):
        return None
    matches = [(len(match.group()), key) for key, gpu in table().items() if (match := re.search(gpu.match, name))]
    if not matches:
        return None
    _, key = max(matches)
    return key, table()[key]
