"""Runs worker code in this process: a whole case for a debugger, or one warm case for the pytest fixture."""

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

    from bench.core.protocol import Request
    from bench.core.result import Case, Result
    from bench.worker.sampling import Images

_WHERE = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_path('purelib'))"


def run_here(request: Request, python: Path) -> Result:
    """Run one case in this very process, for a debugger: nothing is watched, nothing is limited.

    Args:
        request: what to measure.
        python: the interpreter whose packages are taken; it has to be of this process's version.

    Raises:
        BlockedError: it is of another version, or does not start.
    """
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    done = process.run([python, "-c", _WHERE], timeout_seconds=60, check=False)
    version, _, packages = done.stdout.strip().partition(" ")
    if done.returncode or version != mine:
        remedy = f"Make the toolbox with that one: rm -r .venv, then make setup PYTHON={python}"
        if layout.is_packaged():
            remedy = "Install firstlight under that version, or leave out --in-process."
        raise BlockedError(
            f"--in-process takes the packages of {python} into this process, and it is {version or '?'}, this is "
            f"{mine}. {remedy}"
        )
    if packages not in sys.path:
        sys.path.append(packages)  # behind our own: of what both have, ours is loaded already
    from bench.worker import measurement

    return measurement.measure(request, lambda _: None)


def find_device(name: str) -> str:
    """Return the device that "auto" or "cuda" means for this process's torch; any other name is returned unchanged.

    Raises:
        BlockedError: torch does not see the card.
    """
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda:0" if cards else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = "cuda:0"
    if name.startswith("cuda:") and int(name.partition(":")[2]) >= cards:
        raise BlockedError(f"there is no {name}: torch sees {cards} cards")
    return name


@contextlib.contextmanager
def settings_of(case: Case) -> Iterator[None]:
    """Set torch's precision and threads as the case has them, and restore both afterwards."""
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
    """One case in this very process: called, it makes a batch of images and waits until the device has done so."""

    def __init__(self, case: Case, weights: Mapping[str, str]) -> None:
        """Build the model, give it its weights, and make a first batch: kernels are chosen, caches are warm.

        Args:
            case: what is made.
            weights: {architecture: snapshot folder}; empty: seeded random ones.
        """
        import torch

        from bench.worker import clocks, components, sampling
        from bench.worker import memory as device_memory

        self.case = case
        self.weights = "real" if weights else "random"
        self._torch, self._synchronize = torch, clocks.synchronize
        with torch.no_grad():
            model = components.Model(torch, case)
            self.flops = model.flops()
            model.load({name: Path(folder) for name, folder in weights.items()})
            self._loop = sampling.Loop(model)
        self.unet = model.components["unet"]
        self()
        self._memory = device_memory.Peaks(torch, case.device)

    def __call__(self) -> Images:
        """Make a batch of images."""
        with self._torch.no_grad():
            images = self._loop(lambda: None)
            self._synchronize(self._torch, self.case.device)
        return images

    def extra_info(self) -> dict[str, Any]:
        """What belongs beside its times: the case, FLOPs, and the memory since it was ready."""
        self._memory.pause()
        memory = {name: value for name, value in asdict(self._memory.memory()).items() if value is not None}
        work = {"flops_per_step": self.flops.step, "flops_per_batch": self.flops.batch, "weights": self.weights}
        return {"case": asdict(self.case), **work, **memory}
