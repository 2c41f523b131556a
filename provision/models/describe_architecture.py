"""Describes an architecture: the names and shapes of all its tensors, and the full configurations of its components.

The interpreter of an environment with diffusers runs this file as a script. The script makes each component from its
real class on torch's device "meta", so no weights are in memory. A stand-in is built from the output.

Input on stdin, in JSON: {"classes", "configs", "scheduler"}, as in `architectures.Architecture`.
Output on stdout, in JSON:
    "diffusers": the version of diffusers.
    "components": {component: {"config": its full configuration, "tensors": {name: shape}}}. The shape is a list of
        sizes; for an integer tensor, "I64" comes before the sizes.
    "scheduler": its full settings, or null.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# {class: (prefix of tensor names in transformers 5, prefix in checkpoints)}. transformers 5 loads tensors under either
# name, older versions only under the name in checkpoints. So stand-ins have the names of checkpoints.
_PREFIXES = {
    "CLIPTextModel": ("", "text_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.vision_model."),
}
_VERSIONS = ("_diffusers_version", "transformers_version")


def main() -> int:
    """Read the input from stdin, and write the description to stdout; return the exit code 0."""
    request = json.loads(sys.stdin.read())
    json.dump(describe(request["classes"], request["configs"], request["scheduler"]), sys.stdout)
    return 0


def describe(
    classes: dict[str, tuple[str, str]],
    configs: dict[str, dict[str, Any]],
    scheduler: tuple[str, dict[str, Any]] | None,
) -> dict[str, Any]:
    """Return the description of an architecture: the output in the module's docstring.

    Args:
        classes: {component: (library, name of its class)}.
        configs: {component: its configuration}.
        scheduler: (name of its class, settings), or None.
    """
    import diffusers

    components = {
        name: _describe_component(library, class_name, configs[name]) for name, (library, class_name) in classes.items()
    }
    settings = None
    if scheduler:
        class_name, config = scheduler
        settings = _without_versions(json.loads(getattr(diffusers, class_name).from_config(config).to_json_string()))
    return {"diffusers": diffusers.__version__, "components": components, "scheduler": settings}


def _describe_component(library: str, class_name: str, config: dict[str, Any]) -> dict[str, Any]:
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
            component.config.dtype = torch.float32  # the dtype with which a program that names no dtype loads the model
            full_config = json.loads(component.config.to_json_string(use_diff=True))
    tensors = {
        _checkpoint_name(class_name, name): [*([] if weight.is_floating_point() else ["I64"]), *weight.shape]
        for name, weight in component.state_dict().items()
    }
    return {"config": _without_versions(full_config), "tensors": tensors}


def _class(library: str, class_name: str) -> Any:  # noqa: ANN401 (a class of a package that has no types here)
    if library == "transformers":
        import transformers

        return getattr(transformers, class_name)
    from diffusers import pipelines

    # Here `library` is a module of diffusers.pipelines, as in model_index.json.
    return getattr(getattr(pipelines, library), class_name)


def _checkpoint_name(class_name: str, name: str) -> str:
    """Return the name of a tensor in checkpoints, for its name in the installed transformers."""
    omitted, full = _PREFIXES.get(class_name, ("", ""))
    if name.startswith(omitted) and not name.startswith(full):
        return full + name[len(omitted) :]
    return name


def _without_versions(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the versions of diffusers and transformers."""
    return {name: value for name, value in config.items() if name not in _VERSIONS}


if __name__ == "__main__":
    sys.exit(main())
