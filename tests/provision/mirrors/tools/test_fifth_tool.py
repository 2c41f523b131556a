"""A tool that is added to the list is probed, chosen, written and taken back, and no other module changes."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from provision.config.torch import Variant
from provision.core.layout import Root
from provision.core.step import State
from provision.mirrors import catalogue, selection, write_config
from provision.mirrors import record as mirror_record
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_needs import ProbeNeeds
from provision.mirrors.record import OFFICIAL, MirrorSource
from provision.mirrors.tools import all_tools, probe_paths
from provision.mirrors.tools.tool import ConfigFile, Stage, Tool
from provision.volume import variables
from provision.volume.journal import Journal
from provision.volume.variables import VariableGroup

if TYPE_CHECKING:
    from pathlib import Path

    from provision.mirrors.mirror import Mirror
    from provision.mirrors.prober import Prober
    from provision.mirrors.record import MirrorRecord
    from provision.mirrors.tools.tool import ConfigScope, MachineSettings

CONTENT = b"a crate"


class Cargo(Tool):
    name = "cargo"
    variable_groups = (VariableGroup("CARGO_INDEX", ("CARGO_PLAIN",), at_start=True, at_activation=True),)

    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:
        return machine.environ.get("CARGO_INDEX")

    def official(self, needs: ProbeNeeds) -> MirrorSource:
        return MirrorSource(OFFICIAL, "http://127.0.0.1:9")

    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        digest = hashlib.sha256(CONTENT).hexdigest()
        return [ProbeFile("crate", "1", "locked", frozenset({digest}), len(CONTENT), "crate-1")]

    def probe(self, prober: Prober) -> None:
        probe_paths.check(prober, {file: f"{prober.target.url}/{file.path}" for file in prober.probe_files})

    def variables(self, source: MirrorSource) -> dict[str, str]:
        return {"CARGO_INDEX": source.url, "CARGO_PLAIN": "1"}

    def config_files(self, scope: ConfigScope) -> list[ConfigFile]:
        url = scope.record.chosen(self.name).url
        return [ConfigFile(scope.home / ".cargo/config", lambda _: url.encode(), Stage.USER)]


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_tools, "TOOLS", (*all_tools.TOOLS, Cargo()))


def mirrors_of(tmp_path: Path, url: str) -> catalogue.Catalogue:
    file = tmp_path / "mirrors.toml"
    file.write_text(f'[cargo.near]\nurl = "{url}"\n')
    return catalogue.load(file)


def test_fifth_tool_is_probed_written_and_taken_back(tmp_path: Path, home: Path, play: Any) -> None:
    server = play({"/crate-1": CONTENT})
    root = Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    prefix = root.prefix("diffusers")
    (prefix / "lib/python3.11/site-packages").mkdir(parents=True)
    (prefix / ".firstlight.json").write_text('{"interpreter": "conda"}')
    journal = Journal(root.journal, "t")
    known = mirrors_of(tmp_path, server.url)
    wanted = selection.wanted_of("auto", known)
    assert list(wanted) == ["pip", "conda", "torch", "hf", "cargo"]
    needs = ProbeNeeds(tmp_path, Variant(name="cpu"), {}, None, [], [])
    environ = {"PATH": os.environ["PATH"], "HOME": str(home)}
    step = selection.MirrorStep(root, wanted, known, lambda: needs, environ, home, journal, offline=False)
    assert step.check().state is State.DRIFTED
    step.apply()
    assert "cargo near" in step.check().detail
    kept = json.loads(mirror_record.file_of(root).read_text())["choices"]["cargo"]
    assert [source["name"] for source in kept["sources"]] == ["near", "official"]

    settings = write_config.SettingsStep(root, prefix, home, environ, journal, conda_is_here=False)
    settings.apply()
    assert settings.check().state is State.OK
    assert (home / ".cargo/config").read_text() == server.url
    assert variables.read(root) == {"CARGO_INDEX": server.url, "CARGO_PLAIN": "1"}
    line = next(prefix.glob("lib/*/site-packages/firstlight-mirrors.pth")).read_text()
    assert f'os.environ.get("CARGO_INDEX") or os.environ.update({{"CARGO_INDEX": {server.url!r}' in line
    assert "CARGO_PLAIN" in (prefix / "etc/conda/activate.d/firstlight-mirrors.sh").read_text()
    groups = all_tools.variable_groups()
    assert variables.for_child(root, {"CARGO_INDEX": "mine"}, groups) == {}

    for back in write_config.restoring(root, journal, force=False):
        if back.check().state is State.DRIFTED:
            back.apply()
    assert not (home / ".cargo").exists()
    assert variables.read(root) == {}


def test_own_setting_of_fifth_tool_stays(tmp_path: Path, home: Path, play: Any) -> None:
    known: catalogue.Catalogue = mirrors_of(tmp_path, play({}).url)
    near: Mirror = known.of("cargo")["near"]
    assert near.enabled
    needs = ProbeNeeds(tmp_path, Variant(name="cpu"), {}, None, [], [])
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "CARGO_INDEX": "mine"}
    selector = selection.MirrorSelector(known, needs, environ, home, mirror_record.MirrorRecord())
    assert selector.auto(all_tools.by_name("cargo"), []).why == "this machine's own setting stays: mine"


def test_variables_of_two_groups_share_one_line_of_python() -> None:
    values = {"HF_ENDPOINT": "https://hub", "CARGO_INDEX": "https://crates"}
    environ: dict[str, str] = {}
    line = variables.start_line(values, all_tools.variable_groups())
    assert line.count("\n") == 1
    exec(line.replace("import os; ", ""), {"os": type("os", (), {"environ": environ})})  # noqa: S102 (as site does)
    assert environ == values
