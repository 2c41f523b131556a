"""Tests the table of inherited settings against the installed pip, uv and Python, and against files of users."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from provision.core import child_environment
from provision.core.child_environment import IGNORED, KEPT, REPORTED
from provision.installers import uv as uv_installer
from provision.installers import uv_settings
from tests.provision.conftest import lock_text, write_wheel

if TYPE_CHECKING:
    from pathlib import Path

TABLES = {
    "pip": child_environment.PIP,
    "uv": child_environment.UV,
    "uv.toml": child_environment.UV_TOML,
    "python": child_environment.PYTHON,
}


def uv(*words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    argv = [str(uv_installer.uv_binary()), *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ) | environ)


def test_every_option_of_the_installed_pip_is_in_the_table_of_inherited_settings() -> None:
    code = "from pip._internal.commands import create_command as c; "
    code += "print(*sorted({w.lstrip('-') for o in c('install').parser.option_list_all for w in o._long_opts}))"
    completed = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert set(completed.stdout.split()) - set(child_environment.PIP) == set()


def test_every_variable_of_the_installed_uv_is_in_the_table_of_inherited_settings() -> None:
    variables = set()
    for command in ("pip install", "pip compile", "venv", "cache clean"):
        variables |= set(re.findall(r"\bUV_([A-Z0-9_]+)", uv("help", "--no-pager", *command.split()).stdout))
    assert "DEFAULT_INDEX" in variables
    assert variables - set(child_environment.UV) == set()


@pytest.mark.parametrize("table", ["", "[pip]\n"])
def test_every_valid_key_of_uv_toml_is_in_the_table_of_inherited_settings(tmp_path: Path, table: str) -> None:
    """Read the valid keys from uv's error about an unknown key."""
    file = tmp_path / "uv.toml"
    file.write_text(f"{table}no-such-key = 1\n")
    keys = set(
        re.findall(r"`([\w-]+)`", uv("--config-file", file, "pip", "list").stderr.partition("expected one of")[2])
    )
    assert "find-links" in keys
    assert keys - set(child_environment.UV_TOML) == set()


def test_every_variable_of_the_running_python_is_in_the_table_of_inherited_settings() -> None:
    completed = subprocess.run([sys.executable, "--help-env"], capture_output=True, text=True, check=False)
    variables = set(re.findall(r"^(?:-\S+ +: )?PYTHON(\w+)", completed.stdout, re.MULTILINE))
    assert variables - set(child_environment.PYTHON) == set()


@pytest.mark.parametrize("name", TABLES)
def test_no_inherited_setting_is_in_two_of_the_groups_kept_reported_and_ignored(name: str) -> None:
    table = {"pip": "_PIP_TABLE", "uv": "_UV_TABLE", "uv.toml": "_UV_TOML_TABLE", "python": "_PYTHON_TABLE"}[name]
    settings = [word for names in getattr(child_environment, table).values() for word in names.split()]
    assert sorted(settings) == sorted(TABLES[name])


@pytest.mark.parametrize(
    ("variable", "policy"),
    [
        ("PIP_INDEX_URL", KEPT),
        ("PIP_DEFAULT_TIMEOUT", KEPT),
        ("PIP_CONFIG_FILE", KEPT),
        ("PIP_USER", REPORTED),
        ("PIP_REQUIRE_VIRTUALENV", IGNORED),
        ("PIP_WHATEVER_COMES", IGNORED),
        ("UV_INDEX_CORP_PASSWORD", KEPT),
        ("UV_INDEX_STRATEGY", IGNORED),
        ("UV_EXCLUDE_NEWER", REPORTED),
        ("UV_WHATEVER_COMES", IGNORED),
        ("PYTHONUTF8", KEPT),
        ("PYTHONPATH", REPORTED),
        ("PYTHONWARNINGS", IGNORED),
        ("PYTHON_GIL", IGNORED),
        ("HF_TOKEN", KEPT),
        ("SSL_CERT_FILE", KEPT),
    ],
)
def test_inherited_variable_is_passed_on_or_dropped_with_a_report_or_dropped_silently(
    variable: str, policy: str
) -> None:
    assert child_environment.policy(variable) == policy
    assert (variable in child_environment.child({variable: "x"})) == (policy == KEPT)
    assert child_environment.dropped({variable: "x"}) == ([variable] if policy == REPORTED else [])
    assert child_environment.dropped({variable: ""}) == []


