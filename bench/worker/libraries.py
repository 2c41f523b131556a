"""Import the libraries of a case before its request arrives, and report their versions."""

from __future__ import annotations

import contextlib
import platform
import time
from typing import TYPE_CHECKING, Any

from bench.core.axes import PIPELINES
from bench.core.worker_events import PhaseEntered
from bench.core.worker_requests import WAITING
from bench.worker import components

if TYPE_CHECKING:
    from bench.core.result import Case
    from bench.core.worker_events import Emit


def prepare(emit: Emit) -> float:
    """Import the libraries of a case, then announce that the worker waits; return the seconds of the imports.

    The device is not used, so the worker takes no memory of a GPU while it waits.
    """
    began = time.perf_counter()
    emit(PhaseEntered("imports"))
    with contextlib.suppress(Exception):  # the case imports them again, fails in the same way and reports the reason
        _import_classes()
    seconds = time.perf_counter() - began
    emit(PhaseEntered(WAITING))
    return seconds


def _import_classes() -> None:
    """Import torch, and the classes of diffusers and transformers that the cases of most suites use."""
    import diffusers
    import transformers

    for name in ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL", *PIPELINES["text-to-image"]):
        getattr(diffusers, name)  # diffusers imports a class when it is first read
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        getattr(transformers, name)


def software(torch: Any, diffusers: Any, case: Case) -> dict[str, str]:
    """Return {name: version} of Python, torch and diffusers.

    On a GPU also its CUDA version, its name and its use of TF32.
    """
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if case.device.startswith("cuda"):
        versions["cuda"] = str(torch.version.cuda)
        versions["device"] = torch.cuda.get_device_name(case.device)
        versions["tf32"] = components.tf32_in_use(torch)
    return versions
