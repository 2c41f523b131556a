"""The bytes of a journal: every act that a run records, and a header with fixed values."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from provision.volume.journal import Journal

JOURNALS = Path(__file__).resolve().parents[2] / "data" / "journals"
HOME, VOLUME = Path("/home/user"), Path("/data/volume")
BACKUP = VOLUME / ".firstlight/backup/20261201T080000Z-4242"
# A name of any bytes: not UTF-8, a line's end, a quotation mark, a backslash, a separator that JSON may hold raw.
ODD = os.fsdecode(b'w\xff\xfe "x"\n\\' + "文件\u2028".encode())
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def moved(name: str, **paths: object) -> dict[str, object]:
    return {"source": HOME / name, "target": VOLUME / "relocated" / name, **paths}


def partial(name: str) -> Path:
    return VOLUME / f"relocated/.{name}.firstlight-partial"


def aside(name: str) -> Path:
    return HOME / f".{name}.firstlight-aside"


SETUP: list[tuple[str, dict[str, object]]] = [
    ("mark", {"volume": VOLUME}),
    ("folder", {"path": VOLUME / "relocated"}),
    ("copy", moved("hub", partial=partial("hub"), whole=HOME / "hub")),
    ("place", moved("hub", partial=partial("hub"), whole=HOME / "hub")),
    ("move", moved("hub", aside=aside("hub"), whole=VOLUME / "relocated/hub")),
    ("drop", moved("hub", aside=aside("hub"), whole=VOLUME / "relocated/hub")),
    ("move", moved(ODD, whole=HOME / ODD)),
    ("link", moved(ODD, path=HOME / ODD, was=None)),
    ("bring", moved("both", partial=partial("both"), whole=HOME / "both")),
    ("merge", moved("both", manifest=BACKUP / "merge-0.json", whole=HOME / "both")),
    ("move", moved("both", aside=aside("both"), whole=VOLUME / "relocated/both")),
    ("bring", moved("both", partial=partial("both"), whole=aside("both"))),
    ("merge", moved("both", manifest=BACKUP / "merge-1.json", whole=aside("both"))),
    ("drop", moved("both", aside=aside("both"), whole=VOLUME / "relocated/both")),
    ("folder", moved("pip", path=VOLUME / "relocated/pip")),
    ("link", moved("pip", path=HOME / "pip", was=None)),
    ("link", moved("uv", path=HOME / "uv", was="../old place/uv")),
    ("link", moved("uv", path=HOME / "uv", was=str(VOLUME / "elsewhere"))),
    ("copy", moved("killed", partial=partial("killed"), whole=HOME / "killed")),
    (
        "links",
        {
            "paths": [str(HOME / "one"), str(HOME / ODD), str(HOME / "hub")],
            "targets": [str(VOLUME / "one"), str(VOLUME / ODD), str(VOLUME / "relocated/hub")],
        },
    ),
    ("links", {"paths": [], "targets": []}),
    ("environment", {"prefix": VOLUME / "envs/diffusers", "variant": "cpu"}),
    ("fetched", {"file": "torch-9.9+tiny-py3-none-any.whl", "source": "near", "size": 1234567890123}),
    ("mirror", {"event": "near is not asked again in this run: it answers 503 — „слишком“"}),
    ("folder", {"path": HOME / ".conda/envs"}),
    ("link", {"path": HOME / ".conda/envs/diffusers", "target": VOLUME / "envs/diffusers"}),
    ("remember", {"path": HOME / ODD, "target": VOLUME / "relocated" / ODD}),
    ("backup", {"path": HOME / ".bashrc"}),
    ("file", {"path": HOME / ".bashrc", "backup": BACKUP / "file-00000001", "mode": 0o640, "sha256": "1" * 64}),
    ("backup", {"path": HOME / ".bashrc"}),
    ("file", {"path": HOME / ".bashrc", "backup": BACKUP / "file-00000002", "mode": 0o644, "sha256": DIGEST}),
    ("backup", {"path": HOME / ".config/pip/pip.conf"}),
    ("file", {"path": HOME / ".config/pip/pip.conf", "backup": None, "mode": None, "sha256": DIGEST}),
    ("backup", {"path": HOME / ODD}),
    ("file", {"path": HOME / ODD, "backup": BACKUP / "file-00000003", "mode": 0, "sha256": None}),
    ("variable", {"name": "HF_ENDPOINT", "value": f"/{ODD}", "was": None}),
    ("variable", {"name": "PIP_INDEX_URL", "value": None, "was": "http://127.0.0.1/simple"}),
    ("variable", {"name": "PIP_INDEX_URL", "value": "", "was": None}),
    ("snapshots", {"path": VOLUME / "cache/huggingface/hub/models--owner--model"}),
    ("remove", {"prefix": VOLUME / "envs/old"}),
]
UNDO: list[tuple[str, dict[str, object]]] = [
    ("unset", {"name": "HF_ENDPOINT"}),
    ("restore", {"path": HOME / ODD}),
    ("unlink", {"path": HOME / ".conda/envs/diffusers"}),
    ("rmdir", {"path": HOME / ".conda/envs"}),
    ("part", moved("both", partial=aside("both"), whole=VOLUME / "relocated/both")),
    ("unlink", {"path": HOME / "both", "whole": aside("both")}),
    ("clear", {"path": VOLUME / "relocated/both", "whole": HOME / "both"}),
    ("unlink", {"path": HOME / "hub", "whole": VOLUME / "relocated/hub"}),
    ("undone", {"run": "20261201T080000Z-4242"}),
]
GOLDEN = {"setup": ("setup", 1796112000, 4242, SETUP), "undo": ("undo", 1796115600, 4243, UNDO)}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_a_journal_is_written_byte_by_byte_as_it_always_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, start, pid, acts = GOLDEN[name]
    times = iter(start + number + 0.5 for number in range(len(acts)))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(times))
        patch.setattr(time, "gmtime", lambda: time.struct_time((2026, 12, 1, 8 + pid - 4242, 0, 0, 1, 335, 0)))
        patch.setattr(os, "getpid", lambda: pid)
        patch.setattr(platform, "node", lambda: "gpu-host")
        patch.setenv("HOME", str(HOME / ODD))
        journal = Journal(tmp_path / "journal", command)
        for act, what in acts:
            journal.record(act, **what)
    assert journal.path is not None
    assert journal.path.read_bytes() == (JOURNALS / f"{name}.jsonl").read_bytes()
