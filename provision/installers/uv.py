"""Runs uv with an environment and a configuration file that carry over the machine's sources of packages."""

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
from provision.installers.pip_settings import forbids_index, pip_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# {option of pip: (variable of uv, separator of several values)} (source: uv's documentation of its environment).
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
    """Hold the inputs of a uv process that uses the same sources as the machine's pip.

    `environment` is the complete environment of the process. `flags` are further command-line flags.
    `config` are the settings from uv's own files that are carried over.
    `dropped` describes settings that a user may expect to work but that have no effect here.
    """

    environment: dict[str, str]
    flags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def for_uv(
    environ: Mapping[str, str],
    cache: Path,
    *,
    offline: bool,
    settings: Mapping[str, list[str]] | None = None,
    can_link: bool = True,
) -> UvSources:
    """Carry over the machine's sources of packages to uv, and no other settings.

    A setting for uv itself takes precedence over the same setting for pip; so uv's own default index replaces pip's.
    All indexes are searched together, as in pip: the checksums of the lock decide which file is used, not the order
    of the indexes. A missing folder of wheels is left out, since uv fails there and pip ignores it.

    Args:
        environ: the environment variables of this process.
        cache: uv's cache folder where the machine sets none.
        offline: use only cached files.
        settings: the pip settings, as `pip_settings` returns them; None reads them.
        can_link: hard links from the cache to the target work; without them uv copies, and warns of nothing.
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
    if not can_link:
        env.setdefault("UV_LINK_MODE", "copy")
    env |= {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"}
    env |= {"UV_NO_PROGRESS": "1", "UV_NO_CONFIG": "1"}
    # uv must find its target only by --python, so an active venv or conda environment must have no effect.
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_CONFIG_FILE"):
        env.pop(variable, None)
    if offline:
        env["UV_OFFLINE"] = "1"
    in_pip = [f"pip's {key}" for key in settings if child_environment.PIP.get(key) == child_environment.REPORTED]
    by_variable = child_environment.dropped(environ)
    repeated = {f"pip's {name[len('PIP_') :].lower().replace('_', '-')}" for name in by_variable}
    dropped = [*by_variable, *(option for option in in_pip if option not in repeated), *dropped, *absent]
    return UvSources(env, ("--no-index",) if forbids_index(settings) else (), config, tuple(dropped))


def _drop_absent_folders(env: dict[str, str]) -> list[str]:
    """Remove missing folders of wheels from UV_FIND_LINKS in `env`; return a text for each of them."""
    values = [value for value in env.get("UV_FIND_LINKS", "").split(",") if value]
    links = [link if "://" in link else os.path.expanduser(link) for link in values]  # noqa: PTH111 (no Path)
    present = [link for link in links if "://" in link or os.path.exists(link)]  # noqa: PTH110 (nor here)
    if values:
        env["UV_FIND_LINKS"] = ",".join(present)
    if not env.get("UV_FIND_LINKS"):
        env.pop("UV_FIND_LINKS", None)
    return [f"find-links {redact(link)} (no such folder)" for link in links if link not in present]


def _for_uv(variable: str, value: str) -> str | None:
    """Convert a value of pip's option to the value of uv's variable; return None where uv has no such value."""
    if variable in _WHOLE_NUMBERS:
        try:
            return str(math.ceil(float(value)))
        except (ValueError, OverflowError):
            return None
    if variable == "UV_KEYRING_PROVIDER":
        return value if value in {"disabled", "subprocess"} else None
    if variable in {"SSL_CERT_FILE", "SSL_CLIENT_CERT"}:
        return os.path.expanduser(value)  # noqa: PTH111 (pip uses the same function)
    return value


def run_uv(arguments: Sequence[str | Path], uv: UvSources, stdin: str | None = None) -> process.Completed:
    """Run uv to its end. The settings of uv's own files apply only as far as `uv.config` has them.

    Raises:
        CommandError: uv has failed.
    """
    if not uv.config:
        return process.run([uv_binary(), *arguments], env=uv.environment, stdin=stdin)
    # The file may contain a password. Only its owner can read the temporary folder, which is removed when uv ends.
    with tempfile.TemporaryDirectory(prefix="firstlight-") as scratch:
        file = Path(scratch) / "uv.toml"
        file.write_text(uv_settings.write(uv.config), encoding="utf-8")
        return process.run([uv_binary(), "--config-file", file, *arguments], env=uv.environment, stdin=stdin)


def own_index(
    environ: Mapping[str, str], settings: Mapping[str, list[str]], home: Path, written: str | None = None
) -> str | None:
    """Return the machine's first own setting of a package index as text, or None.

    Args:
        environ: the environment variables.
        settings: the pip settings, as `pip_settings` returns them.
        home: the user's home folder.
        written: the index that firstlight has written, which does not count.
    """
    ignored = {"", None, written}
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", *_MORE_INDEXES):
        if environ.get(name) not in ignored:
            return f"{name}={redact(environ[name])}"
    for option in ("index-url", "extra-index-url"):
        values = settings.get(option, [])
        if values and values != [written]:
            return f"pip's {option} = {redact(' '.join(values))}"
    if forbids_index(settings):
        return "pip's no-index"
    return _own_uv(environ, home, written)


_MORE_INDEXES = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX")


def _own_uv(environ: Mapping[str, str], home: Path, written: str | None) -> str | None:
    for file in uv_settings.paths(environ, home):
        try:
            settings = uv_settings.parse(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            continue
        tables = [settings, settings["pip"] if isinstance(settings.get("pip"), dict) else {}]
        values = [table.get(key) for table in tables for key in ("index-url", "extra-index-url", "no-index")]
        indexes = settings.get("index")
        values += [row.get("url") for row in indexes if isinstance(row, dict)] if isinstance(indexes, list) else []
        if any(value not in (None, False, [], written) for value in values):
            return f"{file}'s index"
    return None


def uv_binary() -> Path:
    """Return the path of the toolbox's uv."""
    import uv

    return Path(uv.find_uv_bin())


def main(lock: str) -> int:
    """Install a lock file into the toolbox itself, as the second half of the bootstrap; return the exit code."""
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
    """Return the path of the interpreter from which the toolbox's venv was made."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
