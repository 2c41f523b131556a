"""How this machine configures conda: channels, mirrors, and .condarc."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core.errors import SpecError
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

CHANNELS = "https://conda.anaconda.org"  # conda's own default channel_alias, which its locks write


def mirrors(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """{channel's own address: the address that serves it} by the machine's conda settings.

    Source: conda's documentation of `channel_alias` and `custom_channels`. Both addresses end with a slash.

    Raises:
        SpecError: a .condarc cannot be read.
    """
    settings = conda_settings(environ, home)
    alias = environ.get("CONDA_CHANNEL_ALIAS") or settings.get("channel_alias")
    found = {}
    custom = settings.get("custom_channels")
    for name, base in (custom if isinstance(custom, dict) else {}).items():
        found[f"{CHANNELS}/{name}/"] = f"{str(base).rstrip('/')}/{name}/"
    if alias:
        found[f"{CHANNELS}/"] = f"{str(alias).rstrip('/')}/"
    return found


def own_channels(environ: Mapping[str, str], home: Path, ours: Collection[str] = ()) -> str | None:
    """What this machine itself says of where conda's channels lie, or None; `ours` does not count.

    Raises:
        SpecError: a .condarc cannot be read.
    """
    if environ.get("CONDA_CHANNEL_ALIAS") not in {None, "", *ours}:
        return f"CONDA_CHANNEL_ALIAS={redact(environ['CONDA_CHANNEL_ALIAS'])}"
    settings = conda_settings(environ, home)
    if settings.get("channel_alias") not in {None, *ours}:
        return f"conda's channel_alias = {redact(str(settings['channel_alias']))}"
    custom = settings.get("custom_channels")
    for name, base in (custom if isinstance(custom, dict) else {}).items():
        if str(base).rstrip("/") not in ours:
            return f"conda's custom_channels: {name}: {redact(str(base))}"
    defaults = settings.get("default_channels")
    for base in defaults if isinstance(defaults, list) else []:
        if str(base).rpartition("/")[0] not in ours:
            return f"conda's default_channels: {redact(str(base))}"
    return None


def served(url: str, mirrored: Mapping[str, str]) -> str:
    """The address under which a package is asked for."""
    for channel, mirror in mirrored.items():
        if url.startswith(channel):
            return mirror + url.removeprefix(channel)
    return url


def canonical(url: str, mirrored: Mapping[str, str]) -> str:
    """The channel's own address of a package that a mirror serves."""
    for channel, mirror in mirrored.items():
        if url.startswith(mirror):
            return channel + url.removeprefix(mirror)
    return url


def conda_settings(environ: Mapping[str, str], home: Path) -> dict[str, Any]:
    """What .condarc holds (CONDARC names another); {} where there is none.

    Raises:
        SpecError: it cannot be read.
    """
    file = Path(environ["CONDARC"]) if environ.get("CONDARC") else home / ".condarc"
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        loaded = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise SpecError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None
    return loaded if isinstance(loaded, dict) else {}
