"""Makes the two environments of the checks from a folder of wheels: one for `bench`, one that it measures."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
# The wheels that the measured interpreter needs beside the machine's own torch; all others are for `bench` itself.
_MEASURED = ("diffusers", "transformers", "accelerate", "safetensors", "importlib_metadata", "zipp")


def make_environments(base: Path, wheels: Path, folder: Path) -> tuple[Path, Path]:
    """Return the interpreters of `bench` and of the measured environment; nothing is downloaded.

    Both see the packages of the machine's own interpreter, such as torch, after their own.

    Args:
        base: the interpreter that has torch.
        wheels: the folder of wheels.
        folder: the place of both environments.

    Raises:
        subprocess.CalledProcessError: a wheel does not fit, or the interpreter has no pip.
    """
    files = sorted(wheels.glob("*.whl"))
    measured = [file for file in files if file.name.startswith(_MEASURED)]
    own = [file for file in files if file not in measured]
    packages = _output(base, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    return (
        _make(base, folder / "own", own, [str(CHECKOUT), packages]),
        _make(base, folder / "measured", measured, [packages]),
    )


def _make(base: Path, folder: Path, wheels: list[Path], paths: list[str]) -> Path:
    _output(base, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    packages = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    if wheels:
        options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(packages))
        _output(base, "-m", "pip", "install", *options, *map(str, wheels))
    (packages / "firstlight-checks.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return python


def _output(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def toolbox_python() -> Path:
    """Return the interpreter of the checkout's toolbox, which `make` installs."""
    return CHECKOUT / ".venv" / ("Scripts" if sysconfig.get_platform().startswith("win") else "bin") / "python"
