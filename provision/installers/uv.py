"""Runs uv with the package sources that are set on the host for pip and uv, and without other settings."""

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

# {option of pip: (environment variable of uv with the same meaning, separator between several values)}. Source: uv's
# documentation of its environment variables.
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
    """Hold the inputs of a uv process that uses the same package sources as the host's pip and uv.

    `environment`: all environment variables of the process.
    `flags`: further command-line flags.
    `config`: the settings from uv's own files that are used, for a temporary uv.toml.
    `dropped`: a text for each setting of the host that has no effect here, although the user may expect one.
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
    """Return the inputs of a uv process that uses the package sources of the host's pip and uv.

    A setting of uv takes precedence over the same setting of pip. So uv's default index replaces pip's. uv searches
    all indexes, as pip does: the checksums in the lock file decide which file is used, not the order of the indexes.
    A find-links folder that does not exist is left out, because uv would fail, while pip ignores it.

    Args:
        environ: the environment variables of this process.
        cache: uv's cache folder if the host sets none.
        offline: use only cached files.
        settings: {option of pip: its values}, as `pip_settings` returns them; None: read them now.
        can_link: whether files in the target can be hard links to the cache. If not, uv is set to copy the files, so
            that it prints no warning.
    """
    env = {name: value for name, value in child_environment.child(environ).items() if not name.startswith("PIP_")}
    settings = pip_settings(environ) if settings is None else settings
    config, dropped = uv_settings.read(environ, Path(environ.get("HOME") or Path.home()))
    for option, values in settings.items():
        if option in _CARRIED:
            variable, joint = _CARRIED[option]
            value = _uv_value(variable, joint.join(values))
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
    # --python alone selects the target environment, so an active venv or conda environment must have no effect.
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
    """Remove the folders that do not exist from UV_FIND_LINKS in `env`; return a text for each of them."""
    values = [value for value in env.get("UV_FIND_LINKS", "").split(",") if value]
    links = [link if "://" in link else os.path.expanduser(link) for link in values]  # noqa: PTH111 (no Path)
    present = [link for link in links if "://" in link or os.path.exists(link)]  # noqa: PTH110 (nor here)
    if values:
        env["UV_FIND_LINKS"] = ",".join(present)
    if not env.get("UV_FIND_LINKS"):
        env.pop("UV_FIND_LINKS", None)
    return [f"find-links {redact(link)} (no such folder)" for link in links if link not in present]


def _uv_value(variable: str, value: str) -> str | None:
    """Return the value of a uv variable for the value of pip's option; None if uv does not accept such a value."""
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
    """Run uv and wait for its end. Of the settings in uv's own files, only those in `uv.config` apply.

    Args:
        arguments: the arguments of the command, without the program.
        uv: the inputs of the process, as `for_uv` returns them.
        stdin: the text for its standard input.

    Raises:
        CommandError: uv has failed.
    """
    if not uv.config:
        return process.run([uv_binary(), *arguments], env=uv.environment, stdin=stdin)
    # The file may contain a password. Only this user can read the temporary folder, which is removed when uv ends.
    with tempfile.TemporaryDirectory(prefix="firstlight-") as scratch:
        file = Path(scratch) / "uv.toml"
        file.write_text(uv_settings.write(uv.config), encoding="utf-8")
        return process.run([uv_binary(), "--config-file", file, *arguments], env=uv.environment, stdin=stdin)


def own_index(
    environ: Mapping[str, str], settings: Mapping[str, list[str]], home: Path, written: str | None = None
) -> str | None:
    """Return, as text, the first setting of a package index that firstlight has not written; None without one.

    Args:
        environ: the environment variables.
        settings: {option of pip: its values}, as `pip_settings` returns them.
        home: the user's home folder.
        written: the URL of the index that firstlight has written to the settings; None without one.
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
    return _own_uv_index(environ, home, written)


_MORE_INDEXES = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX")


def _own_uv_index(environ: Mapping[str, str], home: Path, written: str | None) -> str | None:
    """Return, as text, the first of uv's settings files with an index that firstlight has not written; else None."""
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
    """Return the path of the program uv in the toolbox, the venv in which firstlight runs."""
    import uv

    return Path(uv.find_uv_bin())


def main(lock: str) -> int:
    """Install the packages of a lock file into the toolbox, the venv in which firstlight runs.

    The bootstrap runs this as its last step.

    Args:
        lock: the path of the lock file.

    Returns:
        The exit code: 0, or 1 if uv has failed.
    """
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
