"""The sampling loops: real architectures, seeded random weights unless real ones are there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.axes import DTYPES, SCHEDULERS, architecture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.result import Case

_POOL = 1 << 20


@dataclass(frozen=True)
class Flops:
    """FLOPs of one batch: a denoising step, and the whole of an image's loop."""

    step: int
    batch: int


class Model:
    """The components of one case: made on the meta device, where they cost nothing, and loaded when wanted."""

    def __init__(self, torch: Any, case: Case) -> None:  # noqa: ANN401
        """Build the components without memory."""
        self.torch = torch
        self.case = case
        self.config = architecture(case.model)
        self.components: dict[str, Any] = {}
        with torch.device("meta"):
            for name, build in self._builders().items():
                self.components[name] = build(self.config[name]).eval()

    def flops(self) -> Flops:
        """Count the arithmetic of a step and of a whole batch on the meta device."""
        torch, case = self.torch, self.case
        scale = self.config["scale"]
        size = (case.height // scale, case.width // scale)
        with torch.device("meta"), torch.inference_mode():
            if self.config["kind"] == "unconditional":
                step = self._count(lambda: self.components["unet"](torch.empty(case.batch, 3, *size), 1))
                return Flops(step, step * case.steps)
            double = 2 * case.batch  # classifier-free guidance: with the prompt and without
            encoder = self.components["text_encoder"]
            width = encoder.config.hidden_size
            tokens = torch.zeros(double, encoder.config.max_position_embeddings, dtype=torch.long)
            text = self._count(lambda: encoder(tokens))
            states = torch.empty(double, encoder.config.max_position_embeddings, width)
            latents = torch.empty(double, 4, *size)
            step = self._count(lambda: self.components["unet"](latents, 1, encoder_hidden_states=states))
            decode = self._count(lambda: self.components["vae"].decode(latents[: case.batch]))
            return Flops(step, text + step * case.steps + decode)

    def load(self, weights: Path | None) -> Callable[[Callable[[], None]], Any]:
        """Give the components memory and weights, and return the loop.

        Args:
            weights: a snapshot folder, else seeded random weights are made.

        Returns:
            A function that takes `mark` (called when the first step begins and after each step) and returns
            the images, float in [0, 1], of shape (batch, 3, height, width), and the same before any clamping
            (pixels, or the latents that were decoded).
        """
        for name, component in self.components.items():
            self.components[name] = self._read(name, weights) if weights else self._fill(component)
            self.components[name].to(self.case.device, getattr(self.torch, DTYPES[self.case.dtype]))
            if self.case.layout == "channels_last":
                self.components[name].to(memory_format=self.torch.channels_last)
        unconditional = self.config["kind"] == "unconditional"
        return self._unconditional() if unconditional else self._text_to_image()

    def _builders(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        from diffusers import UNet2DModel

        if self.config["kind"] == "unconditional":
            return {"unet": lambda config: UNet2DModel(**config)}
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        return {
            "unet": lambda config: UNet2DConditionModel(**config),
            "vae": lambda config: AutoencoderKL(**config),
            "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
        }

    def _count(self, call: Callable[[], object]) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter:
            call()
        return int(counter.get_total_flops())

    def _fill(self, component: Any) -> Any:  # noqa: ANN401
        """Random weights in PyTorch's default range (uniform, one over the root of the fan-in), from one seeded
        pool: speed and memory do not depend on the values, and a second spent here would be load time."""  # noqa: D205, D209
        torch, case = self.torch, self.case
        dtype = getattr(torch, DTYPES[case.dtype])
        component = component.to(dtype).to_empty(device=case.device)
        generator = torch.Generator().manual_seed(case.seed)
        pool = torch.empty(_POOL).uniform_(-1, 1, generator=generator).to(case.device, dtype)
        with torch.no_grad():
            for name, weight in component.named_parameters():
                if weight.ndim < 2:
                    weight.fill_(1.0 if name.endswith("weight") else 0.0)
                    continue
                flat = weight.view(-1)
                whole = flat.numel() // _POOL * _POOL
                flat[:whole].view(-1, _POOL).copy_(pool.expand(whole // _POOL, _POOL))
                flat[whole:].copy_(pool[: flat.numel() - whole])
                weight.mul_(1.0 / math.sqrt(weight[0].numel()))
            for name, buffer in component.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1], device=case.device).expand(buffer.shape))
        return component

    def _read(self, name: str, weights: Path) -> Any:  # noqa: ANN401
        """One component of a snapshot: safetensors alone, nothing from the network."""
        dtype = getattr(self.torch, DTYPES[self.case.dtype])
        folder = weights if self.config["kind"] == "unconditional" else weights / name
        variant = "fp16" if list(folder.glob("*.fp16.safetensors")) else None
        kind = type(self.components[name])
        component = kind.from_pretrained(
            folder, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
        return component.eval()

    def _scheduler(self) -> Any:  # noqa: ANN401
        import diffusers

        name, changes = SCHEDULERS[self.case.scheduler]
        return getattr(diffusers, name).from_config(self.config["scheduler"] | changes)

    def _noise(self, channels: int, scale: int) -> Any:  # noqa: ANN401
        """The start of every image of a case: drawn on the CPU, so that devices can be compared."""
        torch, case = self.torch, self.case
        shape = (case.batch, channels, case.height // scale, case.width // scale)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
        return noise.to(case.device, getattr(torch, DTYPES[case.dtype]))

    def _unconditional(self) -> Callable[[Callable[[], None]], Any]:
        torch, case = self.torch, self.case
        unet, scheduler, noise = self.components["unet"], self._scheduler(), self._noise(3, 1)

        def loop(mark: Callable[[], None]) -> Any:  # noqa: ANN401
            generator = torch.Generator(case.device).manual_seed(case.seed)
            extra = {} if case.scheduler == "dpmpp-karras" else {"generator": generator}
            scheduler.set_timesteps(case.steps, device=case.device)
            image = noise * scheduler.init_noise_sigma
            mark()
            for step in scheduler.timesteps:
                predicted = unet(scheduler.scale_model_input(image, step), step).sample
                image = scheduler.step(predicted, step, image, **extra).prev_sample
                mark()
            return (image.float() / 2 + 0.5).clamp(0, 1), image

        return loop

    def _text_to_image(self) -> Callable[[Callable[[], None]], Any]:
        import diffusers

        torch, case = self.torch, self.case
        encoder = self.components["text_encoder"]
        pipeline = diffusers.StableDiffusionPipeline(
            vae=self.components["vae"],
            text_encoder=encoder,
            tokenizer=None,
            unet=self.components["unet"],
            scheduler=self._scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(case.seed)
        length, vocabulary = encoder.config.max_position_embeddings, encoder.config.vocab_size
        # The prompt is tokens, with and without words: which words makes no difference to the time.
        tokens = torch.randint(0, vocabulary, (2, length), generator=generator).to(case.device)
        noise = self._noise(4, self.config["scale"])
        guidance = float(self.config["guidance"])

        def loop(mark: Callable[[], None]) -> Any:  # noqa: ANN401
            begun = False
            latents = noise

            def first_step_begins(*_: object) -> None:
                nonlocal begun
                if not begun:
                    begun = True
                    mark()

            def step_ends(_: object, __: int, ___: object, kept: dict[str, Any]) -> dict[str, Any]:
                nonlocal latents
                mark()
                latents = kept["latents"]
                return kept

            prompt, negative = encoder(tokens).last_hidden_state.split(1)
            hook = pipeline.unet.register_forward_pre_hook(first_step_begins)
            try:
                images = pipeline(
                    prompt_embeds=prompt.expand(case.batch, -1, -1),
                    negative_prompt_embeds=negative.expand(case.batch, -1, -1),
                    height=case.height,
                    width=case.width,
                    num_inference_steps=case.steps,
                    guidance_scale=guidance,
                    latents=noise,
                    output_type="pt",
                    callback_on_step_end=step_ends,
                    callback_on_step_end_tensor_inputs=["latents"],
                ).images
            finally:
                hook.remove()
            return images.float(), latents

        return loop
