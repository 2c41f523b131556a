"""Where this machine gets packages from: its pip settings, carried over to uv, which ignores them."""

from __future__ import annotations

import ast
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision import command

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

# pip's option -> uv's variable, and what joins several values there (uv's documentation of its environment).
_CARRIED = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
}


@dataclass(frozen=True)
class UvSources:
    """How uv is started so that it sees what the machine's pip sees: its whole environment, and flags."""

    environment: dict[str, str]
    flags: tuple[str, ...] = ()


def parse_pip_config(listing: str) -> dict[str, list[str]]:
    """Merge the output of `pip config list` into {option: values}.

    The environment beats the sections, and `install` beats `global`, as in pip itself.

    Args:
        listing: lines such as `global.index-url='https://…'` or `:env:.find-links='/wheels'`.
    """
    ranks = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listing.splitlines():
        match = re.match(r"(global|install|:env:)\.([\w-]+)=(.+)$", line)
        if not match:
            continue
        section, option, quoted = match.groups()
        try:
            value = str(ast.literal_eval(quoted))
        except (ValueError, SyntaxError):
            value = quoted
        if option not in found or ranks[section] >= found[option][0]:
            found[option] = (ranks[section], value.split())
    return {option: values for option, (_, values) in found.items() if values}


def for_uv(
    environ: Mapping[str, str], cache: Path, *, offline: bool, settings: Mapping[str, list[str]] | None = None
) -> UvSources:
    """Carry the machine's pip settings over to uv.

    Whatever the machine has set for uv itself stays. Indexes are searched together, as pip does it: the
    lock's hashes, not the order of the indexes, decide what is taken.

    Args:
        environ: ours.
        cache: where uv keeps its downloads when the machine names no place.
        offline: only what is cached may be used.
        settings: as `pip_settings` returns them, where they were asked for already.
    """
    env = dict(environ)
    settings = pip_settings(environ) if settings is None else settings
    for option, values in settings.items():
        if option in _CARRIED:
            variable, joint = _CARRIED[option]
            env.setdefault(variable, joint.join(values))
    env.setdefault("UV_CACHE_DIR", str(cache))
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    env.setdefault("UV_PYTHON_DOWNLOADS", "never")
    env["UV_NO_PROGRESS"] = "1"
    # uv finds its target by --python alone; a venv or conda env that happens to be active must not matter.
    # And no setting of the machine may switch the hashes off.
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_NO_VERIFY_HASHES"):
        env.pop(variable, None)
    if offline:
        env["UV_OFFLINE"] = "1"
    return UvSources(env, ("--no-index",) if says_no_index(settings) else ())


def pip_settings(environ: Mapping[str, str]) -> dict[str, list[str]]:
    """{option: values} of this machine's pip, files and environment together."""
    return parse_pip_config(pip_config_list(environ))


def own_index(
    environ: Mapping[str, str], settings: Mapping[str, list[str]], home: Path, ours: str | None = None
) -> str | None:
    """What this machine itself says of the index that packages come from, or None; `ours` does not count."""
    known = {"", None, ours}
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", *_MORE_INDEXES):
        if environ.get(name) not in known:
            return f"{name}={command.redact(environ[name])}"
    for option in ("index-url", "extra-index-url"):
        values = settings.get(option, [])
        if values and values != [ours]:
            return f"pip's {option} = {command.redact(' '.join(values))}"
    if says_no_index(settings):
        return "pip's no-index"
    return _own_uv(environ, home, ours)


_MORE_INDEXES = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX")


def uv_files(environ: Mapping[str, str], home: Path) -> list[Path]:
    """The configuration files that uv reads outside of a project, the user's first.

    Source: uv's documentation of its configuration files.
    """
    if environ.get("UV_CONFIG_FILE"):
        return [Path(environ["UV_CONFIG_FILE"])]
    if sys.platform == "win32":
        return [Path(environ.get("APPDATA") or home / "AppData/Roaming") / "uv" / "uv.toml"]
    return [Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "uv" / "uv.toml", Path("/etc/uv/uv.toml")]


def _own_uv(environ: Mapping[str, str], home: Path, ours: str | None) -> str | None:
    from provision.spec import parse_toml  # not on top: the toolbox installs itself with this module

    for file in uv_files(environ, home):
        try:
            held = parse_toml(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        tables = [held, held["pip"] if isinstance(held.get("pip"), dict) else {}]
        named = [table.get(key) for table in tables for key in ("index-url", "extra-index-url", "no-index")]
        indexes = held.get("index")
        named += [each.get("url") for each in indexes if isinstance(each, dict)] if isinstance(indexes, list) else []
        if any(value not in (None, False, [], ours) for value in named):
            return f"{file}'s index"
    return None


def official_index() -> str:
    """The official index, as the installed pip has it."""
    from pip._internal.models.index import PyPI

    return PyPI.simple_url


def session(environ: Mapping[str, str], settings: Mapping[str, list[str]]) -> requests.Session:
    """How we ask ourselves what uv would ask: with the machine's proxy and certificates, and by our name."""
    from provision import wire

    asking = wire.Session()
    asking.headers["User-Agent"] = "firstlight"
    certificates = [environ.get("SSL_CERT_FILE"), *settings.get("cert", [])]
    if first := next((each for each in certificates if each and Path(each).exists()), None):
        asking.verify = first
    if "client-cert" in settings:
        asking.cert = settings["client-cert"][0]
    if "proxy" in settings:
        asking.proxies = dict.fromkeys(("http", "https"), settings["proxy"][0])
    return asking


def says_no_index(settings: Mapping[str, list[str]]) -> bool:
    """Whether pip asks no index at all here."""
    return settings.get("no-index", ["0"])[0].lower() in {"1", "true", "yes", "on"}


def uv_binary() -> Path:
    """The uv of the toolbox."""
    import uv

    return Path(uv.find_uv_bin())


def pip_config_list(environ: Mapping[str, str]) -> str:
    """What the toolbox's pip says of its configuration, files and environment together."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    return command.run(pip, env=dict(environ) | {"PYTHONWARNINGS": "ignore"}, timeout_seconds=60).stdout


def main(lock: str) -> int:
    """Install a lock into the toolbox itself; the second half of the bootstrap."""
    target = Path(sys.prefix)
    uv = for_uv(os.environ, target.parent / ".cache" / "uv", offline=False)
    argv: list[str | Path] = [uv_binary(), "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    argv += ["--compile-bytecode", *uv.flags, "--python", sys.executable, "-r", lock]
    try:
        command.run(argv, env=uv.environment)
    except command.CommandError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def base_python() -> Path:
    """The interpreter that the toolbox was made from."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
