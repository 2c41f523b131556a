"""The proof that the environment works: torch and diffusers import, and one denoising step is finite."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

from provision.core import child_environment, layout, process
from provision.core.errors import FirstlightError
from provision.core.step import Check, State
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from provision.core.layout import Root

SCHEMA = 1
_SECONDS = 900  # a cold disk and two busy neighbours took 190 s
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
    """One denoising step ran in exactly this environment; a deep check runs it again."""

    name = "smoke"
    essential = False
    local = True

    def __init__(self, root: Root, env: str) -> None:
        """Take the root and the environment's name."""
        self.root = root
        self.prefix = root.prefix(env)

    def describe(self) -> str:
        """The plan's line."""
        return "import torch and diffusers in the environment and run one denoising step"

    def check(self, *, deep: bool = False) -> Check:
        """Look whether the kept result is of the environment as it stands now; `deep` runs it anew."""
        identity = self._identity()
        if identity is None:
            return Check(State.DRIFTED, "waits for the environment")
        if deep:
            return self._judge(self._run())
        try:
            kept = json.loads(self.root.smoke.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Check(State.DRIFTED, "has not run yet")
        if not isinstance(kept, dict) or kept.get("identity") != identity:
            return Check(State.DRIFTED, "the environment has changed since it ran")
        try:
            return self._judge(kept)
        except (KeyError, ValueError):
            return Check(State.DRIFTED, f"{self.root.smoke} cannot be read")

    def apply(self) -> None:
        """Run it and keep the result."""
        if self._identity() is None:
            raise FirstlightError(f"{self.prefix} has no python that runs, so nothing could be tried in it.")
        found = self._run()
        result = {"schema": SCHEMA, "identity": self._identity()} | found
        write_atomic(self.root.smoke, json.dumps(result, indent=1) + "\n")

    def _identity(self) -> str | None:
        """What changes when the environment is built anew, or a package in it: the interpreter, the packages' records.

        The folder of the packages itself also changes when a program compiles a module in it.
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
        # The bytecode that this first import compiles is what makes every later start three times faster.
        # What it imports must be the environment's own: nothing of the current folder.
        environment = child_environment.child(os.environ)
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.root.hub_in_use)}
        python = layout.interpreter(self.prefix)
        done = process.run([python, "-I", "-c", _PROGRAM], env=environment, timeout_seconds=_SECONDS, check=False)
        if done.returncode != 0:
            last = done.tail(1) or f"exit {done.returncode}"
            verify = layout.next_command("verify")
            raise FirstlightError(f"{python} cannot run a denoising step: {last}. Run `{verify}`.")
        try:
            result = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            raise FirstlightError(f"{python} printed no result:\n{done.tail()}") from None
        return dict(result)

    def _judge(self, result: dict[str, object]) -> Check:
        detail = "torch {torch}, diffusers {diffusers}: one denoising step on {device}".format(**result)
        if result["finite"] is not True:
            verify = layout.next_command("verify")
            return Check(State.BLOCKED, f"{detail} gave numbers that are not finite. Run `{verify}`.")
        return Check(State.OK, f"{detail} in {float(str(result['seconds'])):.1f} s")
