"""Compares with golden files: the journals that real steps and their undo write, and the undo of old journals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import snapshot_download

from provision.config.torch import Variant
from provision.core.layout import Root
from provision.environments import remove
from provision.environments.activation import CondaLinkStep
from provision.environments.definition import EnvironmentDefinition
from provision.environments.step import EnvStep
from provision.host.tool_caches import RelocatedFolder
from provision.lockfiles.folder import LockFolder
from provision.models.snapshots import SnapshotStep
from provision.relocation.record_step import RecordStep
from provision.relocation.step import RelocateStep
from provision.setup import undo, undo_paths
from provision.volume import variables
from provision.volume.changes import keep_backup
from provision.volume.journal import Journal
from provision.volume.marker import VolumeStep
from provision.volume.owner import Owner
from tests.provision.conda_channel import PLATFORM
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from tests.provision.fake_hub import FakeHub

JOURNALS = Path(__file__).resolve().parents[2] / "data" / "journals"
OWNER = Owner("gpu-1", "/home/user")
ODD = b"odd \xff\n"
SHARED = {"journal", "root", "progress", "moves"}  # attributes that are not compared: the same in each step, or steps
# {name of a run: its golden file}.
RUNS = {"20260301T070000Z-99": "schema-1", "20261201T080000Z-4242": "setup", "20261201T090000Z-4243": "undo"}


@pytest.fixture(autouse=True)
def _any_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every path: those of the golden journals are samples, and one folder here has another disk as target."""
    monkeypatch.setattr(undo_paths, "require_own", lambda *_: None)


@pytest.fixture
def journals(tmp_path: Path) -> Root:
    """Return a root with a marker and the golden journals."""
    root = Root(tmp_path / "root")
    root.journal.mkdir(parents=True)
    root.marker.write_text('{"schema": 1, "id": "0"}')
    for run, name in RUNS.items():
        (root.journal / f"{run}.jsonl").write_bytes((JOURNALS / f"{name}.jsonl").read_bytes())
    return root


def normalized(lines: bytes, **places: Path) -> str:
    """Return the acts of a journal with placeholders for times, folders, and names of runs and backups."""
    text = b"\n".join(lines.splitlines()[1:]).decode("ascii") + "\n"
    for name, path in sorted(places.items(), key=lambda place: -len(str(place[1]))):
        text = text.replace(str(path), f"/{name}")
    text = re.sub(r'"at": [0-9.]+', '"at": 0.0', text)
    text = re.sub(r"/file-[0-9a-f]{8}", "/file-0", text)
    return re.sub(r"[0-9]{8}T[0-9]{6}Z-[0-9]+(-[0-9])?", "RUN", text)


