"""Describes the plan of a pull: the files to download, their hubs and their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.config.models import ModelFile
    from provision.models.hub_client import Hub, ListedFile
    from provision.models.verify import FileState


@dataclass(frozen=True)
class FileToFetch:
    """Describe one file to download, as the hub lists it; `have` bytes of it are present from an earlier run."""

    file: ModelFile
    listed: ListedFile
    have: int

    @property
    def size(self) -> int | None:
        """Return the right number of bytes, or None.

        It is None if a hash is pinned and no size: the size of a listing is not trusted then.
        """
        return self.file.size if self.file.locked else self.listed.size

    @property
    def proof(self) -> dict[str, set[str]]:
        """Return {kind of hash: {right hash}} for the strongest pinned hash.

        The hash of the listing counts only if none is pinned.
        """
        if self.file.sha256 is not None:
            return {"sha256": {self.file.sha256}}
        if self.file.git_sha1 is not None:
            return {"git_sha1": {self.file.git_sha1}}
        return {self.listed.kind: {self.listed.blob}}

    @property
    def content(self) -> str:
        """Return the name of the content, its hash. Files with the same content are downloaded once.

        The partial file and its lock have this name. So a later run finds them, even if the listing names another blob.
        """
        return content_name(self.file, self.listed)


def content_name(file: ModelFile, listed: ListedFile) -> str:
    """Return the name of a file's content: its pinned hash, else the blob in the listing."""
    return file.sha256 or file.git_sha1 or listed.blob


@dataclass(frozen=True)
class PullPlan:
    """Describe what a pull does.

    `states` are of all files. `needed` are the files to download, each from the first of `hubs` that delivers it.
    `free`
    is the free disk space in bytes.
    `unproven`: the number of present files that have no pinned hash and that no hub could confirm.
    `by_mirrors`: {hub: number} of the present files whose hash only this mirror has supplied.
    """

    states: list[FileState]
    needed: list[FileToFetch]
    hubs: list[Hub]
    free: int
    unproven: int = 0
    by_mirrors: Mapping[str, int] = field(default_factory=dict)

    @property
    def fetched(self) -> list[FileToFetch]:
        """Return one file for each content that is needed."""
        files: dict[str, FileToFetch] = {}
        for file in self.needed:
            files.setdefault(file.content, file)
        return list(files.values())

    @property
    def bytes_wanted(self) -> int:
        """Return the number of bytes to download."""
        return sum(file.listed.size - file.have for file in self.fetched)

    @property
    def is_done(self) -> bool:
        """Return whether every file is present and right."""
        return all(state.state == "ok" for state in self.states)
