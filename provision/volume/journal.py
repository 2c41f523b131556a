"""The append-only record of what a run is about to change, on the volume, fsynced before each change."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

# 1: started and pid. 2: with the command, host and home; paths of any bytes (as JSON escapes); acts that undo reads.
SCHEMA = 2


class Journal:
    """One file a run, made at the first record: a run that changes nothing leaves nothing."""

    def __init__(self, folder: Path, command: str = "") -> None:
        """Keep the folder and the command that runs; write nothing yet."""
        self.folder = folder
        self.command = command
        self.path: Path | None = None

    @property
    def backup(self) -> Path:
        """Where this run keeps earlier bytes. Only after the first record."""
        assert self.path is not None  # noqa: S101 (for the type alone)
        return self.folder.with_name("backup") / self.path.stem

    def record(self, act: str, **what: object) -> None:
        """Write one line and force it to the disk before the caller acts.

        Args:
            act: what is about to be done, a verb.
            what: the things it is done to; lists as they are, paths as text.
        """
        lines: list[dict[str, object]] = []
        if self.path is None:
            lines.append(self._begin())
        plain = {key: value if isinstance(value, int | list | None) else str(value) for key, value in what.items()}
        lines.append({"at": time.time(), "act": act, **plain})
        assert self.path is not None  # noqa: S101 (for the type alone)
        with self.path.open("a", encoding="ascii") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def _begin(self) -> dict[str, object]:
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        names = (f"{stamp}-{os.getpid()}{suffix}.jsonl" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        self.path = next(path for path in map(self.folder.joinpath, names) if not path.exists())
        return {
            "schema": SCHEMA,
            "run": self.path.stem,
            "started": stamp,
            "command": self.command,
            "host": platform.node(),
            "pid": os.getpid(),
            "home": str(Path.home()),
        }
