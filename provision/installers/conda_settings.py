"""The machine's settings of conda, from its variables and .condarc: channels and their mirrors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core.errors import SpecError
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

CHANNELS = "https://conda.anaconda.org"  # conda's default channel_alias, the host in the addresses of its locks


def mirrors(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return {official address of a channel: address of its mirror} from the machine's conda settings.

    Both addresses end with a slash. The first entry that matches an address applies.
    Source: conda's documentation of `channel_alias` and `custom_channels`.

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
    """Return the machine's first own setting of a channel address as text, or None.

    Args:
        environ: the environment variables.
        home: the user's home folder.
        written: addresses that firstlight has written, which do not count.

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
    """Return the address of a package on the mirror of its channel; the official one where there is no mirror."""
    for channel, mirror in mirrored.items():
        if url.startswith(channel):
            return mirror + url.removeprefix(channel)
    return url


def official_url(url: str, mirrored: Mapping[str, str]) -> str:
    """Return the official address of a package from its address on a mirror."""
    for channel, mirror in mirrored.items():
        if url.startswith(mirror):
            return channel + url.removeprefix(mirror)
    return url


def conda_settings(environ: Mapping[str, str], home: Path) -> dict[str, Any]:
    """Return the content of ~/.condarc, or of the file that CONDARC names; {} where there is no file.

    Raises:
        SpecError: the file cannot be read.
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
