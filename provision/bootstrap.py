"""Builds `.venv`, the virtual environment (the "toolbox") in which firstlight itself runs.

It imports the standard library and two modules of firstlight that also need nothing else.
This file uses no syntax newer than Python 3.6, so that a python3 that is too old can report that it is too old.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

OLDEST = (3, 10)
NEWEST = 14
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, CHECKOUT)  # an isolated python does not search the folder of its script
from provision.core import child_environment  # noqa: E402 (the line above finds it)
from provision.core.bootstrap_wait import BootstrapError, BootstrapProgress, emit  # noqa: E402

TOOLBOX = os.path.join("envs", "toolbox")
LOCKS = ("requirements.lock", "dev.lock")  # dev.lock contains every package of requirements.lock
STAMP = "firstlight.json"
COMMANDS = ("provision", "bench")
LOCK_CHANGED = "the lock file has changed"
COMMANDS_CHANGED = "the commands in .venv/bin have changed"


def find_defect(checkout: str, lock: str) -> "str | None":
    """Return the first reason why `.venv` does not match a lock file, or None if it matches.

    Args:
        checkout: the folder that holds `envs/` and `.venv`.
        lock: the name of a lock file in `envs/toolbox`: "requirements.lock" or "dev.lock".
    """
    venv = os.path.join(checkout, ".venv")
    try:
        with open(os.path.join(venv, STAMP)) as file:
            stamp = json.load(file)
        packages = dict(stamp["packages"])
    except (OSError, ValueError, KeyError, TypeError):
        return ".venv is not built yet"
    if stamp.get("lock") is None:
        return "an earlier run did not finish"
    site = _site_packages(venv)
    if site is None or _version(_python(venv)) is None:
        return "the python of .venv does not start"
    accepted = {_sha256(os.path.join(checkout, TOOLBOX, name)) for name in LOCKS[LOCKS.index(lock) :]}
    if stamp.get("lock") not in accepted:
        return LOCK_CHANGED
    for name, version in sorted(packages.items()):
        defect = _package_defect(site, name, version)
        if defect:
            return "%s %s is damaged: %s" % (name, version, defect)
    return _checkout_defect(checkout, site)


def apply(checkout: str, lock: str) -> None:
    """Build or repair `.venv` from a lock file; pip and uv check every hash.

    Raises:
        BootstrapError: Python has no venv or pip, the existing `.venv` was not made by firstlight, or an installer
            failed.
    """
    venv = os.path.join(checkout, ".venv")
    _need_venv()
    reason = find_defect(checkout, lock)
    if os.path.lexists(venv) and not os.path.exists(os.path.join(venv, STAMP)):
        raise BootstrapError("%s was not made by firstlight. Move this folder away, then run make again." % venv)
    if not os.path.isdir(venv):
        os.mkdir(venv)
    # A working venv keeps its packages: for a newer lock file, or for dev.lock, only the difference is installed.
    healthy = find_defect(checkout, LOCKS[0]) is None or reason in (LOCK_CHANGED, COMMANDS_CHANGED)
    # The stamp without a lock marks the folder as made by firstlight and as unfinished.
    _write_json(os.path.join(venv, STAMP), {"lock": None, "packages": {}})
    progress = BootstrapProgress(checkout, lock)
    environment = child_environment.child(os.environ)
    if not healthy:
        _clear(venv)
        argv = [sys.executable, "-I", "-m", "venv", venv]
        progress.run(argv, "making .venv", "could not make %s" % venv, environment)
    site_config = os.path.join(sys.base_prefix, "pip.conf")
    if os.path.exists(site_config):
        shutil.copyfile(site_config, os.path.join(venv, "pip.conf"))
    site = _site_packages(venv)
    if site is None:
        raise BootstrapError("%s has no site-packages folder. Remove .venv and run make again." % venv)
    with open(os.path.join(site, "firstlight.pth"), "w") as file:
        file.write(_path_line(checkout))
    path = os.path.join(checkout, TOOLBOX, lock)
    python = _python(venv)
    emit("installing the toolbox into .venv (%s, every hash checked)" % lock)
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check"]
    variables = child_environment.for_pip_config(os.environ)
    command = [*pip, "config", "list"]
    listing = progress.run(command, "reading pip's settings", "pip cannot read its settings", variables)
    settings = child_environment.parse_pip_config(listing)
    _report_dropped(settings)
    # pip has this machine's index and certificates, so pip installs uv. uv installs the other packages in a tenth of
    # pip's time.
    uv_lock = os.path.join(venv, "uv.txt")
    with open(uv_lock, "w") as file:
        file.write(_pinned_lines(path, "uv"))
    scratch = os.path.join(venv, "tmp")
    if not os.path.isdir(scratch):
        os.mkdir(scratch)
    install = [*pip, "install", "--quiet", "--no-input", "--no-deps", "--require-hashes", "-r", uv_lock]
    variables = dict(child_environment.for_pip(os.environ, settings), TMPDIR=scratch)
    progress.run(install, "fetching uv", "pip could not install the uv that %s pins" % path, variables)
    shutil.rmtree(scratch, ignore_errors=True)
    # The module that runs uv reads this machine's settings itself, so it gets all environment variables.
    install = [python, "-I", "-m", "provision.installers.uv", path]
    progress.run(install, "uv installs %s" % lock, "uv could not install the packages of %s" % path, dict(os.environ))
    if os.name == "posix":
        for name in COMMANDS:
            _write_command(venv, name)
    installed = _installed(site)
    _write_json(os.path.join(venv, STAMP), {"lock": _sha256(path), "packages": installed})


def main(arguments: "list[str]") -> int:
    """Check `.venv`, build or repair it if it does not match its lock file, check again, and return the exit code.

    Args:
        arguments: the command-line arguments; the only valid one is `--dev`, which selects dev.lock.

    Returns:
        0 if `.venv` matches, 1 after a failure, 2 for an unknown argument, 130 after Ctrl-C.
    """
    unknown = [word for word in arguments if word != "--dev"]
    if unknown:
        emit("unknown argument %s; the only argument is --dev" % unknown[0])
        return 2
    _need_python()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, so that child processes are ended too
    lock = LOCKS[1] if "--dev" in arguments else LOCKS[0]
    return 0 if find_defect(CHECKOUT, lock) is None else _converge(lock)


def _converge(lock: str) -> int:
    try:
        apply(CHECKOUT, lock)
        reason = find_defect(CHECKOUT, lock)
    except BootstrapError as error:
        emit(str(error))
        return 1
    except OSError as error:
        emit("%s: %s. Fix the cause, then run make again." % (error.filename or CHECKOUT, error.strerror))
        return 1
    except KeyboardInterrupt:
        emit("interrupted; run make again to continue")
        return 130
    if reason is not None:
        emit("the toolbox still does not match its lock: %s. Remove .venv and run make again." % reason)
    return 0 if reason is None else 1


def _need_python() -> None:
    """Check the version of the running Python. If it is older than 3.10, restart this script under a newer python3.

    Raises:
        SystemExit: the machine has no newer python3; the exit code is 1.
    """
    if sys.version_info >= OLDEST:
        return
    for minor in range(NEWEST, OLDEST[1] - 1, -1):
        python = shutil.which("python3.%d" % minor)
        if python and _version(python) == (3, minor):
            os.execv(python, [python, "-I", os.path.abspath(__file__), *sys.argv[1:]])
    version = "%d.%d" % sys.version_info[:2]
    emit(
        "this python3 is %s; firstlight needs 3.10 or newer. Install python3.11, then `make PYTHON=python3.11`."
        % version
    )
    raise SystemExit(1)


def _need_venv() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        package = "python%d.%d-venv" % sys.version_info[:2]
        raise BootstrapError(
            "this python has no module venv. Install it (Debian, Ubuntu: apt-get install %s; "
            "Fedora: dnf install python3-pip), then run make again." % package
        ) from error


def _version(python: str) -> "tuple[int, int] | None":
    """Return the (major, minor) version of a Python interpreter, or None if it does not start."""
    code = "import sys; print('%d %d' % sys.version_info[:2])"
    try:
        output = subprocess.check_output([python, "-I", "-S", "-c", code], stderr=subprocess.DEVNULL)
        major, minor = output.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _report_dropped(settings: "dict[str, list[str]]") -> None:
    names = child_environment.dropped(os.environ)
    variables = {name[len("PIP_") :].lower().replace("_", "-") for name in names if name.startswith("PIP_")}
    options = [
        option
        for option in settings
        if child_environment.PIP.get(option) == child_environment.REPORTED and option not in variables
    ]
    dropped = names + ["pip's %s" % option for option in options]
    if dropped:
        have = "have" if dropped[1:] else "has"
        emit("%s %s no effect here: packages are locked by hash" % (", ".join(dropped), have))


def _path_line(checkout: str) -> str:
    """Return the line for a .pth file in site-packages that adds the checkout to sys.path.

    The line is the plain path. If the path has characters outside ASCII, or spaces at an end, the line is a Python
    statement with the path as an escaped string.
    """
    if ascii(checkout)[1:-1] != checkout or checkout != checkout.strip():
        return "import sys; sys.path.append(%s)\n" % ascii(checkout)
    return checkout + "\n"


def _python(venv: str) -> str:
    return os.path.join(venv, "Scripts", "python.exe") if os.name == "nt" else os.path.join(venv, "bin", "python")


def _site_packages(venv: str) -> "str | None":
    if os.name == "nt":
        path = os.path.join(venv, "Lib", "site-packages")
        return path if os.path.isdir(path) else None
    lib = os.path.join(venv, "lib")
    for name in sorted(os.listdir(lib)) if os.path.isdir(lib) else []:
        path = os.path.join(lib, name, "site-packages")
        if os.path.isdir(path):
            return path
    return None


def _installed(site: str) -> "dict[str, str]":
    """Return {name: version} of every package in the folder `site`, from the names of its .dist-info folders."""
    versions = {}
    for entry in os.listdir(site):
        if entry.endswith(".dist-info"):
            name, _, version = entry[: -len(".dist-info")].partition("-")
            versions[name] = version
    return versions


def _package_defect(site: str, name: str, version: str) -> "str | None":
    """Return the first defect of an installed package, or None if each file of its RECORD has its recorded size.

    The defect is "RECORD is missing", "PATH is missing" or "PATH has another size".
    """
    record = _read(os.path.join(site, "%s-%s.dist-info" % (name, version), "RECORD"))
    if record is None:
        return "RECORD is missing"
    for line in record.splitlines():
        # RECORD quotes a path that contains a comma. No package of the toolbox has one; a quoted path is not checked.
        path, _, rest = line.partition(",")
        if path.startswith('"') or path.endswith(".pyc"):
            continue
        size = rest.rpartition(",")[2]
        try:
            actual = os.stat(os.path.join(site, path)).st_size
        except OSError:
            return "%s is missing" % path
        if size and int(size) != actual:
            return "%s has another size" % path
    return None


def _checkout_defect(checkout: str, site: str) -> "str | None":
    """Return why `.venv` does not fit this checkout: the checkout has moved, or the commands differ; else None."""
    venv = os.path.join(checkout, ".venv")
    if _read(os.path.join(site, "firstlight.pth")) != _path_line(checkout):
        return "the checkout has moved"
    commands = COMMANDS if os.name == "posix" else ()
    if any(_read(os.path.join(venv, "bin", command)) != _command_script(venv, command) for command in commands):
        return COMMANDS_CHANGED
    return None


def _clear(venv: str) -> None:
    for entry in os.listdir(venv):
        if entry == STAMP:
            continue
        path = os.path.join(venv, entry)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _pinned_lines(lock: str, name: str) -> str:
    """Return the lines of one package in a lock file: its pinned version and its hashes."""
    lines = (_read(lock) or "").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(name + "==")]
    if not starts:
        raise BootstrapError("%s does not pin %s. Restore the file: git checkout -- %s" % (lock, name, lock))
    end = starts[0] + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    return "\n".join(lines[starts[0] : end]) + "\n"


def _command_script(venv: str, command: str) -> str:
    """Return the content of the sh script that starts a command ("provision" or "bench").

    A `#!` line with the path of python would fail if the path has spaces or is long.
    """
    code = 'import sys; sys.argv[0] = "%s"; from %s.cli.main import main; main()' % (command, command)
    return '#!/bin/sh\nexec %s -I -c %s "$@"\n' % (shlex.quote(_python(venv)), shlex.quote(code))


def _write_command(venv: str, command: str) -> None:
    path = os.path.join(venv, "bin", command)
    with open(path, "wb") as file:
        file.write(os.fsencode(_command_script(venv, command)))
    os.chmod(path, 0o755)


def _write_json(path: str, value: object) -> None:
    part = path + ".part"
    with open(part, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
    os.replace(part, path)


def _read(path: str) -> "str | None":
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except OSError:
        return None


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _run_isolated() -> int:
    """Run `main` in a Python in isolated mode (-I), and return the exit code.

    In isolated mode the PYTHON* variables and the user's site-packages have no effect.
    """
    if sys.flags.isolated:
        return main(sys.argv[1:])
    argv = [sys.executable, "-I", os.path.abspath(__file__), *sys.argv[1:]]
    if os.name == "posix":
        os.execv(sys.executable, argv)
    return subprocess.call(argv)


if __name__ == "__main__":
    raise SystemExit(_run_isolated())
