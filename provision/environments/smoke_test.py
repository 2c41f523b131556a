"""Runs the smoke test of an environment: import torch and diffusers, and compute one denoising step."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

from provision.core import child_environment, layout, process
from provision.core.errors import FirstlightError
from provision.core.step import Check, State
from provision.fs import records
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from provision.core.layout import Root

SCHEMA = 1
_SECONDS = 900  # the timeout; measured: 190 s with a cold disk and two other busy processes
_PROGRAM = """
import json, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
import diffusers
from diffusers import DDPMScheduler, UNet2DModel
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
unet = UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(32, 32), norm_num_groups=8,
                   down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).to(device).eval()
scheduler = DDPMScheduler()
scheduler.set_timesteps(10)
image = torch.randn(1, 3, 8, 8, device=device)
with torch.inference_mode():
    noise = unet(image, scheduler.timesteps[0]).sample
    image = scheduler.step(noise, scheduler.timesteps[0], image).prev_sample
print(json.dumps({"torch": torch.__version__, "diffusers": diffusers.__version__, "device": device,
                  "finite": bool(image.isfinite().all()), "import_torch_seconds": imported - started,
                  "seconds": time.perf_counter() - started}))
"""


class SmokeStep:
    """Runs the smoke test if the environment has changed since the last smoke test; a deep check always runs it."""

    name = "smoke"
    essential = False
    local = True

    def __init__(self, root: Root, env: str) -> None:
        """Store the root and the prefix of the environment with the name `env`."""
        self.root = root
        self.prefix = root.prefix(env)

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        return "import torch and diffusers in the environment and run one denoising step"

    def check(self, *, deep: bool = False) -> Check:
        """Check the stored result of the smoke test; with `deep`, run the smoke test and check its result.

        The state is drifted if there is no result, or if the environment has changed since then.
        """
        identity = self._identity()
        if identity is None:
            return Check(State.DRIFTED, "the environment is not ready yet")
        if deep:
            return self._judge(self._run())
        try:
            stored = records.read_state(self.root.smoke)
        except (OSError, ValueError):
            return Check(State.DRIFTED, "the smoke test has not run yet")
        if stored.get("identity") != identity:
            return Check(State.DRIFTED, "the environment has changed since the last smoke test")
        try:
            return self._judge(stored)
        except (KeyError, ValueError):
            return Check(State.DRIFTED, f"{self.root.smoke} cannot be read")

    def apply(self) -> None:
        """Run the smoke test, and store the result in the root.

        Raises:
            FirstlightError: the environment has no Python, or the smoke test fails.
        """
        if self._identity() is None:
            raise FirstlightError(
                f"{self.prefix} has no usable Python, so the smoke test cannot run. "
                f"Run `{layout.next_command('setup')}`."
            )
        result = self._run()
        stored = {"schema": SCHEMA, "identity": self._identity()} | result
        write_atomic(self.root.smoke, json.dumps(stored, indent=1) + "\n")

    def _identity(self) -> str | None:
        """Return a digest that changes when the environment is rebuilt or a package is reinstalled.

        It is a hash of the inodes and times of the interpreter and the .dist-info folders. The site-packages folder
        itself is left out, because it also changes when Python writes bytecode. None if the environment has no Python.
        """
        python = layout.interpreter(self.prefix)
        try:
            sites = [*self.prefix.glob("lib/python3*/site-packages"), *self.prefix.glob("Lib/site-packages")]
            records = sorted(info for site in sites for info in site.glob("*.dist-info"))
            stats = [python.lstat(), python.stat(), *(record.stat() for record in records)]
        except OSError:
            return None
        digest = hashlib.sha256(repr([(stat.st_ino, stat.st_mtime_ns) for stat in stats]).encode())
        return digest.hexdigest()

    def _run(self) -> dict[str, object]:
        # The first import also writes the bytecode, so that every later start is three times faster.
        # With -I, Python imports no module from the current folder.
        environment = child_environment.child(os.environ)
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.root.hub_in_use)}
        python = layout.interpreter(self.prefix)
        completed = process.run([python, "-I", "-c", _PROGRAM], env=environment, timeout_seconds=_SECONDS, check=False)
        if completed.returncode != 0:
            last_line = completed.tail(1) or f"exit {completed.returncode}"
            verify = layout.next_command("verify")
            raise FirstlightError(
                f"{python} cannot run a denoising step: {last_line}. To check the packages, run `{verify}`."
            )
        try:
            result = json.loads(completed.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            raise FirstlightError(f"{python} printed no result:\n{completed.tail()}") from None
        return dict(result)

    def _judge(self, result: dict[str, object]) -> Check:
        detail = "torch {torch}, diffusers {diffusers}: one denoising step on {device}".format(**result)
        if result["finite"] is not True:
            verify = layout.next_command("verify")
            return Check(
                State.BLOCKED,
                f"{detail} returned values that are not finite. To check the packages, run `{verify}`.",
            )
        return Check(State.OK, f"{detail} in {float(str(result['seconds'])):.1f} s")
