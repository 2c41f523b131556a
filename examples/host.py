"""Finds the models, the device and the dtype for the examples.

The models are read from the cache only. `provision models pull` downloads them and verifies every file.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

STAND_IN = "stand-in/"
CHECKOUT = Path(__file__).resolve().parent.parent
ROOT = Path(sys.prefix).parent.parent  # if this interpreter belongs to an environment of firstlight, ROOT/envs/NAME

os.environ["HF_HUB_OFFLINE"] = "1"
if (ROOT / ".firstlight" / "volume.json").is_file():
    # The home's cache is usually a link to this one, but a host can be set up without the link.
    hub = ROOT / "cache" / "huggingface" / "hub"
    if hub.is_dir() and not any(map(os.environ.get, ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"))):
        os.environ["HF_HUB_CACHE"] = str(hub)


def find(repo: str) -> str:
    """Return the id of a model, or of its stand-in if only that is present.

    If neither is present, the program ends with the command that pulls the model.

    Args:
        repo: the id of a repository, or a folder.
    """
    stand_in = STAND_IN + repo.rpartition("/")[2]
    for candidate in (repo, stand_in, f"{stand_in}.fp16"):
        if Path(candidate).is_dir() or snapshot(candidate):
            if candidate.startswith(STAND_IN):
                print(f"{candidate} has random weights in place of {repo}: the image is noise.")
            return candidate
    program = CHECKOUT / ".venv" / "bin" / "provision"
    words = [str(program) if program.exists() else "provision", "models", "pull", repo.removeprefix(STAND_IN)]
    words += ["--stand-in"] if repo.startswith(STAND_IN) else []
    words += ["--root", str(ROOT)] if (ROOT / ".firstlight").is_dir() else []
    sys.exit(f"{repo} is not in the cache. To download it: {shlex.join(words)}")


def snapshot(repo: str) -> Path | None:
    """Return the snapshot folder of a model; None if it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        index = try_to_load_from_cache(repo, "model_index.json")
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def load_options(model: str) -> dict[str, Any]:
    """Return the arguments of from_pretrained for the present files.

    They are not empty if only fp16 weights are present.
    """
    folder = Path(model) if Path(model).is_dir() else snapshot(model)
    weights = [file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")] if folder else []
    if not weights or any(".fp16." not in name for name in weights):
        return {}
    has_checker = any(name.startswith("safety_checker/") for name in weights)
    return {"variant": "fp16"} | ({} if has_checker else {"safety_checker": None})


def device(requested: str | None = None) -> str:
    """Return the requested device, else the first available one of cuda, mps and cpu."""
    import torch

    if requested:
        return requested
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def dtype(device: str) -> Any:  # noqa: ANN401 (the type checker has no types of torch)
    """Return float16, or float32 on a CPU without float16 kernels, and print the choice."""
    import torch

    if device == "cpu" and not has_half_kernels(torch):
        print("cpu: no float16 kernels, so float32 is used")
        return torch.float32
    print(f"{device}: float16")
    return torch.float16


def has_half_kernels(torch: Any) -> bool:  # noqa: ANN401 (the type checker has no types of torch)
    """Return whether this CPU has float16 kernels; without them, torch emulates float16, which is many times slower."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())  # noqa: SLF001 (there is no public function)
    except (AttributeError, RuntimeError):
        return False
