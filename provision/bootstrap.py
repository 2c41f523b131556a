"""Makes `.venv`, the toolbox that firstlight itself runs on, with nothing but the standard library.

Runs under any python3, also one that is too old (to say so): no syntax newer than Python 3.6 in this file.
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
sys.path.insert(0, CHECKOUT)  # an isolated python does not look beside its script
from provision.core import child_environment  # noqa: E402 (the line above finds it)
from provision.core.bootstrap_wait import BootstrapError, BootstrapProgress, say  # noqa: E402

TOOLBOX = os.path.join("envs", "toolbox")
LOCKS = ("requirements.lock", "dev.lock")  # the second holds all that the first holds
STAMP = "firstlight.json"
COMMANDS = ("provision", "bench")


def look(checkout: str, lock: str) -> "str | None":
    """Say why `.venv` does not hold `lock`, or None when it does.

    Args:
        checkout: the folder that holds `envs/` and `.venv`.
        lock: "requirements.lock" or "dev.lock".
    """
    venv = os.path.join(checkout, ".venv")
    try:
        with open(os.path.join(venv, STAMP)) as file:
            stamp = json.load(file)
        packages = dict(stamp["packages"])
    except (OSError, ValueError, KeyError, TypeError):
        return "no toolbox yet"
    if stamp.get("lock") is None:
        return "an earlier run was cut off"
    site = _site_packages(venv)
    if site is None or _runs(_python(venv)) is None:
        return ".venv's python does not run"
    accepted = {_sha256(os.path.join(checkout, TOOLBOX, name)) for name in LOCKS[LOCKS.index(lock) :]}
    if stamp.get("lock") not in accepted:
        return "the lock has changed"
    for name, version in sorted(packages.items()):
        missing = _missing_file(site, name, version)
        if missing:
            return "%s %s lacks %s" % (name, version, missing)
    return _misplaced(checkout, site)


def apply(checkout: str, lock: str) -> None:
    """Build or mend `.venv` from `lock`, every hash enforced by pip.

    Raises:
        BootstrapError: venv or pip is missing, the folder is not ours, or pip failed.
    """
    venv = os.path.join(checkout, ".venv")
    _need_venv()
    reason = look(checkout, lock)
    if os.path.lexists(venv) and not os.path.exists(os.path.join(venv, STAMP)):
        raise BootstrapError("%s was not made by firstlight. Move it away, then run make again." % venv)
    if not os.path.isdir(venv):
        os.mkdir(venv)
    # A venv that works keeps what it has: a newer lock, or dev.lock, installs only the difference.
    healthy = look(checkout, LOCKS[0]) is None or reason in ("the lock has changed", "its commands have changed")
    # From here to the end the folder is known as ours and as unfinished.
    _write_json(os.path.join(venv, STAMP), {"lock": None, "packages": {}})
    wait = BootstrapProgress(checkout, lock)
    environment = child_environment.child(os.environ)
    if not healthy:
        _clear(venv)
        argv = [sys.executable, "-I", "-m", "venv", venv]
        wait.run(argv, "making .venv", "could not make %s" % venv, environment)
    site_config = os.path.join(sys.base_prefix, "pip.conf")
    if os.path.exists(site_config):
        shutil.copyfile(site_config, os.path.join(venv, "pip.conf"))
    site = _site_packages(venv)
    if site is None:
        raise BootstrapError("%s holds no folder for packages. Remove it and run make again." % venv)
    with open(os.path.join(site, "firstlight.pth"), "w") as file:
        file.write(_path_line(checkout))
    path = os.path.join(checkout, TOOLBOX, lock)
    python = _python(venv)
    say("installing the toolbox into .venv (%s, every hash checked)" % lock)
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check"]
    asking = child_environment.for_pip_config(os.environ)
    listing = wait.run([*pip, "config", "list"], "reading pip's settings", "pip cannot read its settings", asking)
    settings = child_environment.parse_pip_config(listing)
    _say_dropped(settings)
    # pip, which knows this machine's index and certificates, fetches uv; uv fetches the rest in a tenth of the time.
    first = os.path.join(venv, "uv.txt")
    with open(first, "w") as file:
        file.write(_entry(path, "uv"))
    scratch = os.path.join(venv, "tmp")
    if not os.path.isdir(scratch):
        os.mkdir(scratch)
    install = [*pip, "install", "--quiet", "--no-input", "--no-deps", "--require-hashes", "-r", first]
    own = dict(child_environment.for_pip(os.environ, settings), TMPDIR=scratch)
    wait.run(install, "fetching uv", "pip could not install uv of %s" % path, own)
    shutil.rmtree(scratch, ignore_errors=True)
    # uv's half reads the machine's settings itself, so it gets all of them.
    rest = [python, "-I", "-m", "provision.installers.uv", path]
    wait.run(rest, "uv installs %s" % lock, "uv could not install %s" % path, dict(os.environ))
    if os.name == "posix":
        for command in COMMANDS:
            _write_command(venv, command)
    installed = _installed(site)
    _write_json(os.path.join(venv, STAMP), {"lock": _sha256(path), "packages": installed})


def main(arguments: "list[str]") -> int:
    """Look, apply what is missing, look again. Returns the exit code."""
    unknown = [word for word in arguments if word != "--dev"]
    if unknown:
        say("unknown argument %s; the only one is --dev" % unknown[0])
        return 2
    _need_python()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it started ends with it
    lock = LOCKS[1] if "--dev" in arguments else LOCKS[0]
    return 0 if look(CHECKOUT, lock) is None else _converge(lock)


def _converge(lock: str) -> int:
    try:
        apply(CHECKOUT, lock)
        reason = look(CHECKOUT, lock)
    except BootstrapError as error:
        say(str(error))
        return 1
    except OSError as error:
        say("%s: %s. Free or mend it, then run make again." % (error.filename or CHECKOUT, error.strerror))
        return 1
    except KeyboardInterrupt:
        say("interrupted; run make again, it goes on from here")
        return 130
    if reason is not None:
        say("the toolbox is still not right: %s. Remove .venv and run make again." % reason)
    return 0 if reason is None else 1


def _need_python() -> None:
    """Start again under a newer python3 of this machine where this one is too old."""
    if sys.version_info >= OLDEST:
        return
    for minor in range(NEWEST, OLDEST[1] - 1, -1):
        found = shutil.which("python3.%d" % minor)
        if found and _runs(found) == (3, minor):
            os.execv(found, [found, "-I", os.path.abspath(__file__), *sys.argv[1:]])
    version = "%d.%d" % sys.version_info[:2]
    say("python3 is %s, firstlight needs 3.10 or newer. Install one, then `make PYTHON=python3.11`." % version)
    raise SystemExit(1)


def _need_venv() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        package = "python%d.%d-venv" % sys.version_info[:2]
        raise BootstrapError(
            "this python has no venv. Install it (Debian, Ubuntu: apt-get install %s; "
            "Fedora: dnf install python3-pip), then run make again." % package
        ) from error


def _runs(python: str) -> "tuple[int, int] | None":
    """The interpreter's (major, minor), or None when it does not start."""
    code = "import sys; print('%d %d' % sys.version_info[:2])"
    try:
        out = subprocess.check_output([python, "-I", "-S", "-c", code], stderr=subprocess.DEVNULL)
        major, minor = out.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _say_dropped(settings: "dict[str, list[str]]") -> None:
    names = child_environment.dropped(os.environ)
    variables = {name[len("PIP_") :].lower().replace("_", "-") for name in names if name.startswith("PIP_")}
    bent = [
        option
        for option in settings
        if child_environment.PIP.get(option) == child_environment.SAID and option not in variables
    ]
    said = names + ["pip's %s" % option for option in bent]
    if said:
        say("%s %s no effect here: packages are locked by hash" % (", ".join(said), "have" if said[1:] else "has"))


