"""Plays one host of a shared volume, in a process with its own mount and UTS namespaces.

Each line of stdin is a JSON object, and the answer to it is one line of JSON on stdout. The first line holds the paths
of the host, and each further line is a request: the name of a method of `Agent` as `act`, and its arguments. A command
of `provision` runs in a forked child of this process, which has imported all modules.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from provision.core.layout import Root
    from provision.environments.definition import EnvironmentDefinition
    from provision.host.facts import HostFacts

# Python's audit events for the calls that change a file system (docs.python.org/3/library/audit_events.html).
_CHANGES = {f"os.{act}" for act in ("rename", "mkdir", "remove", "rmdir", "symlink", "link", "truncate", "utime")}
_WRITING = os.O_WRONLY | os.O_RDWR
_SMALL_HOME = 8 << 20  # bytes; a larger file system is never filled
_PAGES_FREE = 4  # a user who has fewer writes nothing


class Agent:
    """Holds the paths of the host: its home, the mount point of the volume, and the folder `disk` with its content."""

    def __init__(self, given: dict[str, str]) -> None:
        self.home, self.volume, self.disk = (Path(given[key]) for key in ("home", "volume", "disk"))
        for folder, content in ((self.home, given["home_content"]), (self.volume, given["below"])):
            subprocess.run(["mount", "--bind", content, str(folder)], check=True)
        socket.sethostname(given["name"])
        self.is_mounted = False
        self.held: list[int] = []

    def rename(self, name: str) -> None:
        """Give the host another name, as a host has that is rented again."""
        socket.sethostname(name)
        setattr(platform, "_uname_cache", None)  # noqa: B010 (a new process, which a command is, has no cache)

    def fill(self) -> dict[str, Any]:
        """Fill the file system of the home, if it is a small one."""
        space = os.statvfs(self.home)
        if space.f_blocks * space.f_frsize > _SMALL_HOME:
            return {"done": False}
        with contextlib.suppress(OSError), (self.home / "filler").open("ab") as file:
            while True:
                os.write(file.fileno(), bytes(4096))
        return {"done": True}

    def free(self) -> None:
        """Delete what `fill` has written."""
        (self.home / "filler").unlink(missing_ok=True)

    def mount(self) -> None:
        """Mount the volume unless it is mounted already."""
        if not self.is_mounted:
            subprocess.run(["mount", "--bind", str(self.disk), str(self.volume)], check=True)
            self.is_mounted = True

    def unmount(self) -> None:
        """Close all files that are kept open, and unmount the volume if it is mounted."""
        self.release()
        if self.is_mounted:
            subprocess.run(["umount", str(self.volume)], check=True)
            self.is_mounted = False

    def write(self, path: str, text: str) -> dict[str, Any]:
        """Write a file in the home as the user does; return {"done", "earlier": former text, "real": path}.

        If a parent is a dangling link or no folder, or the path is a folder, write nothing and return {"done": False}.
        """
        file = self.home / path
        parents = file.parents[: len(Path(path).parts) - 1]
        if any(os.path.lexists(parent) and not parent.is_dir() for parent in parents) or file.is_dir():
            return {"done": False}
        earlier = file.read_text(errors="replace") if file.exists() else None
        if os.statvfs(next(parent for parent in file.parents if parent.is_dir())).f_bavail < _PAGES_FREE:
            return {"done": False}  # the disk is full
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return {"done": True, "earlier": earlier, "real": os.path.realpath(file)}

    def delete(self, path: str) -> dict[str, Any]:
        """Delete a file in the home; return {"done", "earlier": former text}, or {"done": False} if it is absent."""
        file = self.home / path
        if not file.is_file():
            return {"done": False}
        earlier = file.read_text(errors="replace")
        file.unlink()
        return {"done": True, "earlier": earlier}

    def hold(self, path: str) -> dict[str, Any]:
        """Open a file in the home and keep it open, as a notebook does; return {"done": whether any file is open}."""
        file = self.home / path
        if file.is_file():
            self.held.append(os.open(file, os.O_RDONLY))
        return {"done": bool(self.held)}

    def release(self) -> None:
        """Close all files that are kept open."""
        while self.held:
            os.close(self.held.pop())

    def link(self, path: str, target: str, seed: dict[str, str]) -> dict[str, Any]:
        """Make a symbolic link in the home as a user does, to a new folder with files.

        Make none, and return {"done": False}, if the path exists, the volume is absent, or a parent is no folder or is
        on the volume.

        Args:
            path: the path of the link in the home.
            target: the folder to which the link leads.
            seed: {name of a file in that folder: its text}.
        """
        place = self.home / path
        if os.path.lexists(place) or not self.is_mounted:
            return {"done": False}
        if any(os.path.lexists(parent) and not parent.is_dir() for parent in place.parents):
            return {"done": False}
        real_parent = os.path.realpath(place.parent)
        if real_parent.startswith(str(self.volume)):
            return {"done": False}  # the parent folder is on the volume already
        earlier = None
        for name, text in seed.items():
            file = Path(target, name)
            earlier = file.read_text(errors="replace") if file.is_file() else earlier
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
        return {"done": True, "earlier": earlier}

    def wipe(self) -> None:
        """Delete the content of the home, as a rental service does between sessions; links are not followed."""
        self.release()
        for entry in os.scandir(self.home):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)  # noqa: PTH108

    def survey(self) -> dict[str, Any]:
        """Return "links": {path: target}, "files": {path, also through links: [real path, text]} and "mounted"."""
        links: dict[str, str] = {}
        files: dict[str, tuple[str, str]] = {}
        stack = [(str(self.home), "", frozenset({str(self.home)}))]
        while stack:
            folder, name, seen = stack.pop()
            for entry in os.scandir(folder):
                path = f"{name}/{entry.name}".removeprefix("/")
                real = os.path.realpath(entry.path)
                if entry.is_symlink():
                    links[path] = os.readlink(entry.path)  # noqa: PTH115
                if os.path.isdir(entry.path) and real not in seen:  # noqa: PTH112
                    stack.append((entry.path, path, seen | {real}))
                elif os.path.isfile(entry.path):  # noqa: PTH113
                    files[path] = (real, _text(entry.path))
        return {"links": links, "files": files, "mounted": self.is_mounted}

    def script(self, root: str) -> dict[str, Any]:
        """Run the relink.sh of a root by sh, with HOME and PATH as its only variables; return its code, out and err."""
        argv = ["sh", f"{root}/.firstlight/relink.sh"]
        completed = subprocess.run(
            argv, check=False, capture_output=True, text=True, env={"HOME": str(self.home), "PATH": os.environ["PATH"]}
        )
        return {"code": completed.returncode, "out": completed.stdout, "err": completed.stderr}

    def run(self, argv: list[str], kill: int | None, folder: str) -> dict[str, Any]:
        """Run `provision` in a forked child, and return {"code", "out", "err", "killed"}.

        Args:
            argv: the arguments.
            kill: the number of the file system change before which the child is killed; None: it is not killed.
            folder: the current folder of the child.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    for number in self.held:
                        os.close(number)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    os.chdir(folder)
                    os.environ["HOME"] = str(self.home)
                    code = _run(argv, kill)
                finally:
                    os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        return {"code": status, "out": texts[0], "err": texts[1], "killed": status == -signal.SIGKILL}


