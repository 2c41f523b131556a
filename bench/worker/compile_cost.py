"""Predict how long torch.compile takes for a model by compiling one block of it."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from bench.core.axes import COMPILES
from bench.core.errors import SkipError

if TYPE_CHECKING:
    from bench.worker.components import Model

_BLOCK = "ResnetBlock2D"  # every UNet of the architectures contains these blocks


def predict(model: Model) -> float:
    """Return the predicted seconds in which torch.compile compiles the UNet of a case.

    They are the seconds of one block, over the block's share of the kernels of the UNet. The share is the number of
    different kernels of the block over that of the whole UNet. A kernel is an operator with the shapes of its
    arguments; torch compiles a repeated one only once. The first compilation of a process also starts the compiler, so
    a small function is compiled before the measurement. The block is compiled without torch's caches, so a second run
    predicts the same seconds; if the whole model is in the caches, compiling takes less.

    Measured on a 2-core CPU with torch 2.13, beside other work: 29 s predicted and 23 s needed for a tiny UNet2DModel,
    41 and 32 for a tiny conditional one, 58 and 63 for ddpm-cat-256.

    Args:
        model: the model of the case, still on the meta device.

    Raises:
        SkipError: torch.compile does not work here.
    """
    torch, case = model.torch, model.case
    block, arguments, share = _block(model)
    try:
        torch.compile(torch.nn.functional.silu)(torch.ones(64, device=case.device, dtype=model.dtype))
        block = copy.deepcopy(block).to(model.dtype).to_empty(device=case.device)
        inputs = [_materialized(torch, case.device, model.dtype, value) for value in arguments]
        with torch._inductor.config.patch(force_disable_caches=True):  # noqa: SLF001 (newer versions also have it in torch.compiler.config)
            began = time.perf_counter()
            torch.compile(block.forward, mode=COMPILES[case.compile])(*inputs)
            seconds = time.perf_counter() - began
    except Exception as error:  # each compiler backend has its own exceptions
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SkipError(f"torch.compile cannot be used here: {reason.strip()[:300]}") from None
    torch.compiler.reset()
    return seconds / share


def _block(model: Model) -> tuple[Any, tuple[Any, ...], float]:
    """Return the first ResnetBlock2D of the UNet on the meta device, its arguments, and its share of the kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Kernels(TorchDispatchMode):  # type: ignore[misc]  # the toolbox has no torch
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[object] = set()

        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add((str(call), _shapes(args)))
            return call(*args, **(kwargs or {}))

    all_kernels, block_kernels = Kernels(), Kernels()
    first_call: dict[str, Any] = {}

    def enter(part: Any, args: tuple[Any, ...]) -> None:
        if not first_call:
            first_call.update(block=part, args=args)

    hooks = [
        part.register_forward_pre_hook(enter)
        for part in model.components["unet"].modules()
        if type(part).__name__ == _BLOCK
    ]
    with all_kernels:
        model.evaluate()
    for hook in hooks:
        hook.remove()
    with block_kernels:
        first_call["block"](*first_call["args"])
    return first_call["block"], first_call["args"], len(block_kernels.seen) / len(all_kernels.seen)


def _shapes(value: Any) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(item) for item in value)
    return tuple(value.shape) if hasattr(value, "shape") else repr(value)


def _materialized(torch: Any, device: str, dtype: Any, value: Any) -> Any:
    return torch.zeros(value.shape, device=device, dtype=dtype) if torch.is_tensor(value) else value