def _path_line(checkout: str) -> str:
    """Return the line of a .pth file that puts a folder on the path, whatever encoding it is read in."""
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
    """{name: version} of every package in `site`, by its .dist-info folder."""
    found = {}
    for entry in os.listdir(site):
        if entry.endswith(".dist-info"):
            name, _, version = entry[: -len(".dist-info")].partition("-")
            found[name] = version
    return found


def _missing_file(site: str, name: str, version: str) -> "str | None":
    """The first file that the package's RECORD names and that is not there in its recorded size."""
    record = _read(os.path.join(site, "%s-%s.dist-info" % (name, version), "RECORD"))
    if record is None:
        return "its RECORD"
    for line in record.splitlines():
        # A path with a comma is quoted; none of ours has one, and a quoted one is then only not looked at.
        path, _, rest = line.partition(",")
        if path.startswith('"') or path.endswith(".pyc"):
            continue
        size = rest.rpartition(",")[2]
        try:
            found = os.stat(os.path.join(site, path)).st_size
        except OSError:
            return path
        if size and int(size) != found:
            return "%s as it was" % path
    return None


def _misplaced(checkout: str, site: str) -> "str | None":
    """Say what does not lead to this checkout, or None."""
    venv = os.path.join(checkout, ".venv")
    if _read(os.path.join(site, "firstlight.pth")) != _path_line(checkout):
        return "the checkout has moved"
    commands = COMMANDS if os.name == "posix" else ()
    if any(_read(os.path.join(venv, "bin", command)) != _command(venv, command) for command in commands):
        return "its commands have changed"
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


def _entry(lock: str, name: str) -> str:
    """One package's lines of a lock: its pin and its hashes."""
    lines = (_read(lock) or "").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(name + "==")]
    if not starts:
        raise BootstrapError("%s does not pin %s. Restore it: git checkout -- %s" % (lock, name, lock))
    end = starts[0] + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    return "\n".join(lines[starts[0] : end]) + "\n"


def _command(venv: str, command: str) -> str:
    """Return a program that starts one of ours: in sh, since a #! line takes neither a space nor a long path."""
    code = 'import sys; sys.argv[0] = "%s"; from %s.cli.main import main; main()' % (command, command)
    return '#!/bin/sh\nexec %s -I -c %s "$@"\n' % (shlex.quote(_python(venv)), shlex.quote(code))


def _write_command(venv: str, command: str) -> None:
    path = os.path.join(venv, "bin", command)
    with open(path, "wb") as file:
        file.write(os.fsencode(_command(venv, command)))
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


def _start() -> int:
    """Run isolated: no variable of Python's, no folder of the user's has a say."""
    if sys.flags.isolated:
        return main(sys.argv[1:])
    argv = [sys.executable, "-I", os.path.abspath(__file__), *sys.argv[1:]]
    if os.name == "posix":
        os.execv(sys.executable, argv)
    return subprocess.call(argv)


if __name__ == "__main__":
    raise SystemExit(_start())
