"""Reads the host's settings of conda (environment variables and .condarc): channels and their mirrors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import yaml_text
from provision.core.errors import SpecError
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

CHANNELS = "https://conda.anaconda.org"  # conda's default channel_alias, with which the URLs in lock files begin


def mirrors(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return {official URL of a channel: URL of its mirror} from the host's conda settings.

    A URL of all channels (channel_alias) is the last entry. All URLs end with a slash. For a package, the first entry
    whose official URL is the beginning of the package's URL applies.
    Source: conda's documentation of `channel_alias` and `custom_channels`.

    Args:
        environ: the environment variables.
        home: the user's home folder.

    Raises:
        SpecError: .condarc cannot be read.
    """
    settings = conda_settings(environ, home)
    alias = environ.get("CONDA_CHANNEL_ALIAS") or settings.get("channel_alias")
    addresses = {}
    custom = settings.get("custom_channels")
    for name, base in (custom if isinstance(custom, dict) else {}).items():
        addresses[f"{CHANNELS}/{name}/"] = f"{str(base).rstrip('/')}/{name}/"
    if alias:
        addresses[f"{CHANNELS}/"] = f"{str(alias).rstrip('/')}/"
    return addresses


def own_channels(environ: Mapping[str, str], home: Path, written: Collection[str] = ()) -> str | None:
    """Return, as text, the first setting of a channel's URL that firstlight has not written; None without one.

    Args:
        environ: the environment variables.
        home: the user's home folder.
        written: the URLs that firstlight has written to the settings.

    Raises:
        SpecError: .condarc cannot be read.
    """
    if environ.get("CONDA_CHANNEL_ALIAS") not in {None, "", *written}:
        return f"CONDA_CHANNEL_ALIAS={redact(environ['CONDA_CHANNEL_ALIAS'])}"
    settings = conda_settings(environ, home)
    if settings.get("channel_alias") not in {None, *written}:
        return f"conda's channel_alias = {redact(str(settings['channel_alias']))}"
    custom = settings.get("custom_channels")
    for name, base in (custom if isinstance(custom, dict) else {}).items():
        if str(base).rstrip("/") not in written:
            return f"conda's custom_channels: {name}: {redact(str(base))}"
    defaults = settings.get("default_channels")
    for base in defaults if isinstance(defaults, list) else []:
        if str(base).rpartition("/")[0] not in written:
            return f"conda's default_channels: {redact(str(base))}"
    return None


def mirror_url(url: str, mirrored: Mapping[str, str]) -> str:
    """Return the URL of a package on the mirror of its channel, or `url` itself if the channel has no mirror.

    Args:
        url: the official URL of the package.
        mirrored: {official URL of a channel: URL of its mirror}.
    """
    for channel, mirror in mirrored.items():
        if url.startswith(channel):
            return mirror + url.removeprefix(channel)
    return url


def official_url(url: str, mirrored: Mapping[str, str]) -> str:
    """Return the official URL of a package, or `url` itself if it is not on one of the mirrors.

    Args:
        url: the URL of the package on a mirror.
        mirrored: {official URL of a channel: URL of its mirror}.
    """
    for channel, mirror in mirrored.items():
        if url.startswith(mirror):
            return channel + url.removeprefix(mirror)
    return url


def conda_settings(environ: Mapping[str, str], home: Path) -> dict[str, Any]:
    """Return {setting: value} from ~/.condarc, or from the file in the variable CONDARC; {} if the file is missing.

    Raises:
        SpecError: the file cannot be read.
    """
    file = Path(environ["CONDARC"]) if environ.get("CONDARC") else home / ".condarc"
    try:
        loaded = yaml_text.load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SpecError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None
    settings = loaded if isinstance(loaded, dict) else {}
    return {key: value for key, value in settings.items() if _is_setting(key, value)}


def _is_setting(key: object, value: object) -> bool:
    """Return whether a setting that firstlight reads has a usable value; conda refuses another one itself."""
    if key == "channel_alias":
        return _is_text(value)
    if key == "custom_channels":
        return isinstance(value, dict) and all(_is_text(text) for pair in value.items() for text in pair)
    if key in {"envs_dirs", "envs_path", "pkgs_dirs", "default_channels"}:
        return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value
