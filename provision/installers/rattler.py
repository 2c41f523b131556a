"""The parent's side of rattler: which mirror serves a channel, and one worker process a request."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import child_environment, process
from provision.core.errors import BlockedError, FirstlightError
from provision.core.redact import redact
from provision.installers.conda_settings import served
from provision.lockfiles.conda_lock import CondaPackage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_ANSWER_SECONDS = 5
# Isolated, a python looks for a module neither in the current folder nor where PYTHONPATH says.
_LAUNCH = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
runpy.run_module("provision.installers.rattler_worker", run_name="__main__")
"""
_NO_SPACE = re.compile(r"os error 28|No space left|os error 122")


def unreachable(packages: Sequence[CondaPackage], mirrored: Mapping[str, str]) -> str | None:
    """Why packages cannot be fetched, asked with one of them; None when they can."""
    import requests

    if not packages:
        return None
    url = served(min(packages, key=lambda package: package.url).url, mirrored)
    try:
        # Some mirrors refuse HEAD; of the body nothing is read.
        with requests.get(url, timeout=_ANSWER_SECONDS, stream=True) as answer:
            return None if answer.ok else f"{redact(url)} answers {answer.status_code}"
    except requests.RequestException as error:
        return f"{redact(url)} does not answer ({type(error).__name__})"


def not_cached(packages: Iterable[CondaPackage], pkgs: Path) -> list[CondaPackage]:
    """The packages that are not unpacked in the package cache."""
    absent = []
    for package in packages:
        stem = package.url.rpartition("/")[2].removesuffix(".conda").removesuffix(".tar.bz2")
        if not (pkgs / stem / "info" / "index.json").exists():
            absent.append(package)
    return absent


def install(
    lock: Path,
    platform: str,
    prefix: Path,
    pkgs: Path,
    mirrored: Mapping[str, str],
    *,
    final: Path,
    specs: Sequence[str] = (),
    reinstall: Iterable[str] = (),
    kept: Iterable[str] = (),
    full: bool = False,
) -> None:
    """Make `prefix` hold exactly the conda packages of a lock, every one checked against its sha256.

    Args:
        lock: a conda-lock.yml.
        platform: conda's name of it.
        prefix: where the files are put.
        pkgs: the package cache; on the prefix's file system its files are hard-linked.
        mirrored: as `mirrors` returns it.
        final: what the files call the prefix, where it will be renamed.
        specs: what was asked for, for conda's own record.
        reinstall: packages whose files are put anew.
        kept: packages that are not in the lock and stay nevertheless.
        full: hash what is cached before it is used.

    Raises:
        BlockedError: no space is left.
        FirstlightError: a package could not be had, or is not what the lock says.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    pkgs.mkdir(parents=True, exist_ok=True)
    _ask(
        {
            "action": "install",
            "lock": str(lock),
            "platform": platform,
            "prefix": str(prefix),
            "final": str(final),
            "pkgs": str(pkgs),
            "mirrors": dict(mirrored),
            "specs": list(specs),
            "reinstall": sorted(reinstall),
            "kept": sorted(kept),
            "full": full,
        },
        final,
    )


def solve(
    specs: Sequence[str],
    channels: Sequence[str],
    platform: str,
    virtual: Sequence[str],
    mirrored: Mapping[str, str],
    cache: Path,
) -> list[CondaPackage]:
    """Solve specs for one platform; the addresses are the channels' own, whatever mirror was asked.

    Raises:
        FirstlightError: a channel does not answer, or there is no solution.
    """
    request = {
        "action": "solve",
        "specs": list(specs),
        "channels": list(channels),
        "platform": platform,
        "virtual": list(virtual),
        "mirrors": dict(mirrored),
        "cache": str(cache),
    }
    try:
        return [CondaPackage(**row) for row in _ask(request, cache)["packages"]]
    except FirstlightError as error:
        lines = str(error).splitlines()
        if not any("error sending request" in line for line in lines):
            raise
        raise FirstlightError(
            f"{lines[1].removeprefix('Caused by: ') if len(lines) > 1 else lines[0]}: {lines[-1]}. Name a mirror "
            "(channel_alias in ~/.condarc, or CONDA_CHANNEL_ALIAS), or leave conda's part as it is: --keep-conda."
        ) from None


def _ask(request: Mapping[str, object], where: Path) -> dict[str, Any]:
    """Run one request. Only the answer's file counts: the worker may crash once it is written."""
    with tempfile.TemporaryDirectory(prefix="firstlight-") as scratch:
        answer_file = Path(scratch) / "answer.json"
        text = json.dumps({**request, "answer": str(answer_file)})
        # The relay listens on loopback: no proxy leads there.
        spared = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
        environment = child_environment.child(os.environ) | {"no_proxy": spared, "NO_PROXY": spared}
        argv = [sys.executable, "-I", "-c", _LAUNCH, str(Path(__file__).resolve().parent.parent.parent)]
        done = process.run(argv, env=environment, stdin=text, check=False)
        try:
            answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise FirstlightError(f"rattler ended without an answer (exit {done.returncode}):\n{done.tail()}") from None
    if "error" not in answer:
        return answer
    message = redact(str(answer["error"]))
    if _NO_SPACE.search(message):
        raise BlockedError(f"{where}: no space left. Free some, or give another --root, then run again.")
    raise FirstlightError(f"conda packages: {message}")
