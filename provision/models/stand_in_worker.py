"""Describes an architecture by its real classes: tensors, full configurations. The environment's interpreter runs it.

Reads {classes, configs, scheduler} in JSON from stdin, as `architectures.Architecture` has them, and prints
{diffusers, components: {name: {config, tensors: {name: shape}}}, scheduler}. No weight is ever in memory.
The shape of a tensor of whole numbers begins with "I64".
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Checkpoints keep the prefix that transformers 5 leaves out; it reads them by either name, older ones by this alone.
_PREFIXES = {
    "CLIPTextModel": ("", "text_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.vision_model."),
}
_VERSIONS = ("_diffusers_version", "transformers_version")


def main() -> int:
    """Describe what stdin names."""
    asked = json.loads(sys.stdin.read())
    json.dump(describe(asked["classes"], asked["configs"], asked["scheduler"]), sys.stdout)
    return 0


def describe(
    classes: dict[str, tuple[str, str]],
    configs: dict[str, dict[str, Any]],
    scheduler: tuple[str, dict[str, Any]] | None,
) -> dict[str, Any]:
    """Return {diffusers, components, scheduler} of an architecture, as the module says."""
    import diffusers

    components = {name: _component(library, kind, configs[name]) for name, (library, kind) in classes.items()}
    settings = None
    if scheduler:
        kind, given = scheduler
        settings = _plain(json.loads(getattr(diffusers, kind).from_config(given).to_json_string()))
    return {"diffusers": diffusers.__version__, "components": components, "scheduler": settings}


def _component(library: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    import torch

    with torch.device("meta"):
        if library == "diffusers":
            import diffusers

            component = getattr(diffusers, kind)(**config)
            told = json.loads(component.to_json_string())
        else:
            made = _class(library, kind)
            component = made(made.config_class(**config))
            component.config.architectures = [kind]
            component.config.dtype = torch.float32  # of the loaded model, where a program names none
            told = json.loads(component.config.to_json_string(use_diff=True))
    tensors = {
        _in_a_checkpoint(kind, name): [*([] if weight.is_floating_point() else ["I64"]), *weight.shape]
        for name, weight in component.state_dict().items()
    }
    return {"config": _plain(told), "tensors": tensors}


def _class(library: str, kind: str) -> Any:  # noqa: ANN401 (a class of a package that has no types here)
    if library == "transformers":
        import transformers

        return getattr(transformers, kind)
    from diffusers import pipelines

    return getattr(getattr(pipelines, library), kind)  # as a pipeline's index names it


def _in_a_checkpoint(kind: str, name: str) -> str:
    short, long = _PREFIXES.get(kind, ("", ""))
    if name.startswith(short) and not name.startswith(long):
        return long + name[len(short) :]
    return name


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the versions of the packages, and without what is private to them."""
    return {name: value for name, value in config.items() if name not in _VERSIONS}


if __name__ == "__main__":
    sys.exit(main())
