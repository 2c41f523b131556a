"""The components of a case: made on the meta device, where they cost nothing; counted; given seeded or real weights."""

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
# The parts of a pipeline that take an image in; with these a VAE encodes before the loop.
_ENCODED = {"image-to-image": 1, "inpainting": 2}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one batch: an evaluation of the model, the whole of an image's loop; and how many evaluations."""

    step: int
    batch: int
    evaluations: int


class Model:
    """The components of one case. `task` is what is done with them."""

    def __init__(self, torch: Any, case: Case) -> None:
        """Build the components without memory."""
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
        """Height and width of what is denoised."""
        return self.case.height // self.config["scale"], self.case.width // self.config["scale"]

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take in the case's dtype."""
        parameters = sum(each.numel() for component in self.components.values() for each in component.parameters())
        return int(parameters * self.torch.finfo(self.dtype).bits // 8)

    def scheduler(self) -> Any:
        """A new scheduler of the case, configured as the model's own is.

        Raises:
            SkipError: it needs a package that is not there.
        """
        import diffusers

        name, changes = SCHEDULERS[self.case.scheduler]
        try:
            return getattr(diffusers, name).from_config(self.config["scheduler"] | changes)
        except ImportError as error:
            raise SkipError(f"{name} cannot be used here: {' '.join(str(error).split())[:200]}") from None

    def evaluations(self) -> int:
        """How often a loop evaluates the model: more than its steps with a scheduler of second order.

        Raises:
            SkipError: the scheduler cannot take so many steps.
        """
        scheduler = self.scheduler()
        try:
            scheduler.set_timesteps(self.case.steps)
        except ValueError as error:
            raise SkipError(f"{self.case.scheduler} takes no {self.case.steps} steps: {error}") from None
        every = len(scheduler.timesteps)
        if self.task != "image-to-image":
            return every
        skipped = self.case.steps - min(int(self.case.steps * STRENGTH), self.case.steps)
        return every - skipped * int(scheduler.order)

    def flops(self) -> Flops:
        """Count the arithmetic of an evaluation and of a whole batch on the meta device.

        Raises:
            SkipError: as `evaluations`.
        """
        torch, case = self.torch, self.case
        evaluations = self.evaluations()
        step = _count(self.evaluate)
        if self.task == "unconditional":
            return Flops(step, step * evaluations, evaluations)
        with torch.device("meta"), torch.inference_mode():
            text = sum(_count(partial(encoder, tokens)) for encoder, tokens in self._encoders())
            pixels = torch.empty(case.batch, 3, case.height, case.width)
            latents = torch.empty(case.batch, 4, *self.latent_size)
            encoded = _ENCODED.get(self.task, 0)
            vae = _count(lambda: self.components["vae"].encode(pixels)) * encoded if encoded else 0
            vae += _count(lambda: self.components["vae"].decode(latents))
        return Flops(step, text + step * evaluations + vae, evaluations)

    def evaluate(self) -> None:
        """One evaluation of what is denoised with, on the meta device."""
        torch, case = self.torch, self.case
        with torch.device("meta"), torch.inference_mode():
            if self.task == "unconditional":
                self.components["unet"](torch.empty(case.batch, 3, *self.latent_size), 1)
                return
            double = 2 * case.batch  # classifier-free guidance: with the prompt and without
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
        """Each text encoder, with tokens as it takes them; on the device that is torch's default."""
        torch, double = self.torch, 2 * self.case.batch
        found = [self.components[name] for name in ("text_encoder", "text_encoder_2") if name in self.components]
        return [(each, torch.zeros(double, each.config.max_position_embeddings, dtype=torch.long)) for each in found]

    def load(self, weights: dict[str, Path]) -> None:
        """Give the components memory and weights, in the case's dtype and layout.

        They lie on its device, or are kept back from it, where it is to be offloaded.

        Args:
            weights: {architecture: snapshot folder}; empty: seeded random weights are made.
        """
        offloaded = self.case.offload != "none"
        device = "cpu" if offloaded else self.case.device
        base = self.config.get("base", self.case.model)
        for name, component in self.components.items():
            own = self.case.model if name in architecture_of_own(self.case.model) else base
            made = self._read(name, weights[own]) if weights else component.to(self.dtype)
            if self.case.layout == "channels_last":
                made.to(memory_format=self.torch.channels_last)  # costs nothing where there is no memory yet
            self.components[name] = made.to(device, self.dtype) if weights else self._fill(made, device)

    def _fill(self, component: Any, device: str) -> Any:
        """Random weights in PyTorch's default range (uniform, one over the root of the fan-in), from one seeded pool.

        Speed and memory do not depend on the values, and a second spent here would be load time.
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
                # The pool is scaled, not the weight: a large one is then written once, and never read.
                _repeat(weight, pool[: weight.numel()] / math.sqrt(weight[0].numel()))
            for name, buffer in component.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
        return component

    def _read(self, name: str, weights: Path) -> Any:
        """One component of a snapshot: safetensors alone, nothing from the network."""
        flat = not (weights / name).is_dir()  # a model that stands alone
        folder = weights if flat else weights / name
        # Two variants of a model may share the folder: one that is plain is what a program without a wish loads.
        files = list(folder.glob("*.safetensors"))
        variant = "fp16" if files and all(".fp16." in file.name for file in files) else None
        kind = type(self.components[name])
        component = kind.from_pretrained(
            folder, dtype=self.dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
        return component.eval()

    def place_anew(self, chance: random.Random, seconds: float) -> None:
        """Move a part of the weights to other memory, a quarter of them at most and for so long at most: on a CPU.

        Where its weights lie makes a UNet of one and the same process up to an eighth faster or slower (measured on a
        shared 2-core AMD EPYC; a card's memory showed us nothing of the kind, and is left alone). A process that kept
        its place would measure its luck: see Curtsinger and Berger, "Stabilizer" (2013).
        """
        if self.case.device != "cpu":
            return
        weights = [weight for component in self.components.values() for weight in component.parameters()]
        ends = time.perf_counter() + seconds
        for weight in chance.sample(weights, len(weights) // 4):
            weight.data = weight.data.clone()
            if time.perf_counter() > ends:
                return

    def noise(self, channels: int) -> Any:
        """The start of every image of a case: drawn on the CPU, so that devices can be compared."""
        torch, case = self.torch, self.case
        shape = (case.batch, channels, *self.latent_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
        return noise.to(case.device, self.dtype)


def _repeat(weight: Any, pool: Any) -> None:
    """Fill a weight with a pool of numbers again and again, in the order of its indices, however it lies in memory."""
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
    """The components that a model brings itself, rather than by the one that it extends."""
    found = architecture(model)
    if "base" not in found:
        return set(found["classes"])
    return set(found["classes"]) - set(architecture(found["base"])["classes"])


def set_precision(torch: Any, dtype: str) -> None:
    """Let fp32 be IEEE's, or TF32 everywhere: torch's own default differs between convolutions and products."""
    if torch.version.cuda:
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"


def _build(library: str, kind: str, config: dict[str, Any]) -> Any:
    if library == "diffusers":
        import diffusers

        return getattr(diffusers, kind)(**config)
    import transformers

    made = getattr(transformers, kind)
    return made(made.config_class(**config))


def _count(call: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return int(counter.get_total_flops())
