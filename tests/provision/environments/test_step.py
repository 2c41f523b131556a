"""Tests the step of an environment: what it checks, what it repairs, and what it leaves unchanged."""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING

import pytest

from provision.config import torch
from provision.config.torch import Variant
from provision.core.errors import BlockedError, FirstlightError
from provision.core.layout import Root
from provision.core.step import State
from provision.environments import prefix, write_locks
from provision.environments.definition import EnvironmentDefinition
from provision.environments.step import EnvStep
from provision.fs.open_dir import OpenDir
from provision.installers import uv
from provision.lockfiles.folder import LockFolder
from provision.lockfiles.requirements import LockedPackage
from provision.volume.environment_marker import MARKER_NAME
from provision.volume.journal import Journal
from tests.provision.conda_channel import PLATFORM
from tests.provision.conftest import lock_text, write_wheel

if TYPE_CHECKING:
    from pathlib import Path

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def env_step(tmp_path: Path, envs: Path, *variants: Variant, offline: bool = False) -> EnvStep:
    """Return the setup step of the environment diffusers; its default is the variant cpu with the small torch."""
    variants = variants or (Variant(name="cpu", torch="9.9+tiny"),)
    root = Root(tmp_path / "root")
    definition = EnvironmentDefinition(
        "diffusers", LockFolder(envs / "diffusers"), variants, PYTHONS, "auto", PLATFORM, "a test"
    )
    return EnvStep(root, definition, tmp_path / "home", Journal(root.journal), offline=offline)


def site_packages(step: EnvStep) -> Path:
    return next(step.prefix.glob("lib/python*/site-packages"))


def test_built_environment_passes_a_deep_check(tmp_path: Path, envs: Path) -> None:
    step = env_step(tmp_path, envs)
    assert step.check().state is State.DRIFTED
    step.apply()
    check = step.check(deep=True)
    assert (check.state, check.fallback) == (State.OK, None)
    assert "every byte verified" in check.detail


def test_files_of_a_new_environment_are_synced_to_disk_before_its_marker_is_written(
    tmp_path: Path, envs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force, forced = OpenDir.sync_file_system, list[tuple[bool, bool]]()

    def forcing(self: OpenDir) -> None:
        forced.append((any(self.path.rglob("diffusers/__init__.py")), (self.path / MARKER_NAME).exists()))
        force(self)

    monkeypatch.setattr(OpenDir, "sync_file_system", forcing)
    env_step(tmp_path, envs).apply()
    assert forced == [(True, False)]


def test_repair_keeps_packages_that_the_user_added(tmp_path: Path, envs: Path, wheels: Path) -> None:
    step = env_step(tmp_path, envs)
    step.apply()
    added = site_packages(step) / "mine.py"
    added.write_text("kept")
    info = site_packages(step) / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "RECORD").write_text("mine.py,,\n")
    (site_packages(step) / "diffusers/__init__.py").unlink()
    step.apply()
    assert step.check(deep=True).state is State.OK
    assert added.read_text() == "kept"


@pytest.mark.parametrize(
    ("command", "detail"),
    [
        ("rm diffusers/__init__.py", "diffusers: diffusers/__init__.py is missing"),
        ("rm diffusers-8.8.dist-info/RECORD", "diffusers: diffusers-8.8.dist-info/RECORD is missing"),
        ("rm -r diffusers-8.8.dist-info", "diffusers: is not installed"),
        ("rm torch/big.txt && echo short > torch/big.txt", "torch: torch/big.txt has 6 bytes, but RECORD lists 20000"),
        ("rm ../../../bin/python", "does not run, or has an unsupported version"),
    ],
)
def test_quick_check_finds_damage_of_a_venv_and_apply_repairs_it(
    tmp_path: Path, envs: Path, command: str, detail: str
) -> None:
    import subprocess

    step = env_step(tmp_path, envs)
    step.apply()
    subprocess.run(["sh", "-c", command], cwd=site_packages(step), check=True)
    check = step.check()
    assert check.state is State.DRIFTED
    assert detail in check.detail
    step.apply()
    assert step.check(deep=True).state is State.OK


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe broken\n", b"torch/__init__.py,sha256=abc,x\n", b"\0" * 4096, b"", b'"torch', b"a,b\n", b"../" * 2000],
    ids=["bytes", "size", "zeros", "empty", "quote", "fields", "long"],
)
def test_package_with_a_damaged_record_is_installed_again(tmp_path: Path, envs: Path, content: bytes) -> None:
    built = env_step(tmp_path, envs)
    built.apply()
    record = next(built.prefix.glob("lib/python3*/site-packages/torch-*.dist-info/RECORD"))
    record.unlink()
    record.write_bytes(content)
    for deep in (False, True):
        check = built.check(deep=deep)
        assert check.state is State.DRIFTED
        assert re.search(r"torch: torch-\S+\.dist-info/RECORD is damaged", check.detail)
    built.apply()
    assert built.check(deep=True).state is State.OK
    assert b"torch/__init__.py,sha256=" in record.read_bytes()


