"""Rejects paths of model files that lead out of the snapshot, and files that can carry code (pickles, libraries)."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

# The suffixes of weights, configuration and text. A file with another suffix may be a pickle, a library or a program.
_ACCEPTED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja", ".yaml", ".yml", ".bpe", ".vocab", "")

# Names that begin with ~ (a home folder to a shell) or - (a flag), the folder .git, names with characters that Windows
# forbids, and the device names of Windows.
_FORBIDDEN_NAME = re.compile(r"^[~-]|^\.git$|[<>:\"|?*]|^(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)


def check_model_path(path: str) -> str:
    """Return the path of a model file unchanged if it is safe on every operating system.

    A safe path stays inside the snapshot, and its suffix is one of weights, configuration or text.

    Raises:
        ValueError: the path is absolute, leads out of the snapshot, or has a forbidden name, character or suffix.
    """
    pure = PurePosixPath(path)
    control = any(unicodedata.category(character) in {"Cc", "Cf", "Cs"} for character in path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path == "." or control:
        raise ValueError(
            f"{path!r} is not a plain relative path such as folder/name; .., \\ and control characters are not allowed"
        )
    if any(_FORBIDDEN_NAME.search(part) for part in pure.parts):
        raise ValueError(
            f"{path!r} has a part that is not a file name on every system, or is special to a shell or git"
        )
    # Some file systems drop a space or a dot at the end of a name. The shortened name may have a forbidden suffix.
    is_truncated = any(part.endswith((" ", ".")) for part in pure.parts)
    if is_truncated or pure.name.startswith(".") or pure.suffix.lower() not in _ACCEPTED_SUFFIXES:
        accepted = ", ".join(filter(None, _ACCEPTED_SUFFIXES))
        raise ValueError(
            f"{path!r} can carry code; only safetensors and text files are accepted ({accepted}, or no suffix)"
        )
    return path
