"""Whether a case's numbers are right: finite, the same again, and near to fp32's."""

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


def look(pixels: Any, raw: Any, path: str | None) -> Numerics:
    """Whether every number is finite, also before it is clamped to a picture; the first picture is kept as PNG.

    Args:
        pixels: float in [0, 1], of shape (batch, 3, height, width).
        raw: the same before it was clamped, or the latents that it was decoded from.
        path: where the picture is kept, None for nowhere.
    """
    finite = bool(pixels.isfinite().all()) and bool(raw.isfinite().all())
    kept = (pixels[0].nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous()
    if path is not None:
        from PIL import Image

        Image.fromarray(kept.numpy()).save(path)
    digest = hashlib.sha256(kept.numpy().tobytes()).hexdigest()
    return Numerics(finite=finite, image=Path(path).name if path else None, image_sha256=digest)


def digest(raw: Any) -> str:
    """The hash of every bit of an image before it was clamped."""
    return hashlib.sha256(raw.cpu().double().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """The inputs and the output of one evaluation of a model, copied."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


@contextlib.contextmanager
def first_evaluation(model: Any) -> Iterator[list[Evaluation]]:
    """Copy the first evaluation of a module that happens within into the list that is yielded."""
    kept: list[Evaluation] = []

    def keep(_: object, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if not kept:
            kept.append(Evaluation(_each(args, _copy), _each(named, _copy), _sample(output).clone()))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        hook.remove()


def forward_error(model: Model, kept: Evaluation) -> float:
    """The relative L2 distance of an evaluation from the same one in fp32, eager, contiguous, with the same weights.

    Each layer's weights are in fp32 while that layer computes and no longer: no room is needed for a second UNet, and
    they lie where the layer before had its own, as a host takes seconds to find 3 GB of new pages. Its settings are
    gone afterwards: nothing can be measured after.

    Args:
        model: the case's.
        kept: an evaluation of its UNet.
    """
    torch, unet = model.torch, model.components["unet"]
    vars(unet).pop("forward", None)  # what was compiled
    first = next(unet.parameters())  # its dtype is what a model calls its own, and turns its inputs into: it stays wide
    first.data = first.data.to(torch.float32).contiguous()
    layers = {part: own for part in unet.modules() if (own := list(part.parameters(recurse=False)))}
    wide = _Wide(torch, max(sum(weight.numel() for weight in own) for own in layers.values()))
    for part in unet.modules():
        if hasattr(part, "set_processor"):
            part.set_processor(_usual_processor())
    for part, own in layers.items():
        narrow = [weight for weight in own if weight is not first]
        if narrow:
            part.register_forward_pre_hook(partial(wide.enter, narrow))
            part.register_forward_hook(partial(wide.leave, narrow))
    if torch.version.cuda:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    as_fp32 = partial(_to_fp32, torch)
    right = _sample(unet(*_each(kept.args, as_fp32), **_each(kept.named, as_fp32))).cpu().double()
    return float((kept.output.cpu().double() - right).norm() / right.norm())


class _Wide:
    """Room for one layer's weights in fp32, and for another's where one computes within the other."""

    def __init__(self, torch: Any, most: int) -> None:
        """Nothing is taken yet. `most`: the weights of the largest layer."""
        self._torch, self._most = torch, most
        self._free: list[Any] = []
        self._taken: list[tuple[Any, list[Any]]] = []

    def enter(self, own: list[Any], *_: object) -> None:
        """A layer computes: its weights are in fp32."""
        torch = self._torch
        room = self._free.pop() if self._free else torch.empty(self._most, dtype=torch.float32, device=own[0].device)
        self._taken.append((room, [weight.data for weight in own]))
        for weight in own:
            count = weight.numel()
            weight.data = room[:count].view(weight.shape).copy_(weight.data)
            room = room[count:]

    def leave(self, own: list[Any], *_: object) -> None:
        """It is done: they are what they were."""
        room, kept = self._taken.pop()
        self._free.append(room)
        for weight, data in zip(own, kept, strict=True):
            weight.data = data


def _to_fp32(torch: Any, value: Any) -> Any:
    return value.to(torch.float32) if torch.is_tensor(value) and value.is_floating_point() else value


def _usual_processor() -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def _sample(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output.sample


def _copy(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def _each(value: Any, change: Any) -> Any:
    """A change of every leaf of what a model is called with."""
    if isinstance(value, dict):
        return {name: _each(item, change) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, [_each(item, change) for item in value])
    return change(value)


def _like(value: Any, items: Iterable[Any]) -> Any:
    return tuple(items) if isinstance(value, tuple) else list(items)
