"""Reads the header of a safetensors file and checks it; the bytes of the tensors are not read.

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
# The longest accepted header. The format allows 100 MB, which would need 1.5 GB of memory. The headers of the largest
# diffusion models have about 1 MB. A valid header of this length needs about 100 MB of memory, a malicious one 160 MB.
_MAX_HEADER_BYTES = 6_000_000


class WeightsError(Exception):
    """Report an invalid safetensors file.

    The message is the end of a sentence, such as "has an invalid header"; the caller puts the file's name before it.
    """


@dataclass(frozen=True)
class Tensor:
    """Describe one tensor of a file.

    `dtype`: its name in the format, such as "F16". `shape`: its sizes.
    `begin`, `end`: the range of its bytes; 0 is the first byte after the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Return the number of elements in the tensor."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor} from the header of a safetensors file.

    Raises:
        WeightsError: the file is not a valid safetensors file. That includes a tensor outside of the file, two tensors
            that overlap, and bytes between two tensors.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise WeightsError(f"has only {size} bytes, fewer than the 8 bytes before the header")
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
            start = "inside the previous tensor" if tensor.begin < end else "after a gap"
            raise WeightsError(f"has the tensor {_printable(name)}, whose data starts {start}")
        if (tensor.end - tensor.begin) * 8 != tensor.elements * BITS[tensor.dtype]:
            raise WeightsError(f"has the tensor {_printable(name)}, whose number of bytes does not match its shape")
        end = tensor.end
    if end != size - 8 - length:
        raise WeightsError(f"has {size - 8 - length:,} bytes of tensors, but its header declares {end:,} bytes")
    return tensors


def _printable(name: str) -> str:
    """Return a tensor's name for a message; control characters, which would change the terminal, are escaped."""
    return name if name.isprintable() else ascii(name)


def _tensor(row: dict[str, Any]) -> Tensor:
    begin, end = row["data_offsets"]
    shape = tuple(row["shape"])
    numbers = (begin, end, *shape)
    if row["dtype"] not in BITS or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("not a tensor")
    return Tensor(row["dtype"], shape, begin, end)
