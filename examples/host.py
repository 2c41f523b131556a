"""Finds the models, the device and the dtype for the examples.

The models are read from the cache alone: `provision models pull` fetches them, and verifies every byte.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

STAND_IN = "stand-in/"
CHECKOUT = Path(__file__).resolve().parent.parent
ROOT = Path(sys.prefix).parent.parent  # of ROOT/envs/NAME, where this interpreter is an environment of firstlight

os.environ["HF_HUB_OFFLINE"] = "1"
if (ROOT / ".firstlight" / "volume.json").is_file():
    # The home's own cache is a link to this one, unless the host was set up without it.
    hub = ROOT / "cache" / "huggingface" / "hub"
    if hub.is_dir() and not any(map(os.environ.get, ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"))):
        os.environ["HF_HUB_CACHE"] = str(hub)


def find(repo: str) -> str:
    """Return the model, or its stand-in where that alone is here; else end with the command that fetches it.

    Args:
        repo: the id of a repository, or a folder.
    """
    stand_in = STAND_IN + repo.rpartition("/")[2]
    for each in (repo, stand_in, f"{stand_in}.fp16"):
        if Path(each).is_dir() or snapshot(each):
            if each.startswith(STAND_IN):
                print(f"{each} has random weights in place of {repo}: the picture is noise.")
            return each
    program = CHECKOUT / ".venv" / "bin" / "provision"
    words = [str(program) if program.exists() else "provision", "models", "pull", repo.removeprefix(STAND_IN)]
    words += ["--stand-in"] if repo.startswith(STAND_IN) else []
    words += ["--root", str(ROOT)] if (ROOT / ".firstlight").is_dir() else []
    sys.exit(f"{repo} is not here. To get it: {shlex.join(words)}")


def snapshot(repo: str) -> Path | None:
    """Return the folder of a model in the cache; None where it is not here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        index = try_to_load_from_cache(repo, "model_index.json")
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def files(model: str) -> dict[str, Any]:
    """Return what from_pretrained must be told where the lean fp16 files alone are here."""
    folder = Path(model) if Path(model).is_dir() else snapshot(model)
    weights = [file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")] if folder else []
    if not weights or any(".fp16." not in name for name in weights):
        return {}
    has_checker = any(name.startswith("safety_checker/") for name in weights)
    return {"variant": "fp16"} | ({} if has_checker else {"safety_checker": None})


def device(asked: str | None = None) -> str:
    """Return the device that was asked for, else cuda, mps or cpu, whichever is there first."""
    import torch

    if asked:
        return asked
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def dtype(device: str) -> Any:  # noqa: ANN401 (torch's types are not known to the checker)
    """Return float16, or float32 on a CPU that has no kernels for it, and say which."""
    import torch

    if device == "cpu" and not has_half_kernels(torch):
        print("cpu: it has no float16 kernels, so this runs in float32")
        return torch.float32
    print(f"{device}: float16")
    return torch.float16


def has_half_kernels(torch: Any) -> bool:  # noqa: ANN401 (torch's types are not known to the checker)
    """Ask torch whether this CPU computes in float16; without kernels it emulates them, many times slower."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())  # noqa: SLF001 (there is no public question)
    except (AttributeError, RuntimeError):
        return False
