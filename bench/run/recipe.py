"""Renders a case as Python code for the user: diffusers calls with all settings that differ from the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.core import axes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.core.result import Case
    from provision.config.models import ModelSpec

_TEMPLATES = Path(__file__).parent / "templates"


def code(case: Case, manifest: Mapping[str, ModelSpec]) -> str:
    """Return Python code that generates one batch of images with the settings of a case.

    Args:
        case: the case.
        manifest: the entries of models.toml by name; for a model without an entry the code has a placeholder.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,  # noqa: S701 (Python, not HTML; all values are our own data)
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    config = axes.architecture(case.model)
    task = case.task or axes.tasks(case.model)[0]
    scheduler, changes = axes.SCHEDULERS[case.scheduler]
    is_xl = config["kind"].endswith("-xl")
    base = config.get("base")
    unconditional = task == "unconditional"
    classes = ["UNet2DModel"] if unconditional else [axes.PIPELINES[task][is_xl]]
    return environment.get_template("recipe.py.jinja").render(
        case=case,
        task=task,
        unconditional=unconditional,
        xl=is_xl,
        classes=[*classes, *(["ControlNetModel"] if base else []), scheduler],
        scheduler=scheduler,
        changes="".join(f", {name}={value!r}" for name, value in changes.items()),
        model=_entry(case.model, manifest),
        base=_entry(base, manifest) if base else None,
        parts=["unet"] if unconditional else ["pipe.unet", *(["pipe.controlnet"] if base else []), "pipe.vae"],
        kernels=axes.PREFERRED_ATTENTIONS.get(case.attention, ()),
        mode=axes.COMPILES[case.compile],
        dtype=axes.DTYPES[case.dtype],
        takes_image=task in {"image-to-image", "inpainting", "controlnet"},
        strength=axes.STRENGTH,
        guidance=config.get("guidance"),
    )


def _entry(model: str, manifest: Mapping[str, ModelSpec]) -> ModelSpec | None:
    return next((entry for entry in manifest.values() if entry.architecture == model), None)
