"""The acts of a journal, a frozen record each.

A record is written before its change is made, so that a killed run names all that it may have changed. The fields of
a record are the keys of its JSON object, in their order; two records may share the name of an act and differ in keys.
The acts of an undo are never undone in turn: their journal is no run of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (the reader takes the types of the fields from the annotations)
from typing import ClassVar, TypeAlias


@dataclass(frozen=True)
class VolumeMark:
    """Written before the volume gets its marker. Undo leaves the marker."""

    act: ClassVar[str] = "mark"
    volume: Path


@dataclass(frozen=True)
class FolderCreation:
    """Written before a missing folder is made. Undo removes the folder if it is empty."""

    act: ClassVar[str] = "folder"
    path: Path


@dataclass(frozen=True)
class TargetCreation:
    """Written before a move makes the empty folder that its link leads to. Undo removes the folder if it is empty."""

    act: ClassVar[str] = "folder"
    source: Path
    target: Path
    path: Path


@dataclass(frozen=True)
class MoveAct:
    """An act on one folder that moves from `source` to `target`; `whole` is where its complete data lies then.

    Undo handles all acts of one pair together: it parts a merged folder, moves a moved one back, and removes the copy
    that a killed run left.
    """

    source: Path
    target: Path


@dataclass(frozen=True)
class FolderCopy(MoveAct):
    """Written before a folder is copied to `partial`, beside its target. Undo removes an unfinished copy."""

    act: ClassVar[str] = "copy"
    partial: Path
    whole: Path


@dataclass(frozen=True)
class CopyPlacement(MoveAct):
    """Written before the verified copy gets the target's name. Undo moves the folder back."""

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
    """Written before a link takes the folder's path, and the folder the name `aside`. Undo moves the folder back."""

    act: ClassVar[str] = "move"
    aside: Path
    whole: Path


@dataclass(frozen=True)
class OriginalRemoval(MoveAct):
    """Written before the old folder is removed, once the target is complete. Undo moves the target back."""

    act: ClassVar[str] = "drop"
    aside: Path
    whole: Path


@dataclass(frozen=True)
class MergeCopy(MoveAct):
    """Written before the files that the target lacks are copied to `partial`. Undo removes an unfinished copy."""

    act: ClassVar[str] = "bring"
    partial: Path
    whole: Path


@dataclass(frozen=True)
class FolderMerge(MoveAct):
    """Written before copied files get their names in a filled target. Undo parts the two folders by the manifest."""

    act: ClassVar[str] = "merge"
    manifest: Path
    whole: Path


@dataclass(frozen=True)
class MoveLink:
    """Written before `path`, a moved folder's old path, is linked to the target.

    `was` is the text of the link that it replaces, None without one. Undo restores that link, or removes the new one.
    """

    act: ClassVar[str] = "link"
    source: Path
    target: Path
    path: Path
    was: str | None


@dataclass(frozen=True)
class EnvironmentLink:
    """Written before conda's folder gets a link to an environment. Undo removes the link."""

    act: ClassVar[str] = "link"
    path: Path
    target: Path


@dataclass(frozen=True)
class LinkBatch:
    """Written before the links of a wiped home are made again, all in one record. Undo removes every link.

    `paths` and `targets` are of one length.
    """

    act: ClassVar[str] = "links"
    paths: tuple[Path, ...]
    targets: tuple[Path, ...]


@dataclass(frozen=True)
class LinkRecord:
    """Written before links.json and relink.sh list a link. Undo of the link itself removes it from them."""

    act: ClassVar[str] = "remember"
    path: Path
    target: Path


@dataclass(frozen=True)
class FileBackup:
    """Written before a file is copied to the backup. Undo reads the FileChange that follows instead."""

    act: ClassVar[str] = "backup"
    path: Path


@dataclass(frozen=True)
class FileChange:
    """Written before a file is written or removed. Undo restores the bytes and the mode of the run's first change.

    `backup` and `mode` are None where the file did not exist; `sha256` is of the new bytes, None where it is removed.
    """

    act: ClassVar[str] = "file"
    path: Path
    backup: Path | None
    mode: int | None
    sha256: str | None


@dataclass(frozen=True)
class VariableChange:
    """Written before a variable of the volume changes; None means not set. Undo sets the earlier value."""

    act: ClassVar[str] = "variable"
    name: str
    value: str | None
    was: str | None


@dataclass(frozen=True)
class EnvironmentBuild:
    """Written before an environment is built or repaired. Undo leaves the environment."""

    act: ClassVar[str] = "environment"
    prefix: Path
    variant: str


@dataclass(frozen=True)
class EnvironmentRemoval:
    """Written before an environment is removed. Undo does not build it again; setup does."""

    act: ClassVar[str] = "remove"
    prefix: Path


@dataclass(frozen=True)
class PackageDownload:
    """Written after an installation, for every package file that came through the relay: its source and bytes.

    Undo ignores it.
    """

    act: ClassVar[str] = "fetched"
    file: str
    source: str
    size: int


@dataclass(frozen=True)
class MirrorWarning:
    """Written after an installation, for every failure of a mirror, without secrets. Undo ignores it."""

    act: ClassVar[str] = "mirror"
    event: str


@dataclass(frozen=True)
class SnapshotRepair:
    """Written before missing snapshots and refs of a hub repository are rebuilt. Undo leaves them."""

    act: ClassVar[str] = "snapshots"
    path: Path


@dataclass(frozen=True)
class VariableRestore:
    """Written by undo before a variable gets its earlier value."""

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
    """Written by undo before a link is removed, or led back to its earlier target."""

    act: ClassVar[str] = "unlink"
    path: Path


@dataclass(frozen=True)
class LinkReplacement:
    """Written by undo before a link makes way for the folder itself, whose complete data lies at `whole`."""

    act: ClassVar[str] = "unlink"
    path: Path
    whole: Path


@dataclass(frozen=True)
class MergeSplit:
    """Written by undo before the files that came from `source` are copied out of a merged target to `partial`."""

    act: ClassVar[str] = "part"
    source: Path
    target: Path
    partial: Path
    whole: Path


@dataclass(frozen=True)
class MergeCleanup:
    """Written by undo before the files that `whole` holds again are removed from the merged folder."""

    act: ClassVar[str] = "clear"
    path: Path
    whole: Path


@dataclass(frozen=True)
class RunUndone:
    """Written by undo at its end. From then on the run of this name is not undone again unless it is named."""

    act: ClassVar[str] = "undone"
    run: str


@dataclass(frozen=True)
class UnknownAct:
    """An act that this version does not write. It counts as an act of its run; undo ignores it."""

    name: str


@dataclass(frozen=True)
class IncompleteAct:
    """An act of a name that this version writes, without one of its fields. Undo refuses the run.

    Schema 1 wrote `link`, `copy` and `drop` with other keys.
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
    | LinkReplacement
    | MergeSplit
    | MergeCleanup
    | RunUndone
)
ReadAct: TypeAlias = Act | UnknownAct | IncompleteAct
