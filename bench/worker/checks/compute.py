"""Check the arithmetic of a device: whether it is right, how fast it is, and whether it stays so under load."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.core.errors import SkipError
from bench.core.validation_records import Reading
from bench.worker import components
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from bench.worker.checks.device import Device

if TYPE_CHECKING:
    Around = Callable[[], AbstractContextManager[object]]

# The unit roundoff of a result: 2**-p for p bits of precision (IEEE 754; bf16 has 8, TF32 and fp16 have 11). An fp8
# product has exact inputs and a bf16 result.
_UNITS = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11, "fp8": 2.0**-8}
# The unit roundoff of a running sum, where it is not that of fp32. For fp8 a Hopper card keeps about 14 bits of the sum
# (source: DeepSeek-V3 Technical Report, arXiv 2412.19437, 3.3.2).
_SUM_UNITS = {"fp8": 2.0**-14}
# The relative error of a sum of k products of numbers around zero is about the root of k times the unit roundoff, for
# its roundings are nearly independent and cancel (sources: Higham and Mary, "A New Approach to Probabilistic Rounding
# Error Analysis", SIAM J. Sci. Comput. 41, 2019; Ipsen and Zhou, arXiv 1906.10465). The limit is this many times that
# error. Tensor cores truncate where others round (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor
# cores", 2021). Winograd convolutions have up to 7 times the error of direct ones (Lavin and Gray, arXiv 1509.09308,
# table of accuracy). Attention rounds its scores, and its weights once more, between its two products.
_MARGINS = {"matrix product": 4.0, "convolution": 16.0, "attention": 8.0}
_OUTLIER = 8.0  # times the limit; no single number differs by as much because of rounding
_ROWS = 256  # rows of a card's product that are compared with float64; they are of every tile of the kernel
_BURST_SECONDS = 0.25
_FEWEST_BURSTS = 8.0
_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192)
# m, n and k of the products: squares, and two oblong shapes as in a transformer.
_SHAPES = (*((edge, edge, edge) for edge in _EDGES), (4096, 4096, 1280), (8192, 8192, 2048))
# A card is fastest with large shapes. From the first shape the time of the others is predicted; the largest follow, and
# the small ones come last.
_CARD_SHAPES = (
    *((2048, 2048, 2048), (8192, 8192, 8192), (8192, 8192, 2048)),
    *((4096, 4096, 4096), (4096, 4096, 1280), (1024, 1024, 1024)),
)
# Batch, channels and side of the 3x3 convolutions, as in the UNets of the architectures.
_CONVOLUTIONS = ((1, 64, 16), (1, 64, 64), (1, 256, 32), (1, 320, 64), (4, 320, 64), (8, 640, 64))
_CARD_CONVOLUTIONS = ((1, 320, 64), (8, 640, 64), (4, 320, 64), (1, 256, 32))


def numerics(device: Device, until: float) -> Iterator[Reading]:
    """Yield the error against float64 of a matrix product, a convolution and an attention in each dtype."""
    checks = {"matrix product": _numerics_of_product, "convolution": _numerics_of_convolution, "attention": _attention}
    for dtype in device.dtypes:
        for name, check in checks.items():
            # No library has fp8 convolutions, and torch has no TF32 setting for attention.
            if name == "matrix product" or (dtype != "fp8" and (dtype, name) != ("tf32", "attention")):
                blank = Reading("numerics", f"{name} {dtype}", device.name, "", None)
                yield checked_device.reading_or_error(
                    blank, partial(_in_time, until, device, dtype, partial(check, device, dtype, blank))
                )


def _in_time(until: float, device: Device, dtype: str, check: Callable[[], Reading]) -> Reading:
    if time.perf_counter() >= until:
        raise SkipError(checked_device.NO_TIME)
    components.set_precision(device.torch, dtype)
    return check()


def _numerics_of_product(device: Device, dtype: str, blank: Reading) -> Reading:
    m, n, k = (4096, 4096, 1024) if device.is_card else (_ROWS, 256, 1024)
    left, right = checked_device.operands(device, dtype, (m, n, k))
    result = device.product(dtype, left, right)
    number = device.torch.arange(_ROWS, device=device.name)
    step = m // _ROWS
    rows = number * step + number % step  # each row has another place within its tile
    return compared(blank, result[rows], _to_float64(left.float()[rows]) @ _to_float64(right), k)


def _numerics_of_convolution(device: Device, dtype: str, blank: Reading) -> Reading:
    torch = device.torch
    batch, channels, side = (4, 128, 64) if device.is_card else (1, 64, 32)
    image, weight = _normal(device, dtype, (batch, channels, side, side), (channels, channels, 3, 3))
    result = torch.nn.functional.conv2d(image, weight, padding=1)[-1:]
    return compared(
        blank, result, torch.nn.functional.conv2d(_to_float64(image[-1:]), _to_float64(weight), padding=1), channels * 9
    )


def _attention(device: Device, dtype: str, blank: Reading) -> Reading:
    tokens, width = 1024 if device.is_card else 256, 64
    shape = (2, 8, tokens, width)
    query, key, value = _normal(device, dtype, shape, shape, shape)
    result = device.torch.nn.functional.scaled_dot_product_attention(query, key, value)[-1]
    query, key, value = (_to_float64(tensor[-1]) for tensor in (query, key, value))
    weights = (query @ key.transpose(-1, -2) / width**0.5).softmax(-1)
    return compared(blank, result, weights @ value, tokens)


def compared(blank: Reading, result: Any, reference: Any, terms: int) -> Reading:
    """Return a reading with the relative L2 distance of a result from its reference, and the limit of this distance.

    Args:
        blank: the reading without a value; its name is "OPERATION DTYPE".
        result: the result of the device.
        reference: the result in float64, computed on the CPU.
        terms: the number of terms in each sum of the result.
    """
    name, _, dtype = blank.name.rpartition(" ")
    sums = terms**0.5 * _SUM_UNITS.get(dtype, _UNITS["fp32"])
    limit = _MARGINS[name] * (sums + _UNITS[dtype])
    difference = _to_float64(result) - reference
    if not bool(difference.isfinite().all()):
        return replace(blank, limit=limit, fault="the result contains NaN or infinity")
    error = float(difference.norm() / reference.norm())
    usual_size = float(reference.norm()) / reference.numel() ** 0.5
    largest = float(difference.abs().max()) / usual_size
    fault = None
    if error <= limit and largest > _OUTLIER * limit:
        fault = (
            f"one of {reference.numel()} numbers differs by {largest:.2g} times their usual size; rounding explains "
            f"{limit:.2g}"
        )
    return replace(blank, value=error, limit=limit, fault=fault)


def _to_float64(tensor: Any) -> Any:
    return tensor.cpu().float().double()  # by way of float32, since fp8 has no direct conversion


def _normal(device: Device, dtype: str, *shapes: tuple[int, ...]) -> list[Any]:
    generator = device.torch.Generator(device.name).manual_seed(0)
    kind = getattr(device.torch, checked_device.KINDS[dtype])
    return [device.torch.empty(shape, device=device.name).normal_(generator=generator).to(kind) for shape in shapes]


def product(device: Device, until: float) -> Iterator[Reading]:
    """Yield the rate of matrix products for each dtype, in the fastest shape."""

    def variants_of(dtype: str) -> Iterator[checked_device.Variant]:
        ordered = sorted(_SHAPES, key=lambda shape: shape[0] * shape[1] * shape[2])
        for m, n, k in _CARD_SHAPES if device.is_card else ordered:

            def make(shape: tuple[int, int, int] = (m, n, k)) -> Callable[[], object]:
                return partial(device.product, dtype, *checked_device.operands(device, dtype, shape))

            room = 8 * (m * k + k * n + m * n)  # bytes of the matrices in fp32, and of their copies in the dtype
            yield checked_device.Variant(2.0 * m * n * k, {"m": float(m), "n": float(n), "k": float(k)}, room, make)

    yield from _rates("product", device, device.dtypes, variants_of, until)


def convolution(device: Device, until: float) -> Iterator[Reading]:
    """Yield the rate of 3x3 convolutions for each dtype, in the fastest shape and memory format."""
    torch = device.torch

    def variants_of(dtype: str) -> Iterator[checked_device.Variant]:
        for batch, channels, side in _CARD_CONVOLUTIONS if device.is_card else _CONVOLUTIONS:
            for layout in (torch.contiguous_format, torch.channels_last):

                def make(
                    shape: tuple[int, int, int] = (batch, channels, side), layout: Any = layout
                ) -> Callable[[], object]:
                    batch, channels, side = shape
                    tensors = _normal(device, dtype, (batch, channels, side, side), (channels, channels, 3, 3))
                    image, weight = (tensor.to(memory_format=layout) for tensor in tensors)
                    return partial(torch.nn.functional.conv2d, image, weight, padding=1)

                is_last = float(layout is torch.channels_last)
                figures = {"batch": batch, "channels": channels, "side": side, "channels_last": is_last}
                elements = 2 * batch * channels * side**2 + 9 * channels**2
                flops = 2.0 * 9 * channels**2 * side**2 * batch
                yield checked_device.Variant(
                    flops, {key: float(figure) for key, figure in figures.items()}, 8 * elements, make
                )

    yield from _rates("convolution", device, [dtype for dtype in device.dtypes if dtype != "fp8"], variants_of, until)


def _rates(
    probe: str,
    device: Device,
    dtypes: Any,
    variants_of: Callable[[str], Iterator[checked_device.Variant]],
    until: float,
) -> Iterator[Reading]:
    """Yield a reading per dtype. The time is shared equally; what a dtype does not use is left to the later ones.

    Args:
        probe: the name of the phase.
        device: the device.
        dtypes: the dtypes, in order.
        variants_of: returns the shapes to measure in a dtype.
        until: the time (time.perf_counter) after which nothing is begun.
    """
    for number, dtype in enumerate(dtypes):
        now = time.perf_counter()
        components.set_precision(device.torch, dtype)
        blank = Reading(probe, f"{probe} {dtype}", device.name, "FLOP/s", None)
        yield checked_device.timed_best(
            blank, device, list(variants_of(dtype)), now + (until - now) / (len(dtypes) - number)
        )


def sustained(device: Device, until: float, around: Around = contextlib.nullcontext) -> Iterator[Reading]:
    """Yield the rate of one matrix product that is repeated in bursts; a result with other bits is a fault.

    The same kernel, inputs and settings give the same bits on one device (source: cuBLAS, "Results Reproducibility").

    Args:
        device: the device.
        until: the time (time.perf_counter) after which no burst is begun.
        around: returns a context manager; each burst runs within one.
    """
    dtype = "fp32" if not device.is_card else "bf16" if "bf16" in device.dtypes else "fp16"
    blank = Reading("sustained", f"sustained {dtype}", device.name, "FLOP/s", None)
    components.set_precision(device.torch, dtype)
    yield checked_device.reading_or_error(blank, partial(_bursts, device, dtype, until, around, blank))
    device.empty_cache()


def _bursts(device: Device, dtype: str, until: float, around: Around, blank: Reading) -> Reading:
    burst = min(_BURST_SECONDS, (until - time.perf_counter()) / _FEWEST_BURSTS)
    edge, left, right, seconds = _largest_product(device, dtype, burst)
    latest: list[Any] = []

    def call() -> None:
        latest[:] = [device.product(dtype, left, right)]

    call()
    first = latest[0]
    times = checked_device.calls_for(device, call, burst)
    rates: list[float] = []
    unequal = 0
    while not rates or time.perf_counter() + times * seconds < until:
        with around():
            rates.append(2.0 * edge**3 / device.timed(call, times))
        unequal += not _same_bits(device.torch, latest[0], first)
    quarter = max(1, len(rates) // 4)
    figures = {
        "first_quarter": statistics.median(rates[:quarter]),
        "last_quarter": statistics.median(rates[-quarter:]),
        "unequal": float(unequal),
    }
    fault = f"{unequal} of {len(rates)} bursts differ from the first result" if unequal else None
    return replace(blank, value=statistics.median(rates), samples=tuple(rates), figures=figures, fault=fault)


def _largest_product(device: Device, dtype: str, most_seconds: float) -> tuple[int, Any, Any, float]:
    """Return the largest square matrix product that takes at most this time: edge, its two matrices, seconds of a call.

    Raises:
        SkipError: the smallest product takes longer.
    """
    best: tuple[int, Any, Any, float] | None = None
    free = device.free_bytes()
    for edge in _EDGES:
        if best is not None and (best[3] * 8 > most_seconds or (free is not None and 32 * edge**2 > free)):
            break  # twice the edge takes eight times the work
        left, right = checked_device.operands(device, dtype, (edge, edge, edge))
        call = partial(device.product, dtype, left, right)
        device.timed(call)
        seconds = device.timed(call)
        if seconds > most_seconds:  # other work disturbed it, so it took longer than predicted
            break
        best = edge, left, right, seconds
    if best is None:
        raise SkipError(checked_device.NO_TIME)
    return best


def _same_bits(torch: Any, one: Any, two: Any) -> bool:
    return bool(torch.equal(one.view(torch.uint8), two.view(torch.uint8)))


def threads(device: Device, until: float) -> Iterator[Reading]:
    """Yield the rate of fp32 products on all CPU threads together, over that rate on one thread times their number."""
    blank = Reading("threads", "scaling", device.name, "", None)
    whole = device.torch.get_num_threads()
    try:
        yield checked_device.reading_or_error(blank, partial(_scaling, device, whole, until, blank))
    finally:
        device.torch.set_num_threads(whole)


def _scaling(device: Device, whole: int, until: float, blank: Reading) -> Reading:
    torch = device.torch
    if whole == 1:
        raise SkipError("torch uses only one thread")
    counts = [*(2**power for power in range(whole.bit_length()) if 2**power < whole), whole]
    torch.set_num_threads(1)
    rounds = 3 * len(counts)
    edge, left, right, seconds = _largest_product(device, "fp32", (until - time.perf_counter()) / rounds)
    best = dict.fromkeys(counts, 0.0)
    # The numbers of threads take turns, so that other work disturbs each of them alike.
    while not all(best.values()) or time.perf_counter() + 2 * seconds * len(counts) < until:
        for count in counts:
            torch.set_num_threads(count)
            device.timed(partial(device.product, "fp32", left, right))  # a warm-up, in which the threads start
            best[count] = max(best[count], 2.0 * edge**3 / device.timed(partial(device.product, "fp32", left, right)))
    figures = {str(count): rate for count, rate in best.items()}
    return replace(blank, value=best[whole] / best[1] / whole, figures=figures)
