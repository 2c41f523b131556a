"""Tests the bytes of a journal: each kind of act, and a header with fixed values."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import get_args

import pytest

from provision.volume import journal_acts as acts
from provision.volume.journal import Journal, JournalEntry, JournalHeader, read_journal

JOURNALS = Path(__file__).resolve().parents[2] / "data" / "journals"
HOME, VOLUME = Path("/home/user"), Path("/data/volume")
BACKUP = VOLUME / ".firstlight/backup/20261201T080000Z-4242"
# A name with bytes that are not UTF-8, a line end, a quotation mark, a backslash, and a line separator (U+2028).
ODD = os.fsdecode(b'w\xff\xfe "x"\n\\' + "文件\u2028".encode())
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def ends(name: str) -> tuple[Path, Path]:
    return HOME / name, VOLUME / "relocated" / name


def partial(name: str) -> Path:
    return VOLUME / f"relocated/.{name}.firstlight-partial"


def aside(name: str) -> Path:
    return HOME / f".{name}.firstlight-aside"


SETUP: list[acts.Act] = [
    acts.VolumeMark(VOLUME),
    acts.FolderCreation(VOLUME / "relocated"),
    acts.FolderCopy(*ends("hub"), partial=partial("hub"), whole=HOME / "hub"),
    acts.CopyPlacement(*ends("hub"), partial=partial("hub"), whole=HOME / "hub"),
    acts.FolderSwap(*ends("hub"), aside=aside("hub"), whole=VOLUME / "relocated/hub"),
    acts.OriginalRemoval(*ends("hub"), aside=aside("hub"), whole=VOLUME / "relocated/hub"),
    acts.FolderRename(*ends(ODD), whole=HOME / ODD),
    acts.MoveLink(*ends(ODD), path=HOME / ODD, was=None),
    acts.MergeCopy(*ends("both"), partial=partial("both"), whole=HOME / "both"),
    acts.FolderMerge(*ends("both"), manifest=BACKUP / "merge-0.json", whole=HOME / "both"),
    acts.FolderSwap(*ends("both"), aside=aside("both"), whole=VOLUME / "relocated/both"),
    acts.MergeCopy(*ends("both"), partial=partial("both"), whole=aside("both")),
    acts.FolderMerge(*ends("both"), manifest=BACKUP / "merge-1.json", whole=aside("both")),
    acts.OriginalRemoval(*ends("both"), aside=aside("both"), whole=VOLUME / "relocated/both"),
    acts.TargetCreation(*ends("pip"), path=VOLUME / "relocated/pip"),
    acts.MoveLink(*ends("pip"), path=HOME / "pip", was=None),
    acts.MoveLink(*ends("uv"), path=HOME / "uv", was="../old place/uv"),
    acts.MoveLink(*ends("uv"), path=HOME / "uv", was=str(VOLUME / "elsewhere")),
    acts.FolderCopy(*ends("killed"), partial=partial("killed"), whole=HOME / "killed"),
    acts.LinkBatch(
        paths=(HOME / "one", HOME / ODD, HOME / "hub"),
        targets=(VOLUME / "one", VOLUME / ODD, VOLUME / "relocated/hub"),
    ),
    acts.LinkBatch(paths=(), targets=()),
    acts.EnvironmentBuild(VOLUME / "envs/diffusers", variant="cpu"),
    acts.PackageDownload("torch-9.9+tiny-py3-none-any.whl", source="near", size=1234567890123),
    acts.MirrorWarning("near is not asked again in this run: it answers 503 — „слишком“"),
    acts.FolderCreation(HOME / ".conda/envs"),
    acts.EnvironmentLink(HOME / ".conda/envs/diffusers", target=VOLUME / "envs/diffusers"),
    acts.LinkRecord(HOME / ODD, target=VOLUME / "relocated" / ODD),
    acts.FileBackup(HOME / ".bashrc"),
    acts.FileChange(HOME / ".bashrc", backup=BACKUP / "file-00000001", mode=0o640, sha256="1" * 64),
    acts.FileBackup(HOME / ".bashrc"),
    acts.FileChange(HOME / ".bashrc", backup=BACKUP / "file-00000002", mode=0o644, sha256=DIGEST),
    acts.FileBackup(HOME / ".config/pip/pip.conf"),
    acts.FileChange(HOME / ".config/pip/pip.conf", backup=None, mode=None, sha256=DIGEST),
    acts.FileBackup(HOME / ODD),
    acts.FileChange(HOME / ODD, backup=BACKUP / "file-00000003", mode=0, sha256=None),
    acts.VariableChange("HF_ENDPOINT", value=f"/{ODD}", was=None),
    acts.VariableChange("PIP_INDEX_URL", value=None, was="http://127.0.0.1/simple"),
    acts.VariableChange("PIP_INDEX_URL", value="", was=None),
    acts.SnapshotRepair(VOLUME / "cache/huggingface/hub/models--owner--model"),
    acts.EnvironmentRemoval(VOLUME / "envs/old"),
    acts.LinkTexts(paths=(HOME / ODD, HOME / "a/b"), was=("../" + ODD, ".//..//c/"), texts=("/" + ODD, "/c")),
]
UNDO: list[acts.Act] = [
    acts.VariableRestore("HF_ENDPOINT"),
    acts.FileRestore(HOME / ODD),
    acts.LinkRemoval(HOME / ".conda/envs/diffusers"),
    acts.FolderRemoval(HOME / ".conda/envs"),
    acts.MergeSplit(*ends("both"), partial=aside("both"), whole=VOLUME / "relocated/both"),
    acts.LinkReplacement(HOME / "both", whole=aside("both")),
    acts.MergeCleanup(VOLUME / "relocated/both", whole=HOME / "both"),
    acts.LinkReplacement(HOME / "hub", whole=VOLUME / "relocated/hub"),
    acts.RunUndone("20261201T080000Z-4242"),
    acts.LinkTextRestore(HOME / ODD),
]
GOLDEN = {"setup": ("setup", 1796112000, 4242, SETUP), "undo": ("undo", 1796115600, 4243, UNDO)}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_journal_has_the_bytes_of_the_golden_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, start, pid, records = GOLDEN[name]
    times = iter(start + number + 0.5 for number in range(len(records)))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(times))
        patch.setattr(time, "gmtime", lambda: time.struct_time((2026, 12, 1, 8 + pid - 4242, 0, 0, 1, 335, 0)))
        patch.setattr(os, "getpid", lambda: pid)
        patch.setattr(platform, "node", lambda: "gpu-host")
        patch.setenv("HOME", str(HOME / ODD))
        journal = Journal(tmp_path / "journal", command)
        for act in records:
            journal.record(act)
    assert journal.path is not None
    root = f', "root": {json.dumps(str(tmp_path.parent))}'.encode()
    written = journal.path.read_bytes()
    assert written.count(root) == 1, "the header names the root"
    assert written.replace(root, b"") == (JOURNALS / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_journal_is_read_into_the_records_from_which_it_was_written(name: str) -> None:
    command, start, pid, records = GOLDEN[name]
    journal = read_journal(JOURNALS / f"{name}.jsonl")
    assert journal.header == JournalHeader(f"20261201T0{8 + pid - 4242}0000Z", command, "gpu-host", str(HOME / ODD))
    assert list(journal.entries) == [
        JournalEntry(start + number + 0.5, record) for number, record in enumerate(records)
    ]


def test_golden_journals_have_every_kind_of_record() -> None:
    assert {type(record) for record in (*SETUP, *UNDO)} == set(get_args(acts.Act))
    names = {kind.act for kind in get_args(acts.Act)}
    assert len(names) == 28
    for name in names:
        keys = [set(kind.__dataclass_fields__) for kind in get_args(acts.Act) if kind.act == name]
        assert len({frozenset(names) for names in keys}) == len(keys), f"two records of {name} have the same keys"


def test_journal_of_schema_1_is_read_with_its_unknown_and_incomplete_acts() -> None:
    journal = read_journal(JOURNALS / "schema-1.jsonl")
    assert journal.header == JournalHeader("20260301T070000Z", None, None, None)
    link = acts.IncompleteAct("link", "path")
    assert [entry.act for entry in journal.entries] == [
        acts.VolumeMark(VOLUME),
        acts.UnknownAct("remove-empty"),
        link,
        acts.UnknownAct("rename"),
        link,
        acts.IncompleteAct("copy", "target"),
        acts.UnknownAct("aside"),
        link,
        acts.IncompleteAct("drop", "source"),
        acts.EnvironmentBuild(VOLUME / "envs/diffusers", "cpu"),
        acts.EnvironmentRemoval(VOLUME / "envs/old"),
    ]


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        (b'{"at": 1, "act": "teleport", "path": "/x"}', JournalEntry(1.0, acts.UnknownAct("teleport"))),
        (b'{"at": "soon"}', JournalEntry(0.0, acts.UnknownAct("None"))),
        (b'{"act": "folder", "path": "/x", "since": 3}', JournalEntry(0.0, acts.FolderCreation(Path("/x")))),
        (b'{"act": "folder", "path": null}', JournalEntry(0.0, acts.IncompleteAct("folder", "path"))),
        (b'{"act": "links", "paths": "/x", "targets": []}', JournalEntry(0.0, acts.IncompleteAct("links", "paths"))),
        (b'{"act": "fetched", "file": "a", "source": "b"}', JournalEntry(0.0, acts.IncompleteAct("fetched", "size"))),
        (b"not JSON", None),
        (b"[1]", None),
        (b"\xff", None),
        (b'{"at": 2.5, "act": "folder", "pa', None),
    ],
)
def test_irregular_journal_line_is_an_unknown_act_or_an_incomplete_act_or_skipped(
    tmp_path: Path, line: bytes, entry: JournalEntry | None
) -> None:
    path = tmp_path / "odd.jsonl"
    golden = JOURNALS / "undo.jsonl"
    path.write_bytes(golden.read_bytes() + line)
    assert list(read_journal(path).entries) == [*read_journal(golden).entries, *([entry] if entry else [])]


def test_empty_journal_has_a_header_without_values(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    journal = read_journal(path)
    assert (journal.header, journal.entries) == (JournalHeader(None, None, None, None), ())