CONFIG = """\
exclude-newer = "2001-01-01T00:00:00Z"
index-strategy = "first-index"
link-mode = "symlink"
find-links = ["links"]

[[index]]
name = "corp"
url = "https://pypi.corp.example/simple"
authenticate = "always"

[[index]]
url = "https://old.corp.example/simple"
default = true # the mirror

[pip]
target = "/nowhere"
torch-backend = "auto"
extra-index-url = ["https://more.example"]
"""


@pytest.fixture
def user_file(home: Path) -> Path:
    file = home / ".config/uv/uv.toml"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG)
    return file


def test_uv_toml_yields_the_package_sources_and_reports_dropped_settings(
    tmp_path: Path, home: Path, user_file: Path
) -> None:
    system = tmp_path / "etc/uv/uv.toml"
    system.parent.mkdir(parents=True)
    system.write_text('\ufeffoffline = true\nkeyring-provider = "subprocess"\n[[index]]\nurl = "https://s.example"\n')
    kept, dropped = uv_settings.read({"XDG_CONFIG_DIRS": str(tmp_path / "etc")}, home)
    assert [row["url"] for row in kept["index"]] == [
        "https://pypi.corp.example/simple",
        "https://old.corp.example/simple",
        "https://s.example",
    ]
    assert kept["find-links"] == [f"{user_file.parent}/links"]
    assert kept["keyring-provider"] == "subprocess"
    assert kept["pip"] == {"extra-index-url": ["https://more.example"]}
    assert set(kept) == {"index", "find-links", "keyring-provider", "pip"}
    files = {str(user_file): {"exclude-newer", "target", "torch-backend"}, str(system): {"offline"}}
    assert set(dropped) == {f"{key} of {file}" for file, keys in files.items() for key in keys}
    assert uv_settings.parse(uv_settings.write(kept)) == kept
    inside = uv_settings.parse(uv_settings.write({"environments": ["x"], **kept}, "tool.uv"))
    assert inside == {"tool": {"uv": {"environments": ["x"], **kept}}}


def test_uv_accepts_the_config_that_is_written_from_the_users_uv_toml(tmp_path: Path, user_file: Path) -> None:
    sources = uv_installer.for_uv(os.environ, tmp_path / "cache", offline=False, settings={})
    file = tmp_path / "written.toml"
    file.write_text(uv_settings.write(sources.config))
    completed = uv("--config-file", file, "pip", "list", "--python", sys.executable, UV_NO_CONFIG="1")
    assert completed.returncode == 0, completed.stderr


def test_index_in_uv_toml_keeps_its_ignore_error_codes_and_loses_its_exclude_newer(
    tmp_path: Path, home: Path, user_file: Path
) -> None:
    user_file.write_text(
        '[[index]]\nname = "own"\nurl = "https://own.example/simple"\nignore-error-codes = [401, 403]\n'
        'cache-control = { api = "max-age=600", files = "max-age=3600" }\nexclude-newer = "2024-01-01"\n'
    )
    kept, dropped = uv_settings.read(dict(os.environ), home)
    assert kept["index"] == [{"name": "own", "url": "https://own.example/simple", "ignore-error-codes": [401, 403]}]
    assert dropped == [f"an index's exclude-newer of {user_file}"]
    file = tmp_path / "uv.toml"
    file.write_text(uv_settings.write(kept))
    completed = uv("--config-file", file, "pip", "list", "--system")
    assert "TOML" not in completed.stderr, completed.stderr


@pytest.mark.parametrize(("value", "is_read"), [("1", False), ("true", False), ("0", True), ("false", True)])
def test_users_uv_toml_is_read_unless_uv_no_config_is_1_or_true(
    home: Path, user_file: Path, value: str, *, is_read: bool
) -> None:
    user_file.write_text('index-url = "https://own.example/simple"\n')
    kept, _ = uv_settings.read(dict(os.environ) | {"UV_NO_CONFIG": value}, home)
    assert bool(kept) is is_read


