"""Generate the images of a case, by a sampling loop in this module or by a pipeline of diffusers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.core.axes import COMPILES, PIPELINES, STRENGTH
from bench.core.errors import SkipError
from bench.worker import attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.worker.components import Model

if TYPE_CHECKING:
    Mark = Callable[[], None]


class Images(NamedTuple):
    """Hold one batch of images.

    `pixels`: floats in [0, 1] of shape (batch, 3, height, width). `raw`: the pixels before clamping, or the latents
    that they were decoded from.
    """

    pixels: Any
    raw: Any


class Loop:
    """Generate one batch of images after another, all equal.

    `parts`: {name: (object, name of its function)} of the components that `timing.PhaseTimer` times. `notes`: how the
    loop differs from the settings of its case.
    """

    def __init__(self, model: Model) -> None:
        """Prepare what all images share: settings, scheduler and initial noise.

        Raises:
            SkipError: a setting is not available on this device.
        """
        self.model = model
        self.scheduler = model.scheduler()
        self.parts: dict[str, tuple[Any, str]] = {
            name: (component, "forward") for name, component in model.components.items() if name != "vae"
        }
        self.parts["scheduler"] = (self.scheduler, "step")
        _apply_settings(model)
        self._kernels, self.notes = attention.choose_kernels(model)
        unconditional = model.task == "unconditional"
        self._image = _written_out(self) if unconditional else _by_pipeline(self)

    def __call__(self, mark: Mark) -> Images:
        """Generate one batch of images.

        Args:
            mark: called when the first evaluation begins, and after each step.
        """
        with attention.prefer(self._kernels):
            return self._image(mark)


def _apply_settings(model: Model) -> None:
    """Apply the case's settings of attention, compilation and VAE."""
    case, components = model.case, model.components
    if case.offload != "none" and (model.task == "unconditional" or not case.device.startswith("cuda")):
        raise SkipError(f"offload {case.offload}: only a pipeline on a CUDA device supports offloading")
    attention.set_processors(model)
    for name in ("unet", "controlnet"):
        mode = COMPILES[case.compile]
        if name in components and mode is not None:
            # The function is compiled and not the module, so hooks on the module stay outside of the compiled code.
            components[name].forward = model.torch.compile(components[name].forward, mode=mode)
    if case.vae != "whole":
        if "vae" not in components:
            raise SkipError(f"vae {case.vae}: {case.model} has no VAE")
        if case.vae == "slicing":
            components["vae"].enable_slicing()
        else:
            components["vae"].enable_tiling()


def _written_out(loop: Loop) -> Callable[[Mark], Images]:
    """Return a function that makes an image with the loop of diffusers' tutorials: a UNet2DModel and a scheduler."""
    model, scheduler = loop.model, loop.scheduler
    torch, case = model.torch, model.case
    unet, noise = model.components["unet"], model.noise(3)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def image(mark: Mark) -> Images:
        generator = torch.Generator(case.device).manual_seed(case.seed)
        extra = {"generator": generator} if takes_generator else {}
        scheduler.set_timesteps(case.steps, device=case.device)
        sample = noise * scheduler.init_noise_sigma
        mark()
        for step in scheduler.timesteps:
            predicted = unet(scheduler.scale_model_input(sample, step), step).sample
            sample = scheduler.step(predicted, step, sample, **extra).prev_sample.to(noise.dtype)
            mark()
        return Images((sample.float() / 2 + 0.5).clamp(0, 1), sample)

    return image


