"""Tests provision/bootstrap.py in a checkout of its own, with a real venv, a real pip and a small toolbox."""

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
    """Build the wheel of an installed package from the files in its RECORD, and return the wheel's path."""
    package = metadata.distribution(name)
    wheel = folder / f"{name}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in package.files or ():
            path = str(file)
            if path.startswith("../../../bin/"):
                path = f"{name}-{package.version}.data/scripts/{file.name}"
            if not path.endswith((".pyc", "RECORD", "INSTALLER", "REQUESTED")):
                archive.write(str(file.locate()), path)
        rows = "".join(f"{entry},,\n" for entry in archive.namelist())
        archive.writestr(f"{name}-{package.version}.dist-info/RECORD", rows)
    return wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkout for the tests of this file, which build its toolbox once and leave the toolbox complete."""
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
    """Run bootstrap.py with added variables, as a user does, or with `isolated` (python -I) as make does."""
    added = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "wheels")} | variables
    argv = [python, *(["-I"] if isolated else []), str(checkout / "provision/bootstrap.py"), *words]
    env = dict(os.environ) | added
    return subprocess.run(argv, capture_output=True, text=True, env=env, check=False, cwd=checkout, timeout=600)


def copy_of(built: Path, target: Path) -> Path:
    """Copy the checkout without its toolbox, and return the copy, whose commands print their arguments."""
    shutil.copytree(built, target, ignore=shutil.ignore_patterns(".venv"))
    for package in ("provision", "bench"):
        (target / package / "cli").mkdir(parents=True)
        (target / package / "cli/main.py").write_text("import sys\n\ndef main():\n    print(*sys.argv)\n")
    return target


def runs(checkout: Path, code: str) -> bool:
    """Return whether the toolbox's Python runs the code without an error."""
    return subprocess.run([checkout / ".venv/bin/python", "-c", code], check=False).returncode == 0


def test_second_run_of_the_bootstrap_checks_the_toolbox_and_changes_nothing(built: Path) -> None:
    first = bootstrap(built)
    assert first.returncode == 0, first.stderr
    assert "bootstrap: installing the toolbox into .venv (requirements.lock, every hash checked)\n" in first.stderr
    assert runs(built, "import one")
    before = {path: path.lstat().st_mtime_ns for path in (built / ".venv").rglob("*")}
    again = bootstrap(built)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    after = {path: path.lstat().st_mtime_ns for path in (built / ".venv").rglob("*")}
    assert after == before


def test_toolbox_of_dev_lock_also_satisfies_requirements_lock(built: Path) -> None:
    assert bootstrap(built, "--dev").returncode == 0
    assert runs(built, "import one, two")
    assert bootstrap(built).stderr == "", "dev.lock contains every package of requirements.lock"


@pytest.mark.parametrize("deleted", ["bin/python", "site:one/data.txt", "site:one-1.0.dist-info"])
def test_deleted_file_of_the_toolbox_is_restored_by_the_next_run(built: Path, deleted: str) -> None:
    assert bootstrap(built).returncode == 0
    site = next((built / ".venv/lib").glob("python*/site-packages"))
    path = site / deleted.removeprefix("site:") if deleted.startswith("site:") else built / ".venv" / deleted
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    completed = bootstrap(built)
    assert completed.returncode == 0, completed.stderr
    assert "installing the toolbox" in completed.stderr
    assert runs(built, "import one; assert one.x == 1")


def test_wrong_hash_in_the_lock_is_rejected_and_a_run_with_the_right_lock_succeeds(tmp_path: Path, built: Path) -> None:
    checkout = copy_of(built, tmp_path / "checkout")
    lock = checkout / "envs/toolbox/requirements.lock"
    correct = lock.read_text()
    lock.write_text(correct[:-9] + "0" * 8 + "\n")
    completed = bootstrap(checkout)
    assert completed.returncode == 1
    assert "Hash mismatch" in completed.stderr
    assert "Traceback" not in completed.stderr
    lock.write_text(correct)
    assert bootstrap(checkout).returncode == 0
    assert runs(checkout, "import one")