def test_users_uv_toml_with_invalid_toml_is_ignored_and_reported(home: Path, user_file: Path) -> None:
    user_file.write_text("[[index\n")
    kept, dropped = uv_settings.read({}, home)
    assert kept == {}
    assert f"{user_file} (it cannot be read" in " ".join(dropped)
    assert uv_settings.read({"UV_NO_CONFIG": "1"}, home) == ({}, [])


def test_uv_installs_from_the_index_in_uv_toml_without_the_users_other_settings(
    tmp_path: Path, user_file: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.provision import http_server

    (tmp_path / "wheels").mkdir()
    wheel = write_wheel(tmp_path / "wheels", "greet", "1.0", {"greet.py": ""})
    server = serve(http_server.index([wheel]))
    lock = lock_text(wheel)
    settings = CONFIG.split("[[index]]", maxsplit=1)[0].replace('find-links = ["links"]\n', "")
    user_file.write_text(
        f'{settings}[[index]]\nname = "own"\nurl = "{server.url}/simple"\ndefault = true\n[pip]\ntarget = "/n"\n'
    )
    (tmp_path / "work/pyproject.toml").write_text(
        '[tool.uv]\nno-binary = true\nexclude-newer = "2001-01-01T00:00:00Z"\n'
    )
    for name, value in {"UV_TORCH_BACKEND": "nonsense", "UV_OVERRIDE": "/none", "UV_NO_BINARY": "1"}.items():
        monkeypatch.setenv(name, value)
    sources = uv_installer.for_uv(os.environ, tmp_path / "cache", offline=False, settings={})
    assert {"UV_TORCH_BACKEND", "UV_OVERRIDE", "UV_NO_BINARY", f"target of {user_file}"} <= set(sources.dropped)
    uv_installer.run_uv(
        ["venv", "--quiet", "--no-project", "--python", uv_installer.base_python(), tmp_path / "venv"], sources
    )
    install = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", "-", "--python"]
    uv_installer.run_uv([*install, tmp_path / "venv/bin/python"], sources, lock)
    assert list((tmp_path / "venv").glob("lib/python*/site-packages/greet.py"))


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        ({"timeout": ["60.5"], "retries": ["7"]}, {"UV_HTTP_TIMEOUT": "61", "UV_HTTP_RETRIES": "7"}),
        ({"default-timeout": ["180"]}, {"UV_HTTP_TIMEOUT": "180"}),
        ({"pypi-url": ["https://p.example"]}, {"UV_DEFAULT_INDEX": "https://p.example"}),
        ({"keyring-provider": ["subprocess"]}, {"UV_KEYRING_PROVIDER": "subprocess"}),
        ({"use-feature": ["truststore"]}, {"UV_SYSTEM_CERTS": "1"}),
        ({"timeout": ["soon"], "keyring-provider": ["import"], "user": ["1"]}, {}),
    ],
    ids=["timeout and retries", "default-timeout", "pypi-url", "keyring", "truststore", "invalid or other values"],
)
def test_timeout_index_keyring_and_certificate_options_of_pip_become_uv_variables(
    tmp_path: Path, settings: dict[str, list[str]], variables: dict[str, str]
) -> None:
    plain = uv_installer.for_uv({}, tmp_path, offline=False, settings={}).environment
    environment = uv_installer.for_uv({}, tmp_path, offline=False, settings=settings).environment
    assert {name: value for name, value in environment.items() if name not in plain} == variables


def test_variables_for_pip_have_the_users_package_sources_and_name_no_settings_file() -> None:
    settings = {"index-url": ["https://p.example"], "find-links": ["/a", "/b"], "user": ["yes"], "config-file": ["/x"]}
    environment = child_environment.for_pip(
        {"PIP_TARGET": "/t", "PIP_CERT": "/c", "HOME": "/h", "PYTHONPATH": "/p"}, settings
    )
    assert environment == {
        "HOME": "/h",
        "PYTHONNOUSERSITE": "1",
        "PIP_INDEX_URL": "https://p.example",
        "PIP_FIND_LINKS": "/a /b",
        "PIP_CONFIG_FILE": os.devnull,
    }
