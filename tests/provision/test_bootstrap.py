"""The first stage, in a checkout of its own: real venv, real pip, a small toolbox."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from typing import TYPE_CHECKING

import psutil
import pytest

from provision import bootstrap as bootstrap_module
from provision.core import bootstrap_wait
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
    (checkout / "envs/toolbox").mkdir(parents=True)
    (checkout / "wheels").mkdir()
    shutil.copytree(CHECKOUT / "provision", checkout / "provision", ignore=shutil.ignore_patterns("__pycache__", "cli"))
    uv = repack(checkout / "wheels", "uv")
    one = write_wheel(checkout / "wheels", "one", "1.0", {"one/__init__.py": "x = 1\n", "one/data.txt": "data"})
    two = write_wheel(checkout / "wheels", "two", "2.0", {"two.py": "y = 2\n"})
    (checkout / "envs/toolbox/requirements.lock").write_text(lock_text(uv, one))
    (checkout / "envs/toolbox/dev.lock").write_text(lock_text(uv, one, two))
    return checkout


def bootstrap(
    checkout: Path, *words: str, python: str = sys.executable, isolated: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run it as a person does, or as make does: `isolated`."""
    changed = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "wheels")} | variables
    argv = [python, *(["-I"] if isolated else []), str(checkout / "provision/bootstrap.py"), *words]
    env = dict(os.environ) | changed
    return subprocess.run(argv, capture_output=True, text=True, env=env, check=False, cwd=checkout, timeout=600)


def copy_of(built: Path, target: Path) -> Path:
    """A checkout of its own, without a toolbox; its commands print their words."""
    shutil.copytree(built, target, ignore=shutil.ignore_patterns(".venv"))
    for package in ("provision", "bench"):
        (target / package / "cli").mkdir(parents=True)
        (target / package / "cli/main.py").write_text("import sys\n\ndef main():\n    print(*sys.argv)\n")
    return target


def runs(checkout: Path, code: str) -> bool:
    return subprocess.run([checkout / ".venv/bin/python", "-c", code], check=False).returncode == 0


def test_it_builds_once_and_then_only_looks(built: Path) -> None:
    first = bootstrap(built)
    assert first.returncode == 0, first.stderr
    assert "bootstrap: installing the toolbox into .venv (requirements.lock, every hash checked)\n" in first.stderr
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
    checkout = copy_of(built, tmp_path / "checkout")
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


def test_a_run_that_was_cut_off_is_begun_anew(tmp_path: Path, built: Path) -> None:
    """Its python has no pip, and what the lock asks for is not there."""
    checkout = copy_of(built, tmp_path / "checkout")
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "firstlight.json").write_text('{"lock": null, "packages": {}}')
    done = bootstrap(checkout)
    assert done.returncode == 0, done.stderr
    assert runs(checkout, "import one")


def test_an_interrupted_run_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Its child and that one's child, as uv is pip's half's."""
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        f"open({str(pids) + '.part'!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(pids) + '.part'!r}, {str(pids)!r})\n"
        "os.kill(os.getppid(), signal.SIGTERM); signal.pause()\n"
    )
    program = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "from provision import bootstrap; from provision.core import bootstrap_wait as waiting\n"
        f"def apply(*_):\n"
        f"  wait = waiting.Wait({str(home)!r}, 'dev.lock')\n"
        f"  wait.run([sys.executable, '-c', {code!r}], '', '', dict(os.environ))\n"
        "bootstrap.apply = apply\n"
        "bootstrap.look = lambda *_: 'no toolbox yet'\n"
        "raise SystemExit(bootstrap.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    one, two = map(int, pids.read_text().split())
    assert not psutil.pid_exists(one)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(two).wait(600)  # it was not ours to reap


