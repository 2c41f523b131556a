"""Defines the acts of a journal: one frozen record class for each kind of change.

A record is written before its change is made, so the journal of a killed run has every change that the run may have
made. The fields of a record are the keys of its JSON object, in this order. Two record classes may share the name of an
act and differ in their keys. The acts that undo itself writes cannot be undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (the reader takes the types of the fields from the annotations)
from typing import ClassVar, TypeAlias


@dataclass(frozen=True)
class VolumeMark:
    """Written before the volume gets its marker. Undo keeps the marker."""

    act: ClassVar[str] = "mark"
    volume: Path


@dataclass(frozen=True)
class FolderCreation:
    """Written before a missing folder is made. Undo removes the folder if it is empty."""

    act: ClassVar[str] = "folder"
    path: Path


@dataclass(frozen=True)
class TargetCreation:
    """Written before a move makes an empty target folder for its link. Undo removes the folder if it is still empty."""

    act: ClassVar[str] = "folder"
    source: Path
    target: Path
    path: Path


@dataclass(frozen=True)
class MoveAct:
    """Describe one act of a folder move from `source` to `target`; `whole` is the path that has the complete data.

    Undo handles all acts of one move together. It separates a merged folder, moves a moved folder back, and removes the
    copy that a killed run left.
    """

    source: Path
    target: Path


@dataclass(frozen=True)
class FolderCopy(MoveAct):
    """Written before a folder is copied to `partial`, beside its target. Undo removes an incomplete copy."""

    act: ClassVar[str] = "copy"
    partial: Path
    whole: Path


@dataclass(frozen=True)
class CopyPlacement(MoveAct):
    """Written before the verified copy is renamed from `partial` to the target. Undo moves the folder back."""

    act: ClassVar[str] = "place"
    partial: Path
    whole: Path


@dataclass(frozen=True)
class FolderRename(MoveAct):
    """Written before a folder is renamed to a target on the same file system. Undo moves the folder back."""

    act: ClassVar[str] = "move"
    whole: Path


@dataclass(frozen=True)
class FolderSwap(MoveAct):
    """Written before the folder is renamed to `aside` and a link takes its path. Undo moves the folder back."""

    act: ClassVar[str] = "move"
    aside: Path
    whole: Path


@dataclass(frozen=True)
class OriginalRemoval(MoveAct):
    """Written before the original folder is removed; the target is complete then. Undo moves the target back."""

    act: ClassVar[str] = "drop"
    aside: Path
    whole: Path


@dataclass(frozen=True)
class MergeCopy(MoveAct):
    """Written before a merge copies files that the target does not have to `partial`. Undo removes this copy."""

    act: ClassVar[str] = "bring"
    partial: Path
    whole: Path


@dataclass(frozen=True)
class FolderMerge(MoveAct):
    """Written before a merge renames the copied files into the target. Undo separates the folders by the manifest."""

    act: ClassVar[str] = "merge"
    manifest: Path
    whole: Path


@dataclass(frozen=True)
class MoveLink:
    """Written before `path`, the old path of a moved folder, becomes a link to the target.

    `was` is the text of the link that is replaced; None: there was no link. Undo restores that link, or removes the new
    link.
    """

    act: ClassVar[str] = "link"
    source: Path
    target: Path
    path: Path
    was: str | None


@dataclass(frozen=True)
class LinkTexts:
    """Written before relative links become absolute, because they lead out of a folder that will be moved.

    `paths` are the links, `was` their earlier texts, and `texts` their new texts. Undo sets the earlier texts.
    """

    act: ClassVar[str] = "texts"
    paths: tuple[Path, ...]
    was: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class EnvironmentLink:
    """Written before a link to an environment is made in conda's `envs` folder. Undo removes the link."""

    act: ClassVar[str] = "link"
    path: Path
    target: Path


@dataclass(frozen=True)
class LinkBatch:
    """Written before the missing links of a wiped home are made again, once for all. Undo removes every link.

    `paths` are the links, and `targets` their targets, in the same order.
    """

    act: ClassVar[str] = "links"
    paths: tuple[Path, ...]
    targets: tuple[Path, ...]


@dataclass(frozen=True)
class LinkRecord:
    """Written before a link is added to links.json and relink.sh. The undo of the link also removes these entries."""

    act: ClassVar[str] = "remember"
    path: Path
    target: Path


@dataclass(frozen=True)
class FileBackup:
    """Written before a file is copied to the backups. Undo ignores this act and uses the FileChange that follows."""

    act: ClassVar[str] = "backup"
    path: Path


