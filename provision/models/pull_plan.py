"""What a pull will fetch: the files, their sources, and their bytes."""

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
    """One file that is to be fetched, as the hub lists it; `have` bytes of it are here from an earlier run."""

    file: ModelFile
    listed: ListedFile
    have: int

    @property
    def size(self) -> int | None:
        """The bytes that are right; None where a hash is pinned and no size: a listing's word is none then."""
        return self.file.size if self.file.locked else self.listed.size

    @property
    def proof(self) -> dict[str, set[str]]:
        """{kind of hash: the right one}: the strongest that is pinned; a listing's word counts where none is."""
        if self.file.sha256 is not None:
            return {"sha256": {self.file.sha256}}
        if self.file.git_sha1 is not None:
            return {"git_sha1": {self.file.git_sha1}}
        return {self.listed.kind: {self.listed.blob}}

    @property
    def content(self) -> str:
        """What is fetched, by its hash: files of one content are fetched once. The partial and its lock bear this name.

        A listing may name another blob each time; what has arrived must be found again.
        """
        return content_name(self.file, self.listed)


def content_name(file: ModelFile, listed: ListedFile) -> str:
    """Return the name of a file's content: its pinned hash, else the name that the hub lists."""
    return file.sha256 or file.git_sha1 or listed.blob


@dataclass(frozen=True)
class PullPlan:
    """What a pull would do. `states` of all files; `needed` of them are fetched, from the first of `hubs` that can.

    `unproven`: how many files are here that nobody has pinned, and no hub was asked about; `by_mirrors`: {whose word:
    how many} of those that nobody but a mirror has pinned.
    """

    states: list[FileState]
    needed: list[FileToFetch]
    hubs: list[Hub]
    free: int
    unproven: int = 0
    by_mirrors: Mapping[str, int] = field(default_factory=dict)

    @property
    def fetched(self) -> list[FileToFetch]:
        """The first of each content that is needed."""
        found: dict[str, FileToFetch] = {}
        for each in self.needed:
            found.setdefault(each.content, each)
        return list(found.values())

    @property
    def bytes_wanted(self) -> int:
        """The bytes that would arrive."""
        return sum(each.listed.size - each.have for each in self.fetched)

    @property
    def is_done(self) -> bool:
        """Whether every file is there and right."""
        return all(each.state == "ok" for each in self.states)