def _by_pipeline(loop: Loop) -> Callable[[Mark], Images]:
    """Return a function that makes an image with the diffusers pipeline of the task.

    The prompt is random tokens, since the text of a prompt does not change the time.
    """
    model = loop.model
    torch, case = model.torch, model.case
    pipeline = _pipeline(loop)
    loop.parts["vae decode"] = (pipeline.vae, "decode")
    if model.task in {"image-to-image", "inpainting"}:
        loop.parts["vae encode"] = (pipeline.vae, "encode")
    encoders = [(name, component) for name, component in model.components.items() if name.startswith("text_encoder")]
    generator_of_inputs = torch.Generator().manual_seed(case.seed)
    tokens = {}
    for name, encoder in encoders:
        shape = (2, encoder.config.max_position_embeddings)
        tokens[name] = torch.randint(0, encoder.config.vocab_size, shape, generator=generator_of_inputs).to(case.device)
    inputs = _inputs(model, generator_of_inputs)
    options = {
        "guidance_scale": float(model.config["guidance"]),
        "num_inference_steps": case.steps,
        "output_type": "pt",
        "callback_on_step_end_tensor_inputs": ["latents"],
    }

    def prompt() -> dict[str, Any]:
        if len(encoders) == 1:
            ((name, encoder),) = encoders
            states = encoder(tokens[name]).last_hidden_state
            return _pairs(case.batch, prompt_embeds=states)
        outputs = [encoder(tokens[name], output_hidden_states=True) for name, encoder in encoders]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return _pairs(case.batch, prompt_embeds=states, pooled_prompt_embeds=outputs[-1].text_embeds)

    def image(mark: Mark) -> Images:
        begun = False
        latents = None

        def first_step_begins(*_: object) -> None:
            nonlocal begun
            if not begun:
                begun = True
                mark()

        def step_ends(_: object, __: int, ___: object, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal latents
            mark()
            latents = tensors["latents"]
            return tensors

        first = model.components["controlnet"] if model.task == "controlnet" else pipeline.unet
        hook = first.register_forward_pre_hook(first_step_begins)
        generator = torch.Generator(case.device).manual_seed(case.seed)
        try:
            images = pipeline(
                **prompt(), **inputs, **options, generator=generator, callback_on_step_end=step_ends
            ).images
        finally:
            hook.remove()
        return Images(images.float(), latents)

    return image


def _pipeline(loop: Loop) -> Any:
    import diffusers

    model = loop.model
    is_xl = "text_encoder_2" in model.components
    kind = getattr(diffusers, PIPELINES[model.task][is_xl])
    tokenizers: dict[str, None] = {"tokenizer": None, "tokenizer_2": None} if is_xl else {"tokenizer": None}
    rest: dict[str, Any] = {"add_watermarker": False} if is_xl else {"safety_checker": None}
    if not is_xl:
        rest |= {"feature_extractor": None, "requires_safety_checker": False}
    pipeline = kind(**model.components, **tokenizers, **rest, scheduler=loop.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if model.case.offload == "model":
        pipeline.enable_model_cpu_offload(device=model.case.device)
    elif model.case.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=model.case.device)
    return pipeline


def _inputs(model: Model, generator: Any) -> dict[str, Any]:
    """Return the arguments of the pipeline besides the prompt: the initial noise, or an image and a mask."""
    torch, case = model.torch, model.case
    size = {"height": case.height, "width": case.width}
    if model.task == "text-to-image":
        return {**size, "latents": model.noise(4)}
    image = torch.rand((case.batch, 3, case.height, case.width), generator=generator)
    if model.task == "image-to-image":
        return {"image": image, "strength": STRENGTH}
    if model.task == "inpainting":
        mask = torch.zeros(case.batch, 1, case.height, case.width)
        mask[:, :, case.height // 4 : -case.height // 4, case.width // 4 : -case.width // 4] = 1.0
        return {**size, "image": image, "mask_image": mask, "latents": model.noise(4)}
    return {**size, "image": image, "latents": model.noise(4)}


def _pairs(batch: int, **states: Any) -> dict[str, Any]:
    """Return the prompt arguments of the pipeline for a whole batch.

    Args:
        batch: the number of images.
        states: {name: a tensor whose two rows are the states of the prompt and of the negative prompt}.
    """
    arguments = {}
    for name, both in states.items():
        rest = (1,) * (both.ndim - 1)
        arguments[name], arguments[f"negative_{name}"] = (one.repeat(batch, *rest) for one in both.split(1))
    return arguments
