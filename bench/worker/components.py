"""Build the components of a case on the meta device, count their FLOPs, and give them random or real weights."""

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
    """Record the FLOPs of one evaluation and of a whole batch, and the number of evaluations per image."""

    step: int
    batch: int
    evaluations: int


@dataclass(frozen=True)
class AttentionCall:
    """Describe one kind of call of torch's scaled_dot_product_attention; equal calls of a model are one kind.

    `component`: "unet", "text encoder" or "vae". `queries` and `keys`: the lengths of the two sequences. `is_masked`,
    `is_causal`: the call has a mask of its own, or the causal one.
    """

    component: str
    heads: int
    queries: int
    keys: int
    head_size: int
    is_masked: bool
    is_causal: bool


class Model:
    """Hold the components of one case; `task` is the task of its pipeline."""

    def __init__(self, torch: Any, case: Case) -> None:
        """Build the components without memory, on the meta device."""
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
        """Return the height and the width of the denoised tensor."""
        return self.case.height // self.config["scale"], self.case.width // self.config["scale"]

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights in the case's dtype."""
        parameters = sum(weight.numel() for component in self.components.values() for weight in component.parameters())
        return int(parameters * self.torch.finfo(self.dtype).bits // 8)

    def scheduler(self) -> Any:
        """Return a new scheduler of the case, with the configuration of the model's own.

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
        """Return how often a loop evaluates the model; second-order schedulers evaluate more often than once per step.

        The scheduler makes all its steps once with a small tensor: some fail with very few or very many steps, each
        with an error of its own.

        Raises:
            SkipError: the scheduler does not support this number of steps, or the task has no step.
        """
        scheduler, case = self.scheduler(), self.case
        skipped = case.steps - int(case.steps * STRENGTH) if self.task == "image-to-image" else 0
        if skipped == case.steps:
            raise SkipError(f"image-to-image at strength {STRENGTH:g} has no step of {case.steps}")
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
        except Exception as error:  # each scheduler raises errors of its own
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
        rest = sum(_count(call) * times for _, call, times in self._around_the_loop())
        return Flops(step, step * evaluations + rest, evaluations)

    def attention_calls(self) -> set[AttentionCall]:
        """Return the kinds of attention calls of one image; the components have to be on the meta device still."""
        calls: set[AttentionCall] = set()
        for name, call, _ in [("unet", self.evaluate, 1), *self._around_the_loop()]:
            calls |= _recorded(self.torch, name, call)
        return calls

    def _around_the_loop(self) -> list[tuple[str, Callable[[], object], int]]:
        """Return (component, one call of it on the meta device, calls per image) of all work outside of the loop."""
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
        """Evaluate the denoising model once, on the meta device."""
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
        """Return each text encoder with input tokens, on torch's default device."""
        torch, double = self.torch, 2 * self.case.batch
        encoders = [self.components[name] for name in ("text_encoder", "text_encoder_2") if name in self.components]
        return [
            (encoder, torch.zeros(double, encoder.config.max_position_embeddings, dtype=torch.long))
            for encoder in encoders
        ]

    def load(self, weights: dict[str, Path]) -> None:
        """Materialize the components (from the meta device) with their weights, in the case's dtype and layout.

        The components are placed on the case's device, or on the CPU where they are to be offloaded.

        Args:
            weights: {architecture: snapshot folder}; empty: seeded random weights are used.
        """
        offloaded = self.case.offload != "none"
        device = "cpu" if offloaded else self.case.device
        base = self.config.get("base", self.case.model)
        for name, component in self.components.items():
            owner = self.case.model if name in architecture_of_own(self.case.model) else base
            prepared = self._read(name, weights[owner]) if weights else component.to(self.dtype)
            if self.case.layout == "channels_last":
                prepared.to(memory_format=self.torch.channels_last)  # costs nothing on the meta device
            self.components[name] = prepared.to(device, self.dtype) if weights else self._fill(prepared, device)

    def _fill(self, component: Any, device: str) -> Any:
        """Fill a component with random weights in PyTorch's default range, from one seeded pool.

        The range is uniform, one over the root of the fan-in. Speed and memory do not depend on the values, and any
        time spent here would count as load time.
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
                # Scaling the pool and not the weight writes a large weight once and never reads it.
                _repeat(weight, pool[: weight.numel()] / math.sqrt(weight[0].numel()))
            for name, buffer in component.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
        return component

    def _read(self, name: str, weights: Path) -> Any:
        """Load one component from a snapshot; only safetensors files are read, and nothing from the network."""
        flat = not (weights / name).is_dir()  # the snapshot is one component
        folder = weights if flat else weights / name
        # Two variants may share a folder; diffusers' default is the plain one, so fp16 is read only if the plain one is
        # absent.
        files = list(folder.glob("*.safetensors"))
        variant = "fp16" if files and all(".fp16." in file.name for file in files) else None
        kind = type(self.components[name])
        component = kind.from_pretrained(
            folder, dtype=self.dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
        return component.eval()

    def place_anew(self, generator: random.Random, seconds: float) -> None:
        """Reallocate up to a quarter of the weights, for at most this many seconds; on a CPU only.

        The placement of the weights in memory makes a UNet in one process up to an eighth faster or slower (measured on
        a shared 2-core AMD EPYC). GPUs showed no such effect, so their weights stay. A process that kept one placement
        would measure its luck: see Curtsinger and Berger, "Stabilizer" (2013).
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
        """Return the initial noise of every image of a case; drawn on the CPU, so that devices can be compared."""
        torch, case = self.torch, self.case
        shape = (case.batch, channels, *self.latent_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
        return noise.to(case.device, self.dtype)


def _repeat(weight: Any, pool: Any) -> None:
    """Fill a weight with repetitions of a pool of numbers, in the order of its indices, for any memory layout."""
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


def architecture_of_own(model: str) -> set[str]:
    """Return the components that a model has itself, without those of the architecture that it extends."""
    config = architecture(model)
    if "base" not in config:
        return set(config["classes"])
    return set(config["classes"]) - set(architecture(config["base"])["classes"])


def set_precision(torch: Any, dtype: str) -> None:
    """Set how a GPU computes in fp32: in IEEE fp32, in TF32 everywhere, or as torch does by default.

    The fp32 parts of a case in fp16 or bf16 (SDXL decodes with a VAE in fp32) have torch's default, as in programs:
    TF32 in convolutions only. Source: torch's notes on CUDA semantics, TensorFloat-32.
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
    """Return the kinds of attention calls that a call on the meta device makes."""
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
