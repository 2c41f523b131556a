"""The first stage, in a checkout of its own: real venv, real pip, a small toolbox."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from tests.conftest import CHECKOUT
from tests.provision.conftest import lock_text, write_wheel

if TYPE_CHECKING:
    from pathlib import Path


def repack(folder: Path, name: str) -> Path:
    """The wheel of a package that the toolbox itself holds, made again from its RECORD."""
    found = metadata.distribution(name)
    wheel = folder / f"{name}-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in found.files or ():
            place = str(file)
            if place.startswith("../../../bin/"):
                place = f"{name}-{found.version}.data/scripts/{file.name}"
            if not place.endswith((".pyc", "RECORD", "INSTALLER", "REQUESTED")):
                archive.write(str(file.locate()), place)
        rows = "".join(f"{entry},,\n" for entry in archive.namelist())
        archive.writestr(f"{name}-{found.version}.dist-info/RECORD", rows)
    return wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose toolbox has been built once; tests work on it in turn and leave it mended."""
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "provision").mkdir()
    (checkout / "envs/toolbox").mkdir(parents=True)
    (checkout / "wheels").mkdir()
    for name in ("__init__", "bootstrap", "sources", "command", "errors"):
        shutil.copy(CHECKOUT / f"provision/{name}.py", checkout / "provision")
    uv = repack(checkout / "wheels", "uv")
    one = write_wheel(checkout / "wheels", "one", "1.0", {"one/__init__.py": "x = 1\n", "one/data.txt": "data"})
    two = write_wheel(checkout / "wheels", "two", "2.0", {"two.py": "y = 2\n"})
    (checkout / "envs/toolbox/requirements.lock").write_text(lock_text(uv, one))
    (checkout / "envs/toolbox/dev.lock").write_text(lock_text(uv, one, two))
    return checkout


def bootstrap(checkout: Path, *words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "wheels")}
    argv = [python, str(checkout / "provision/bootstrap.py"), *words]
    return subprocess.run(argv, capture_output=True, text=True, env=dict(os.environ) | pip, check=False, timeout=120)


def runs(checkout: Path, code: str) -> bool:
    return subprocess.run([checkout / ".venv/bin/python", "-c", code], check=False).returncode == 0


def test_it_builds_once_and_then_only_looks(built: Path) -> None:
    first = bootstrap(built)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("\n") == 1, "one line says what it does"
    assert runs(built, "import one")
    before = {path: path.lstat().st_mtime_ns for path in (built / ".venv").rglob("*")}
    again = bootstrap(built)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    after = {path: path.lstat().st_mtime_ns for path in (built / ".venv").rglob("*")}
    assert after == before


def test_the_developers_lock_is_added_and_serves_both(built: Path) -> None:
    assert bootstrap(built, "--dev").returncode == 0
    assert runs(built, "import one, two")
    assert bootstrap(built).stderr == "", "dev.lock holds all that requirements.lock holds"


@pytest.mark.parametrize("harm", ["bin/python", "site:one/data.txt", "site:one-1.0.dist-info"])
def test_a_deleted_file_is_noticed(built: Path, harm: str) -> None:
    assert bootstrap(built).returncode == 0
    site = next((built / ".venv/lib").glob("python*/site-packages"))
    victim = site / harm.removeprefix("site:") if harm.startswith("site:") else built / ".venv" / harm
    if victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.unlink()
    done = bootstrap(built)
    assert done.returncode == 0, done.stderr
    assert "installing the toolbox" in done.stderr
    assert runs(built, "import one; assert one.x == 1")


def test_a_wrong_hash_is_refused_and_the_next_run_mends(tmp_path: Path, built: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(built, checkout, ignore=shutil.ignore_patterns(".venv"))
    lock = checkout / "envs/toolbox/requirements.lock"
    right = lock.read_text()
    lock.write_text(right[:-9] + "0" * 8 + "\n")
    done = bootstrap(checkout)
    assert done.returncode == 1
    assert "Hash mismatch" in done.stderr
    assert "Traceback" not in done.stderr
    lock.write_text(right)
    assert bootstrap(checkout).returncode == 0
    assert runs(checkout, "import one")


def test_a_foreign_venv_is_left_alone(tmp_path: Path, built: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(built, checkout, ignore=shutil.ignore_patterns(".venv"))
    (checkout / ".venv").mkdir()
    (checkout / ".venv/precious").write_text("mine")
    done = bootstrap(checkout)
    assert done.returncode == 1
    assert "was not made by firstlight" in done.stderr
    assert (checkout / ".venv/precious").read_text() == "mine"


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path, built: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(built, checkout, ignore=shutil.ignore_patterns(".venv"))
    (checkout / "provision/ensurepip.py").write_text("raise ImportError('as on Debian without python3-venv')\n")
    done = bootstrap(checkout)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "apt-get install python3." in line


def test_an_unknown_word_is_told(built: Path) -> None:
    done = bootstrap(built, "--nonsense")
    assert done.returncode == 2
    assert "--nonsense" in done.stderr
