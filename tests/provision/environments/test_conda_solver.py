"""Tests the solver of conda packages, the mirrors in conda's settings, and the conda lock that firstlight ships."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import FirstlightError, SpecError
from provision.installers import conda_settings, rattler
from provision.lockfiles import conda_lock
from tests.conftest import CHECKOUT, NOWHERE
from tests.provision import conda_channel
from tests.provision.conda_channel import PLATFORM

if TYPE_CHECKING:
    from pathlib import Path


def test_solved_packages_have_the_official_urls_of_the_channel(
    channel_folder: Path, conda: conda_channel.FolderServer, tmp_path: Path
) -> None:
    mirrors = conda_settings.mirrors(os.environ, tmp_path)
    packages = rattler.solve(["python", "hello"], ["conda-forge"], PLATFORM, [], mirrors, tmp_path / "cache")
    assert {package.name for package in packages} == {"python", "hello"}
    assert all(package.url.startswith(conda_channel.CANONICAL) for package in packages)
    channel_packages = {
        package.name: package for package in conda_channel.locked(channel_folder / "conda-forge", "python", "hello=2.0")
    }
    assert {package.name: package for package in packages} == channel_packages


def test_package_for_cuda_12_is_solved_only_with_a_virtual_package_of_cuda_12(
    conda: conda_channel.FolderServer, tmp_path: Path
) -> None:
    mirrors = conda_settings.mirrors(os.environ, tmp_path)

    def solve(*virtual: str) -> list[str]:
        packages = rattler.solve(["wants-cuda"], ["conda-forge"], PLATFORM, virtual, mirrors, tmp_path / "cache")
        return [package.name for package in packages]

    assert solve("__cuda=12.8") == ["wants-cuda"]
    with pytest.raises(FirstlightError, match="__cuda"):
        solve("__cuda=11.8")


def test_unreachable_conda_channel_is_reported_with_two_remedies(tmp_path: Path) -> None:
    mirrors = {"https://conda.anaconda.org/": f"{NOWHERE}/"}
    with pytest.raises(FirstlightError, match=r"(?s)^error sending request[^\n]*CONDA_CHANNEL_ALIAS.*--keep-conda"):
        rattler.solve(["python"], ["conda-forge"], PLATFORM, [], mirrors, tmp_path / "cache")


def test_conda_mirrors_come_from_condarc_unless_a_variable_names_one(home: Path) -> None:
    channels = "https://conda.anaconda.org"
    assert conda_settings.mirrors({}, home) == {}
    (home / ".condarc").write_text(
        "channel_alias: https://a.example/cloud/\ncustom_channels:\n  bio: https://b.example\n"
    )
    assert conda_settings.mirrors({}, home) == {
        f"{channels}/bio/": "https://b.example/bio/",
        f"{channels}/": "https://a.example/cloud/",
    }
    assert conda_settings.mirror_url(f"{channels}/bio/x", conda_settings.mirrors({}, home)) == "https://b.example/bio/x"
    assert (
        conda_settings.mirrors({"CONDA_CHANNEL_ALIAS": "https://c.example"}, home)[f"{channels}/"]
        == "https://c.example/"
    )
    (home / ".condarc").write_text("channel_alias: [\n")
    with pytest.raises(SpecError, match="condarc cannot be read"):
        conda_settings.mirrors({}, home)


def test_shipped_conda_lock_has_official_urls_and_different_hashes() -> None:
    """Check the platforms, the URLs, the file names and the hashes of the shipped conda lock."""
    packages = conda_lock.read_lock(CHECKOUT / "envs/diffusers/conda-lock.yml")
    assert {package.platform for package in packages} == {"linux-64", "osx-64", "osx-arm64", "win-64"}
    for package in packages:
        assert package.url.startswith(f"{conda_channel.CANONICAL}/")
        assert package.url.rpartition("/")[2].startswith(f"{package.name}-{package.version}-")
    assert len({hashlib.sha256(package.sha256.encode()).digest() for package in packages}) > len(packages) // 2
