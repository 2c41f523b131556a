"""How uv is started: its environment, its sources, and its private configuration."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import child_environment, process
from provision.core.redact import redact
from provision.installers import uv_settings
from provision.installers.pip_settings import pip_settings, says_no_index

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# pip's option -> uv's variable, and what joins several values there (uv's documentation of its environment).
_CARRIED = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "pypi-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "retries": ("UV_HTTP_RETRIES", " "),
    "keyring-provider": ("UV_KEYRING_PROVIDER", " "),
}
_WHOLE_NUMBERS = {"UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES"}


@dataclass(frozen=True)
class UvSources:
    """Hold how uv is started so that it sees the sources of the machine's pip.

    `environment` is its whole environment, `config` what is kept of uv's own files.
    `dropped`: settings that a user may expect to work and that have no effect here.
    """

    environment: dict[str, str]
    flags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def for_uv(
    environ: Mapping[str, str], cache: Path, *, offline: bool, settings: Mapping[str, list[str]] | None = None
) -> UvSources:
    """Carry the machine's settings of sources over to uv, and nothing else of its settings.

    What the machine has set for uv itself goes before what it has set for pip: a default index of uv's own takes the
    place of pip's. Indexes are searched together, as pip does it: the lock's hashes, not the order of the indexes,
    decide what is taken. A folder of wheels that is not there is left out: pip passes it over, uv ends there.

    Args:
        environ: ours.
        cache: where uv keeps its downloads when the machine names no place.
        offline: only what is cached may be used.
        settings: as `pip_settings` returns them, where they were asked for already.
    """
    env = {name: value for name, value in child_environment.child(environ).items() if not name.startswith("PIP_")}
    settings = pip_settings(environ) if settings is None else settings
    config, dropped = uv_settings.read(environ, Path(environ.get("HOME") or Path.home()))
    for option, values in settings.items():
        if option in _CARRIED:
            variable, joint = _CARRIED[option]
            value = _for_uv(variable, joint.join(values))
            if value is not None:
                env.setdefault(variable, value)
    has_default = env.get("UV_INDEX_URL") or any(row.get("default") for row in uv_settings.indexes(config)[0])
    if has_default and "UV_DEFAULT_INDEX" not in environ:
        env.pop("UV_DEFAULT_INDEX", None)
    absent = _drop_absent_folders(env)
    if "truststore" in settings.get("use-feature", []):
        env.setdefault("UV_SYSTEM_CERTS", "1")
    env.setdefault("UV_CACHE_DIR", str(cache))
    env |= {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"}
    env |= {"UV_NO_PROGRESS": "1", "UV_NO_CONFIG": "1"}
    # uv finds its target by --python alone; a venv or conda env that happens to be active must not matter.
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_CONFIG_FILE"):
        env.pop(variable, None)
    if offline:
        env["UV_OFFLINE"] = "1"
    in_pip = [f"pip's {key}" for key in settings if child_environment.PIP.get(key) == child_environment.REPORTED]
    by_variable = child_environment.dropped(environ)
    named = {f"pip's {name[len('PIP_') :].lower().replace('_', '-')}" for name in by_variable}
    dropped = [*by_variable, *(each for each in in_pip if each not in named), *dropped, *absent]
    return UvSources(env, ("--no-index",) if says_no_index(settings) else (), config, tuple(dropped))


def _drop_absent_folders(env: dict[str, str]) -> list[str]:
    """Leave the folders of wheels that are not there out of UV_FIND_LINKS; return them in words."""
    told = [each for each in env.get("UV_FIND_LINKS", "").split(",") if each]
    places = [each if "://" in each else os.path.expanduser(each) for each in told]  # noqa: PTH111 (no Path)
    there = [each for each in places if "://" in each or os.path.exists(each)]  # noqa: PTH110 (nor here)
    if told:
        env["UV_FIND_LINKS"] = ",".join(there)
    if not env.get("UV_FIND_LINKS"):
        env.pop("UV_FIND_LINKS", None)
    return [f"find-links {redact(each)} (it is not there)" for each in places if each not in there]


def _for_uv(variable: str, value: str) -> str | None:
    """Return a value of pip's in the form that uv takes, or None where uv has no such value."""
    if variable in _WHOLE_NUMBERS:
        try:
            return str(math.ceil(float(value)))
        except (ValueError, OverflowError):
            return None
    if variable == "UV_KEYRING_PROVIDER":
        return value if value in {"disabled", "subprocess"} else None
    if variable in {"SSL_CERT_FILE", "SSL_CLIENT_CERT"}:
        return os.path.expanduser(value)  # noqa: PTH111 (as pip does)
    return value


def run_uv(arguments: Sequence[str | Path], uv: UvSources, stdin: str | None = None) -> process.Completed:
    """Run uv to its end; of uv's own files it reads only what `uv` carries.

    Raises:
        CommandError: it failed.
    """
    if not uv.config:
        return process.run([uv_binary(), *arguments], env=uv.environment, stdin=stdin)
    # The file may hold a password: its folder is open to its owner alone, and goes when uv has ended.
    with tempfile.TemporaryDirectory(prefix="firstlight-") as scratch:
        file = Path(scratch) / "uv.toml"
        file.write_text(uv_settings.write(uv.config), encoding="utf-8")
        return process.run([uv_binary(), "--config-file", file, *arguments], env=uv.environment, stdin=stdin)


def own_index(
    environ: Mapping[str, str], settings: Mapping[str, list[str]], home: Path, ours: str | None = None
) -> str | None:
    """What this machine itself says of the index that packages come from, or None; `ours` does not count."""
    known = {"", None, ours}
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", *_MORE_INDEXES):
        if environ.get(name) not in known:
            return f"{name}={redact(environ[name])}"
    for option in ("index-url", "extra-index-url"):
        values = settings.get(option, [])
        if values and values != [ours]:
            return f"pip's {option} = {redact(' '.join(values))}"
    if says_no_index(settings):
        return "pip's no-index"
    return _own_uv(environ, home, ours)


_MORE_INDEXES = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX")


def _own_uv(environ: Mapping[str, str], home: Path, ours: str | None) -> str | None:
    for file in uv_settings.paths(environ, home):
        try:
            held = uv_settings.parse(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            continue
        tables = [held, held["pip"] if isinstance(held.get("pip"), dict) else {}]
        named = [table.get(key) for table in tables for key in ("index-url", "extra-index-url", "no-index")]
        indexes = held.get("index")
        named += [each.get("url") for each in indexes if isinstance(each, dict)] if isinstance(indexes, list) else []
        if any(value not in (None, False, [], ours) for value in named):
            return f"{file}'s index"
    return None


def uv_binary() -> Path:
    """The uv of the toolbox."""
    import uv

    return Path(uv.find_uv_bin())


def main(lock: str) -> int:
    """Install a lock into the toolbox itself; the second half of the bootstrap."""
    target = Path(sys.prefix)
    uv = for_uv(os.environ, target.parent / ".cache" / "uv", offline=False)
    argv: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    argv += ["--compile-bytecode", *uv.flags, "--python", sys.executable, "-r", lock]
    try:
        run_uv(argv, uv)
    except process.CommandError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def base_python() -> Path:
    """The interpreter that the toolbox was made from."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
