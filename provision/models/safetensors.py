"""Reads the header of a safetensors file and checks it; the weights themselves are not read.

Source of the format: safetensors' README. A file has eight bytes with the header's length (little endian), the header
in JSON, then the bytes of the tensors without a gap.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# {dtype: bits of an element} (source: Dtype of safetensors).
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
# In bytes. The format allows 100 MB, which need 1.5 GB of memory. The largest diffusion models have about 1 MB. A valid
# header of this length needs about 100 MB of memory, and a malicious one 160 MB.
_MAX_HEADER_BYTES = 6_000_000


class WeightsError(Exception):
    """Report an invalid file of weights; the message completes a sentence whose subject is the file."""


@dataclass(frozen=True)
class Tensor:
    """Describe one tensor: its dtype, its shape, and the range of its bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Return the number of its elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor} of a file. All byte ranges are inside the file, without an overlap or gap.

    Raises:
        WeightsError: the file is not a valid safetensors file.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise WeightsError(f"has {size} bytes, fewer than a header")
        (length,) = struct.unpack("<Q", length_bytes)
        if length > size - 8:
            raise WeightsError("has a header that is longer than the file")
        if length > _MAX_HEADER_BYTES:
            raise WeightsError(f"has a header of {length:,} bytes, more than the limit of {_MAX_HEADER_BYTES:,}")
        header = file.read(length)
    try:
        rows = json.loads(header)
        tensors = {name: _tensor(row) for name, row in rows.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError("has an invalid header") from None
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise WeightsError(f"has {'an overlap' if tensor.begin < end else 'a gap'} before {_printable(name)}")
        if (tensor.end - tensor.begin) * 8 != tensor.elements * BITS[tensor.dtype]:
            raise WeightsError(f"has the tensor {_printable(name)} with a length that does not match its shape")
        end = tensor.end
    if end != size - 8 - length:
        raise WeightsError(f"has {size - 8 - length:,} bytes of tensors, and its header declares {end:,}")
    return tensors


def _printable(name: str) -> str:
    """Return a tensor's name with its control characters escaped, so that the terminal does not obey them."""
    return name if name.isprintable() else ascii(name)


def _tensor(row: dict[str, Any]) -> Tensor:
    begin, end = row["data_offsets"]
    shape = tuple(row["shape"])
    numbers = (begin, end, *shape)
    if row["dtype"] not in BITS or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("not a tensor")
    return Tensor(row["dtype"], shape, begin, end)
