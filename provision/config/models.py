"""Defines the records of models.toml: each model's repository, its revision, and its files with their hashes."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, model_validator

from provision.config.safe_model_path import check_model_path
from provision.config.toml import Strict

if TYPE_CHECKING:
    from collections.abc import Sequence


class ModelFile(Strict):
    """Describe one file of a model: its path in the repository, its size in bytes and its hash.

    If `size` or both hashes are None, the manifest does not pin them. They are then read from the official hub, or with
    `pull --trust-mirror` also from a mirror. `git_sha1` is git's blob hash. It covers the size and the content, so a
    file with `git_sha1` alone needs its size.
    """

    path: Annotated[str, AfterValidator(check_model_path)]
    size: Annotated[int, Field(ge=0)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    git_sha1: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None

    @property
    def locked(self) -> bool:
        """Return whether the manifest pins the content of the file by a hash."""
        return self.sha256 is not None or self.git_sha1 is not None

    @model_validator(mode="after")
    def _sized(self) -> ModelFile:
        if self.git_sha1 is not None and self.sha256 is None and self.size is None:
            raise ValueError(f"{self.path!r} has a git_sha1 and no size; add the size, because git's hash covers it")
        return self


def _check_paths_differ(files: Sequence[ModelFile]) -> None:
    """Check that all files can exist together, also on a file system that ignores case.

    Raises:
        ValueError: two paths are equal or differ only in case, or one file's path is the folder of another file.
    """
    kinds: dict[str, str] = {}
    for file in files:
        for part in [file.path, *map(str, PurePosixPath(file.path).parents)][:-1]:
            key = unicodedata.normalize("NFC", part).casefold()
            kind = "file" if part == file.path else "folder"
            if (kind == "file" and key in kinds) or kinds.get(key, f"folder {part}") != f"folder {part}":
                clash = "is listed twice, is both a file and a folder, or differs from another path only in case"
                raise ValueError(f"path {file.path!r} {clash}")
            kinds[key] = f"{kind} {part}"


_ALIAS = r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$"


class ModelSpec(Strict):
    """Describe one model of the manifest.

    `extras` has {EXTRA: files}: the files that the model name `NAME+EXTRA` adds to `files`. The list is empty if
    `files` contains them already. `aliases` are former names of the model; an alias with a slash is a former id of its
    repository.
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
        _check_paths_differ([*self.files, *(file for extra in self.extras.values() for file in extra)])
        return self

    @property
    def folder(self) -> str:
        """Return the name of the repository's folder in a hub cache: models--OWNER--NAME."""
        return cache_folder(self.repo)

    @property
    def former_repos(self) -> list[str]:
        """Return the aliases that are former ids of the repository, such as "OWNER/NAME"."""
        return [alias for alias in self.aliases if "/" in alias]

    @property
    def bytes(self) -> int | None:
        """Return the total size of `files` in bytes; None if the size of a .safetensors file is not pinned."""
        if any(file.size is None and file.path.endswith(".safetensors") for file in self.files):
            return None
        return sum(file.size or 0 for file in self.files)


def cache_folder(repo: str) -> str:
    """Return the name of a model repository's folder in a hub cache.

    Source: the cache layout of huggingface_hub, models--OWNER--NAME.
    """
    return f"models--{repo.replace('/', '--')}"
