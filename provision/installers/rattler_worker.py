"""Runs rattler in a process of its own, because the library can crash when the interpreter exits.

The process reads one request as JSON from standard input, and writes one result as JSON to a file. The request has
the path of this file in "answer", and the name of the function to run in "action": install or solve.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from provision.lockfiles.conda_lock import CondaPackage


def client(mirrors: dict[str, str]) -> Any:  # noqa: ANN401 (rattler is imported where it is used)
    """Return a rattler client that downloads from the mirrors of channels.

    The records of packages keep the official URLs.

    Args:
        mirrors: {official URL of a channel: URL of its mirror}.
    """
    import rattler
    from rattler.networking.middleware import MirrorMiddleware, RetryMiddleware

    middleware: list[Any] = [RetryMiddleware(2)]
    if mirrors:
        middleware.append(MirrorMiddleware({channel: [mirror] for channel, mirror in mirrors.items()}))
    return rattler.Client(middleware, user_agent="firstlight", timeout=60)


async def install(request: dict[str, Any]) -> dict[str, object]:
    """Install exactly the conda packages of a lock file into a prefix.

    Args:
        request: the arguments of `rattler.install` in this package, under their names; `mirrored` is "mirrors".

    Returns:
        {"packages": the number of packages}.

    Raises:
        ValueError: the lock file has no packages for the platform.
    """
    import rattler

    mode = rattler.ValidationMode.full() if request["full"] else rattler.ValidationMode.fast()
    environment = rattler.LockFile.from_path(request["lock"]).default_environment()
    platforms = environment.platforms() if environment else []
    platform = next((candidate for candidate in platforms if candidate.name == request["platform"]), None)
    records = environment.conda_repodata_records_for_platform(platform) if environment and platform else None
    if records is None:
        raise ValueError(f"{request['lock']} is not locked for {request['platform']}")
    await rattler.install(
        records,
        target_prefix=request["prefix"],
        alternative_target_prefix=request["final"],
        client=client(request["mirrors"]),
        package_cache=rattler.PackageCache.new_layered([request["pkgs"]], validation_mode=mode),
        reinstall_packages=set(request["reinstall"]) or None,
        ignored_packages=set(request["kept"]) or None,
        requested_specs=[rattler.MatchSpec(spec)._match_spec for spec in request["specs"]],  # noqa: SLF001 (takes no MatchSpec)
        execute_link_scripts=False,
        show_progress=False,
    )
    return {"packages": len(records)}


async def solve(request: dict[str, Any]) -> dict[str, object]:
    """Find the conda packages that satisfy specs on one platform.

    Args:
        request: the arguments of `rattler.solve` in this package, under their names; `mirrored` is "mirrors".

    Returns:
        {"packages": [the fields of a `CondaPackage` as a dictionary, for each package]}.

    Raises:
        ValueError: the channel lists a package without its md5 or sha256.
    """
    import rattler

    gateway = rattler.Gateway(
        cache_dir=request["cache"],
        client=client(request["mirrors"]),
        default_config=rattler.SourceConfig(sharded_enabled=False),
    )
    virtual, build = [], rattler.BuildString("0")
    for text in request["virtual"]:
        name, _, version = text.partition("=")
        virtual.append(rattler.GenericVirtualPackage(rattler.PackageName(name), rattler.Version(version or "0"), build))
    records = await rattler.solve(
        sources=request["channels"],
        specs=request["specs"],
        gateway=gateway,
        platforms=[request["platform"], "noarch"],
        virtual_packages=virtual,
    )
    packages = []
    for record in records:
        if record.md5 is None or record.sha256 is None:
            raise ValueError(f"{record.url} is listed without its md5 or sha256 in the channel")
        dependencies = {spec.partition(" ")[0]: spec.partition(" ")[2].strip() or "*" for spec in record.depends}
        package = CondaPackage(
            record.name.source,
            str(record.version),
            request["platform"],
            record.url,
            record.md5.hex(),
            record.sha256.hex(),
            dependencies,
            record.size,
            record.timestamp.timestamp() if record.timestamp else None,
        )
        packages.append(vars(package))
    return {"packages": packages}


def main() -> None:
    """Run one request, write its result or {"error": text}, and exit with 0 without the interpreter's shutdown."""
    request = json.loads(sys.stdin.read())
    action = {"install": install, "solve": solve}[request["action"]]
    try:
        result = asyncio.run(action(request))
    except BaseException as error:  # rattler's exceptions have no common base class; the parent raises the error
        result = {"error": str(error) or type(error).__name__}
    result_file = Path(request["answer"])
    part = result_file.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(result_file)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
