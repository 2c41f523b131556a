"""Check the numbers of a case: whether they are finite, repeatable, and close to those in fp32."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core.result import Numerics

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bench.worker.components import Model


def check_image(pixels: Any, raw: Any, path: str | None) -> Numerics:
    """Return whether all numbers of an image are finite, and its checksum; write the first picture of the batch as PNG.

    Args:
        pixels: float in [0, 1], of shape (batch, 3, height, width).
        raw: the pixels before clamping, or the latents that they were decoded from.
        path: the file of the picture; None writes none.
    """
    finite = bool(pixels.isfinite().all()) and bool(raw.isfinite().all())
    kept = (pixels[0].nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous()
    if path is not None:
        from PIL import Image

        Image.fromarray(kept.numpy()).save(path)
    digest = hashlib.sha256(kept.numpy().tobytes()).hexdigest()
    return Numerics(finite=finite, image=Path(path).name if path else None, image_sha256=digest)


def digest(raw: Any) -> str:
    """Return the checksum of every bit of an image before clamping."""
    return hashlib.sha256(raw.cpu().double().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """Hold copies of the inputs and the output of one evaluation of a model."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


@contextlib.contextmanager
def first_evaluation(model: Any) -> Iterator[list[Evaluation]]:
    """Yield a list, to which the first evaluation of this module within the context is added."""
    kept: list[Evaluation] = []

    def keep(_: object, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if not kept:
            kept.append(Evaluation(_map_leaves(args, _copy), _map_leaves(named, _copy), _sample(output).clone()))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        hook.remove()


def forward_error(model: Model, kept: Evaluation) -> float:
    """Return the relative L2 distance between an evaluation and the same one in fp32, with the same weights.

    The evaluation in fp32 is not compiled. The weights of a layer are in fp32 only while that layer computes, so no
    memory for a second UNet is needed. All layers use the same buffer, since a host takes seconds to allocate 3 GB of
    new pages. Afterwards the model has lost its settings, so nothing can be measured with it.

    Args:
        model: the model of the case.
        kept: an evaluation of its UNet.
    """
    torch, unet = model.torch, model.components["unet"]
    vars(unet).pop("forward", None)  # removes the compiled function
    first = next(unet.parameters())  # a UNet converts its inputs to the dtype of this weight, so it must stay in fp32
    first.data = first.data.to(torch.float32).contiguous()
    layers = {part: weights for part in unet.modules() if (weights := list(part.parameters(recurse=False)))}
    buffers = _Fp32Buffers(torch, max(sum(weight.numel() for weight in weights) for weights in layers.values()))
    for part in unet.modules():
        if hasattr(part, "set_processor"):
            part.set_processor(_default_processor())
    for part, weights in layers.items():
        other_weights = [weight for weight in weights if weight is not first]
        if other_weights:
            part.register_forward_pre_hook(partial(buffers.enter, other_weights))
            part.register_forward_hook(partial(buffers.leave, other_weights))
    if torch.version.cuda:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    as_fp32 = partial(_to_fp32, torch)
    args, named = _map_leaves(kept.args, as_fp32), _map_leaves(kept.named, as_fp32)
    reference = _sample(unet(*args, **named)).cpu().double()
    return float((kept.output.cpu().double() - reference).norm() / reference.norm())


class _Fp32Buffers:
    """Hold buffers for the fp32 weights of the layers that compute now: one, or more where a layer contains others."""

    def __init__(self, torch: Any, most: int) -> None:
        """Start without buffers. `most`: the number of weights of the largest layer."""
        self._torch, self._most = torch, most
        self._free: list[Any] = []
        self._taken: list[tuple[Any, list[Any]]] = []

    def enter(self, weights: list[Any], *_: object) -> None:
        """Convert a layer's weights to fp32 before the layer computes."""
        torch = self._torch
        buffer = (
            self._free.pop() if self._free else torch.empty(self._most, dtype=torch.float32, device=weights[0].device)
        )
        self._taken.append((buffer, [weight.data for weight in weights]))
        for weight in weights:
            count = weight.numel()
            weight.data = buffer[:count].view(weight.shape).copy_(weight.data)
            buffer = buffer[count:]

    def leave(self, weights: list[Any], *_: object) -> None:
        """Restore a layer's weights after the layer has computed."""
        buffer, originals = self._taken.pop()
        self._free.append(buffer)
        for weight, data in zip(weights, originals, strict=True):
            weight.data = data


def _to_fp32(torch: Any, value: Any) -> Any:
    return value.to(torch.float32) if torch.is_tensor(value) and value.is_floating_point() else value


def _default_processor() -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def _sample(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output.sample


def _copy(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def _map_leaves(value: Any, change: Any) -> Any:
    """Return the same nested lists, tuples and dicts with every other value replaced by `change(value)`."""
    if isinstance(value, dict):
        return {name: _map_leaves(item, change) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, [_map_leaves(item, change) for item in value])
    return change(value)


def _like(value: Any, items: Iterable[Any]) -> Any:
    return tuple(items) if isinstance(value, tuple) else list(items)
