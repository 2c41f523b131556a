"""Describes an architecture by its real classes: its tensors and full configurations.

The environment's interpreter runs this file. It reads {classes, configs, scheduler} in JSON from stdin, as in
`architectures.Architecture`, and prints {diffusers, components: {name: {config, tensors: {name: shape}}}, scheduler}.
No weights are in memory. The shape of an integer tensor begins with "I64".
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Checkpoints have a prefix in tensor names that transformers 5 omits. Version 5 reads either name, older versions only
# the one with the prefix.
_PREFIXES = {
    "CLIPTextModel": ("", "text_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.vision_model."),
}
_VERSIONS = ("_diffusers_version", "transformers_version")


def main() -> int:
    """Describe the architecture on stdin."""
    request = json.loads(sys.stdin.read())
    json.dump(describe(request["classes"], request["configs"], request["scheduler"]), sys.stdout)
    return 0


def describe(
    classes: dict[str, tuple[str, str]],
    configs: dict[str, dict[str, Any]],
    scheduler: tuple[str, dict[str, Any]] | None,
) -> dict[str, Any]:
    """Return {diffusers, components, scheduler} of an architecture, as in the module's docstring."""
    import diffusers

    components = {
        name: _component(library, class_name, configs[name]) for name, (library, class_name) in classes.items()
    }
    settings = None
    if scheduler:
        class_name, config = scheduler
        settings = _plain(json.loads(getattr(diffusers, class_name).from_config(config).to_json_string()))
    return {"diffusers": diffusers.__version__, "components": components, "scheduler": settings}


def _component(library: str, class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    import torch

    with torch.device("meta"):
        if library == "diffusers":
            import diffusers

            component = getattr(diffusers, class_name)(**config)
            full_config = json.loads(component.to_json_string())
        else:
            model_class = _class(library, class_name)
            component = model_class(model_class.config_class(**config))
            component.config.architectures = [class_name]
            component.config.dtype = torch.float32  # the dtype of a loaded model if a program requests none
            full_config = json.loads(component.config.to_json_string(use_diff=True))
    tensors = {
        _checkpoint_name(class_name, name): [*([] if weight.is_floating_point() else ["I64"]), *weight.shape]
        for name, weight in component.state_dict().items()
    }
    return {"config": _plain(full_config), "tensors": tensors}


def _class(library: str, class_name: str) -> Any:  # noqa: ANN401 (a class of a package that has no types here)
    if library == "transformers":
        import transformers

        return getattr(transformers, class_name)
    from diffusers import pipelines

    return getattr(getattr(pipelines, library), class_name)  # the name of a module in a pipeline's index


def _checkpoint_name(class_name: str, name: str) -> str:
    omitted, full = _PREFIXES.get(class_name, ("", ""))
    if name.startswith(omitted) and not name.startswith(full):
        return full + name[len(omitted) :]
    return name


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the versions of the packages."""
    return {name: value for name, value in config.items() if name not in _VERSIONS}


if __name__ == "__main__":
    sys.exit(main())
