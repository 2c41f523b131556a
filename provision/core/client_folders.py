"""Computes the folders of huggingface_hub from environment variables, without its import, which takes 30 ms."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# The variables that select the hub cache; an earlier one overrides the later ones.
_HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
_REFERENCE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


@dataclass(frozen=True)
class ClientFolders:
    """Hold the folders that huggingface_hub uses in a process, as absolute paths.

    `home` is the folder HF_HOME, `hub` the hub cache, and `xet` the cache of the Xet downloads. `variable` is the name
    of the environment variable that selects the hub cache; None: the cache is the default one in the user's home.
    `is_relative` is True if the variable has a relative path, so that the hub cache depends on the working folder.
    """

    home: Path
    hub: Path
    xet: Path
    variable: str | None
    is_relative: bool


def client_folders(environ: Mapping[str, str], home: Path) -> ClientFolders:
    """Return the folders that huggingface_hub uses with the given environment variables.

    Source: huggingface_hub's constants.py. There, a variable with an empty value counts as set, and selects the working
    folder. HF_XET_CACHE is taken literally; in the values of the other variables ~ and $NAME are replaced.

    Args:
        environ: the environment variables.
        home: the user's home folder, which replaces ~.
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
    """Return the hub cache of huggingface_hub if no variable selects another: ~/.cache/huggingface/hub in `home`."""
    return home / ".cache" / "huggingface" / "hub"


def _expand(text: str, environ: Mapping[str, str], home: Path) -> str:
    """Return a path with ~ replaced, and then $NAME and ${NAME}, as os.path.expanduser and expandvars do.

    The name of an unset variable stays in the path.
    """
    if os.name == "nt":
        return os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111 (%NAME% as well)
    is_own_home = text == "~" or text.startswith("~/")
    own = str(home).rstrip("/") + text[1:]
    expanded = own or "/" if is_own_home else os.path.expanduser(text)  # noqa: PTH111 (an unknown user stays as it is)
    return _REFERENCE.sub(lambda match: environ.get(match[1] or match[2], match[0]), expanded)
