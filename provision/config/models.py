"""Reads an entry of models.toml: a repository, its revision, and its files with their hashes."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, model_validator

from provision.config.toml import Strict

if TYPE_CHECKING:
    from collections.abc import Sequence

# Weights, configuration and text. What is not named here may be a pickle, a library or a program.
_TAKEN_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja", ".yaml", ".yml", ".bpe", ".vocab", "")

# A home or a flag to a shell, the folder of a repository, what Windows has no name for, and its devices.
_NO_NAME = re.compile(r"^[~-]|^\.git$|[<>:\"|?*]|^(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)


def _safe_path(path: str) -> str:
    """A path inside a snapshot that can neither leave it nor carry code, and is that path on every system."""
    pure = PurePosixPath(path)
    control = any(unicodedata.category(each) in {"Cc", "Cf", "Cs"} for each in path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path == "." or control:
        raise ValueError(f"{path!r} is not a plain relative path")
    if any(_NO_NAME.search(part) for part in pure.parts):
        raise ValueError(f"{path!r} has a part that is no name of a file everywhere, or means something else")
    # Some file systems drop a space or a dot at the end of a name: what they keep may have another suffix.
    is_bent = any(part.endswith((" ", ".")) for part in pure.parts)
    if is_bent or pure.name.startswith(".") or pure.suffix.lower() not in _TAKEN_SUFFIXES:
        taken = ", ".join(filter(None, _TAKEN_SUFFIXES))
        raise ValueError(f"{path!r} can carry code; only safetensors and text files are taken ({taken}, or no suffix)")
    return path


class ModelFile(Strict):
    """One file of a model. What is None is not known yet, and is asked of the official hub alone.

    A git hash is of the size and the content: where it is all that is pinned, the size is pinned too.
    """

    path: Annotated[str, AfterValidator(_safe_path)]
    size: Annotated[int, Field(ge=0)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    git_sha1: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None

    @property
    def locked(self) -> bool:
        """Whether its content is pinned here."""
        return self.sha256 is not None or self.git_sha1 is not None

    @model_validator(mode="after")
    def _sized(self) -> ModelFile:
        if self.git_sha1 is not None and self.sha256 is None and self.size is None:
            raise ValueError(f"{self.path!r} has a git_sha1 and no size: git hashes both, add the size")
        return self


def _one_path_each(files: Sequence[ModelFile]) -> None:
    """Refuse two paths that one file system or another takes for the same, and a file where others need a folder."""
    seen: dict[str, str] = {}
    for file in files:
        for part in [file.path, *map(str, PurePosixPath(file.path).parents)][:-1]:
            key = unicodedata.normalize("NFC", part).casefold()
            kind = "file" if part == file.path else "folder"
            if (kind == "file" and key in seen) or seen.get(key, f"folder {part}") != f"folder {part}":
                raise ValueError(f"{file.path!r} is there twice, or differs from another path by its case alone")
            seen[key] = f"{kind} {part}"


_ALIAS = r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$"


class ModelSpec(Strict):
    """One model of the manifest.

    `extras`: {name: files that NAME+EXTRA adds}; empty where the entry has them anyway. `aliases`: former names of the
    entry and, with a slash, former ids of its repository.
    """

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    variant: str | None = None
    license: str
    architecture: str
    note: str = ""
    aliases: list[Annotated[str, Field(pattern=_ALIAS)]] = []
    files: Annotated[list[ModelFile], Field(min_length=1)]
    extras: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], list[ModelFile]] = {}

    @model_validator(mode="after")
    def _paths(self) -> ModelSpec:
        _one_path_each([*self.files, *(file for extra in self.extras.values() for file in extra)])
        return self

    @property
    def folder(self) -> str:
        """The name of its folder in a hub cache (the client's layout)."""
        return cache_folder(self.repo)

    @property
    def former_repos(self) -> list[str]:
        """The former ids of its repository."""
        return [alias for alias in self.aliases if "/" in alias]

    @property
    def bytes(self) -> int | None:
        """The size of all its files; None where the size of one with weights is not pinned."""
        if any(file.size is None and file.path.endswith(".safetensors") for file in self.files):
            return None
        return sum(file.size or 0 for file in self.files)


def cache_folder(repo: str) -> str:
    """Return the name of a model repository's folder in a hub cache (the client's layout)."""
    return f"models--{repo.replace('/', '--')}"
