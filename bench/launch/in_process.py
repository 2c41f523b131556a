"""Runs a case in this process instead of a worker: `bench run --in-process` for a debugger, and the pytest fixture."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import layout, process
from provision.core.errors import BlockedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bench.core.result import Case, Result
    from bench.core.worker_requests import CaseRequest
    from bench.worker.sampling import Images

_LOCATE_PACKAGES = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]  # no module of the working folder takes the place of another
import sysconfig
print('%d.%d' % sys.version_info[:2], sysconfig.get_path('purelib'))
"""


def run_in_process(request: CaseRequest, python: Path) -> Result:
    """Run one case in this process, so that a debugger can stop in it; without a monitor and without a time limit.

    Args:
        request: the case to measure.
        python: the interpreter whose packages are loaded; its version must be that of this process.

    Raises:
        BlockedError: the interpreter has another version, or does not start.
    """
    own_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    process_result = process.run([python, "-c", _LOCATE_PACKAGES], timeout_seconds=60, check=False)
    version, _, packages = process_result.stdout.strip().partition(" ")
    if process_result.returncode or version != own_version:
        remedy = f"Build .venv anew with that interpreter: rm -r .venv, then make setup PYTHON={python}"
        if layout.is_packaged():
            remedy = "Install firstlight with an interpreter of that version, or omit --in-process."
        raise BlockedError(
            f"--in-process loads the packages of {python} into this process. That interpreter is Python "
            f"{version or '?'}, but this process is Python {own_version}. {remedy}"
        )
    if packages not in sys.path:
        sys.path.append(packages)  # last: of packages that both have, this process has loaded its own version
    from bench.worker import measurement

    return measurement.measure(request, lambda _: None)


def find_device(name: str) -> str:
    """Return the device that "auto" or "cuda" means for the torch of this process.

    Any other name is returned unchanged.

    Raises:
        BlockedError: torch does not list the GPU of this name.
    """
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda:0" if cards else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = "cuda:0"
    if name.startswith("cuda:") and int(name.partition(":")[2]) >= cards:
        raise BlockedError(
            f"torch does not list {name}, and the number of GPUs that it lists is {cards}. Run `nvidia-smi`."
        )
    return name


@contextlib.contextmanager
def torch_settings(case: Case) -> Iterator[None]:
    """Set torch's fp32 precision and its number of threads to those of the case.

    Restore the former values at the end.
    """
    import torch

    from bench.worker import components

    threads = torch.get_num_threads()
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    components.set_precision(torch, case.dtype)
    try:
        if case.threads:
            torch.set_num_threads(case.threads)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class DiffusionCase:
    """Hold one loaded case in this process. A call generates one batch of images and waits until the device is idle."""

    def __init__(self, case: Case, weights: Mapping[str, str]) -> None:
        """Build the model, load its weights, and generate a first batch. This selects the kernels and fills the caches.

        Args:
            case: the case to run.
            weights: {architecture: snapshot folder}; empty for seeded random weights.
        """
        import torch

        from bench.worker import components, device_timers, sampling
        from bench.worker import memory as device_memory

        self.case = case
        self.weights = "real" if weights else "random"
        self._torch, self._synchronize = torch, device_timers.synchronize
        with torch.no_grad():
            model = components.Model(torch, case)
            self.flops = model.flops()
            model.load({name: Path(folder) for name, folder in weights.items()})
            self._loop = sampling.Loop(model)
        self.unet = model.components["unet"]
        self()
        self._memory = device_memory.Peaks(torch, case.device)

    def __call__(self) -> Images:
        """Generate one batch of images, and wait until the device is idle."""
        with self._torch.no_grad():
            images = self._loop(lambda: None)
            self._synchronize(self._torch, self.case.device)
        return images

    def extra_info(self) -> dict[str, Any]:
        """Return what is stored beside the times of pytest-benchmark.

        These are the case, its FLOPs, and the memory peaks since the first batch.
        """
        self._memory.pause()
        memory = {name: value for name, value in asdict(self._memory.memory()).items() if value is not None}
        work = {"flops_per_step": self.flops.step, "flops_per_batch": self.flops.batch, "weights": self.weights}
        return {"case": asdict(self.case), **work, **memory}
