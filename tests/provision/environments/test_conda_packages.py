"""An environment whose python comes from conda: a real channel on loopback, real rattler, real faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from provision.config.torch import Variant
from provision.core import layout
from provision.core.errors import BlockedError, FirstlightError, SpecError
from provision.core.layout import Root
from provision.core.step import State
from provision.environments.definition import EnvironmentDefinition
from provision.environments.step import EnvStep
from provision.installers import conda_settings, rattler
from provision.lockfiles import conda_lock
from provision.lockfiles.folder import LockFolder
from provision.volume.environment_marker import read_owner
from provision.volume.journal import Journal
from tests.conftest import CHECKOUT, NOWHERE
from tests.provision import conda_channel
from tests.provision.conda_channel import MINOR, PLATFORM
from tests.provision.conftest import lock_text, write_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator


def build(root: Path, envs: Path, *, interpreter: str = "auto", offline: bool = False) -> EnvStep:
    locks, variants, minors = LockFolder(envs / "diffusers"), [Variant(name="cpu", torch="9.9+tiny")], [MINOR]
    wanted = EnvironmentDefinition("diffusers", locks, variants, minors, interpreter, PLATFORM, "a test")
    place = Root(root)
    return EnvStep(place, wanted, Path.home(), Journal(place.journal), offline=offline)


def site(step: EnvStep) -> Path:
    return next(step.prefix.glob("lib/python3*/site-packages"))


def said(*argv: object) -> str:
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def step(tmp_path: Path, conda_envs: Path, conda: conda_channel.Served) -> EnvStep:
    return build(tmp_path / "root", conda_envs)


@pytest.fixture
def scripts(conda_envs: Path, wheels: Path) -> None:
    """A wheel with a console script joins the pip part."""
    points = "[console_scripts]\ngreet = greet:main\n"
    files = {"greet.py": "def main():\n    print('hello from pip')\n", "greet-1.0.dist-info/entry_points.txt": points}
    write_wheel(wheels, "greet", "1.0", files)
    (conda_envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))


def test_it_is_built_from_conda_and_pip_together(step: EnvStep, scripts: None, conda: conda_channel.Served) -> None:
    assert step.check().state is State.DRIFTED
    step.apply()
    found = step.check(deep=True)
    assert (found.state, found.fallback) == (State.OK, None), found.detail
    assert "from conda" in found.detail
    python = layout.interpreter(step.prefix)
    assert said(python, "-c", "import sys, torch, hello; print(sys.prefix)") == str(step.prefix)
    assert said(step.prefix / "bin/hello") == "hello from conda"
    assert said(step.prefix / "bin/greet") == "hello from pip"
    assert not list(step.prefix.parent.glob(".*")), "nothing is left beside it"
    for script in (step.prefix / "bin").iterdir():
        assert b".building-" not in script.read_bytes()[:500]
    assert {path.split("/")[1] for path in conda.seen} == {"conda-forge"}, "the mirror was asked"
    meta = next(step.prefix.glob("conda-meta/hello-*.json"))
    assert json.loads(meta.read_text())["url"].startswith(conda_channel.CANONICAL), (
        "the record names the channel itself"
    )


def test_packages_of_conda_are_left_to_conda(step: EnvStep, conda_envs: Path, wheels: Path) -> None:
    write_wheel(wheels, "hello", "1.0", {"hello.py": "raise SystemExit('pip overwrote it')\n"})
    (conda_envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    step.apply()
    assert said(step.prefix / "bin/hello") == "hello from conda"
    assert step.check(deep=True).state is State.OK


def test_conda_and_pip_may_not_disagree(step: EnvStep, conda_envs: Path, wheels: Path) -> None:
    write_wheel(wheels, "hello", "3.0", {"hello.py": ""})
    (conda_envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    with pytest.raises(SpecError, match=r"cpu\.lock wants hello==3\.0, .*conda-lock\.yml holds hello 1\.0"):
        step.apply()
    assert not step.prefix.exists()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("rm bin/hello", "hello: bin/hello is missing"),
        ("rm lib/python3*/json/decoder.py", "python: lib/python3"),
        ("rm bin/python3.*", "is missing"),
        ("rm conda-meta/hello-1.0-0.json", "hello: is not installed"),
        ("cd lib/python3*/site-packages; cp hello.py new; echo more >> new; mv new hello.py", "hello.py is"),
        ("rm lib/python3*/site-packages/torch/__init__.py", "torch: torch/__init__.py is missing"),
    ],
)
def test_harm_is_seen_by_a_quick_look_and_mended_offline(
    step: EnvStep, tmp_path: Path, conda_envs: Path, conda: conda_channel.Served, harm: str, told: str
) -> None:
    step.apply()
    mine = site(step) / "mine.py"
    mine.write_text("kept")
    subprocess.run(["sh", "-c", harm], cwd=step.prefix, check=True)
    found = step.check()
    assert found.state is State.DRIFTED
    assert told in found.detail
    conda.seen.clear()
    offline = build(tmp_path / "root", conda_envs, offline=True)
    offline.apply()
    assert offline.check(deep=True).state is State.OK
    assert conda.seen == []
    assert mine.read_text() == "kept"


def test_a_flipped_byte_spreads_through_no_hard_link(step: EnvStep, tmp_path: Path, conda_envs: Path) -> None:
    """The file of the cache is the file of the environment: to mend one is to mend both."""
    step.apply()
    victim = site(step) / "hello.py"
    content = bytearray(victim.read_bytes())
    content[0] ^= 1
    with victim.open("r+b") as file:
        file.write(content)
    assert step.check().state is State.OK, "a quick look sees sizes alone"
    found = step.check(deep=True)
    assert "hello.py does not have its recorded content" in found.detail
    step.apply()
    assert step.check(deep=True).state is State.OK
    other = build(tmp_path / "root", conda_envs)
    shutil.rmtree(step.prefix)
    other.apply()
    assert other.check(deep=True).state is State.OK


def test_a_tampered_package_is_not_taken(step: EnvStep, conda: conda_channel.Served) -> None:
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
def test_a_lock_that_was_tampered_with_takes_nothing(step: EnvStep, conda_envs: Path, part: str) -> None:
    """Another hash for a package that is served as ever."""
    lock = conda_envs / "diffusers" / part
    text = lock.read_text()
    digest = re.findall(r"sha256[:'= ]+([0-9a-f]{64})", text)[0]
    lock.write_text(text.replace(digest, "0" + digest[1:] if digest[0] != "0" else "1" + digest[1:]))
    with pytest.raises(FirstlightError, match=r"[Hh]ash|sha256"):
        step.apply()
    assert not step.prefix.exists()


def test_a_wheel_that_was_tampered_with_is_not_taken(step: EnvStep, wheels: Path) -> None:
    write_wheel(wheels, "diffusers", "8.8", {"diffusers/__init__.py": "raise SystemExit('not what was locked')"})
    with pytest.raises(FirstlightError, match=r"[Hh]ash"):
        step.apply()
    assert not step.prefix.exists()


def test_deleted_caches_are_no_loss(step: EnvStep, conda: conda_channel.Served) -> None:
    step.apply()
    shutil.rmtree(step.root.pkgs)
    shutil.rmtree(step.root.cache)
    assert step.check(deep=True).state is State.OK
    (step.prefix / "bin/hello").unlink()
    (site(step) / "torch/__init__.py").unlink()
    conda.seen.clear()
    step.apply()
    assert step.check(deep=True).state is State.OK
    assert [path for path in conda.seen if "hello" in path], "what was harmed was fetched again"


def test_another_package_under_the_right_name_is_not_taken(step: EnvStep, conda: conda_channel.Served) -> None:
    conda.faults["hello-1.0"] = next((conda.folder / "conda-forge/noarch").glob("hello-2.0-*")).read_bytes()
    with pytest.raises(FirstlightError, match="hello"):
        step.apply()
    assert not step.prefix.exists()


@pytest.mark.parametrize(("mirror", "told"), [("dead", "does not answer"), ("404", "answers 404")])
def test_a_mirror_that_is_down(
    tmp_path: Path,
    conda_envs: Path,
    conda: conda_channel.Served,
    monkeypatch: pytest.MonkeyPatch,
    mirror: str,
    told: str,
) -> None:
    monkeypatch.setenv("CONDA_CHANNEL_ALIAS", NOWHERE if mirror == "dead" else f"{conda.url}/nothing-here")
    with pytest.raises(BlockedError, match=f"(?s){told}.*CONDA_CHANNEL_ALIAS"):
        build(tmp_path / "root", conda_envs, interpreter="conda").apply()
    auto = build(tmp_path / "root", conda_envs)
    auto.apply()
    found = auto.check()
    assert found.state is State.OK
    assert "the system's python stands in for conda's" in (found.fallback or "")
    assert told in (found.fallback or "")
    forced = build(tmp_path / "root", conda_envs, interpreter="conda").check()
    assert (forced.state, "env remove diffusers" in forced.detail) == (State.BLOCKED, True)


def test_a_channel_that_goes_down_half_way_leaves_nothing_named(step: EnvStep, conda: conda_channel.Served) -> None:
    conda.faults["hello-1.0"] = 503
    with pytest.raises(FirstlightError, match="hello"):
        step.apply()
    assert not step.prefix.exists()


def test_a_lock_for_another_platform(step: EnvStep, conda_envs: Path, tmp_path: Path) -> None:
    lock = conda_envs / "diffusers/conda-lock.yml"
    lock.write_text(lock.read_text().replace(PLATFORM, "osx-arm64"))
    with pytest.raises(BlockedError, match=f"is not locked for {PLATFORM}; it is for: osx-arm64"):
        build(tmp_path / "root", conda_envs, interpreter="conda").apply()
    step.apply()
    assert "is not locked for" in (step.check().fallback or "")


@pytest.fixture
def other_disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def test_a_moved_root_is_rehomed(
    step: EnvStep, tmp_path: Path, conda_envs: Path, scripts: None, other_disk: Path
) -> None:
    step.apply()
    moved = other_disk / "moved"
    shutil.copytree(tmp_path / "root", moved, symlinks=True)
    shutil.rmtree(tmp_path / "root")
    again = build(moved, conda_envs, offline=True)
    assert "must be told that it lies at" in again.check().detail
    again.apply()
    found = again.check(deep=True)
    assert found.state is State.OK, found.detail
    assert said(again.prefix / "bin/hello") == "hello from conda"
    assert said(again.prefix / "bin/greet") == "hello from pip"
    for script in (again.prefix / "bin").iterdir():
        assert str(tmp_path / "root").encode() not in script.read_bytes()[:500]
    assert (read_owner(again.prefix) or {})["prefix"] == str(again.prefix)


def test_a_system_environment_may_be_moved_as_it_is(tmp_path: Path, envs: Path, wheels: Path) -> None:
    points = "[console_scripts]\ngreet = greet:main\n"
    files = {"greet.py": "def main():\n    print('hi')\n", "greet-1.0.dist-info/entry_points.txt": points}
    write_wheel(wheels, "greet", "1.0", files)
    (envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    build(tmp_path / "root", envs).apply()
    (tmp_path / "root").rename(tmp_path / "moved")
    again = build(tmp_path / "moved", envs)
    assert again.check(deep=True).state is State.OK
    assert said(again.prefix / "bin/greet") == "hi"


def test_a_long_root_is_told(tmp_path: Path, conda_envs: Path, conda: conda_channel.Served) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    step = build(deep, conda_envs)
    step.apply()
    assert "passes 127 characters" in (step.check().fallback or "")


def test_a_package_cache_on_another_disk_is_told(step: EnvStep, other_disk: Path) -> None:
    step.root.path.mkdir()
    step.root.pkgs.symlink_to(other_disk)
    if other_disk.stat().st_dev == step.root.path.stat().st_dev:
        pytest.skip("this machine has one file system only")
    step.apply()
    assert "another file system" in (step.check().fallback or "")


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.provision.environments.test_conda_packages import build
step = build(Path(sys.argv[1]), Path(sys.argv[2]))
print("ready", flush=True)
step.apply()
"""


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_any_moment_it_is_whole_or_not_there(
    tmp_path: Path, conda_envs: Path, conda: conda_channel.Served, scripts: None, moment: int
) -> None:
    """Killed with all its children as the channel serves its n-th answer, and later at sizes that the disk shows."""
    root = tmp_path / "root"
    argv = [sys.executable, "-c", RUN, str(root), str(conda_envs), str(CHECKOUT)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    probe = psutil.Process(process.pid)

    def reached() -> bool:
        if moment < 4:
            return len(conda.seen) > moment
        folders = (root / "envs").glob(".*.building-*")
        built = sum(len(files) for folder in folders for _, _, files in os.walk(folder))
        return built > (moment - 3) * 300 or (root / "envs/diffusers").exists()

    while process.poll() is None and not reached():
        os.sched_yield()
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*probe.children(recursive=True), probe]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()
    process.stdout.close()
    step = build(root, conda_envs)
    first = step.check(deep=True)
    assert first.state is State.OK or not step.prefix.exists(), first.detail
    if first.state is not State.OK:
        step.apply()
    assert step.check(deep=True).state is State.OK
    assert not list(step.prefix.parent.glob(".*"))


