"""Rejects the paths of model files that can carry code (pickles, libraries, programs) or leave their folder."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

# The suffixes of weights, configuration and text. A file with another one may be a pickle, a library or a program.
_ACCEPTED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja", ".yaml", ".yml", ".bpe", ".vocab", "")

# Names that are a home (~) or a flag (-) to a shell, the folder .git, names with characters that Windows forbids, and
# the device names of Windows.
_FORBIDDEN_NAME = re.compile(r"^[~-]|^\.git$|[<>:\"|?*]|^(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)


def check_model_path(path: str) -> str:
    """Return a model file's path that stays inside a snapshot, cannot hold code, and is the same path on every system.

    Raises:
        ValueError: the path is absolute, leaves the snapshot, or has a forbidden name, character or suffix.
    """
    pure = PurePosixPath(path)
    control = any(unicodedata.category(character) in {"Cc", "Cf", "Cs"} for character in path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path == "." or control:
        raise ValueError(
            f"{path!r} is not a plain relative path, such as folder/name: without .., \\ and control characters"
        )
    if any(_FORBIDDEN_NAME.search(part) for part in pure.parts):
        raise ValueError(f"{path!r} has a part that is not a file name on every system, or has a special meaning")
    # Some file systems drop a space or a dot at the end of a name. The rest of the name may have another suffix.
    is_truncated = any(part.endswith((" ", ".")) for part in pure.parts)
    if is_truncated or pure.name.startswith(".") or pure.suffix.lower() not in _ACCEPTED_SUFFIXES:
        accepted = ", ".join(filter(None, _ACCEPTED_SUFFIXES))
        raise ValueError(
            f"{path!r} can carry code; only safetensors and text files are accepted ({accepted}, or no suffix)"
        )
    return path