def test_unfinished_toolbox_of_an_earlier_run_is_built_again(tmp_path: Path, built: Path) -> None:
    """Leave a toolbox with Python and firstlight's marker, without pip and without any locked package."""
    checkout = copy_of(built, tmp_path / "checkout")
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "firstlight.json").write_text('{"lock": null, "packages": {}}')
    completed = bootstrap(checkout)
    assert completed.returncode == 0, completed.stderr
    assert runs(checkout, "import one")


def test_interrupted_bootstrap_ends_its_child_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Start a child and a grandchild, as `provision.installers.uv` is a child that starts uv; both must end."""
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
        "from provision import bootstrap; from provision.core import bootstrap_wait\n"
        f"def apply(*_):\n"
        f"  progress = bootstrap_wait.BootstrapProgress({str(home)!r}, 'dev.lock')\n"
        f"  progress.run([sys.executable, '-c', {code!r}], '', '', dict(os.environ))\n"
        "bootstrap.apply = apply\n"
        "bootstrap.find_defect = lambda *_: '.venv is not built yet'\n"
        "raise SystemExit(bootstrap.main([]))\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=600
    )
    assert completed.returncode == 130, completed.stderr
    assert "interrupted" in completed.stderr
    child, grandchild = map(int, pids.read_text().split())
    assert not psutil.pid_exists(child)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(grandchild).wait(600)  # the process without a parent may end later


def test_error_of_the_bootstrap_contains_no_password_and_no_token(tmp_path: Path) -> None:
    """Fail like pip, which quotes the settings line that it cannot read; the line may contain a password."""
    code = "raise SystemExit('index-url = https://user:s3cretpw@pkgs.example/simple hf_" + "a" * 20 + "')"
    with pytest.raises(bootstrap_wait.BootstrapError) as caught:
        bootstrap_wait.BootstrapProgress(str(tmp_path), "dev.lock").run(
            [sys.executable, "-c", code], "", "it failed", dict(os.environ)
        )
    assert "https://…@pkgs.example/simple hf_…" in str(caught.value)


@pytest.mark.parametrize("path", ["/a\nb", "/a ", "/\N{LATIN SMALL LETTER U WITH DIAERESIS}", "/a\\b", "/a b"])
def test_path_line_of_the_toolbox_adds_a_checkout_with_any_name_to_sys_path(path: str) -> None:
    """Use the line like the module `site`: execute a line that begins with `import`, else add the line as a folder."""
    (line,) = bootstrap_module._path_line(path).splitlines()
    if line.startswith("import "):
        before, added = list(sys.path), list(sys.path)
        try:
            exec(line)  # noqa: S102 (as site does)
            added = sys.path[len(before) :]
        finally:
            sys.path[:] = before
        assert added == [path]
    else:
        assert line.rstrip() == path


def test_venv_not_made_by_firstlight_is_not_changed(tmp_path: Path, built: Path) -> None:
    checkout = copy_of(built, tmp_path / "checkout")
    (checkout / ".venv").mkdir()
    (checkout / ".venv/precious").write_text("mine")
    completed = bootstrap(checkout)
    assert completed.returncode == 1
    assert "was not made by firstlight" in completed.stderr
    assert (checkout / ".venv/precious").read_text() == "mine"


def test_bootstrap_with_a_python_without_venv_prints_one_line_with_the_package_to_install(
    tmp_path: Path, built: Path
) -> None:
    checkout = copy_of(built, tmp_path / "checkout")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    site = next((tmp_path / "bare/lib").glob("python*/site-packages"))
    (site / "debian.pth").write_text("import sys; sys.modules['ensurepip'] = None  # as without python3-venv\n")
    completed = bootstrap(checkout, python=str(tmp_path / "bare/bin/python"))
    assert completed.returncode == 1
    (line,) = completed.stderr.splitlines()
    assert "apt-get install python3." in line


def test_users_settings_that_change_an_installation_have_no_effect_on_the_bootstrap(
    tmp_path: Path, home: Path, built: Path
) -> None:
    checkout = copy_of(built, tmp_path / "checkout")
    shadows = tmp_path / "path"
    shadows.mkdir()
    for name in ("typer", "json", "provision", "requests", "uv"):
        (shadows / f"{name}.py").write_text("raise SystemExit('another module was imported')\n")
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
    variables = {
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
        "PYTHONPATH": str(shadows),
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
    completed = bootstrap(checkout, isolated=True, **variables)
    assert completed.returncode == 0, completed.stderr
    assert runs(checkout, "import one; assert one.x == 1")
    assert not (tmp_path / "target").exists()
    message = next(line for line in completed.stderr.splitlines() if "no effect here" in line)
    assert "PIP_CONSTRAINT, " in message
    assert "PYTHONPATH, " in message
    assert message.count("\n") == 0
    completed = subprocess.run(
        [checkout / ".venv/bin/provision", "a b"],
        env=dict(os.environ) | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout == "provision a b\n"


def test_commands_of_the_toolbox_start_in_a_folder_with_special_characters(tmp_path: Path, built: Path) -> None:
    """Use a path with a space, quotes, a dollar, a non-ASCII letter, and more than the 127 characters of a #! line."""
    checkout = copy_of(built, tmp_path / ("x" * 120) / 'it\'s a $HOME; "ü"')
    links = str(built / "wheels")  # pip accepts no find-links path with a space
    completed = bootstrap(checkout, PIP_FIND_LINKS=links)
    assert completed.returncode == 0, completed.stderr
    for command in ("provision", "bench"):
        argv = [str(checkout / ".venv/bin" / command), "one word", "$HOME"]
        for locale in ("C", "C.UTF-8"):
            completed = subprocess.run(
                argv, env=dict(os.environ) | {"LC_ALL": locale}, capture_output=True, text=True, check=True
            )
            assert completed.stdout == f"{command} one word $HOME\n"
    assert bootstrap(checkout, PIP_FIND_LINKS=links).stderr == "", "the second run has nothing to do"


