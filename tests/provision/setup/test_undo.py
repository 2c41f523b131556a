"""Tests the commands undo, gc and relocate, and the run lock, through the command line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from provision.core.layout import Root
from provision.setup import undo
from provision.volume.journal import Journal
from provision.volume.journal_acts import FolderCreation
from provision.volume.owner import current
from provision.volume.run_lock import holding
from tests.provision import random_trees
from tests.provision.run_command import provision


@pytest.fixture
def host(tmp_path: Path, envs: Path) -> list[object]:
    (tmp_path / "host.toml").write_text(
        'models = []\nlogin = true\nrelocate = ["pip", "uv", {path = "~/work dir", to = "work"}]\n'
    )
    return ["--root", tmp_path / "root", "--envs", envs, "--host", tmp_path / "host.toml"]


def test_undo_of_setup_restores_files_modes_links_and_folders(tmp_path: Path, home: Path, host: list[object]) -> None:
    (home / "work dir").mkdir()
    tree_before = random_trees.small(home / "work dir")
    (home / ".bashrc").write_bytes(b"alias x=y")
    (home / ".bashrc").chmod(0o640)
    before = {path: path.lstat().st_mode for path in home.rglob("*")}
    completed = provision("setup", *host, env={"SHELL": "/bin/bash"})
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert (home / "work dir").is_symlink()
    assert "relink.sh" in (home / ".bashrc").read_text()
    (home / "work dir/since").write_text("made through the link")

    listed = json.loads(provision("undo", "--list", "--json", *host[:2]).stdout)["runs"]
    assert [(run["command"], run["undone"]) for run in listed] == [("setup", False)]
    dry = provision("undo", "--dry-run", *host[:2])
    assert dry.returncode == 3
    assert "would    folder work dir" in dry.stdout
    assert "to apply them, omit --dry-run" in dry.stdout
    assert "make setup" not in dry.stdout, "setup does not undo a run"
    assert (home / "work dir").is_symlink()

    undone = provision("undo", *host[:2])
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert not (home / "work dir").is_symlink()
    assert (home / "work dir/since").read_text() == "made through the link"
    (home / "work dir/since").unlink()
    assert random_trees.read(home / "work dir") == tree_before
    assert (home / ".bashrc").read_bytes() == b"alias x=y"
    after = {path: path.lstat().st_mode for path in home.rglob("*")}
    assert after == before
    assert "the environment stays" in undone.stdout
    assert json.loads((tmp_path / "root/.firstlight/links.json").read_text())["links"] == []

    nothing = provision("undo", *host[:2])
    assert nothing.returncode == 2
    assert "nothing is left to undo" in nothing.stderr


def test_undo_is_blocked_by_a_later_change_of_a_file_or_link_and_restores_nothing(
    home: Path, host: list[object]
) -> None:
    (home / ".bashrc").write_text("alias x=y\n")
    assert provision("setup", *host).returncode == 0
    with (home / ".bashrc").open("a") as file:
        file.write("export MINE=1\n")
    refused = provision("undo", *host[:2])
    assert refused.returncode == 4, refused.stdout
    assert "-export MINE=1" in refused.stdout
    assert (home / ".cache/pip").is_symlink(), "undo restores all or nothing"
    (home / ".bashrc").write_text((home / ".bashrc").read_text().replace("export MINE=1\n", ""))
    (home / ".cache/pip").unlink()
    (home / ".cache/pip").mkdir()
    refused = provision("undo", *host[:2])
    assert refused.returncode == 4, refused.stdout
    assert f"{home}/.cache/pip is not a link now" in refused.stdout
    (home / ".cache/pip").rmdir()
    assert provision("undo", *host[:2]).returncode == 0


def test_gc_deletes_the_backups_of_its_own_host_and_keeps_those_of_another_host(
    tmp_path: Path, home: Path, host: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".bashrc").write_text("alias x=y\n")
    assert provision("setup", *host).returncode == 0
    backup = tmp_path / "root/.firstlight/backup"
    assert provision("setup", *host).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "another-host")
        assert "0 backups" in provision("gc", "--yes", *host[:2]).stdout
    unconfirmed = provision("gc", *host[:2])
    assert unconfirmed.returncode == 2
    assert "10 bytes" in unconfirmed.stdout
    assert "--yes" in unconfirmed.stderr
    assert list(backup.iterdir())
    assert provision("gc", "--yes", *host[:2]).returncode == 0
    assert list(backup.iterdir()) == []
    refused = provision("undo", *host[:2])
    assert refused.returncode == 4, refused.stdout
    assert "deleted by gc" in refused.stdout
    assert "0 backups" in provision("gc", *host[:2]).stdout


def test_runs_are_undone_newest_first(home: Path, tmp_path: Path, host: list[object]) -> None:
    for name in ("one", "two"):
        (home / name).mkdir()
        (home / name / "file").write_text(name)
        assert provision("relocate", home / name, *host).returncode == 0
    assert (home / "two").readlink() == tmp_path / "root/relocated/two"
    assert provision("status", *host).returncode == 3, "other folders in host.toml are not relocated yet"
    assert provision("undo", *host[:2]).returncode == 0
    assert [(home / name).is_symlink() for name in ("one", "two")] == [True, False]
    assert provision("undo", *host[:2]).returncode == 0
    assert (home / "one/file").read_text() == "one"


def test_relocate_accepts_the_name_of_a_cache_or_a_folder_with_the_flag_to(
    home: Path, tmp_path: Path, envs: Path
) -> None:
    (tmp_path / "plain.toml").write_text("models = []\n")
    flags = ["--root", tmp_path / "root", "--envs", envs, "--host", tmp_path / "plain.toml"]
    (home / ".cache/pip").mkdir(parents=True)
    (home / ".cache/pip/wheel").write_text("w")
    assert provision("relocate", "pip", *flags).returncode == 0
    assert (tmp_path / "root/cache/pip/wheel").read_text() == "w"
    (home / "data").mkdir()
    assert provision("relocate", "~/data", "--to", "big/data", *flags).returncode == 0
    assert (home / "data").readlink() == tmp_path / "root/big/data"
    assert provision("relocate", "~/data", "--to", "../x", *flags).returncode == 2
    assert provision("relocate", "pip", "--to", "x", *flags).returncode == 2
    unnamed = provision("relocate", "~/other", *flags[2:], env={"HOME": str(tmp_path / "fresh")})
    assert unnamed.returncode == 2
    assert "--root DIR" in unnamed.stderr
    # Setup keeps a folder that the command relocated, as if host.toml listed it.
    (home / "data").unlink()
    (home / "data").mkdir()
    (home / "data/new").write_text("n")
    status = provision("status", *flags, "--json")
    assert any(
        row["after"] == "drifted" and "what is on record" in row["step"]
        for row in json.loads(status.stdout)["outcomes"]
    )


def test_setup_while_another_run_holds_the_lock_is_blocked_and_names_its_process(
    tmp_path: Path, home: Path, host: list[object]
) -> None:
    root = Root(tmp_path / "root")
    with holding(root, "make setup"):
        completed = provision("setup", *host)
    assert completed.returncode == 4
    assert f"pid {os.getpid()} on " in completed.stderr
    assert "at work since 20" in completed.stderr
    assert not list(root.state.glob("lock.lease-*"))
    assert provision("setup", *host).returncode == 0


def test_setup_takes_over_the_lock_of_a_killed_run(tmp_path: Path, home: Path, host: list[object]) -> None:
    code = (
        "import os, signal; from pathlib import Path; from provision.volume.run_lock import holding; "
        f"from provision.core.layout import Root\nwith holding(Root(Path({str(tmp_path / 'root')!r})), ''): "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environ = dict(os.environ) | {"PYTHONPATH": str(Path(undo.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environ, check=False).returncode == -9
    assert (tmp_path / "root/.firstlight/lock.lease-1").exists()
    completed = provision("setup", *host)
    assert completed.returncode == 0
    assert "has ended without releasing it" in completed.stderr
    assert not list((tmp_path / "root/.firstlight").glob("lock.lease-*"))


def test_journal_with_a_truncated_last_line_is_read_up_to_that_line(tmp_path: Path) -> None:
    root = Root(tmp_path)
    journal = Journal(root.journal, "setup")
    journal.record(FolderCreation(tmp_path / "a\udcff"))
    assert journal.path is not None
    with journal.path.open("a") as file:
        file.write('{"act": "li')
    (run,) = undo.runs(root)
    assert run.acts == (FolderCreation(tmp_path / "a\udcff"),)


def test_undo_of_a_merge_keeps_a_file_on_the_volume_that_the_home_lacks(
    home: Path, tmp_path: Path, host: list[object]
) -> None:
    """Replace the link of a merged folder by an empty folder, which lacks the file that was merged."""
    work = home / "work dir"
    (tmp_path / "root/work").mkdir(parents=True)
    (tmp_path / "root/work/old").write_text("old")
    work.mkdir()
    (work / "thesis").write_text("of years")
    assert provision("relocate", work, "--to", "work", *host).returncode == 0
    assert (tmp_path / "root/work/thesis").read_text() == "of years"
    work.unlink()
    work.mkdir()
    refused = provision("undo", *host[:2])
    assert refused.returncode == 4, refused.stdout
    assert f"missing or different: {work}/thesis" in refused.stdout
    (work / "thesis").write_text("of another")
    provision("undo", *host[:2])
    assert (tmp_path / "root/work/thesis").read_text() == "of years"
    (work / "thesis").unlink()
    work.rmdir()
    work.symlink_to(tmp_path / "root/work")
    assert provision("undo", *host[:2]).returncode == 0
    assert [path.name for path in work.iterdir()] == ["thesis"]
    assert [path.name for path in (tmp_path / "root/work").iterdir()] == ["old"]


@pytest.mark.parametrize("left", [b"", bytes(300), b'{"schema": 2, "started": "20990101T000000Z"'])
def test_undo_skips_a_newer_journal_without_an_act(tmp_path: Path, left: bytes) -> None:
    """Leave a journal without its content, as after a power loss, beside the journal of an earlier run."""
    root = Root(tmp_path)
    Journal(root.journal, "setup").record(FolderCreation(tmp_path / "a"))
    (real,) = undo.runs(root)
    (root.journal / "20990101T000000Z-1.jsonl").write_bytes(left)
    assert undo.choose(root, None, current(Path.home())) == real


def test_runs_started_in_the_same_second_are_listed_in_the_order_of_their_first_acts(tmp_path: Path) -> None:
    """Use process ids of four and five digits, which would be in the wrong order if sorted as text."""
    root = Root(tmp_path)
    root.journal.mkdir(parents=True)
    for number, at in (("9999", 100.1), ("10000", 100.2), ("10000-2", 100.3)):
        header = {"schema": 2, "started": "20260101T000000Z", "command": "relocate"}
        lines = [json.dumps(line) for line in (header, {"at": at, "act": "mark"})]
        (root.journal / f"20260101T000000Z-{number}.jsonl").write_text("\n".join(lines) + "\n")
    assert [run.name.partition("Z-")[2] for run in undo.runs(root)] == ["9999", "10000", "10000-2"]
