"""Tests that a file is written completely or not at all, also beside planted links and processes with the same id."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from provision.fs import durable
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the random part of temporary names by the entries of a list, so that a test can plant one."""
    names = ["00000001", "00000002", "00000003"]
    monkeypatch.setattr(secrets, "token_hex", lambda _: names.pop(0))
    return names


def test_planted_link_at_the_temporary_name_is_not_followed(tmp_path: Path, tokens: list[str]) -> None:
    secret = tmp_path / "secret"
    secret.write_text("keep")
    planted = tmp_path / f"file.part-{os.getpid()}-{tokens[0]}"
    planted.symlink_to(secret)
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
    assert secret.read_text() == "keep"
    assert planted.is_symlink(), "a file that this process did not make is not deleted"


def test_writers_with_the_same_process_id_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    # Threads stand for two containers: they have one process id, and each writes a whole file of its own.
    file = tmp_path / "folder/file"
    contents = [letter * 300_000 for letter in "abcd"]
    start = threading.Barrier(len(contents))

    def write(content: str) -> None:
        start.wait()
        for _ in range(3):
            write_atomic(file, content)
            assert file.read_text() in contents

    errors: list[BaseException] = []

    def guarded(content: str) -> None:
        try:
            write(content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_private_file_is_readable_for_its_user_alone_under_each_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "private", "x", private=True)
        write_atomic(tmp_path / "shared", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o666 & ~umask


def test_temporary_file_is_deleted_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(durable, "sync_descriptor", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "folder/file", "new")
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of the size of a file")
def test_failed_write_names_the_file_and_keeps_the_old_bytes(tmp_path: Path) -> None:
    import resource

    file = tmp_path / "records/record.json"
    write_atomic(file, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Python ignores SIGXFSZ, so the write fails
    try:
        with pytest.raises(OSError, match=r"record\.json") as error:
            write_atomic(file, "n" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert [path.name for path in file.parent.iterdir()] == ["record.json"]
    assert file.read_text() == "old"
