"""Tests merges of folders that hold SQLite databases: no database is ever combined with the log of another."""

from __future__ import annotations

import os
import shutil
import sqlite3
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.core.step import State
from tests.provision.folder_moves import relocation_step

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("db", "db-wal", "db-shm", "db-journal")
SUBSETS: list[tuple[str, ...]] = [
    (),
    ("db",),
    ("db", "db-wal"),
    ("db", "db-wal", "db-shm"),
    ("db", "db-journal"),
    ("db-wal",),
    ("db-journal",),
]


def side(folder: Path, text: str, present: tuple[str, ...], time: int) -> None:
    folder.mkdir(parents=True)
    (folder / f"{text}.txt").write_text(text)
    for name in present:
        (folder / name).write_text(f"{text} {name}")
        os.utime(folder / name, (time, time))


def units(folder: Path) -> dict[str, dict[str, str]]:
    """Return {name of a database: {log or "": content}} of the databases and logs of a folder."""
    found: dict[str, dict[str, str]] = {}
    for file in folder.iterdir():
        if file.name.startswith("db"):
            base, log = next(
                ((file.name.removesuffix(log), log) for log in ("-wal", "-shm", "-journal") if file.name.endswith(log)),
                (file.name, ""),
            )
            found.setdefault(base, {})[log] = file.read_text()
    return found


@pytest.mark.parametrize("is_home_newer", [True, False])
@pytest.mark.parametrize("of_volume", SUBSETS, ids="+".join)
@pytest.mark.parametrize("of_home", SUBSETS, ids="+".join)
def test_no_database_stands_beside_the_log_of_another(
    source: Path, volume: Path, of_home: tuple[str, ...], of_volume: tuple[str, ...], is_home_newer: bool
) -> None:
    side(source, "home", of_home, 20 if is_home_newer else 10)
    side(Root(volume).hub, "volume", of_volume, 15)
    step = relocation_step(source, volume)
    step.apply()
    assert step.check().state is State.OK
    merged = units(source)
    for unit in merged.values():
        origins = {text.split()[0] for text in unit.values()}
        assert len(origins) == 1, merged
    contents = sorted(text for unit in merged.values() for text in unit.values())
    assert contents == sorted([f"home {name}" for name in of_home] + [f"volume {name}" for name in of_volume])
    for text, present in (("home", of_home), ("volume", of_volume)):
        assert len([unit for unit in merged.values() if text in next(iter(unit.values()))]) == bool(present)


def test_databases_with_unplayed_logs_keep_their_rows(source: Path, volume: Path) -> None:
    """Both sides have a database in WAL mode, as a killed program leaves it: all rows are in the log."""
    for folder, rows in ((source, ["a", "b"]), (Root(volume).hub, ["c"])):
        folder.mkdir(parents=True)
        live = folder.with_name(f"{folder.name}-live")
        live.mkdir()
        with sqlite3.connect(live / "db") as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE t (x)")
            connection.executemany("INSERT INTO t VALUES (?)", [(row,) for row in rows])
            connection.commit()
            for file in live.iterdir():
                shutil.copy(file, folder)
        connection.close()
        shutil.rmtree(live)
        assert (folder / "db-wal").stat().st_size > 0
    relocation_step(source, volume).apply()
    rows_of = {}
    for name in [file.name for file in source.iterdir() if not file.name.endswith(("-wal", "-shm"))]:
        connection = sqlite3.connect(source / name)
        rows_of[name] = [row[0] for row in connection.execute("SELECT x FROM t ORDER BY x")]
        connection.close()
    assert sorted(rows_of.values()) == [["a", "b"], ["c"]]


def test_repeated_merge_of_one_database_keeps_one_copy(source: Path, volume: Path) -> None:
    side(Root(volume).hub, "volume", FILES, 15)
    for _ in range(2):
        side(source, "home", ("db", "db-wal"), 10)
        relocation_step(source, volume).apply()
        assert len(units(source)) == 2
        source.unlink()
