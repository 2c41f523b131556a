"""Computes the folders of huggingface_hub from environment variables, without an import of it (30 ms)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# The variables that select the hub cache, the strongest first.
_HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
_REFERENCE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


@dataclass(frozen=True)
class ClientFolders:
    """Hold the folders that huggingface_hub uses in a process, as absolute paths.

    `home` is HF_HOME. `variable` is the variable that selects the hub cache, None for the default of the home.
    `is_relative`: the variable holds a relative path, so the hub cache differs between working folders.
    """

    home: Path
    hub: Path
    xet: Path
    variable: str | None
    is_relative: bool


def client_folders(environ: Mapping[str, str], home: Path) -> ClientFolders:
    """Return the folders that huggingface_hub uses with these variables.

    Source: huggingface_hub's constants.py. An empty variable counts as set there, and names the working folder.
    HF_XET_CACHE is taken literally; in the other variables ~ and $NAME are replaced.

    Args:
        environ: the environment variables.
        home: the home folder, which replaces ~.
    """
    cache = environ.get("XDG_CACHE_HOME", os.path.join(home, ".cache"))  # noqa: PTH118 (an empty name stays empty)
    hf_home = _expand(environ.get("HF_HOME", os.path.join(cache, "huggingface")), environ, home)  # noqa: PTH118
    former = environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(hf_home, "hub"))  # noqa: PTH118
    hub = _expand(environ.get("HF_HUB_CACHE", former), environ, home)
    xet = environ.get("HF_XET_CACHE", os.path.join(hf_home, "xet"))  # noqa: PTH118
    return ClientFolders(
        Path(hf_home).absolute(),
        Path(hub).absolute(),
        Path(xet).absolute(),
        None if Path(hub) == default_hub(home) else next(name for name in _HUB_VARIABLES if name in environ),
        not Path(hub).is_absolute(),
    )


def default_hub(home: Path) -> Path:
    """Return the hub cache that huggingface_hub uses in a home without any variable."""
    return home / ".cache" / "huggingface" / "hub"


def _expand(text: str, environ: Mapping[str, str], home: Path) -> str:
    """Replace ~ and then $NAME and ${NAME}, as os.path does; an unset variable stays in the text."""
    if os.name == "nt":
        return os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111 (%NAME% as well)
    is_own_home = text == "~" or text.startswith("~/")
    own = str(home).rstrip("/") + text[1:]
    expanded = own or "/" if is_own_home else os.path.expanduser(text)  # noqa: PTH111 (an unknown user stays as it is)
    return _REFERENCE.sub(lambda match: environ.get(match[1] or match[2], match[0]), expanded)