def _text(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123
        content = file.read()
    return content.decode() if content[:2] in {b"A:", b"B:"} else hashlib.sha256(content).hexdigest()


def _run(argv: list[str], kill: int | None) -> int:
    from provision.cli import main

    if kill is not None:
        left = kill

        def count(event: str, details: tuple[Any, ...]) -> None:
            nonlocal left
            if event in _CHANGES or (event == "open" and isinstance(details[2], int) and details[2] & _WRITING):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    sys.argv = ["provision", *argv]
    try:
        main.main()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


class FolderOfEnvironment:
    """Replaces the setup step that builds an environment: it only writes the environment's pyvenv.cfg."""

    essential = False
    local = True

    def __init__(self, root: Root, definition: EnvironmentDefinition, *_: object, **__: object) -> None:
        self.name = f"environment {definition.name}"
        self.file = root.prefix(definition.name) / "pyvenv.cfg"

    def describe(self) -> str:
        return f"make {self.file}"

    def check(self, *, deep: bool = False) -> Any:
        from provision.core.step import Check, State

        return Check(State.OK if self.file.exists() else State.DRIFTED, str(self.file))

    def apply(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(f"home = {platform.node()}\n")


def _prepare() -> None:
    """Import the modules of all commands; replace two slow parts, the hardware probe and the build of environments."""
    from provision.cli import main, models_output, models_run, output  # noqa: F401
    from provision.host import facts
    from provision.models import inventory, remove, stand_ins  # noqa: F401
    from provision.setup import doctor, plan, undo  # noqa: F401

    machine: HostFacts = facts.probe()
    facts.probe = lambda *_, **__: machine
    setattr(plan, "EnvStep", FolderOfEnvironment)  # noqa: B010 (mypy does not allow the name to be assigned)


def main() -> None:
    from provision.fs import lease

    # A process that was killed in another PID namespace keeps its lease until the lease expires, by default after two
    # minutes. The rounds must not wait that long.
    lease.EXPIRY_SECONDS, lease.RENEWAL_SECONDS = 6.0, 0.5
    agent = Agent(json.loads(sys.stdin.readline()))
    _prepare()
    print(json.dumps({"ready": platform.node()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(agent, request.pop("act"))(**request)
        print(json.dumps(answer or {}), flush=True)


if __name__ == "__main__":
    main()