def test_journals_of_real_steps_and_of_their_undo_equal_the_golden_files(
    home: Path, tmp_path: Path, other_disk: Path, envs: Path, hub: FakeHub
) -> None:
    root = Root(tmp_path / "root")
    journal = Journal(root.journal, "setup")
    VolumeStep(root, [], journal).apply()

    renamed = Path(str(home / "x")).with_name(ODD.decode("utf-8", "surrogateescape"))
    for folder in (renamed, home / "copied", home / "both", root.path / "both", root.path / "wiped"):
        folder.mkdir()
        (folder / folder.parent.name).write_text(folder.name[:1])
    (home / "led").symlink_to(root.path / "old")
    places = [
        RelocatedFolder(renamed, root.path / "renamed"),
        RelocatedFolder(home / "copied", other_disk / "copied"),
        RelocatedFolder(home / "both", root.path / "both"),
        RelocatedFolder(home / "led", root.path / "led"),
        RelocatedFolder(home / "fresh", root.path / "fresh"),
        RelocatedFolder(home / "wiped", root.path / "wiped"),
    ]
    moves = [RelocateStep(place.source.name, [place], root, home, journal) for place in places]
    for step in moves:
        step.apply()

    variant = Variant(name="cpu", torch="9.9+tiny")
    pythons = ["3.10", "3.11", "3.12", "3.13", "3.14"]
    locks = LockFolder(envs / "diffusers")
    definition = EnvironmentDefinition("diffusers", locks, (variant,), pythons, "auto", PLATFORM, "a test")
    environment = EnvStep(root, definition, home, journal, offline=False)
    environment.apply()
    CondaLinkStep(environment.prefix, home, [], journal).apply()
    RecordStep(root, home, [moves[0]], journal).apply()
    variables.set_value(root, "HF_ENDPOINT", "http://127.0.0.1", journal)
    (home / ".bashrc").write_bytes(b"alias x=y")
    (home / ".bashrc").chmod(0o640)
    for file, content in ((home / ".bashrc", b"alias x=z"), (home / "new.conf", b"a = 1")):
        keep_backup(file, content, journal)
        file.write_bytes(content)
    snapshot_download(hub.repo, revision=hub.revision, cache_dir=root.hub, endpoint=hub.url)
    SnapshotStep(root, [], journal).apply()
    assert journal.path is not None
    places_of = {"home": home, "volume": root.path, "disk": other_disk}
    assert normalized(journal.path.read_bytes(), **places_of) == (JOURNALS / "steps-setup.txt").read_text("ascii")

    completed = provision("undo", "--quiet", "--root", root.path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (undone,) = set(root.journal.glob("*.jsonl")) - {journal.path}
    assert normalized(undone.read_bytes(), **places_of) == (JOURNALS / "steps-undo.txt").read_text("ascii")

    removal = Journal(root.journal, "env remove")
    remove.remove(environment.prefix, root, home, removal)
    assert removal.path is not None
    line = '{"at": 0.0, "act": "remove", "prefix": "/volume/envs/diffusers"}\n'
    assert normalized(removal.path.read_bytes(), **places_of) == line


def test_undo_list_of_the_golden_journals_equals_the_golden_output(journals: Root) -> None:
    listed = provision("undo", "--list", "--json", "--root", journals.path)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == (JOURNALS / "list.json").read_text("ascii")
    plain = provision("undo", "--list", "--root", journals.path)
    assert plain.stdout == (JOURNALS / "list.txt").read_text("ascii")


def read_steps(run: undo.JournaledRun, root: Root) -> list[dict[str, object]]:
    """Return the attributes of each step of an undo as JSON types; /present replaces the current path of the root."""
    rows: list[dict[str, object]] = []
    for step in undo.steps(run, root, Path(str(run.header.home)), Journal(root.journal, "undo")):
        values = {name: value for name, value in vars(step).items() if name not in SHARED}
        row = {"step": type(step).__name__, "describe": step.describe(), **values}
        rows.append(
            {
                name: value if isinstance(value, bool | int | None) else present(value, root)
                for name, value in row.items()
            }
        )
    return rows


def present(value: object, root: Root) -> str:
    return str(value).replace(str(root.path), "/present")


def test_undo_steps_of_a_golden_journal_equal_the_golden_steps(journals: Root) -> None:
    run = undo.choose(journals, "20261201T080000Z-4242", OWNER)
    assert run.undone
    result = {"steps": read_steps(run, journals), "kept": undo.kept_changes(run)}
    assert json.loads(json.dumps(result)) == json.loads((JOURNALS / "undo-steps.json").read_text("ascii"))


def test_undo_rejects_a_run_of_schema_1_whose_acts_lack_a_needed_field(journals: Root) -> None:
    """Undo a run whose last act is a `drop`, which names no source in schema 1."""
    refused = provision("undo", "20260301T070000Z-99", "--json", "--root", journals.path)
    assert refused.returncode == 4
    error = json.loads(refused.stdout)["error"]
    assert error["kind"] == "blocked"
    assert error["message"].startswith(
        "run 20260301T070000Z-99 cannot be undone: its journal was written by an older version and does not name the "
        "source of the act `drop`."
    )
    assert f"cat {journals.journal}/20260301T070000Z-99.jsonl" in error["message"]
    assert len(list(journals.journal.iterdir())) == len(RUNS), "no run is recorded as undone"


def test_acts_of_a_schema_1_journal_that_have_not_changed_since_are_read(journals: Root) -> None:
    run = undo.choose(journals, "20260301T070000Z-99", OWNER)
    assert len(run.acts) == 11
    assert undo.kept_changes(run) == [
        "the volume keeps its marker",
        "the environment stays; to remove it: provision env remove NAME",
        "a removed environment is not restored; to build it again: provision setup",
        "the next setup repeats the changes that host.toml or a profile names",
    ]


def test_damaged_journal_lines_and_unknown_acts_add_no_steps_to_an_undo(journals: Root) -> None:
    run = undo.choose(journals, "20261201T080000Z-4242", OWNER)
    steps, count = read_steps(run, journals), len(run.acts)
    path = journals.journal / f"{run.name}.jsonl"
    odd = [
        b"not JSON",
        b"",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"at": 1, "act": "teleport", "path": "/x"}',
        b'{"at": "soon"}',
    ]
    path.write_bytes(path.read_bytes() + b"\n".join([*odd, b'{"at": 2.5, "act": "folder", "pa']))
    run = undo.choose(journals, run.name, OWNER)
    assert len(run.acts) == count + 2
    assert read_steps(run, journals) == steps


def test_run_with_only_an_unknown_act_has_no_steps_to_undo(journals: Root) -> None:
    header = b'{"schema": 2, "started": "20270101T000000Z", "command": "setup"}'
    path = journals.journal / "20270101T000000Z-1.jsonl"
    path.write_bytes(header + b'\n{"act": "teleport", "source": "/a", "target": "/b"}\n')
    run = undo.choose(journals, path.stem, OWNER)
    assert (run.name, len(run.acts)) == (path.stem, 1)
    assert undo.steps(run, journals, Path("/home/user"), Journal(journals.journal)) == []
    assert undo.kept_changes(run) == ["the next setup repeats the changes that host.toml or a profile names"]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_journal_with_a_damaged_header_is_listed_without_command_host_and_home(journals: Root, kept: int) -> None:
    """Damage the first line. The next line is then read as the header, so the run has no command, host or start."""
    path = journals.journal / "20261201T080000Z-4242.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b'{"schema": 2, "ru\n', *lines[1 : kept + 1]]))
    (row,) = [row.to_dict() for row in undo.runs(journals) if row.name == path.stem]
    assert row == {
        "run": path.stem,
        "command": None,
        "host": None,
        "home": None,
        "acts": max(kept - 1, 0),
        "undone": True,
        "backup_bytes": 0,
    }
    assert [run.name for run in undo.runs(journals)][-1] == path.stem
