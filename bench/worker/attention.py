"""Sets how a case computes attention: by a processor of diffusers, or by one of torch's kernels."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from bench.core.axes import ATTENTIONS, PREFERRED_ATTENTIONS
from bench.core.errors import SkipError
from bench.worker import components

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bench.worker.components import AttentionCall, Model


def set_processors(model: Model) -> None:
    """Set the attention processor of diffusers if the case names one ("eager", "sliced")."""
    case = model.case
    if case.attention not in {"eager", "sliced"}:
        return
    from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

    for name in ("unet", "controlnet"):
        for part in model.components[name].modules() if name in model.components else ():
            if hasattr(part, "set_processor"):
                half = max(1, part.sliceable_head_dim // 2)
                part.set_processor(AttnProcessor() if case.attention == "eager" else SlicedAttnProcessor(half))


def choose_kernels(model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the kernels of torch that the case may use, the one that it names first, and notes for the reader.

    A kernel computes only some sizes and dtypes. On CUDA, flash computes heads of at most 256 numbers in 16 bits
    (source: torch's sdp_utils.cpp), but the VAE of Stable Diffusion has one head of 512. So each kind of call of the
    model is tried once on the device. The calls that the named kernel rejects get the next kernel of
    PREFERRED_ATTENTIONS.

    Returns:
        The names of the SDPBackends, empty if torch chooses; and a note on the calls that another kernel computes.

    Raises:
        SkipError: the named kernel computes no call of the UNet, or this torch cannot prefer it to others.
    """
    case = model.case
    forced = ATTENTIONS[case.attention]
    if forced is None:
        return (), ()
    if forced == "MATH":  # this kernel computes every call
        return (forced,), ()
    calls = components.Model(model.torch, case).attention_calls()
    reasons = {call: _rejection(model, forced, call) for call in calls}
    rejected = {call: reason for call, reason in reasons.items() if reason is not None}
    if not any(call.component == "unet" for call in calls - rejected.keys()):
        why_not = next(iter(rejected.values()), "the model does not use torch's scaled_dot_product_attention")
        raise SkipError(f"attention {case.attention} is not available on {case.device} in {case.dtype}: {why_not}")
    if not rejected:
        return (forced,), ()
    if forced == "CUDNN_ATTENTION" and not _has_priorities():  # an older torch prefers every other kernel to this one
        raise SkipError(
            f"attention {case.attention} cannot compute all attention calls of the model, and torch "
            f"{model.torch.__version__} would use another kernel for all of them; it needs torch 2.6 or newer"
        )
    return PREFERRED_ATTENTIONS[case.attention], (
        f"attention {case.attention} rejects {_heads_text(rejected)}; another kernel computes them",
    )


@contextlib.contextmanager
def prefer(kernels: Sequence[str]) -> Iterator[None]:
    """Let torch use only these kernels while the context is active: for each call the first one that computes it."""
    if not kernels:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    options = {"set_priority": True} if len(kernels) > 1 and _has_priorities() else {}
    with sdpa_kernel([getattr(SDPBackend, name) for name in kernels], **options):
        yield


def _has_priorities() -> bool:
    """Return whether torch can use kernels in a given order (2.6 and later)."""
    from torch.nn.attention import sdpa_kernel

    return "set_priority" in inspect.signature(sdpa_kernel).parameters


def _rejection(model: Model, kernel: str, call: AttentionCall) -> str | None:
    """Return the reason for which a kernel rejects a call; None if it computes the call."""
    torch, case = model.torch, model.case
    dtype = torch.float32 if call.component == "vae" and _is_upcast(model) else model.dtype

    def tensor(length: int) -> Any:
        return torch.ones(1, call.heads, length, call.head_size, device=case.device, dtype=dtype)

    query, key = tensor(call.queries), tensor(call.keys)
    mask = torch.zeros(1, 1, call.queries, call.keys, device=case.device, dtype=dtype) if call.is_masked else None
    try:
        with prefer([kernel]):
            torch.nn.functional.scaled_dot_product_attention(query, key, key, mask, is_causal=call.is_causal)
    except RuntimeError as error:
        if isinstance(error, getattr(torch, "OutOfMemoryError", ())):
            raise
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


def _is_upcast(model: Model) -> bool:
    """Return whether the pipeline converts the VAE to fp32 before it decodes; only SDXL pipelines in fp16 do that."""
    is_half = model.case.dtype == "fp16" and "text_encoder_2" in model.components
    return is_half and bool(model.components["vae"].config.force_upcast)


def _heads_text(calls: Iterable[AttentionCall]) -> str:
    """Return a text on some calls, such as "the vae's heads of size 512": the component and the sizes of its heads."""
    sizes: dict[str, set[int]] = {}
    for call in calls:
        sizes.setdefault(call.component, set()).add(call.head_size)
    return "; ".join(
        f"the {name}'s heads of size {', '.join(map(str, sorted(of_component)))}"
        for name, of_component in sorted(sizes.items())
    )