def test_the_solver_keeps_the_channels_own_addresses(
    channel_folder: Path, conda: conda_channel.Served, tmp_path: Path
) -> None:
    mirrored = conda_settings.mirrors(os.environ, tmp_path)
    found = rattler.solve(["python", "hello"], ["conda-forge"], PLATFORM, [], mirrored, tmp_path / "cache")
    assert {package.name for package in found} == {"python", "hello"}
    assert all(package.url.startswith(conda_channel.CANONICAL) for package in found)
    whole = {
        package.name: package for package in conda_channel.locked(channel_folder / "conda-forge", "python", "hello=2.0")
    }
    assert {package.name: package for package in found} == whole


def test_cuda_is_a_virtual_package(conda: conda_channel.Served, tmp_path: Path) -> None:
    mirrored = conda_settings.mirrors(os.environ, tmp_path)

    def solve(*virtual: str) -> list[str]:
        found = rattler.solve(["wants-cuda"], ["conda-forge"], PLATFORM, virtual, mirrored, tmp_path / "cache")
        return [package.name for package in found]

    assert solve("__cuda=12.8") == ["wants-cuda"]
    with pytest.raises(FirstlightError, match="__cuda"):
        solve("__cuda=11.8")


def test_a_channel_that_does_not_answer_the_solver(tmp_path: Path) -> None:
    mirrored = {"https://conda.anaconda.org/": f"{NOWHERE}/"}
    with pytest.raises(FirstlightError, match=r"(?s)^error sending request[^\n]*CONDA_CHANNEL_ALIAS.*--keep-conda"):
        rattler.solve(["python"], ["conda-forge"], PLATFORM, [], mirrored, tmp_path / "cache")


def test_conda_settings_name_the_mirror(home: Path) -> None:
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


def test_the_shipped_lock_is_of_the_real_records() -> None:
    """Every package's file name says its name and version, and its hashes are whole."""
    packages = conda_lock.read_lock(CHECKOUT / "envs/diffusers/conda-lock.yml")
    assert {package.platform for package in packages} == {"linux-64", "osx-64", "osx-arm64", "win-64"}
    for package in packages:
        assert package.url.startswith(f"{conda_channel.CANONICAL}/")
        assert package.url.rpartition("/")[2].startswith(f"{package.name}-{package.version}-")
    assert len({hashlib.sha256(package.sha256.encode()).digest() for package in packages}) > len(packages) // 2