@dataclass(frozen=True)
class FileChange:
    """Written before a file is written or removed. Undo restores the bytes and the mode of the run's first change.

    `backup` is the path of a copy of the earlier file. `backup` and `mode` are None if the file did not exist.
    `sha256` is the digest of the new content; None: the file is removed.
    """

    act: ClassVar[str] = "file"
    path: Path
    backup: Path | None
    mode: int | None
    sha256: str | None


@dataclass(frozen=True)
class VariableChange:
    """Written before a stored environment variable changes from `was` to `value` (None: not set). Undo sets `was`."""

    act: ClassVar[str] = "variable"
    name: str
    value: str | None
    was: str | None


@dataclass(frozen=True)
class EnvironmentBuild:
    """Written before an environment is built or repaired. Undo keeps the environment."""

    act: ClassVar[str] = "environment"
    prefix: Path
    variant: str


@dataclass(frozen=True)
class EnvironmentRemoval:
    """Written before an environment is removed. Undo does not build the environment again; the next setup does."""

    act: ClassVar[str] = "remove"
    prefix: Path


@dataclass(frozen=True)
class PackageDownload:
    """Written after an installation, for each package file that the failover proxy delivered. Undo ignores this act.

    `source` is the name of the mirror that delivered the file. `size` is in bytes.
    """

    act: ClassVar[str] = "fetched"
    file: str
    source: str
    size: int


@dataclass(frozen=True)
class MirrorWarning:
    """Written after an installation, for each failure of a mirror. `event` describes the failure without secrets.

    Undo ignores this act.
    """

    act: ClassVar[str] = "mirror"
    event: str


@dataclass(frozen=True)
class SnapshotRepair:
    """Written before missing snapshots and refs of a hub repository are rebuilt at `path`. Undo keeps them."""

    act: ClassVar[str] = "snapshots"
    path: Path


@dataclass(frozen=True)
class VariableRestore:
    """Written by undo before a stored environment variable gets its earlier value."""

    act: ClassVar[str] = "unset"
    name: str


@dataclass(frozen=True)
class FileRestore:
    """Written by undo before a file gets its earlier bytes, or is removed."""

    act: ClassVar[str] = "restore"
    path: Path


@dataclass(frozen=True)
class FolderRemoval:
    """Written by undo before an empty folder is removed."""

    act: ClassVar[str] = "rmdir"
    path: Path


@dataclass(frozen=True)
class LinkRemoval:
    """Written by undo before a link is removed, or gets its earlier target."""

    act: ClassVar[str] = "unlink"
    path: Path


@dataclass(frozen=True)
class LinkTextRestore:
    """Written by undo before a link inside a folder gets its earlier text."""

    act: ClassVar[str] = "text"
    path: Path


@dataclass(frozen=True)
class LinkReplacement:
    """Written by undo before a link is replaced by the moved folder; the path `whole` has its complete data."""

    act: ClassVar[str] = "unlink"
    path: Path
    whole: Path


@dataclass(frozen=True)
class MergeSplit:
    """Written by undo before files that came from `source` are copied from the merged `target` to `partial`."""

    act: ClassVar[str] = "part"
    source: Path
    target: Path
    partial: Path
    whole: Path


@dataclass(frozen=True)
class MergeCleanup:
    """Written by undo before files are removed from the merged folder `path`; the folder `whole` has them again."""

    act: ClassVar[str] = "clear"
    path: Path
    whole: Path


@dataclass(frozen=True)
class RunUndone:
    """Written by undo at its end. Afterwards, undo skips the run `run`, unless the user gives its name."""

    act: ClassVar[str] = "undone"
    run: str


@dataclass(frozen=True)
class UnknownAct:
    """Hold the name of an act that has no record class here. Undo ignores the act; the run counts as one with acts."""

    name: str


@dataclass(frozen=True)
class IncompleteAct:
    """Hold the name of an act whose JSON object does not have the required field `field`. Undo rejects its run.

    Such acts come from schema 1, which wrote `link`, `copy` and `drop` with other keys.
    """

    name: str
    field: str


Act: TypeAlias = (
    VolumeMark
    | FolderCreation
    | TargetCreation
    | FolderCopy
    | CopyPlacement
    | FolderRename
    | FolderSwap
    | OriginalRemoval
    | MergeCopy
    | FolderMerge
    | MoveLink
    | LinkTexts
    | EnvironmentLink
    | LinkBatch
    | LinkRecord
    | FileBackup
    | FileChange
    | VariableChange
    | EnvironmentBuild
    | EnvironmentRemoval
    | PackageDownload
    | MirrorWarning
    | SnapshotRepair
    | VariableRestore
    | FileRestore
    | FolderRemoval
    | LinkRemoval
    | LinkTextRestore
    | LinkReplacement
    | MergeSplit
    | MergeCleanup
    | RunUndone
)
ReadAct: TypeAlias = Act | UnknownAct | IncompleteAct