def test_command_script_of_an_older_toolbox_is_replaced(built: Path) -> None:
    assert bootstrap(built).returncode == 0
    (built / ".venv/bin/provision").write_text("#!/usr/bin/env python3\n")
    assert bootstrap(built).returncode == 0
    assert (built / ".venv/bin/provision").read_text().startswith("#!/bin/sh\n")


class Stderr(io.StringIO):
    """Records the output, and makes the file `go` at the first write, which lets the child program end."""

    def __init__(self, go: Path, is_terminal: bool) -> None:
        super().__init__()
        self.go, self.is_terminal = go, is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.go.touch()
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_long_installation_shows_its_written_and_expected_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    go = tmp_path / "go"
    stderr = Stderr(go, is_terminal)
    monkeypatch.setattr(bootstrap_wait, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(bootstrap_wait, "LINE_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    progress = bootstrap_wait.BootstrapProgress(str(tmp_path), "requirements.lock")
    progress.counting.join()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/file").write_bytes(bytes(3_000_000))
    poll = f"for _ in range(6000):\n  if os.path.exists({str(go)!r}): break\n  time.sleep(0.01)\n"
    code = f"import os, time\n{poll}print('its output')"
    output = progress.run([sys.executable, "-c", code], "uv installs", "it failed", dict(os.environ))
    assert output == "its output\n"
    text = stderr.getvalue()
    lines = text.replace("\r\x1b[K", "\n").splitlines()
    assert "bootstrap: uv installs: 3 of about " in text
    assert max(map(len, lines)) < 60 or not is_terminal, "a line that the terminal wraps cannot be erased"
    assert " MB written, " in text
    assert text.endswith("\r\x1b[K" if is_terminal else " s\n"), "the live counter is erased, a plain line stays"


def test_unknown_argument_of_the_bootstrap_is_rejected(built: Path) -> None:
    completed = bootstrap(built, "--nonsense")
    assert completed.returncode == 2
    assert "--nonsense" in completed.stderr