def test_package_is_updated_when_the_lock_file_changes(tmp_path: Path, envs: Path, wheels: Path) -> None:
    step = env_step(tmp_path, envs)
    step.apply()
    next(wheels.glob("diffusers-*.whl")).unlink()
    write_wheel(wheels, "diffusers", "8.9", {"diffusers/__init__.py": "new = 1\n"})
    (envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    step = env_step(tmp_path, envs)  # the step of another run, which reads the new lock
    assert "is 8.8, but the lock pins 8.9" in step.check().detail
    step.apply()
    assert step.check(deep=True).state is State.OK
    assert (site_packages(step) / "diffusers/__init__.py").read_text() == "new = 1\n"


def test_folder_of_the_user_in_the_place_of_the_environment_blocks_the_step(tmp_path: Path, envs: Path) -> None:
    step = env_step(tmp_path, envs)
    step.prefix.mkdir(parents=True)
    (step.prefix / "precious").write_text("not ours")
    assert step.check().state is State.BLOCKED


def test_fallback_variant_is_installed_if_torch_is_not_available(tmp_path: Path, envs: Path, wheels: Path) -> None:
    wheel = write_wheel(wheels, "torch", "9.9", {"torch/__init__.py": ""})
    tiny = next(wheels.glob("torch-9.9+tiny-*.whl"))
    (envs / "diffusers/cu130.lock").write_text(lock_text(wheel, next(wheels.glob("diffusers-*.whl"))))
    tiny.unlink()
    cpu = Variant(name="cpu", torch="9.9+tiny", instead="cu130", instead_cost="which costs gigabytes")
    step = env_step(tmp_path, envs, cpu, Variant(name="cu130", torch="9.9"))
    step.apply()
    check = step.check()
    assert check.state is State.OK
    reason = f"find-links {wheels} does not list torch 9.9+tiny"
    assert f"torch 9.9+tiny was not available ({reason}); fallback: which costs gigabytes" in str(check.fallback)


def test_torch_comes_from_the_page_of_its_variant_if_no_own_source_has_the_wheel(
    tmp_path: Path, envs: Path, wheels: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for wheel in wheels.glob("torch-*.whl"):
        wheel.rename(elsewhere / wheel.name)
    step = env_step(tmp_path, envs, Variant(name="cpu", torch="9.9+tiny", find_links=str(elsewhere)))
    step.apply()
    assert step.check(deep=True).state is State.OK


def test_error_lists_the_python_versions_of_the_machine_if_none_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BlockedError, match=r"this machine has no Python 3\.99 \(it has: .*3\.\d+"):
        prefix.find_python(["3.99"], uv.base_python(), "uv python install")


def test_find_python_returns_the_first_supported_version_that_exists() -> None:
    here = ".".join(platform.python_version_tuple()[:2])
    python, version = prefix.find_python(["3.99", here], uv.base_python(), "…")
    assert version.startswith(f"{here}.")
    assert python.exists()


def test_packages_of_a_lock_file_are_those_whose_markers_match_the_python_version(tmp_path: Path) -> None:
    (tmp_path / "cpu.lock").write_text(
        "# words\nA_b.c==1.0 \\\n    --hash=sha256:00\nold==1 ; python_full_version < '3.12' \\\n    --hash=sha256:00\n"
        "new==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:00\nwin==1 ; sys_platform == 'win32' \\\n"
    )
    locks = LockFolder(tmp_path)
    assert locks.packages("cpu", "3.11.7") == (LockedPackage("a-b-c", "1.0"), LockedPackage("old", "1"))
    assert locks.packages("cpu", "3.12.1") == (LockedPackage("a-b-c", "1.0"), LockedPackage("new", "2"))


def test_error_of_an_invalid_lock_file_names_the_line_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "cpu.lock").write_text("fine==1\n<<<<<<< HEAD\n")
    with pytest.raises(FirstlightError, match=r"(?s)line 2.*git checkout"):
        LockFolder(tmp_path).packages("cpu", "3.11.7")
    with pytest.raises(FirstlightError, match="cannot be read"):
        LockFolder(tmp_path).packages("absent", "3.11.7")


def test_hashes_of_other_builds_are_added_to_the_entry_of_torch_only() -> None:
    text = "torch==1+cpu \\\n    --hash=sha256:bb\nother==2 \\\n    --hash=sha256:cc\n"
    variant = torch.Variant(name="cpu", torch="1+cpu", hashes=["aa", "bb"])
    assert write_locks.add_hashes(text, variant) == (
        "torch==1+cpu \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\nother==2 \\\n    --hash=sha256:cc\n"
    )
    assert write_locks.add_hashes(text, torch.Variant(name="x", torch="1+cpu")) == text
