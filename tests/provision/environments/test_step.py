"""An environment from its lock: what is looked at, what is mended, what is left alone."""

from __future__ import annotations

import platform
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


def build(tmp_path: Path, envs: Path, *variants: Variant, offline: bool = False) -> EnvStep:
    chosen = variants or (Variant(name="cpu", torch="9.9+tiny"),)
    root = Root(tmp_path / "root")
    wanted = EnvironmentDefinition(
        "diffusers", LockFolder(envs / "diffusers"), chosen, PYTHONS, "auto", PLATFORM, "a test"
    )
    return EnvStep(root, wanted, tmp_path / "home", Journal(root.journal), offline=offline)


def site(step: EnvStep) -> Path:
    return next(step.prefix.glob("lib/python*/site-packages"))


def test_it_is_built_and_then_as_locked(tmp_path: Path, envs: Path) -> None:
    step = build(tmp_path, envs)
    assert step.check().state is State.DRIFTED
    step.apply()
    found = step.check(deep=True)
    assert (found.state, found.fallback) == (State.OK, None)
    assert "every byte verified" in found.detail


def test_environment_is_forced_to_the_disk_before_its_marker(
    tmp_path: Path, envs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force, forced = OpenDir.sync_file_system, list[tuple[bool, bool]]()

    def forcing(self: OpenDir) -> None:
        forced.append((any(self.path.rglob("diffusers/__init__.py")), (self.path / MARKER_NAME).exists()))
        force(self)

    monkeypatch.setattr(OpenDir, "sync_file_system", forcing)
    build(tmp_path, envs).apply()
    assert forced == [(True, False)]


def test_what_the_user_added_stays(tmp_path: Path, envs: Path, wheels: Path) -> None:
    step = build(tmp_path, envs)
    step.apply()
    added = site(step) / "mine.py"
    added.write_text("kept")
    info = site(step) / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "RECORD").write_text("mine.py,,\n")
    (site(step) / "diffusers/__init__.py").unlink()
    step.apply()
    assert step.check(deep=True).state is State.OK
    assert added.read_text() == "kept"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("rm diffusers/__init__.py", "diffusers: diffusers/__init__.py is missing"),
        ("rm diffusers-8.8.dist-info/RECORD", "diffusers: its RECORD is missing"),
        ("rm -r diffusers-8.8.dist-info", "diffusers: is not installed"),
        ("rm torch/big.txt && echo short > torch/big.txt", "torch: torch/big.txt is 6 bytes, recorded with 20000"),
        ("rm ../../../bin/python", "its python does not run"),
    ],
)
def test_harm_is_seen_by_a_quick_look_and_mended(tmp_path: Path, envs: Path, harm: str, told: str) -> None:
    import subprocess

    step = build(tmp_path, envs)
    step.apply()
    subprocess.run(["sh", "-c", harm], cwd=site(step), check=True)
    found = step.check()
    assert found.state is State.DRIFTED
    assert told in found.detail
    step.apply()
    assert step.check(deep=True).state is State.OK


def test_a_changed_lock_is_followed(tmp_path: Path, envs: Path, wheels: Path) -> None:
    step = build(tmp_path, envs)
    step.apply()
    next(wheels.glob("diffusers-*.whl")).unlink()
    write_wheel(wheels, "diffusers", "8.9", {"diffusers/__init__.py": "new = 1\n"})
    (envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    step = build(tmp_path, envs)  # another run
    assert "is 8.8, the lock wants 8.9" in step.check().detail
    step.apply()
    assert step.check(deep=True).state is State.OK
    assert (site(step) / "diffusers/__init__.py").read_text() == "new = 1\n"


def test_a_foreign_folder_is_left_alone(tmp_path: Path, envs: Path) -> None:
    step = build(tmp_path, envs)
    step.prefix.mkdir(parents=True)
    (step.prefix / "precious").write_text("not ours")
    assert step.check().state is State.BLOCKED


def test_another_build_of_torch_stands_in(tmp_path: Path, envs: Path, wheels: Path) -> None:
    wheel = write_wheel(wheels, "torch", "9.9", {"torch/__init__.py": ""})
    tiny = next(wheels.glob("torch-9.9+tiny-*.whl"))
    (envs / "diffusers/cu130.lock").write_text(lock_text(wheel, next(wheels.glob("diffusers-*.whl"))))
    tiny.unlink()
    wanted = Variant(name="cpu", torch="9.9+tiny", instead="cu130", instead_cost="which costs gigabytes")
    step = build(tmp_path, envs, wanted, Variant(name="cu130", torch="9.9"))
    step.apply()
    found = step.check()
    assert found.state is State.OK
    assert f"torch 9.9+tiny could not be had (find-links {wheels} does not list torch 9.9+tiny); in its" in str(
        found.fallback
    )


def test_the_page_of_a_variant_is_asked_where_the_machine_lacks_its_wheel(
    tmp_path: Path, envs: Path, wheels: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for wheel in wheels.glob("torch-*.whl"):
        wheel.rename(elsewhere / wheel.name)
    step = build(tmp_path, envs, Variant(name="cpu", torch="9.9+tiny", find_links=str(elsewhere)))
    step.apply()
    assert step.check(deep=True).state is State.OK


def test_no_fitting_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BlockedError, match=r"no python of version 3\.99 is here \(found: .*3\.\d+"):
        prefix.find_python(["3.99"], uv.base_python(), "uv python install")


def test_the_first_supported_python_is_taken() -> None:
    here = ".".join(platform.python_version_tuple()[:2])
    python, version = prefix.find_python(["3.99", here], uv.base_python(), "…")
    assert version.startswith(f"{here}.")
    assert python.exists()


def test_a_lock_is_read_for_one_python(tmp_path: Path) -> None:
    (tmp_path / "cpu.lock").write_text(
        "# words\nA_b.c==1.0 \\\n    --hash=sha256:00\nold==1 ; python_full_version < '3.12' \\\n    --hash=sha256:00\n"
        "new==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:00\nwin==1 ; sys_platform == 'win32' \\\n"
    )
    locks = LockFolder(tmp_path)
    assert locks.packages("cpu", "3.11.7") == (LockedPackage("a-b-c", "1.0"), LockedPackage("old", "1"))
    assert locks.packages("cpu", "3.12.1") == (LockedPackage("a-b-c", "1.0"), LockedPackage("new", "2"))


def test_a_broken_lock_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "cpu.lock").write_text("fine==1\n<<<<<<< HEAD\n")
    with pytest.raises(FirstlightError, match=r"(?s)line 2.*git checkout"):
        LockFolder(tmp_path).packages("cpu", "3.11.7")
    with pytest.raises(FirstlightError, match="cannot be read"):
        LockFolder(tmp_path).packages("absent", "3.11.7")


def test_hashes_of_other_builds_are_added_to_torch_alone() -> None:
    text = "torch==1+cpu \\\n    --hash=sha256:bb\nother==2 \\\n    --hash=sha256:cc\n"
    variant = torch.Variant(name="cpu", torch="1+cpu", hashes=["aa", "bb"])
    assert write_locks.add_hashes(text, variant) == (
        "torch==1+cpu \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\nother==2 \\\n    --hash=sha256:cc\n"
    )
    assert write_locks.add_hashes(text, torch.Variant(name="x", torch="1+cpu")) == text
