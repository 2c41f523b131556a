"""Look up the rates of matrix products that were measured on GPUs of the same kind; measured.tsv has the sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.gpu import specs

TABLE = Path(__file__).parent / "measured.tsv"
DTYPES = ("fp32", "tf32", "fp16", "bf16")
# Words that some drivers and reports leave out of a GPU's name.
_OPTIONAL = frozenset({"nvidia", "geforce", "tesla", "quadro", "gpu", "generation", "edition", "amd", "radeon"})
_MEMORY = re.compile(r"\d+g(b|i?b)?")  # the size of the memory does not change the rate of a product
# {number of known rates of a kind: a share}. A GPU whose rate is below the lowest known rate times this share counts as
# slower than all others of its kind; `_MARGIN` is the share for three or more rates. One or two rates do not show how
# much healthy GPUs differ, so their share is lower (the rates of the RTX 4090 in 16 bits differ by 8 %).
_MARGINS = {1: 0.92, 2: 0.94}
_MARGIN = 0.98


@dataclass(frozen=True)
class KindFigures:
    """Hold the measured rates of one kind of GPU and one dtype, in FLOPs a second, in ascending order."""

    kind: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median rate; for an even number of rates, the lower of the two in the middle."""
        return self.rates[(len(self.rates) - 1) // 2]

    @property
    def limit(self) -> float:
        """Return the rate below which a GPU counts as slower than every healthy GPU of its kind."""
        return self.rates[0] * _MARGINS.get(len(self.rates), _MARGIN)


def find(name: str, dtype: str) -> KindFigures | None:
    """Return the measured rates for a GPU, by the name that the driver reports.

    None for a slice (MIG, vGPU), and for a GPU or dtype that the table does not have.
    """
    kind = kind_of(name)
    rates = () if specs.is_slice(name) else _table().get((kind, dtype), ())
    return KindFigures(kind, rates) if rates else None


def kind_of(name: str) -> str:
    """Return the kind of a GPU: its name in lower case, without the words and numbers that do not change its speed.

    "NVIDIA GeForce RTX 4090 24GB" is of the kind "rtx 4090".
    """
    words = re.split(r"[\s_-]+", name.casefold())
    return " ".join(word for word in words if word not in _OPTIONAL and not _MEMORY.fullmatch(word))


@cache
def _table() -> dict[tuple[str, str], tuple[float, ...]]:
    """Return the content of measured.tsv as {(kind, dtype): its rates in FLOPs a second, in ascending order}."""
    rates: dict[tuple[str, str], list[float]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        if line.startswith("#") or cells[0] == "kind":
            continue
        for dtype, cell in zip(DTYPES, cells[1:], strict=False):
            if cell:
                rates.setdefault((cells[0], dtype), []).append(float(cell) * 1e12)
    return {key: tuple(sorted(values)) for key, values in rates.items()}
