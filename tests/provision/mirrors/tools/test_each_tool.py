"""Tests the class of each tool: the user's settings, official source, probe files, settings files and variables."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import pytest

from provision.config import host
from provision.config.models import ModelFile, ModelSpec
from provision.config.torch import Variant
from provision.core.python_source import PythonSource
from provision.installers import conda_settings, pip_settings
from provision.lockfiles.conda_lock import CondaPackage
from provision.mirrors import official
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorChoice, MirrorRecord, MirrorSource
from provision.mirrors.probe_needs import ProbeNeeds
from provision.mirrors.tools import all_tools
from provision.mirrors.tools.conda import Conda, CondaMirror
from provision.mirrors.tools.hf import Hf
from provision.mirrors.tools.pip import Pip
from provision.mirrors.tools.tool import ConfigScope, MachineSettings, Stage
from provision.mirrors.tools.torch import Torch, TorchMirror

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from provision.mirrors.tools.tool import Tool

URL = "https://m.example/x"
CHOSEN = MirrorSource("m", URL, channels={"conda-forge": f"{URL}/conda-forge"})
RECORD = MirrorRecord({name: MirrorChoice("m", (CHOSEN,), "by test") for name in all_tools.names()})
FOR_EACH_TOOL = pytest.mark.parametrize("tool", all_tools.TOOLS, ids=all_tools.names())
PYTHON_SOURCES = [None, PythonSource.SYSTEM, PythonSource.CONDA]


def package(channel: str, name: str) -> CondaPackage:
    url = f"{conda_settings.CHANNELS}/{channel}/noarch/{name}-1-0.conda"
    return CondaPackage(name, "1", "linux-64", url, "0" * 32, "1" * 64)


def needs(folder: Path, *packages: CondaPackage) -> ProbeNeeds:
    hashes = {"a": ("1.0", frozenset({"2" * 64})), "torch": ("9.9+cpu", frozenset({"3" * 64}))}
    files = [ModelFile(path=name, size=size, sha256="4" * 64) for name, size in (("s", 1), ("m", 2), ("l", 3))]
    model = ModelSpec(repo="o/m", revision="5" * 40, license="x", architecture="x", files=files)
    variant = Variant(name="cpu", find_links="https://torch.example/cpu")
    return ProbeNeeds(folder, variant, hashes, "linux-64", packages, [model])


def scope(home: Path, record: MirrorRecord, source: PythonSource | None, *, conda_is_here: bool = True) -> ConfigScope:
    return ConfigScope(record, home / "prefix", source, home, {}, conda_is_here)


def test_names_of_the_tools_are_the_names_in_host_toml() -> None:
    assert tuple(all_tools.names()) == get_args(host.Tool)
    assert all(all_tools.by_name(tool.name) is tool for tool in all_tools.TOOLS)


@FOR_EACH_TOOL
def test_variables_of_a_mirror_are_the_variables_that_restore_unsets(tool: Tool) -> None:
    names = [name for group in tool.variable_groups for name in group.names]
    assert list(tool.variables(CHOSEN)) == names


@pytest.mark.parametrize(
    ("tool", "environ", "setting"),
    [
        (Pip(), {"PIP_INDEX_URL": "https://mine"}, "PIP_INDEX_URL=https://mine"),
        (Pip(), {"UV_DEFAULT_INDEX": "https://mine"}, "UV_DEFAULT_INDEX=https://mine"),
        (Pip(), {"PIP_INDEX_URL": URL}, None),
        (Conda(), {"CONDA_CHANNEL_ALIAS": "https://mine"}, "CONDA_CHANNEL_ALIAS=https://mine"),
        (Conda(), {"CONDA_CHANNEL_ALIAS": URL}, None),
        (Torch(), {"PIP_NO_INDEX": "1"}, "pip's no-index"),
        (Torch(), {"PIP_INDEX_URL": "https://mine"}, None),
        (Hf(), {"HF_ENDPOINT": "https://user:secret@mine"}, "HF_ENDPOINT=https://…@mine"),
        (Hf(), {"HF_ENDPOINT": f"{URL}/"}, None),
    ],
)
def test_own_setting_of_a_tool_is_a_value_of_the_user_and_not_the_chosen_mirror(
    tool: Tool, environ: dict[str, str], setting: str | None, home: Path
) -> None:
    assert tool.own_setting(MachineSettings({"HOME": str(home), **environ}, home), RECORD) == setting


def test_settings_of_pip_are_read_once_and_only_for_tools_that_need_them(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    calls: list[Mapping[str, str]] = []

    def read_settings(environ: Mapping[str, str]) -> dict[str, list[str]]:
        calls.append(environ)
        return {}

    monkeypatch.setattr(pip_settings, "pip_settings", read_settings)
    machine = MachineSettings({}, home)
    assert [tool.own_setting(machine, RECORD) for tool in (Conda(), Hf())] == [None, None]
    assert calls == []
    assert [tool.own_setting(machine, RECORD) for tool in (Pip(), Torch())] == [None, None]
    assert calls == [{}]


def test_official_source_of_each_tool_is_the_default_of_its_installer(tmp_path: Path) -> None:
    locked = needs(tmp_path, package("bioconda", "b"), package("conda-forge", "a"))
    sources = {tool.name: tool.official(locked) for tool in all_tools.TOOLS}
    channels = {name: f"{conda_settings.CHANNELS}/{name}" for name in ("bioconda", "conda-forge")}
    assert sources == {
        "pip": MirrorSource(OFFICIAL, pip_settings.official_index()),
        "conda": MirrorSource(OFFICIAL, conda_settings.CHANNELS, channels=channels),
        "torch": MirrorSource(OFFICIAL, "https://torch.example/cpu", "find-links"),
        "hf": MirrorSource(OFFICIAL, official.official_endpoint()),
    }


def test_probe_files_of_each_tool_come_from_the_locks_that_the_tool_installs(tmp_path: Path) -> None:
    locked = needs(tmp_path, package("conda-forge", "c"))
    names = {tool.name: [file.name for file in tool.probe_files(locked)] for tool in all_tools.TOOLS}
    assert names == {"pip": ["a"], "conda": ["c"], "torch": ["torch"], "hf": ["l", "s"]}
    assert Conda().probe_files(needs(tmp_path)) == []


def test_conda_mirror_without_a_locked_channel_is_not_probed(tmp_path: Path) -> None:
    locked = needs(tmp_path, package("bioconda", "b"))
    source = CondaMirror(url=URL).source_for("m", locked)
    target = Conda().target(source, locked)
    assert target is not None
    assert target.channels == {"bioconda": f"{URL}/bioconda"}
    assert Conda().target(MirrorSource("m", URL, channels={"conda-forge": f"{URL}/conda-forge"}), locked) is None


def test_conda_channel_that_a_mirror_lacks_has_its_official_address(tmp_path: Path) -> None:
    mirror = CondaMirror(url=URL, lacks=["nvidia"], elsewhere={"pytorch": "https://e.example"})
    assert mirror.source_for("m", needs(tmp_path)).channels == {
        "conda-forge": f"{URL}/conda-forge",
        "pytorch": "https://e.example/pytorch",
        "nvidia": f"{conda_settings.CHANNELS}/nvidia",
    }


def test_address_of_a_torch_mirror_contains_the_variant(tmp_path: Path) -> None:
    mirror = TorchMirror(url="https://m.example/{variant}/", kind="find-links")
    source = mirror.source_for("m", needs(tmp_path))
    assert source == MirrorSource("m", "https://m.example/cpu/", "find-links")
    assert Torch.page(source) == "https://m.example/cpu/"
    assert Torch.page(MirrorSource("m", "https://m.example/cpu/")) == "https://m.example/cpu/torch/"


@pytest.mark.parametrize("source", PYTHON_SOURCES)
def test_settings_files_in_an_environment_are_returned_only_if_the_environment_exists(
    home: Path, source: PythonSource | None
) -> None:
    files = {
        tool.name: {file.stage: file.path.name for file in tool.config_files(scope(home, RECORD, source))}
        for tool in all_tools.TOOLS
    }
    pip = {Stage.USER: "pip.conf", Stage.USER_UV: "uv.toml"}
    conda = {Stage.USER: ".condarc"}
    if source is not None:
        pip[Stage.ENVIRONMENT] = "pip.conf"
    if source is PythonSource.CONDA:
        conda[Stage.CONDA_ENVIRONMENT] = ".condarc"
    assert files == {"pip": pip, "conda": conda, "torch": {}, "hf": {}}


def test_condarc_of_a_home_without_conda_is_returned_only_if_the_file_exists(home: Path) -> None:
    without_conda = scope(home, RECORD, None, conda_is_here=False)
    assert Conda().config_files(without_conda) == []
    (home / ".condarc").write_text("")
    assert [file.path for file in Conda().config_files(without_conda)] == [home / ".condarc"]


def test_settings_files_have_the_mirror_and_are_empty_for_the_official_source(home: Path) -> None:
    official_record = MirrorRecord(
        {name: MirrorChoice(OFFICIAL, (MirrorSource(OFFICIAL),), "") for name in all_tools.names()}
    )
    for tool in (Pip(), Conda()):
        for file in tool.config_files(scope(home, RECORD, PythonSource.CONDA)):
            assert URL in file.render(b"").decode()
        for file in tool.config_files(scope(home, official_record, PythonSource.CONDA)):
            assert file.render(b"") == b""


def test_page_of_torch_is_in_the_environments_pip_conf_and_not_in_the_users(home: Path) -> None:
    files = Pip().config_files(scope(home, RECORD, PythonSource.SYSTEM))
    texts = {file.stage: file.render(b"").decode() for file in files}
    assert f"find-links = {URL}/torch/" in texts[Stage.ENVIRONMENT]
    assert "find-links" not in texts[Stage.USER] + texts[Stage.USER_UV]
