"""Reads the header of a safetensors file, and says what is wrong with it; the weights themselves are not read.

Source of the format: safetensors' README: eight bytes of the header's length (little endian), the header in JSON, then
the tensors' bytes without a gap.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# Bits of an element, by the format's names (source: safetensors' Dtype).
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
# Bytes. The format itself allows 100 MB, which take 1.5 GB of memory to read; the largest diffusion models have about
# 1 MB. A sound header of this length takes about 100 MB of memory, and one made to harm 160 MB.
_LONGEST_HEADER = 6_000_000


class WeightsError(Exception):
    """What is wrong with a file of weights, as the end of a sentence about it."""


@dataclass(frozen=True)
class Tensor:
    """One tensor: its element type, its shape, and where its bytes lie after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, every offset checked: inside the file, without overlap or gap.

    Raises:
        WeightsError: it is no sound safetensors file.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise WeightsError(f"has {size} bytes, and a header takes more")
        (length,) = struct.unpack("<Q", first)
        if length > size - 8:
            raise WeightsError("has a header that is longer than the file")
        if length > _LONGEST_HEADER:
            raise WeightsError(
                f"has a header of {length:,} bytes, more than the {_LONGEST_HEADER:,} that any model has"
            )
        text = file.read(length)
    try:
        rows = json.loads(text)
        tensors = {name: _tensor(row) for name, row in rows.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError("has a header that cannot be read") from None
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise WeightsError(f"has {'an overlap' if tensor.begin < end else 'a gap'} before {_shown(name)}")
        if (tensor.end - tensor.begin) * 8 != tensor.elements * BITS[tensor.dtype]:
            raise WeightsError(f"holds {_shown(name)} with another length than its shape has")
        end = tensor.end
    if end != size - 8 - length:
        raise WeightsError(f"has {size - 8 - length:,} bytes of tensors, its header tells {end:,}")
    return tensors


def _shown(name: str) -> str:
    """A tensor's name, without what a terminal would obey."""
    return name if name.isprintable() else ascii(name)


def _tensor(row: dict[str, Any]) -> Tensor:
    begin, end = row["data_offsets"]
    shape = tuple(row["shape"])
    numbers = (begin, end, *shape)
    if row["dtype"] not in BITS or not all(type(each) is int and each >= 0 for each in numbers):
        raise ValueError("not a tensor")
    return Tensor(row["dtype"], shape, begin, end)
