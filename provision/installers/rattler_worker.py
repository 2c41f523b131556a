"""What runs rattler: a process of its own, since the library can crash at the interpreter's exit, its work done.

Reads one request as JSON from standard input, writes one answer to the file that the request names, and ends at once.
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
    """A client that asks each mirror in place of its channel; the records keep the channel's own address."""
    import rattler
    from rattler.networking.middleware import MirrorMiddleware, RetryMiddleware

    wares: list[Any] = [RetryMiddleware(2)]
    if mirrors:
        wares.append(MirrorMiddleware({channel: [mirror] for channel, mirror in mirrors.items()}))
    return rattler.Client(wares, user_agent="firstlight", timeout=60)


async def install(request: dict[str, Any]) -> dict[str, object]:
    """Make a prefix hold exactly the conda packages of a lock.

    Args:
        request: `lock` (a conda-lock.yml), `platform`, `prefix` (where it is made), `final` (what its files call it),
            `pkgs` (the package cache), `mirrors`, `specs` (what was asked for), `reinstall` (packages to link anew),
            `kept` (what the user added), `full` (hash what is cached before it is used).
    """
    import rattler

    mode = rattler.ValidationMode.full() if request["full"] else rattler.ValidationMode.fast()
    environment = rattler.LockFile.from_path(request["lock"]).default_environment()
    platforms = environment.platforms() if environment else []
    platform = next((each for each in platforms if each.name == request["platform"]), None)
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
        requested_specs=[rattler.MatchSpec(spec)._match_spec for spec in request["specs"]],  # noqa: SLF001 (it wants the inner one)
        execute_link_scripts=False,
        show_progress=False,
    )
    return {"packages": len(records)}


async def solve(request: dict[str, Any]) -> dict[str, object]:
    """Solve specs for one platform.

    Args:
        request: `specs`, `channels`, `platform`, `virtual` (such as `__cuda=12.8`), `mirrors`, `cache`.
    """
    import rattler

    gateway = rattler.Gateway(
        cache_dir=request["cache"],
        client=client(request["mirrors"]),
        default_config=rattler.SourceConfig(sharded_enabled=False),
    )
    virtual, build = [], rattler.BuildString("0")
    for each in request["virtual"]:
        name, _, version = each.partition("=")
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
            raise ValueError(f"{record.url} has no md5 and sha256 in its channel")
        named = {spec.partition(" ")[0]: spec.partition(" ")[2].strip() or "*" for spec in record.depends}
        package = CondaPackage(
            record.name.source,
            str(record.version),
            request["platform"],
            record.url,
            record.md5.hex(),
            record.sha256.hex(),
            named,
            record.size,
            record.timestamp.timestamp() if record.timestamp else None,
        )
        packages.append(vars(package))
    return {"packages": packages}


def main() -> None:
    """Serve one request and end without the interpreter's own exit."""
    request = json.loads(sys.stdin.read())
    action = {"install": install, "solve": solve}[request["action"]]
    try:
        answer = asyncio.run(action(request))
    except BaseException as error:  # what the library raises has no common base; the parent decides
        answer = {"error": str(error) or type(error).__name__}
    answer_file = Path(request["answer"])
    part = answer_file.with_suffix(".part")
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.replace(answer_file)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
