"""The append-only record of what a run is about to change, on the volume, fsynced before each change."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1


class Journal:
    """One file a run, made at the first record: a run that changes nothing leaves nothing."""

    def __init__(self, folder: Path) -> None:
        """Keep the folder; write nothing yet."""
        self.folder = folder
        self.path: Path | None = None

    def record(self, act: str, **what: object) -> None:
        """Write one line and force it to the disk before the caller acts.

        Args:
            act: what is about to be done, a verb.
            what: the things it is done to; paths are written as text.
        """
        lines: list[dict[str, object]] = []
        if self.path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            self.path = self.folder / f"{stamp}-{os.getpid()}.jsonl"
            lines.append({"schema": SCHEMA, "started": stamp, "pid": os.getpid()})
        lines.append({"at": time.time(), "act": act, **{key: str(value) for key, value in what.items()}})
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