def test_a_failure_shows_no_secret(tmp_path: Path) -> None:
    """pip repeats the line of its settings that it cannot read."""
    words = "raise SystemExit('index-url = https://user:s3cretpw@pkgs.example/simple hf_" + "a" * 20 + "')"
    with pytest.raises(bootstrap_wait.BootstrapError) as caught:
        bootstrap_wait.BootstrapProgress(str(tmp_path), "dev.lock").run(
            [sys.executable, "-c", words], "", "it failed", dict(os.environ)
        )
    assert "https://…@pkgs.example/simple hf_…" in str(caught.value)


@pytest.mark.parametrize("path", ["/a\nb", "/a ", "/\N{LATIN SMALL LETTER U WITH DIAERESIS}", "/a\\b", "/a b"])
def test_the_checkout_is_on_the_path_whatever_its_name_is(path: str) -> None:
    """As the module `site` reads a line of a .pth file: it imports, or takes the line for a folder."""
    (line,) = bootstrap_module._path_line(path).splitlines()
    if line.startswith("import "):
        before, found = list(sys.path), list(sys.path)
        try:
            exec(line)  # noqa: S102 (as site does)
            found = sys.path[len(before) :]
        finally:
            sys.path[:] = before
        assert found == [path]
    else:
        assert line.rstrip() == path


