"""Provides two hosts that share one volume: their folders, their agent processes, and the content of all disks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import limited_fs
from tests.provision import hub_server

if TYPE_CHECKING:
    from tests.provision.http_server import Server

HOSTS = ("A", "B")
MODELS = {
    "small": ("owner/small", {"model_index.json": b'{"_class_name": "X"}\n', "unet/w.safetensors": b"small" * 900}),
    "other": ("owner/other", {"model_index.json": b'{"_class_name": "Y"}\n', "vae/w.safetensors": b"other" * 700}),
}
# The command that starts a process as a host with its own mounts, host name and process ids. Both hosts may use the
# same process ids.
_NAMESPACE = ["unshare", "--mount", "--uts", "--propagation", "private", "--pid", "--fork", "--mount-proc"]
# The starts of the names of firstlight's own files that may change with every run, also with a refused one.
_VOLATILE = ("lock", "holder", "lease", "capabilit")

Tree = dict[str, tuple[str, int, str]]


@dataclass(frozen=True)
class Layout:
    """Describe how two hosts see the volume: the paths of their homes and of their mount points below `base`.

    `small`: the homes lie on small file systems of their own, which can be full. `volume` names the file system of the
    volume: "disk", or one of LIMITED.
    """

    homes: tuple[str, str] = ("home", "home")
    mounts: tuple[str, str] = ("volume", "volume")
    small: bool = False
    volume: str = "disk"


# The features that the volume lacks, as a network share and an object store lack them.
LIMITED = {
    "share": ("seconds", "fixed-modes", "owner", "no-xattr", "no-flock"),
    "store": ("no-hardlink", "no-exchange", "100ns", "no-fsync"),
}
_SMALL = "size=1m,nr_inodes=4k"
SAME = Layout()
OTHER_MOUNT = Layout(mounts=("volume", "data"))
OTHER_HOME = Layout(homes=("home", "home-b"))


def can_share() -> bool:
    """Return whether this process may start processes in the namespaces of another host (`_NAMESPACE`)."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*_NAMESPACE, "true"], check=False, capture_output=True).returncode == 0


