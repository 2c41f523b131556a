"""Tests how the package sources in pip's settings are passed on to uv."""

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


def uv_sources(home: Path, config: str, **environ: str) -> uv_installer.UvSources:
    """Return uv's package sources for a user with this pip.conf and these added environment variables."""
    file = home / ".config/pip/pip.conf"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config)
    return uv_installer.for_uv(dict(os.environ) | environ, home / "cache", offline=False)


def test_index_find_links_and_certificate_of_pip_conf_become_uv_variables(tmp_path: Path, home: Path) -> None:
    (home / "one").mkdir()
    (tmp_path / "two").mkdir()
    uv = uv_sources(
        home,
        "[global]\nindex-url = https://pip.example/simple\nextra-index-url =\n  https://a.example\n  https://b.example\n"
        f"find-links = ~/one\n  {tmp_path}/two\n  https://links.example\ncert = ~/ca.pem\ntrusted-host = pip.example\n",
    ).environment
    assert uv["UV_DEFAULT_INDEX"] == "https://pip.example/simple"
    assert uv["UV_INDEX"] == "https://a.example https://b.example"
    assert uv["UV_FIND_LINKS"] == f"{home}/one,{tmp_path}/two,https://links.example"
    assert uv["SSL_CERT_FILE"] == f"{home}/ca.pem" or "SSL_CERT_FILE" in os.environ
    assert uv["UV_INSECURE_HOST"] == "pip.example"


def test_find_links_folder_that_does_not_exist_is_left_out_and_reported(tmp_path: Path, home: Path) -> None:
    """Name a folder on a volume that is not mounted: pip skips such a folder with a warning, and uv fails."""
    uv = uv_sources(home, f"[global]\nfind-links = {tmp_path}\n  /not/mounted\n")
    assert uv.environment["UV_FIND_LINKS"] == str(tmp_path)
    assert "find-links /not/mounted (no such folder)" in uv.dropped
    assert "UV_FIND_LINKS" not in uv_sources(home, "[global]\nfind-links = /not/mounted\n").environment


@pytest.mark.parametrize("own", ["variable", "file", "none"])
def test_users_default_index_of_uv_goes_before_the_index_of_pip_conf(home: Path, own: str) -> None:
    environ = {"UV_INDEX_URL": "https://uv.example"} if own == "variable" else {}
    if own == "file":
        (home / ".config/uv").mkdir(parents=True)
        (home / ".config/uv/uv.toml").write_text('[[index]]\nurl = "https://uv.example"\ndefault = true\n')
    uv = uv_sources(home, "[global]\nindex-url = https://pip.example\n", **environ).environment
    assert uv.get("UV_DEFAULT_INDEX") == ("https://pip.example" if own == "none" else None)


def test_index_in_a_pip_variable_goes_before_the_index_of_pip_conf(home: Path) -> None:
    uv = uv_sources(
        home, "[global]\nindex-url = https://file.example\n", PIP_INDEX_URL="https://env.example"
    ).environment
    assert uv["UV_DEFAULT_INDEX"] == "https://env.example"


def test_install_section_of_pip_conf_goes_before_its_global_section() -> None:
    text = "install.index-url='https://install'\nglobal.index-url='https://global'\n"
    assert child_environment.parse_pip_config(text)["index-url"] == ["https://install"]


def test_index_in_a_uv_variable_goes_before_the_index_of_pip_conf(home: Path) -> None:
    uv = uv_sources(
        home, "[global]\nindex-url = https://pip.example\n", UV_DEFAULT_INDEX="https://uv.example"
    ).environment
    assert uv["UV_DEFAULT_INDEX"] == "https://uv.example"


def test_uv_gets_no_variable_that_disables_checksums_or_selects_a_target(home: Path) -> None:
    uv = uv_sources(home, "", UV_NO_VERIFY_HASHES="1", VIRTUAL_ENV="/venv", CONDA_PREFIX="/conda").environment
    assert not {"UV_NO_VERIFY_HASHES", "VIRTUAL_ENV", "CONDA_PREFIX"} & set(uv)
    assert uv["UV_PYTHON_DOWNLOADS"] == "never"


@pytest.mark.parametrize(("value", "flags"), [("1", ("--no-index",)), ("true", ("--no-index",)), ("0", ())])
def test_pip_no_index_becomes_the_uv_flag_no_index_unless_its_value_is_0(
    home: Path, value: str, flags: tuple[str, ...]
) -> None:
    assert uv_sources(home, "", PIP_NO_INDEX=value).flags == flags


def test_offline_run_sets_the_variable_uv_offline(home: Path) -> None:
    assert uv_installer.for_uv(dict(os.environ), home, offline=True).environment["UV_OFFLINE"] == "1"


def test_uv_installs_wheels_from_two_find_links_folders_of_pip(tmp_path: Path, home: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    wheels = [write_wheel(one, "first", "1.0", {"first.py": ""}), write_wheel(two, "second", "2.0", {"second.py": ""})]
    lock = tmp_path / "lock"
    lock.write_text(lock_text(*wheels))
    uv = uv_sources(home, f"[global]\nno-index = true\nfind-links = {one}\n  {two}\n")
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


def test_redact_removes_a_token_and_the_password_in_a_url() -> None:
    text = redact("hf_abcdefghij at https://user:secret@pip.example/simple")
    assert text == "hf_… at https://…@pip.example/simple"