def test_a_foreign_venv_is_left_alone(tmp_path: Path, built: Path) -> None:
    checkout = copy_of(built, tmp_path / "checkout")
    (checkout / ".venv").mkdir()
    (checkout / ".venv/precious").write_text("mine")
    done = bootstrap(checkout)
    assert done.returncode == 1
    assert "was not made by firstlight" in done.stderr
    assert (checkout / ".venv/precious").read_text() == "mine"


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path, built: Path) -> None:
    checkout = copy_of(built, tmp_path / "checkout")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    site = next((tmp_path / "bare/lib").glob("python*/site-packages"))
    (site / "debian.pth").write_text("import sys; sys.modules['ensurepip'] = None  # as without python3-venv\n")
    done = bootstrap(checkout, python=str(tmp_path / "bare/bin/python"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "apt-get install python3." in line


def test_settings_that_would_bend_the_toolbox_have_no_effect(tmp_path: Path, home: Path, built: Path) -> None:
    checkout = copy_of(built, tmp_path / "checkout")
    other = tmp_path / "path"
    other.mkdir()
    for name in ("typer", "json", "provision", "requests", "uv"):
        (other / f"{name}.py").write_text("raise SystemExit('another module was imported')\n")
    constraint = tmp_path / "constraint.txt"
    constraint.write_text("uv==0.0.1\none==0.1\n")
    (home / ".config/pip").mkdir(parents=True)
    (home / ".config/pip/pip.conf").write_text(
        f"[global]\nquiet = 3\nlog = /proc/none/log\nno-binary = :all:\n[install]\nuser = yes\n"
        f"target = {tmp_path}/target\nrequire-virtualenv = yes\nconstraint = {constraint}\n"
    )
    (home / ".config/uv").mkdir()
    (home / ".config/uv/uv.toml").write_text(
        'exclude-newer = "2001-01-01T00:00:00Z"\nno-binary = true\n[pip]\ntarget = "/proc/none"\n'
    )
    (checkout / "pyproject.toml").write_text("[tool.uv\n")
    bent = {
        "PIP_USER": "1",
        "PIP_TARGET": str(tmp_path / "target"),
        "PIP_PREFIX": str(tmp_path / "prefix"),
        "PIP_ROOT": str(tmp_path / "pip-root"),
        "PIP_CONSTRAINT": str(constraint),
        "PIP_REQUIREMENT": str(tmp_path / "none.txt"),
        "PIP_NO_BINARY": ":all:",
        "PIP_DRY_RUN": "1",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "PIP_PYTHON": "/none/python",
        "PIP_LOG": "/proc/none/log",
        "PYTHONPATH": str(other),
        "PYTHONSAFEPATH": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONOPTIMIZE": "2",
        "PYTHONHOME": "/none",
        "PYTHONPLATLIBDIR": "lib32",
        "UV_EXCLUDE_NEWER": "2001-01-01T00:00:00Z",
        "UV_TORCH_BACKEND": "nonsense",
        "UV_CONSTRAINT": str(constraint),
        "UV_NO_BINARY": "1",
        "UV_PROJECT": "/none",
        "UV_WORKING_DIR": "/none",
        "UV_SYSTEM_PYTHON": "1",
        "UV_NO_SUCH_VARIABLE": "1",
    }
    done = bootstrap(checkout, isolated=True, **bent)
    assert done.returncode == 0, done.stderr
    assert runs(checkout, "import one; assert one.x == 1")
    assert not (tmp_path / "target").exists()
    said = next(line for line in done.stderr.splitlines() if "no effect here" in line)
    assert "PIP_CONSTRAINT, " in said
    assert "PYTHONPATH, " in said
    assert said.count("\n") == 0
    started = subprocess.run(
        [checkout / ".venv/bin/provision", "a b"],
        env=dict(os.environ) | bent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert started.stdout == "provision a b\n"


def test_checkout_in_an_odd_folder_starts(tmp_path: Path, built: Path) -> None:
    """A space, quotes, a dollar, a letter beyond ASCII, and more than the 127 characters of a #! line."""
    checkout = copy_of(built, tmp_path / ("x" * 120) / 'it\'s a $HOME; "ü"')
    links = str(built / "wheels")  # pip takes no address with a space
    done = bootstrap(checkout, PIP_FIND_LINKS=links)
    assert done.returncode == 0, done.stderr
    for command in ("provision", "bench"):
        argv = [str(checkout / ".venv/bin" / command), "one word", "$HOME"]
        for locale in ("C", "C.UTF-8"):
            started = subprocess.run(
                argv, env=dict(os.environ) | {"LC_ALL": locale}, capture_output=True, text=True, check=True
            )
            assert started.stdout == f"{command} one word $HOME\n"
    assert bootstrap(checkout, PIP_FIND_LINKS=links).stderr == "", "nothing is to be done"


def test_command_of_an_older_toolbox_is_written_anew(built: Path) -> None:
    assert bootstrap(built).returncode == 0
    (built / ".venv/bin/provision").write_text("#!/usr/bin/env python3\n")
    assert bootstrap(built).returncode == 0
    assert (built / ".venv/bin/provision").read_text().startswith("#!/bin/sh\n")


class Stderr(io.StringIO):
    """Takes what is shown, and lets the program that is waited for end once something is."""

    def __init__(self, go: Path, is_terminal: bool) -> None:
        super().__init__()
        self.go, self.is_terminal = go, is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.go.touch()
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_long_wait_shows_what_is_done_and_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    go = tmp_path / "go"
    shown = Stderr(go, is_terminal)
    monkeypatch.setattr(bootstrap_wait, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(bootstrap_wait, "LINE_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    wait = bootstrap_wait.BootstrapProgress(str(tmp_path), "requirements.lock")
    wait.counting.join()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/file").write_bytes(bytes(3_000_000))
    waits = f"for _ in range(6000):\n  if os.path.exists({str(go)!r}): break\n  time.sleep(0.01)\n"
    code = f"import os, time\n{waits}print('its answer')"
    answer = wait.run([sys.executable, "-c", code], "uv installs", "it failed", dict(os.environ))
    assert answer == "its answer\n"
    text = shown.getvalue()
    shown_lines = text.replace("\r\x1b[K", "\n").splitlines()
    assert "bootstrap: uv installs: 3 of about " in text
    assert max(map(len, shown_lines)) < 60 or not is_terminal, "a line that wraps cannot be written over"
    assert " MB written, " in text
    assert text.endswith("\r\x1b[K" if is_terminal else " s\n"), "the counter leaves no trace, a line stays"


def test_an_unknown_word_is_told(built: Path) -> None:
    done = bootstrap(built, "--nonsense")
    assert done.returncode == 2
    assert "--nonsense" in done.stderr
