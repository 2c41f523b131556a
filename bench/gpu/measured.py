"""Look up the rates of matrix products that were measured on devices of one kind; measured.tsv has the sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.gpu import specs

TABLE = Path(__file__).parent / "measured.tsv"
DTYPES = ("fp32", "tf32", "fp16", "bf16")
# Words that some drivers and reports leave out. The size of the memory does not change the rate of a product.
_OPTIONAL = frozenset({"nvidia", "geforce", "tesla", "quadro", "gpu", "generation", "edition", "amd", "radeon"})
_MEMORY = re.compile(r"\d+g(b|i?b)?")
# A device is slower than all others of its kind if it is below the lowest figure times this share. One figure alone
# does not show how much healthy devices differ; three or more do (those of the RTX 4090 differ by 8 % in 16 bits).
_MARGINS = {1: 0.92, 2: 0.94}
_MARGIN = 0.98


@dataclass(frozen=True)
class KindFigures:
    """Hold the figures of one kind of device and one dtype, in FLOPs a second, sorted."""

    kind: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median; of an even number of figures the lower one in the middle."""
        return self.rates[(len(self.rates) - 1) // 2]

    @property
    def limit(self) -> float:
        """Return the rate below which a device is slower than every healthy one of its kind."""
        return self.rates[0] * _MARGINS.get(len(self.rates), _MARGIN)


def find(name: str, dtype: str) -> KindFigures | None:
    """Return the measured figures of a device by the name that the driver reports.

    None for a slice (MIG, vGPU), and for a device or dtype without figures.
    """
    kind = kind_of(name)
    rates = () if specs.is_slice(name) else _table().get((kind, dtype), ())
    return KindFigures(kind, rates) if rates else None


def kind_of(name: str) -> str:
    """Return the kind of a device: its name without the words and numbers that do not change its speed."""
    words = re.split(r"[\s_-]+", name.casefold())
    return " ".join(word for word in words if word not in _OPTIONAL and not _MEMORY.fullmatch(word))


@cache
def _table() -> dict[tuple[str, str], tuple[float, ...]]:
    """Return {(kind, dtype): the sorted rates}."""
    rates: dict[tuple[str, str], list[float]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        if line.startswith("#") or cells[0] == "kind":
            continue
        for dtype, cell in zip(DTYPES, cells[1:], strict=False):
            if cell:
                rates.setdefault((cells[0], dtype), []).append(float(cell) * 1e12)
    return {key: tuple(sorted(values)) for key, values in rates.items()}
