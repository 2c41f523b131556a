"""Build the components of a case on torch's meta device, count their FLOPs, and give them random or real weights."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.core.axes import DTYPES, SCHEDULERS, STRENGTH, architecture, tasks
from bench.core.errors import SkipError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from bench.core.result import Case

_POOL = 1 << 20
# {task: the number of images that the VAE encodes before the loop}
_ENCODED = {"image-to-image": 1, "inpainting": 2}


@dataclass(frozen=True)
class Flops:
    """Record the FLOPs of one evaluation of the model (`step`) and of a whole batch (`batch`).

    `evaluations`: the number of evaluations per image.
    """

    step: int
    batch: int
    evaluations: int


@dataclass(frozen=True)
class AttentionCall:
    """Describe one kind of call of torch's scaled_dot_product_attention; equal calls of a model are one kind.

    `component`: "unet", "text encoder" or "vae". `queries`, `keys`: the lengths of the two sequences. `head_size`: the
    numbers in a head. `is_masked`: the call has an attention mask. `is_causal`: the call uses the causal mask.
    """

    component: str
    heads: int
    queries: int
    keys: int
    head_size: int
    is_masked: bool
    is_causal: bool


class Model:
    """Hold the components (UNet, VAE, text encoders, ...) of one case.

    `config`: the content of the architecture's file. `task`: the task of the pipeline. `components`: {name: module}.
    """

    def __init__(self, torch: Any, case: Case) -> None:
        """Build the components on torch's meta device, where their weights have shapes and no memory."""
        self.torch = torch
        self.case = case
        self.config = architecture(case.model)
        self.task = case.task or tasks(case.model)[0]
        self.dtype = getattr(torch, DTYPES[case.dtype])
        self.components: dict[str, Any] = {}
        with torch.device("meta"):
            for name, (library, kind) in self.config["classes"].items():
                self.components[name] = _build(library, kind, self.config[name]).eval()

    @property
    def latent_size(self) -> tuple[int, int]:
        """Return the height and the width of the tensor that is denoised."""
        return self.case.height // self.config["scale"], self.case.width // self.config["scale"]

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights of all components in the case's dtype."""
        parameters = sum(weight.numel() for component in self.components.values() for weight in component.parameters())
        return int(parameters * self.torch.finfo(self.dtype).bits // 8)

    def scheduler(self) -> Any:
        """Return a new scheduler of the kind that the case names, with the scheduler configuration of the model.

        Raises:
            SkipError: the scheduler needs a package that is not installed.
        """
        import diffusers

        name, changes = SCHEDULERS[self.case.scheduler]
        try:
            return getattr(diffusers, name).from_config(self.config["scheduler"] | changes)
        except ImportError as error:
            raise SkipError(f"{name} cannot be used here: {' '.join(str(error).split())[:200]}") from None

    def evaluations(self) -> int:
        """Return how often a sampling loop evaluates the model.

        A second-order scheduler needs about two evaluations a step.

        The scheduler makes all its steps once with a small tensor, since some schedulers fail only at very few or very
        many steps.

        Raises:
            SkipError: the scheduler does not support this number of steps, or no step of an image-to-image case
                remains.
        """
        scheduler, case = self.scheduler(), self.case
        skipped = case.steps - int(case.steps * STRENGTH) if self.task == "image-to-image" else 0
        if skipped == case.steps:
            raise SkipError(f"image-to-image at strength {STRENGTH:g} leaves no step of {case.steps}; use more steps")
        try:
            scheduler.set_timesteps(case.steps)
            first = skipped * int(scheduler.order)
            if first and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            steps = scheduler.timesteps[first:]
            sample = self.torch.ones(1, 4, 8, 8)
            for step in steps:
                scaled = scheduler.scale_model_input(sample, step)
                sample = scheduler.step(self.torch.zeros_like(scaled), step, sample).prev_sample
        except Exception as error:  # each scheduler has its own exceptions
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise SkipError(f"{case.scheduler} does not support {case.steps} steps: {reason}") from None
        return len(steps)

    def flops(self) -> Flops:
        """Count the FLOPs of an evaluation and of a whole batch on the meta device.

        Raises:
            SkipError: the scheduler does not support this number of steps.
        """
        evaluations = self.evaluations()
        step = _count(self.evaluate)
        rest = sum(_count(call) * times for _, call, times in self._calls_outside_the_loop())
        return Flops(step, step * evaluations + rest, evaluations)

    def attention_calls(self) -> set[AttentionCall]:
        """Return the kinds of attention calls of one image. The components must still be on the meta device."""
        calls: set[AttentionCall] = set()
        for name, call, _ in [("unet", self.evaluate, 1), *self._calls_outside_the_loop()]:
            calls |= _recorded(self.torch, name, call)
        return calls

    def _calls_outside_the_loop(self) -> list[tuple[str, Callable[[], object], int]]:
        """Return the work before and after the sampling loop: text encoders, VAE encoder and VAE decoder.

        Each item is (component, a function that calls it once on the meta device, number of calls per image).
        """
        torch, case = self.torch, self.case
        if self.task == "unconditional":
            return []
        with torch.device("meta"):
            encoders = self._encoders()
            pixels = torch.empty(case.batch, 3, case.height, case.width)
            latents = torch.empty(case.batch, 4, *self.latent_size)
        vae, encoded = self.components["vae"], _ENCODED.get(self.task, 0)
        calls: list[tuple[str, Callable[[], object], int]] = [
            ("text encoder", partial(encoder, tokens), 1) for encoder, tokens in encoders
        ]
        calls += [("vae", partial(vae.encode, pixels), encoded)] if encoded else []
        return [*calls, ("vae", partial(vae.decode, latents), 1)]

    def evaluate(self) -> None:
        """Evaluate the UNet, and the ControlNet if there is one, once on the meta device."""
        torch, case = self.torch, self.case
        with torch.device("meta"), torch.inference_mode():
            if self.task == "unconditional":
                self.components["unet"](torch.empty(case.batch, 3, *self.latent_size), 1)
                return
            double = 2 * case.batch  # classifier-free guidance evaluates with and without the prompt
            widths = [(encoder.config, tokens.shape) for encoder, tokens in self._encoders()]
            states = torch.cat([torch.empty(*shape, config.hidden_size) for config, shape in widths], -1)
            is_xl = "text_encoder_2" in self.components
            pooled = torch.empty(double, widths[-1][0].projection_dim)
            added = {"text_embeds": pooled, "time_ids": torch.empty(double, 6)} if is_xl else None
            latents = torch.empty(double, self.components["unet"].config.in_channels, *self.latent_size)
            self.components["unet"](latents, 1, encoder_hidden_states=states, added_cond_kwargs=added)
            if "controlnet" in self.components:
                control = torch.empty(double, 3, case.height, case.width)
                self.components["controlnet"](latents, 1, encoder_hidden_states=states, controlnet_cond=control)

    def _encoders(self) -> list[tuple[Any, Any]]:
        """Return (text encoder, input tokens) for each text encoder; the tokens are on torch's default device."""
        torch, double = self.torch, 2 * self.case.batch
        encoders = [self.components[name] for name in ("text_encoder", "text_encoder_2") if name in self.components]
        return [
            (encoder, torch.zeros(double, encoder.config.max_position_embeddings, dtype=torch.long))
            for encoder in encoders
        ]

    def load(self, weights: dict[str, Path]) -> None:
        """Replace the components on the meta device by ones with weights, in the case's dtype and memory format.

        They are placed on the case's device; with an `offload` they stay on the CPU.

        Args:
            weights: {architecture: snapshot folder}; empty: seeded random weights are used.
        """
        offloaded = self.case.offload != "none"
        device = "cpu" if offloaded else self.case.device
        base = self.config.get("base", self.case.model)
        for name, component in self.components.items():
            owner = self.case.model if name in own_components(self.case.model) else base
            prepared = self._load_component(name, weights[owner]) if weights else component.to(self.dtype)
            if self.case.layout == "channels_last":
                prepared.to(memory_format=self.torch.channels_last)  # costs nothing on the meta device
            self.components[name] = prepared.to(device, self.dtype) if weights else self._fill(prepared, device)

    def _fill(self, component: Any, device: str) -> Any:
        """Return a component on a device with random weights, repeated from one pool of seeded numbers.

        The weights are uniform between plus and minus one over the root of the fan-in, PyTorch's default. Speed and
        memory do not depend on their values. A pool is used since the time of this function counts as load time.
        """
        torch = self.torch
        component = component.to_empty(device=device)
        generator = torch.Generator().manual_seed(self.case.seed)
        pool = torch.empty(_POOL).uniform_(-1, 1, generator=generator).to(device, self.dtype)
        with torch.no_grad():
            for name, weight in component.named_parameters():
                if weight.ndim < 2:
                    weight.fill_(1.0 if name.endswith("weight") else 0.0)
                    continue
                # The pool is scaled and not the weight, so a large weight is written once and never read.
                _repeat(weight, pool[: weight.numel()] / math.sqrt(weight[0].numel()))
            for name, buffer in component.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
        return component

    def _load_component(self, name: str, weights: Path) -> Any:
        """Load one component from a snapshot folder. Only safetensors files are read, and the network is not used."""
        flat = not (weights / name).is_dir()  # then the snapshot consists of this component
        folder = weights if flat else weights / name
        # A folder may hold plain files and files of the variant fp16. Like diffusers by default, this reads the plain
        # ones; it reads fp16 only if there are no plain ones.
        files = list(folder.glob("*.safetensors"))
        variant = "fp16" if files and all(".fp16." in file.name for file in files) else None
        kind = type(self.components[name])
        component = kind.from_pretrained(
            folder, dtype=self.dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
        return component.eval()

    def reallocate_weights(self, generator: random.Random, seconds: float) -> None:
        """Copy up to a quarter of the weights to new memory, for at most this many seconds; does nothing on a GPU.

        The placement of the weights in memory makes a UNet in one process up to an eighth faster or slower (measured on
        a shared 2-core AMD EPYC). A process that kept one placement would measure this chance: see Curtsinger and
        Berger, "Stabilizer" (2013). GPUs showed no such effect.

        Args:
            generator: selects the weights.
            seconds: the time limit.
        """
        if self.case.device != "cpu":
            return
        weights = [weight for component in self.components.values() for weight in component.parameters()]
        ends = time.perf_counter() + seconds
        for weight in generator.sample(weights, len(weights) // 4):
            weight.data = weight.data.clone()
            if time.perf_counter() > ends:
                return

    def noise(self, channels: int) -> Any:
        """Return the initial noise of a batch, the same for every batch.

        Drawn on the CPU, so it is equal on all devices.
        """
        torch, case = self.torch, self.case
        shape = (case.batch, channels, *self.latent_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
        return noise.to(case.device, self.dtype)


def _repeat(weight: Any, pool: Any) -> None:
    """Fill a weight with repetitions of a pool of numbers, in the order of its indices, in any memory format."""
    if not weight.is_contiguous():
        row = weight[0].numel()
        rows = max(1, pool.numel() // row)
        again = pool.repeat(1 + math.ceil(min(rows, weight.shape[0]) * row / pool.numel()))
        for first in range(0, weight.shape[0], rows):
            some = weight[first : first + rows]
            begin = first * row % pool.numel()
            some.copy_(again[begin : begin + some.numel()].view(some.shape))
        return
    flat, size = weight.view(-1), pool.numel()
    whole = flat.numel() // size * size
    flat[:whole].view(-1, size).copy_(pool.expand(whole // size, size))
    flat[whole:].copy_(pool[: flat.numel() - whole])


def own_components(model: str) -> set[str]:
    """Return the names of the components of an architecture, without those of its base.

    The base is the architecture that it extends.
    """
    config = architecture(model)
    if "base" not in config:
        return set(config["classes"])
    return set(config["classes"]) - set(architecture(config["base"])["classes"])


def set_precision(torch: Any, dtype: str) -> None:
    """Set how a CUDA device computes in fp32 for a case of this dtype.

    "fp32" and "fp64": in IEEE fp32. "tf32": in TF32. "fp16" and "bf16": as torch does by default, with TF32 in
    convolutions only, since programs do so too: SDXL decodes with a VAE in fp32. Source: torch's notes on CUDA
    semantics, TensorFloat-32.
    """
    if torch.version.cuda:
        torch.backends.cudnn.allow_tf32 = dtype in {"tf32", "bf16", "fp16"}
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"


def tf32_in_use(torch: Any) -> str:
    """Return where fp32 numbers are computed in TF32: "True" (everywhere), "False" (nowhere) or "convolutions"."""
    parts = (bool(torch.backends.cudnn.allow_tf32), bool(torch.backends.cuda.matmul.allow_tf32))
    return "convolutions" if parts == (True, False) else str(all(parts))


def _build(library: str, kind: str, config: dict[str, Any]) -> Any:
    if library == "diffusers":
        import diffusers

        return getattr(diffusers, kind)(**config)
    import transformers

    component_class = getattr(transformers, kind)
    return component_class(component_class.config_class(**config))


def _count(call: Callable[[], object]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.inference_mode(), counter:
        call()
    return int(counter.get_total_flops())


def _recorded(torch: Any, component: str, call: Callable[[], object]) -> set[AttentionCall]:
    """Return the kinds of attention calls that a function makes on the meta device.

    Args:
        torch: the library.
        component: the name for `AttentionCall.component`.
        call: the function.
    """
    from torch.overrides import TorchFunctionMode

    calls: set[AttentionCall] = set()

    class Recorder(TorchFunctionMode):  # type: ignore[misc]  # the toolbox has no torch
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = kwargs or {}
            if getattr(function, "__name__", "") == "scaled_dot_product_attention":
                given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
                given |= named
                _, heads, queries, size = given["query"].shape
                masks = given.get("attn_mask") is not None, bool(given.get("is_causal"))
                calls.add(AttentionCall(component, heads, queries, given["key"].shape[-2], size, *masks))
            return function(*args, **named)

    with torch.device("meta"), torch.inference_mode(), Recorder():
        call()
    return calls
