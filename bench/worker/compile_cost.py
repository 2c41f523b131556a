"""What torch.compile will cost, told by one block of a model that is compiled."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from bench.core.axes import COMPILES
from bench.core.errors import SkipError

if TYPE_CHECKING:
    from bench.worker.components import Model

_BLOCK = "ResnetBlock2D"  # every UNet here is made of them, and of what surrounds them


def predict(model: Model) -> float:
    """Seconds that compiling a model will still take: what one block of its UNet takes, over the block's share of it.

    A kernel is taken to be an operator with the shapes that it is called with: what comes again is not compiled again.
    The first function of a process costs extra, the compiler's own start: it is paid here. No cache is asked for the
    block, so that a second run predicts the same; where the whole was compiled before, it takes less than is told.

    On a 2-core CPU with torch 2.13, beside other work: 29 s told and 23 needed for a tiny UNet2DModel, 41 and 32 for a
    tiny conditional one, 58 and 63 for ddpm-cat-256.

    Args:
        model: the case's, still on the meta device.

    Raises:
        SkipError: torch cannot compile here.
    """
    torch, case = model.torch, model.case
    block, given, share = _block(model)
    try:
        torch.compile(torch.nn.functional.silu)(torch.ones(64, device=case.device, dtype=model.dtype))
        block = copy.deepcopy(block).to(model.dtype).to_empty(device=case.device)
        inputs = [_real(torch, case.device, model.dtype, value) for value in given]
        with torch._inductor.config.patch(force_disable_caches=True):  # noqa: SLF001 (newer ones have it in torch.compiler.config, too)
            began = time.perf_counter()
            torch.compile(block.forward, mode=COMPILES[case.compile])(*inputs)
            seconds = time.perf_counter() - began
    except Exception as error:  # a compiler that is missing or fails: each backend has its own exceptions
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SkipError(f"torch.compile cannot be used here: {why.strip()[:300]}") from None
    torch.compiler.reset()
    return seconds / share


def _block(model: Model) -> tuple[Any, tuple[Any, ...], float]:
    """(a block, what it is called with, its share of the kernels of all that is compiled), on the meta device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Kernels(TorchDispatchMode):  # type: ignore[misc]  # the toolbox has no torch
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[object] = set()

        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add((str(call), _shapes(args)))
            return call(*args, **(kwargs or {}))

    every, its_own = Kernels(), Kernels()
    found: dict[str, Any] = {}

    def enter(part: Any, args: tuple[Any, ...]) -> None:
        if not found:
            found.update(block=part, args=args)

    hooks = [
        part.register_forward_pre_hook(enter)
        for part in model.components["unet"].modules()
        if type(part).__name__ == _BLOCK
    ]
    with every:
        model.evaluate()
    for hook in hooks:
        hook.remove()
    with its_own:
        found["block"](*found["args"])
    return found["block"], found["args"], len(its_own.seen) / len(every.seen)


def _shapes(value: Any) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(item) for item in value)
    return tuple(value.shape) if hasattr(value, "shape") else repr(value)


def _real(torch: Any, device: str, dtype: Any, value: Any) -> Any:
    return torch.zeros(value.shape, device=device, dtype=dtype) if torch.is_tensor(value) else value
