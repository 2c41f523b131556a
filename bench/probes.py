"""Short questions to a machine: what torch can use, and how fast a dtype is before a case is priced."""

from __future__ import annotations

import time
from typing import Any

from bench.axes import DTYPES

_ENOUGH_SECONDS = 0.05
_PATIENCE_SECONDS = 1.0


def query(torch: Any) -> dict[str, Any]:  # noqa: ANN401
    """What this torch is and what it can compute on, as plain JSON types."""
    built = torch.version.cuda
    available = bool(built) and torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    return {
        "torch": torch.__version__,
        "cuda": built,
        "available": available,
        "devices": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
            }
            for index in range(count)
        ],
        "architectures": torch.cuda.get_arch_list() if built else [],
        "mps": bool(torch.backends.mps.is_available()),
    }


def rate(torch: Any, device: str, dtype: str) -> float:  # noqa: ANN401
    """FLOPs a second of a 3x3 convolution as the UNets have it, doubled in size until it can be timed.

    The first size takes a fraction of a millisecond where the dtype has kernels; where it has none (fp16 on
    most CPUs) even that takes long enough, and the rate is known without hanging.

    Raises:
        RuntimeError: the device cannot compute in this dtype.
    """
    kind = getattr(torch, DTYPES[dtype])
    channels, side, best = 64, 8, 0.0
    began = time.perf_counter()
    weight = torch.full((channels, channels, 3, 3), 0.01, device=device, dtype=kind)
    with torch.inference_mode():
        while True:
            image = torch.full((1, channels, side, side), 0.5, device=device, dtype=kind)
            first = _timed(torch, device, image, weight)
            # A slow first call is a kernel being made ready, or a dtype without kernels: the second call tells.
            seconds = _timed(torch, device, image, weight) if first < _PATIENCE_SECONDS else first
            best = max(best, 2.0 * channels * channels * 9 * side * side / seconds)
            if seconds > _ENOUGH_SECONDS or side >= 512 or time.perf_counter() - began > _PATIENCE_SECONDS:
                return best
            side *= 2


def _timed(torch: Any, device: str, image: Any, weight: Any) -> float:  # noqa: ANN401
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    torch.nn.functional.conv2d(image, weight, padding=1)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
