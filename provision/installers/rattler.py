"""Installs and solves conda packages with the library rattler, in one worker process for each request."""

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
from provision.installers.conda_settings import mirror_url
from provision.lockfiles.conda_lock import CondaPackage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_TIMEOUT_SECONDS = 5  # to connect to a channel, and to read from it
# With -I, Python ignores the current folder and PYTHONPATH. So the folder with the package `provision` is an argument.
_LAUNCH = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
runpy.run_module("provision.installers.rattler_worker", run_name="__main__")
"""
_NO_SPACE = re.compile(r"os error 28|No space left|os error 122")


def unreachable(packages: Sequence[CondaPackage], mirrored: Mapping[str, str]) -> str | None:
    """Request one of the packages, and return, as text, why it cannot be downloaded; None if it can.

    Args:
        packages: the packages; no request is made if there are none.
        mirrored: {official URL of a channel: URL of its mirror}.
    """
    import requests

    if not packages:
        return None
    url = mirror_url(min(packages, key=lambda package: package.url).url, mirrored)
    try:
        # A GET request whose body is not read, since some mirrors reject HEAD.
        with requests.get(url, timeout=_TIMEOUT_SECONDS, stream=True) as response:
            return None if response.ok else f"{redact(url)} answers {response.status_code}"
    except requests.RequestException as error:
        return f"{redact(url)} does not answer ({type(error).__name__})"


def not_cached(packages: Iterable[CondaPackage], pkgs: Path) -> list[CondaPackage]:
    """Return the packages that are missing in the package cache `pkgs`, where packages are unpacked."""
    missing = []
    for package in packages:
        stem = package.url.rpartition("/")[2].removesuffix(".conda").removesuffix(".tar.bz2")
        if not (pkgs / stem / "info" / "index.json").exists():
            missing.append(package)
    return missing


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
    """Install exactly the conda packages of a lock file into a prefix, and verify the sha256 of each package.

    Args:
        lock: the path of a conda-lock.yml.
        platform: conda's name of the platform.
        prefix: the folder into which the files are written.
        pkgs: the package cache; its files are hard-linked if the prefix is on the same file system.
        mirrored: {official URL of a channel: URL of its mirror}.
        final: the path that is written into installed files as their prefix; the caller renames `prefix` to it.
        specs: the requested specs, for conda's own record in the prefix.
        reinstall: the names of packages whose files are written again.
        kept: the names of packages that are not removed although they are not in the lock file.
        full: verify the checksums of the files of cached packages before they are used.

    Raises:
        BlockedError: no space is left.
        FirstlightError: a package cannot be downloaded, or its content does not match the lock file.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    pkgs.mkdir(parents=True, exist_ok=True)
    _run_worker(
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
    """Return the conda packages that satisfy specs on one platform.

    Args:
        specs: the requested packages, in conda's syntax, such as "numpy>=2".
        channels: the names or URLs of the channels.
        platform: conda's name of the platform, such as "linux-64".
        virtual: the virtual packages of the host, such as `__cuda=12.8`.
        mirrored: {official URL of a channel: URL of its mirror}.
        cache: the folder for downloaded repodata.

    Returns:
        The packages, with official URLs.

    Raises:
        FirstlightError: a channel is unavailable, or there is no solution.
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
        return [CondaPackage(**row) for row in _run_worker(request, cache)["packages"]]
    except FirstlightError as error:
        lines = str(error).splitlines()
        if not any("error sending request" in line for line in lines):
            raise
        raise FirstlightError(
            f"{lines[1].removeprefix('Caused by: ') if len(lines) > 1 else lines[0]}: {lines[-1]}. Set a mirror "
            "(channel_alias in ~/.condarc, or CONDA_CHANNEL_ALIAS), or keep the locked conda packages: --keep-conda."
        ) from None


def _run_worker(request: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """Run a worker process (rattler_worker.py) for one request, and return its result.

    The worker's exit code is ignored if there is a result file, since rattler may crash after the file is written.

    Args:
        request: the request, with "action" and the keys that the function of this name in rattler_worker.py reads.
        folder: the folder to name in the message if the disk is full.

    Raises:
        BlockedError: the disk is full.
        FirstlightError: the worker reported another error, or ended without a result.
    """
    with tempfile.TemporaryDirectory(prefix="firstlight-") as scratch:
        result_file = Path(scratch) / "answer.json"
        text = json.dumps({**request, "answer": str(result_file)})
        # The failover proxy listens on loopback, which an HTTP proxy on another host cannot reach.
        no_proxy = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
        environment = child_environment.child(os.environ) | {"no_proxy": no_proxy, "NO_PROXY": no_proxy}
        argv = [sys.executable, "-I", "-c", _LAUNCH, str(Path(__file__).resolve().parent.parent.parent)]
        worker = process.run(argv, env=environment, stdin=text, check=False)
        try:
            result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            reason = f"rattler ended without a result (exit code {worker.returncode}):\n{worker.tail()}"
            raise FirstlightError(reason) from None
    if "error" not in result:
        return result
    message = redact(str(result["error"]))
    if _NO_SPACE.search(message):
        raise BlockedError(f"{folder}: no space left. Free some space, or use another --root, then run again.")
    raise FirstlightError(f"conda packages: {message}")
