"""The machine's pip settings, as uv gets them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from provision.core import child_environment, process
from provision.core.redact import redact
from provision.installers import uv as uv_installer
from tests.provision.conftest import lock_text, write_wheel

if TYPE_CHECKING:
    from pathlib import Path


def carried(home: Path, config: str, **environ: str) -> uv_installer.UvSources:
    file = home / ".config/pip/pip.conf"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config)
    return uv_installer.for_uv(dict(os.environ) | environ, home / "cache", offline=False)


def test_index_links_and_certificate_come_over(tmp_path: Path, home: Path) -> None:
    (home / "one").mkdir()
    (tmp_path / "two").mkdir()
    uv = carried(
        home,
        "[global]\nindex-url = https://pip.example/simple\nextra-index-url =\n  https://a.example\n  https://b.example\n"
        f"find-links = ~/one\n  {tmp_path}/two\n  https://links.example\ncert = ~/ca.pem\ntrusted-host = pip.example\n",
    ).environment
    assert uv["UV_DEFAULT_INDEX"] == "https://pip.example/simple"
    assert uv["UV_INDEX"] == "https://a.example https://b.example"
    assert uv["UV_FIND_LINKS"] == f"{home}/one,{tmp_path}/two,https://links.example"
    assert uv["SSL_CERT_FILE"] == f"{home}/ca.pem" or "SSL_CERT_FILE" in os.environ
    assert uv["UV_INSECURE_HOST"] == "pip.example"


def test_a_folder_of_wheels_that_is_not_there_is_left_out_and_said(tmp_path: Path, home: Path) -> None:
    """A volume that is not mounted: pip passes it over with a warning, uv would end there."""
    uv = carried(home, f"[global]\nfind-links = {tmp_path}\n  /not/mounted\n")
    assert uv.environment["UV_FIND_LINKS"] == str(tmp_path)
    assert "find-links /not/mounted (it is not there)" in uv.dropped
    assert "UV_FIND_LINKS" not in carried(home, "[global]\nfind-links = /not/mounted\n").environment


@pytest.mark.parametrize("own", ["variable", "file", "none"])
def test_a_default_index_of_uvs_own_takes_the_place_of_pips(home: Path, own: str) -> None:
    environ = {"UV_INDEX_URL": "https://uv.example"} if own == "variable" else {}
    if own == "file":
        (home / ".config/uv").mkdir(parents=True)
        (home / ".config/uv/uv.toml").write_text('[[index]]\nurl = "https://uv.example"\ndefault = true\n')
    uv = carried(home, "[global]\nindex-url = https://pip.example\n", **environ).environment
    assert uv.get("UV_DEFAULT_INDEX") == ("https://pip.example" if own == "none" else None)


def test_the_environment_beats_the_file(home: Path) -> None:
    uv = carried(home, "[global]\nindex-url = https://file.example\n", PIP_INDEX_URL="https://env.example").environment
    assert uv["UV_DEFAULT_INDEX"] == "https://env.example"


def test_install_beats_global() -> None:
    text = "install.index-url='https://install'\nglobal.index-url='https://global'\n"
    assert child_environment.parse_pip_config(text)["index-url"] == ["https://install"]


def test_what_the_machine_set_for_uv_itself_stays(home: Path) -> None:
    uv = carried(home, "[global]\nindex-url = https://pip.example\n", UV_DEFAULT_INDEX="https://uv.example").environment
    assert uv["UV_DEFAULT_INDEX"] == "https://uv.example"


def test_nothing_switches_the_hashes_off(home: Path) -> None:
    uv = carried(home, "", UV_NO_VERIFY_HASHES="1", VIRTUAL_ENV="/venv", CONDA_PREFIX="/conda").environment
    assert not {"UV_NO_VERIFY_HASHES", "VIRTUAL_ENV", "CONDA_PREFIX"} & set(uv)
    assert uv["UV_PYTHON_DOWNLOADS"] == "never"


@pytest.mark.parametrize(("value", "flags"), [("1", ("--no-index",)), ("true", ("--no-index",)), ("0", ())])
def test_no_index_becomes_a_flag(home: Path, value: str, flags: tuple[str, ...]) -> None:
    assert carried(home, "", PIP_NO_INDEX=value).flags == flags


def test_offline_is_said_to_uv(home: Path) -> None:
    assert uv_installer.for_uv(dict(os.environ), home, offline=True).environment["UV_OFFLINE"] == "1"


def test_uv_really_finds_wheels_in_two_folders_of_pip(tmp_path: Path, home: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    wheels = [write_wheel(one, "first", "1.0", {"first.py": ""}), write_wheel(two, "second", "2.0", {"second.py": ""})]
    lock = tmp_path / "lock"
    lock.write_text(lock_text(*wheels))
    uv = carried(home, f"[global]\nno-index = true\nfind-links = {one}\n  {two}\n")
    target = tmp_path / "target"
    argv: list[str | Path] = [
        uv_installer.uv_binary(),
        "pip",
        "install",
        *uv.flags,
        "--require-hashes",
        "-r",
        lock,
        "--target",
        target,
    ]
    process.run([*argv, "--python", uv_installer.base_python()], env=uv.environment)
    assert (target / "first.py").exists()
    assert (target / "second.py").exists()


def test_secrets_are_taken_out() -> None:
    text = redact("hf_abcdefghij at https://user:secret@pip.example/simple")
    assert text == "hf_… at https://…@pip.example/simple"
