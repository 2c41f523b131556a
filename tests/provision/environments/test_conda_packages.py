"""Tests environments with Python from conda: a real channel on loopback, real rattler, and real faults."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from provision.core import layout
from provision.core.errors import BlockedError, FirstlightError, SpecError
from provision.core.step import State
from tests.conftest import NOWHERE
from tests.provision import conda_channel
from tests.provision.conda_channel import PLATFORM
from tests.provision.conftest import lock_text, write_wheel
from tests.provision.environments.conda_steps import env_step, output_of, site_packages

if TYPE_CHECKING:
    from pathlib import Path

    from provision.environments.step import EnvStep


def test_environment_is_built_from_conda_and_pip_packages(
    step: EnvStep, greet_wheel: None, conda: conda_channel.FolderServer
) -> None:
    assert step.check().state is State.DRIFTED
    step.apply()
    check = step.check(deep=True)
    assert (check.state, check.fallback) == (State.OK, None), check.detail
    assert "from conda" in check.detail
    python = layout.interpreter(step.prefix)
    assert output_of(python, "-c", "import sys, torch, hello; print(sys.prefix)") == str(step.prefix)
    assert output_of(step.prefix / "bin/hello") == "hello from conda"
    assert output_of(step.prefix / "bin/greet") == "hello from pip"
    assert not list(step.prefix.parent.glob(".*")), "no temporary folder is left"
    for script in (step.prefix / "bin").iterdir():
        assert b".building-" not in script.read_bytes()[:500]
    assert {path.split("/")[1] for path in conda.seen} == {"conda-forge"}, "all packages come from the mirror"
    meta = next(step.prefix.glob("conda-meta/hello-*.json"))
    assert json.loads(meta.read_text())["url"].startswith(conda_channel.CANONICAL), (
        "the record has the official URL of the channel"
    )


def test_pip_does_not_install_a_package_that_conda_installs(step: EnvStep, conda_envs: Path, wheels: Path) -> None:
    write_wheel(wheels, "hello", "1.0", {"hello.py": "raise SystemExit('pip overwrote it')\n"})
    (conda_envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    step.apply()
    assert output_of(step.prefix / "bin/hello") == "hello from conda"
    assert step.check(deep=True).state is State.OK


def test_different_versions_in_the_conda_and_pip_lock_files_are_rejected(
    step: EnvStep, conda_envs: Path, wheels: Path
) -> None:
    write_wheel(wheels, "hello", "3.0", {"hello.py": ""})
    (conda_envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    with pytest.raises(SpecError, match=r"cpu\.lock pins hello==3\.0, but .*conda-lock\.yml has hello 1\.0"):
        step.apply()
    assert not step.prefix.exists()


@pytest.mark.parametrize(
    ("command", "detail"),
    [
        ("rm bin/hello", "hello: bin/hello is missing"),
        ("rm lib/python3*/json/decoder.py", "python: lib/python3"),
        ("rm bin/python3.*", "is missing"),
        ("rm conda-meta/hello-1.0-0.json", "hello: is not installed"),
        ("cd lib/python3*/site-packages; cp hello.py new; echo more >> new; mv new hello.py", "hello.py has"),
        ("rm lib/python3*/site-packages/torch/__init__.py", "torch: torch/__init__.py is missing"),
    ],
)
def test_quick_check_finds_damage_of_a_conda_environment_and_apply_repairs_it_offline(
    step: EnvStep, tmp_path: Path, conda_envs: Path, conda: conda_channel.FolderServer, command: str, detail: str
) -> None:
    step.apply()
    added = site_packages(step) / "mine.py"
    added.write_text("kept")
    subprocess.run(["sh", "-c", command], cwd=step.prefix, check=True)
    check = step.check()
    assert check.state is State.DRIFTED
    assert detail in check.detail
    conda.seen.clear()
    offline = env_step(tmp_path / "root", conda_envs, offline=True)
    offline.apply()
    assert offline.check(deep=True).state is State.OK
    assert conda.seen == []
    assert added.read_text() == "kept"


def test_byte_changed_through_a_hard_link_is_repaired_in_the_environment_and_the_cache(
    step: EnvStep, tmp_path: Path, conda_envs: Path
) -> None:
    """Change a byte of an installed file that is a hard link to the file in the package cache."""
    step.apply()
    file_path = site_packages(step) / "hello.py"
    content = bytearray(file_path.read_bytes())
    content[0] ^= 1
    with file_path.open("r+b") as file:
        file.write(content)
    assert step.check().state is State.OK, "a quick check compares sizes only"
    check = step.check(deep=True)
    assert "hello.py does not have its recorded content" in check.detail
    step.apply()
    assert step.check(deep=True).state is State.OK
    rebuilt = env_step(tmp_path / "root", conda_envs)
    shutil.rmtree(step.prefix)
    rebuilt.apply()
    assert rebuilt.check(deep=True).state is State.OK


def test_conda_package_with_a_changed_byte_is_rejected_and_leaves_no_environment(
    step: EnvStep, conda: conda_channel.FolderServer
) -> None:
    package = next((conda.folder / "conda-forge/noarch").glob("hello-1.0-*")).read_bytes()
    flipped = bytearray(package)
    flipped[len(flipped) // 2] ^= 1
    conda.faults["hello-1.0"] = bytes(flipped)
    with pytest.raises(FirstlightError, match="hello"):
        step.apply()
    assert not step.prefix.exists()
    assert not list(step.prefix.parent.glob(".*"))
    conda.faults.clear()
    step.apply()
    assert step.check(deep=True).state is State.OK


@pytest.mark.parametrize("part", ["conda-lock.yml", "cpu.lock"])
def test_right_package_is_rejected_if_its_hash_in_the_lock_file_was_changed(
    step: EnvStep, conda_envs: Path, part: str
) -> None:
    """Change one hash of the lock; the channel and the wheels stay the same."""
    lock = conda_envs / "diffusers" / part
    text = lock.read_text()
    digest = re.findall(r"sha256[:'= ]+([0-9a-f]{64})", text)[0]
    lock.write_text(text.replace(digest, "0" + digest[1:] if digest[0] != "0" else "1" + digest[1:]))
    with pytest.raises(FirstlightError, match=r"[Hh]ash|sha256"):
        step.apply()
    assert not step.prefix.exists()


def test_wheel_with_other_content_than_the_locked_one_is_rejected(step: EnvStep, wheels: Path) -> None:
    write_wheel(wheels, "diffusers", "8.8", {"diffusers/__init__.py": "raise SystemExit('not what was locked')"})
    with pytest.raises(FirstlightError, match=r"[Hh]ash"):
        step.apply()
    assert not step.prefix.exists()


def test_environment_is_repaired_after_its_caches_are_deleted(step: EnvStep, conda: conda_channel.FolderServer) -> None:
    step.apply()
    shutil.rmtree(step.root.pkgs)
    shutil.rmtree(step.root.cache)
    assert step.check(deep=True).state is State.OK
    (step.prefix / "bin/hello").unlink()
    (site_packages(step) / "torch/__init__.py").unlink()
    conda.seen.clear()
    step.apply()
    assert step.check(deep=True).state is State.OK
    assert [path for path in conda.seen if "hello" in path], "the damaged package is downloaded again"


def test_other_conda_package_under_the_right_file_name_is_rejected(
    step: EnvStep, conda: conda_channel.FolderServer
) -> None:
    conda.faults["hello-1.0"] = next((conda.folder / "conda-forge/noarch").glob("hello-2.0-*")).read_bytes()
    with pytest.raises(FirstlightError, match="hello"):
        step.apply()
    assert not step.prefix.exists()


@pytest.mark.parametrize(("mirror", "reason"), [("no server", "does not answer"), ("404", "answers 404")])
def test_unreachable_conda_mirror_causes_a_fallback_to_the_systems_python(
    tmp_path: Path,
    conda_envs: Path,
    conda: conda_channel.FolderServer,
    monkeypatch: pytest.MonkeyPatch,
    mirror: str,
    reason: str,
) -> None:
    monkeypatch.setenv("CONDA_CHANNEL_ALIAS", NOWHERE if mirror == "no server" else f"{conda.url}/nothing-here")
    with pytest.raises(BlockedError, match=f"(?s){reason}.*CONDA_CHANNEL_ALIAS"):
        env_step(tmp_path / "root", conda_envs, interpreter="conda").apply()
    auto = env_step(tmp_path / "root", conda_envs)
    auto.apply()
    check = auto.check()
    assert check.state is State.OK
    assert "fallback: the system's Python" in (check.fallback or "")
    assert reason in (check.fallback or "")
    requested = env_step(tmp_path / "root", conda_envs, interpreter="conda").check()
    assert (requested.state, "env remove diffusers" in requested.detail) == (State.BLOCKED, True)


def test_conda_channel_that_fails_during_the_build_leaves_no_environment(
    step: EnvStep, conda: conda_channel.FolderServer
) -> None:
    conda.faults["hello-1.0"] = 503
    with pytest.raises(FirstlightError, match="hello"):
        step.apply()
    assert not step.prefix.exists()


def test_conda_lock_for_other_platforms_only_is_rejected_or_causes_a_fallback(
    step: EnvStep, conda_envs: Path, tmp_path: Path
) -> None:
    lock = conda_envs / "diffusers/conda-lock.yml"
    lock.write_text(lock.read_text().replace(PLATFORM, "osx-arm64"))
    with pytest.raises(BlockedError, match=f"is not locked for {PLATFORM}; it is for: osx-arm64"):
        env_step(tmp_path / "root", conda_envs, interpreter="conda").apply()
    step.apply()
    assert "is not locked for" in (step.check().fallback or "")
