"""What cards are on paper: figures with their sources, found by a card's name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from provision.config import toml

TABLE = Path(__file__).parent / "specs.toml"
# A slice of a card (MIG, vGPU) has a part of its figures: which part, its name does not say.
_SLICE = re.compile(r"\bMIG\b|\bGRID\b|-\d+[ABCQ]\b")

Figure = Annotated[float, Field(gt=0)]
Named = Literal["fp16", "fp16_acc16", "bf16", "tf32", "fp32", "bandwidth_gbs", "memory_gb", "power_watts", "pcie"]


def _pattern(text: str) -> str:
    re.compile(text)
    return text


class PcieSpec(toml.Strict):
    """A card's link."""

    generation: int
    lanes: int


class GpuSpec(toml.Strict):
    """One kind of card. TFLOP/s are 1e12 FLOPs a second, dense; GB/s and GB are of 1e9 bytes, memory of 2**30.

    `tflops`: {dtype: the sheet's figure}. `measured`: {dtype: the best product that was ever measured on one}.
    `unchecked`: the figures that no source confirms.
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
        """FLOPs a second of the sheet in a dtype of a case; None where it has no figure."""
        found = {str(name): figure for name, figure in self.tflops.items()}.get(dtype)
        return found * 1e12 if found is not None else None


@cache
def table() -> dict[str, GpuSpec]:
    """Every card that is known."""
    return toml.load_tables(TABLE, GpuSpec)


def find(name: str) -> tuple[str, GpuSpec] | None:
    """The card of this name, as torch or the driver tells it; None where it is not known.

    Of several that match, the one that matches most of the name. A slice of a card is not that card.
    """
    if _SLICE.search(name):
        return None
    matches = [(len(match.group()), key) for key, gpu in table().items() if (match := re.search(gpu.match, name))]
    if not matches:
        return None
    _, key = max(matches)
    return key, table()[key]
