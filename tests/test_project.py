"""Tests the files for contributors: the make targets, paths and sections that they name exist; licence and version."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from provision.core.version import VERSION
from tests.conftest import CHECKOUT

# The SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt without its first, empty line.
APACHE_2_0 = "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
GUIDES = ("CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md")


def text_of(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def test_licence_is_the_exact_text_of_apache_2_0() -> None:
    assert hashlib.sha256((CHECKOUT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


def test_pre_commit_hooks_run_the_commands_of_make_check_and_download_nothing() -> None:
    repos = YAML(typ="safe", pure=True).load(text_of(".pre-commit-config.yaml"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = repos[0]["hooks"]
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}
    recipe = re.search(r"^check:.*\n\t@(.+)$", text_of("Makefile"), re.MULTILINE)
    assert recipe is not None
    assert [hook["entry"] for hook in hooks] == recipe.group(1).split(" && ")


@pytest.mark.parametrize("guide", GUIDES)
def test_every_make_target_that_a_guide_names_exists(guide: str) -> None:
    named = set(re.findall(r"(?:^|[`(])\s*make ([a-z]+)", text_of(guide), re.MULTILINE))
    targets = set(re.findall(r"^([a-z_]+):", text_of("Makefile"), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_path_that_contributing_names_exists() -> None:
    paths = re.findall(r"`((?:provision|bench|envs|tests)/[a-z0-9_./-]+)`", text_of("CONTRIBUTING.md"))
    assert len(paths) > 30
    # Only a built wheel has provision/envs, a copy of envs/.
    assert [path for path in paths if not (CHECKOUT / path).exists() and path != "provision/envs"] == []


def test_every_section_that_contributing_links_to_exists() -> None:
    text = text_of("CONTRIBUTING.md")
    titles = [title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    links = re.findall(r"\]\(#([a-z-]+)\)", text)
    assert links
    assert set(links) <= set(titles)


@pytest.mark.parametrize("program", ["provision", "bench"])
def test_version_flag_prints_the_version(program: str) -> None:
    argv = [sys.executable, "-m", program, "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{program} {VERSION}\n", "")


def test_version_is_written_only_in_version_py() -> None:
    project = text_of("pyproject.toml")
    assert 'dynamic = ["version"]' in project
    assert re.search(r"^version\s*=", project, re.MULTILINE) is None
    files = [file for package in ("provision", "bench") for file in (CHECKOUT / package).rglob("*.py")]
    pattern = re.compile(r"^(__version__|VERSION)\b", re.MULTILINE)
    holders = [file for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    assert holders == [Path(CHECKOUT / "provision/core/version.py")]
