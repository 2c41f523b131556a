"""Tests that one class in the list of tools adds a fifth tool, which is probed, chosen, written and restored."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from provision.config.torch import Variant
from provision.core.layout import Root
from provision.core.step import State
from provision.mirrors import catalogue, chosen_mirrors, selection, write_config
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorSource
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_needs import ProbeNeeds
from provision.mirrors.tools import all_tools, probe_paths
from provision.mirrors.tools.tool import ConfigFile, Stage, Tool
from provision.volume import variables
from provision.volume.journal import Journal
from provision.volume.variables import VariableGroup

if TYPE_CHECKING:
    from pathlib import Path

    from provision.mirrors.chosen_mirrors import MirrorRecord
    from provision.mirrors.mirror import Mirror
    from provision.mirrors.probe_mirror import Prober
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
def _fifth_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_tools, "TOOLS", (*all_tools.TOOLS, Cargo()))
    monkeypatch.setattr(variables, "NAMES", variables.NAMES | {"CARGO_INDEX", "CARGO_PLAIN"})


def catalogue_with(tmp_path: Path, url: str) -> catalogue.Catalogue:
    """Return a catalogue with one mirror of the tool cargo, named `near`."""
    file = tmp_path / "mirrors.toml"
    file.write_text(f'[cargo.near]\nurl = "{url}"\n')
    return catalogue.load(file)


def test_fifth_tool_that_one_class_adds_is_probed_written_and_restored(tmp_path: Path, home: Path, serve: Any) -> None:
    server = serve({"/crate-1": CONTENT})
    root = Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    prefix = root.prefix("diffusers")
    (prefix / "lib/python3.11/site-packages").mkdir(parents=True)
    (prefix / ".firstlight.json").write_text('{"interpreter": "conda"}')
    journal = Journal(root.journal, "t")
    mirrors = catalogue_with(tmp_path, server.url)
    requested = selection.requested_mirrors("auto", mirrors)
    assert list(requested) == ["pip", "conda", "torch", "hf", "cargo"]
    needs = ProbeNeeds(tmp_path, Variant(name="cpu"), {}, None, [], [])
    environ = {"PATH": os.environ["PATH"], "HOME": str(home)}
    step = selection.MirrorStep(root, requested, mirrors, lambda: needs, environ, home, journal, offline=False)
    assert step.check().state is State.DRIFTED
    step.apply()
    assert "cargo near" in step.check().detail
    choice = json.loads(chosen_mirrors.record_path(root).read_text())["choices"]["cargo"]
    assert [source["name"] for source in choice["sources"]] == ["near", "official"]

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

    for restore_step in write_config.restore_steps(root, journal, force=False):
        if restore_step.check().state is State.DRIFTED:
            restore_step.apply()
    assert not (home / ".cargo").exists()
    assert variables.read(root) == {}


def test_users_own_setting_of_a_fifth_tool_is_kept(tmp_path: Path, home: Path, serve: Any) -> None:
    mirrors: catalogue.Catalogue = catalogue_with(tmp_path, serve({}).url)
    near: Mirror = mirrors.of("cargo")["near"]
    assert near.enabled
    needs = ProbeNeeds(tmp_path, Variant(name="cpu"), {}, None, [], [])
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "CARGO_INDEX": "mine"}
    selector = selection.MirrorSelector(mirrors, needs, environ, home, chosen_mirrors.MirrorRecord())
    assert selector.auto(all_tools.by_name("cargo"), []).why == "this machine's own setting stays: mine"


def test_pth_line_for_the_variables_of_two_tools_is_one_line_that_sets_both() -> None:
    values = {"HF_ENDPOINT": "https://hub", "CARGO_INDEX": "https://crates"}
    environ: dict[str, str] = {}
    line = variables.start_line(values, all_tools.variable_groups())
    assert line.count("\n") == 1
    exec(line.replace("import os; ", ""), {"os": type("os", (), {"environ": environ})})  # noqa: S102 (as site does)
    assert environ == values