@dataclass
class Host:
    """Hold one host of the volume.

    Attributes:
        name: A or B.
        base: the folder that holds all disks of both hosts.
        home: the path of the home for programs on this host.
        volume: the path of the volume's mount point for programs on this host.
        process: the agent (host_agent.py), which runs on this host.
        mounted: whether the volume is mounted on this host.
    """

    name: str
    base: Path
    home: Path
    volume: Path
    process: subprocess.Popen[str]
    mounted: bool = True

    @property
    def own(self) -> Path:
        """Return the folder with this host's own disks: home, nvme, and `below`, the folder under the mount point."""
        return self.base / self.name

    @property
    def definition(self) -> Path:
        return self.own / "host.toml"

    def ask(self, act: str, **request: Any) -> dict[str, Any]:
        """Send a request to the agent, wait for its answer, and return it."""
        self.send(act, **request)
        return self.answer()

    def send(self, act: str, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"act": act, **request}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the agent of host {self.name} has ended with {self.process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def survey(self) -> Survey:
        answer = self.ask("survey")
        return Survey(answer["links"], {path: (real, text) for path, (real, text) in answer["files"].items()})


@dataclass(frozen=True)
class Survey:
    """Hold the content of a home as programs on its host find it.

    Attributes:
        links: {path of a symbolic link: its target}.
        files: {path of a file, also through links: (real path, text)}.
    """

    links: dict[str, str]
    files: dict[str, tuple[str, str]]


@dataclass
class Reading:
    """Hold the content of all disks: {name of a disk, such as "disk" or "A/home": {path: (kind, mode, text)}}."""

    trees: dict[str, Tree]

    def own_texts(self, host: str) -> set[str]:
        """Return the texts of all entries on the volume and on a host's own disks."""
        return self.texts("disk", *(f"{host}/{part}" for part in ("home", "below", "nvme")))

    def texts(self, *disks: str) -> set[str]:
        """Return the texts of all entries on the named disks, or on every disk if none is named."""
        return {text for disk in disks or self.trees for _, _, text in self.trees[disk].values()}


@dataclass
class SharedVolume:
    """Holds a volume and its two hosts; `clear` empties all disks for the next round."""

    base: Path
    hub: Server
    layout: Layout = SAME
    mounts: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    agents: dict[tuple[str, ...], Host] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def disk(self) -> Path:
        """Return the folder that holds the bytes of the volume."""
        return self.base / ("disk" if self.layout.volume == "disk" else f"{self.layout.volume}-backing")

    def _home(self, name: str) -> Path:
        """Return the folder that holds the bytes of a home."""
        return self.base / name / ("small" if self.layout.small else "home")

    def lay(self) -> None:
        """Make the mount points and the envs folder, which all rounds share, and mount what the hosts inherit."""
        for name, limits in LIMITED.items():
            backing, point = self.base / f"{name}-backing", self.base / name
            backing.mkdir()
            point.mkdir()
            self.mounts.enter_context(limited_fs.mounted(backing, point, *limits))
        for name in HOSTS:
            small = self.base / name / "small"
            small.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", _SMALL, "small", small], check=True)
            self.mounts.callback(_unmount, small)
        for name in ("home", "home-b", "volume", "data", "disk", "envs/hosts", "envs/alpha", "envs/beta"):
            (self.base / name).mkdir(parents=True)
        envs = self.base / "envs"
        for env in ("alpha", "beta"):
            (envs / env / "requirements.lock").write_text("# a lock\n")
        (envs / "torch.toml").write_text('python = ["3.10", "3.11", "3.12", "3.13"]\n[[variant]]\nname = "cpu"\n')
        entries = [hub_server.manifest_entry(name, repo, files) for name, (repo, files) in MODELS.items()]
        (envs / "models.toml").write_text("\n".join(entries))
        (envs / "mirrors.toml").write_text("")

    def clear(self, layout: Layout, definitions: dict[str, str]) -> None:
        """Empty all disks, write the host.toml of each host, and mount the volume on both hosts.

        Args:
            layout: the paths of homes and mount points.
            definitions: {host: text of its host.toml, without the line `root`}.
        """
        for name in HOSTS:
            for part in ("home", "small", "below", "nvme", "tmp"):
                folder = self.base / name / part
                folder.mkdir(parents=True, exist_ok=True)
                _empty(folder)
        self.layout = layout
        _empty(self.disk)
        for number, name in enumerate(HOSTS):
            host = self._agent(name, layout.homes[number], layout.mounts[number])
            host.definition.write_text(f'root = "{host.volume}"\n{definitions[name]}')
            host.ask("release")
            host.ask("rename", name=f"host{name}")
            host.ask("mount")
            host.mounted = True
            self.hosts[name] = host

    def _agent(self, name: str, home: str, volume: str) -> Host:
        key = (name, home, volume, f"{self.layout.small} {self.layout.volume}")
        if key not in self.agents:
            own = self.base / name
            environ = {
                "PATH": os.environ["PATH"],
                "HOME": str(self.base / home),
                "TMPDIR": str(own / "tmp"),
                "HF_ENDPOINT": self.hub.url,
                "no_proxy": "127.0.0.1",
                "LANG": "C.UTF-8",
            }
            argv = [*_NAMESPACE, sys.executable, "-I", "-B", str(Path(__file__).with_name("host_agent.py"))]
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd=self.base
            )
            host = Host(name, self.base, self.base / home, self.base / volume, process)
            given = {"home": host.home, "volume": host.volume, "home_content": self._home(name)}
            given["disk"] = self.base / self.layout.volume
            given |= {"below": own / "below", "name": Path(f"host{name}")}
            assert process.stdin is not None
            process.stdin.write(json.dumps({key: str(path) for key, path in given.items()}) + "\n")
            process.stdin.flush()
            assert host.answer() == {"ready": f"host{name}"}
            self.agents[key] = host
        return self.agents[key]

    def read(self) -> Reading:
        """Read every disk of both hosts, and the volume."""
        trees = {f"{host}/{part}": tree(self.base / host / part) for host in HOSTS for part in ("below", "nvme")}
        homes = {f"{host}/home": tree(self._home(host)) for host in HOSTS}
        return Reading({"disk": tree(self.disk), **trees, **homes})

    def close(self) -> None:
        """End the agents of all hosts; their namespaces and mounts end at the same time."""
        for host in self.agents.values():
            assert host.process.stdin is not None
            assert host.process.stdout is not None
            host.process.stdin.close()
            host.process.wait()
            host.process.stdout.close()
        self.mounts.close()


def tree(top: Path) -> Tree:
    """Return {path: (kind, mode, text)} of all entries below a folder.

    The kind is "file", "folder" or "link". The text is `content_text` of a file, the target of a link, or "".
    """
    entries: Tree = {}
    stack = [("", str(top))]
    while stack:
        name, folder = stack.pop()
        for entry in os.scandir(folder):
            path = f"{name}/{entry.name}".removeprefix("/")
            status = entry.stat(follow_symlinks=False)
            mode = stat.S_IMODE(status.st_mode)
            if entry.is_symlink():
                entries[path] = ("link", 0, os.readlink(entry.path))  # noqa: PTH115
            elif entry.is_dir():
                entries[path] = ("folder", mode, "")
                stack.append((path, entry.path))
            else:
                content = Path(entry.path).read_bytes()
                entries[path] = ("file", mode, content_text(content))
    return entries


def content_text(content: bytes) -> str:
    """Return the content of a user's file, which begins with "A:" or "B:", or the SHA-256 of any other content."""
    return content.decode() if content[:2] in {b"A:", b"B:"} else hashlib.sha256(content).hexdigest()


def lasting(disk: Tree) -> Tree:
    """Return a tree without the files of locks and of cached measurements, which any run may write."""
    return {
        path: entry
        for path, entry in disk.items()
        if not (path.startswith(".firstlight/") and path.removeprefix(".firstlight/").startswith(_VOLATILE))
    }


def difference(before: Tree, after: Tree) -> str:
    """Return the first 12 differences of two trees, one a line; "" if the trees are equal."""
    lines = [f"- {path} {before[path]}" for path in sorted(set(before) - set(after))]
    lines += [f"+ {path} {after[path]}" for path in sorted(set(after) - set(before))]
    lines += [
        f"! {path} {before[path]} -> {after[path]}"
        for path in sorted(set(before) & set(after))
        if before[path] != after[path]
    ]
    return "\n".join(lines[:12])


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=True)


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)  # noqa: PTH108
