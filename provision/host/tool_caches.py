"""Defines the folders that can be relocated by the name of a tool: their usual path, and their path on the volume."""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.config.host import Folder as FolderSpec
from provision.core import layout
from provision.core.client_folders import client_folders
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.config.host import Name, Relocated
    from provision.core.client_folders import ClientFolders

_RESERVED = (".firstlight", "envs", "pkgs")  # the folders in the root that firstlight uses for its own files


@dataclass(frozen=True)
class RelocatedFolder:
    """Describe one folder to relocate: the old path `source`, the new path `target`, and a variable.

    `variable` is the environment variable that sets the folder of the tool, for a host on which the link cannot be
    made; None: there is none.
    """

    source: Path
    target: Path
    variable: str | None = None


def places(
    relocate: Sequence[Relocated],
    root: layout.Root,
    environ: Mapping[str, str],
    home: Path,
    bases: Sequence[Path],
    named: Sequence[Path] = (),
) -> dict[str, list[RelocatedFolder]]:
    """Return the folders to relocate, as {label of an entry of `relocate`: [its folders, each with source and target]}.

    The label is the name of the tool, or the path of the user's folder as written.

    Args:
        relocate: the entries: names of tools, or folders of the user.
        root: the root on the volume.
        environ: the environment variables; some set the folder of a tool.
        home: the home folder.
        bases: the prefixes of the conda installations of this machine.
        named: the folders in the home that conda's settings name for environments or packages.

    Raises:
        SpecError: two folders overlap, a target lies in a folder that firstlight uses itself, or a source contains the
            root.
    """
    folders = {}
    for entry in relocate:
        if isinstance(entry, FolderSpec):
            path = entry.path.replace("~", str(home), 1) if entry.path.startswith("~") else entry.path
            folders[entry_label(entry)] = [RelocatedFolder(Path(path).absolute(), root.path / entry.to)]
        elif entry == "conda":
            folders[entry] = _conda_folders(root, environ, home, bases, named)
        else:
            folders[entry] = _folders_of_tool(entry, root, environ, home)
    _check_overlaps([folder for group in folders.values() for folder in group], root)
    return folders


def entry_label(entry: Relocated) -> str:
    """Return the label of an entry of a `relocate` list: the name of the tool, or the path as host.toml has it."""
    return entry.path if isinstance(entry, FolderSpec) else entry


def parse_argument(path: str, to: str | None, home: Path) -> tuple[str, Relocated]:
    """Return (label, entry) for one argument of `provision relocate`: the name of a tool, or a folder.

    Args:
        path: the argument.
        to: the value of --to, or None.
        home: the home folder.

    Raises:
        SpecError: `to` is set for the name of a tool or is not a relative path inside the root; or `to` is None and the
            new path cannot be derived from `path`; or `path` is `/`.
    """
    if path in (*NAMES, "conda"):
        if to is not None:
            raise SpecError(
                f"{path} is the name of a tool, and its folders have fixed paths in the root. Run again without --to."
            )
        return path, path
    source = Path(path).expanduser().absolute()
    if source == Path(source.anchor):
        raise SpecError(f"{path} is the top of the file system and cannot be relocated. Name a folder inside it.")
    inside = source.relative_to(home) if source.is_relative_to(home) else source.relative_to(source.anchor)
    label = f"~/{inside}" if source.is_relative_to(home) else str(source)
    try:
        return label, FolderSpec(path=label, to=to or f"relocated/{inside}")
    except ValueError as error:
        if to is None:
            raise SpecError(
                f"{path} contains .. or a backslash, so its path in the root cannot be derived from it. "
                "Pass a relative path inside the root: --to relocated/NAME"
            ) from error
        raise SpecError(
            f"--to must be a relative path inside the root, without .. and backslashes, and {to!r} is not. "
            "Pass a path such as --to relocated/NAME"
        ) from error


def link_paths(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the old paths of the folders of all tools in NAMES; links at these paths lead to an earlier root."""
    root = layout.Root(home)
    return [folder.source for name in NAMES for folder in _folders_of_tool(name, root, environ, home)]


NAMES: tuple[Name, ...] = ("huggingface", "pip", "uv", "torch", "triton", "inductor", "modules", "datasets")


def _folders_of_tool(name: str, root: layout.Root, environ: Mapping[str, str], home: Path) -> list[RelocatedFolder]:
    """Return the folders of the tool `name`, a member of NAMES.

    Source: the variables and default paths in the documentation of each tool.
    """
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    hugging = _client_folders(environ, home)
    triton = Path(environ.get("TRITON_HOME") or home)
    temporary = Path(tempfile.gettempdir())
    if sys.platform == "win32":
        local = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
        caches = {"pip": local / "pip" / "Cache", "uv": local / "uv" / "cache"}
    else:
        caches = {"pip": home / "Library/Caches/pip" if sys.platform == "darwin" else cache / "pip", "uv": cache / "uv"}
    folders = {
        "huggingface": [
            ("HF_HUB_CACHE", hugging.hub, "huggingface/hub"),
            ("HF_XET_CACHE", hugging.xet, "huggingface/xet"),
        ],
        "modules": [("HF_MODULES_CACHE", hugging.home / "modules", "huggingface/modules")],
        "datasets": [("HF_DATASETS_CACHE", hugging.home / "datasets", "huggingface/datasets")],
        "pip": [("PIP_CACHE_DIR", caches["pip"], "pip")],
        "uv": [("UV_CACHE_DIR", caches["uv"], "uv")],
        "torch": [("TORCH_HOME", cache / "torch", "torch")],
        "triton": [("TRITON_CACHE_DIR", triton / ".triton" / "cache", "triton")],
        "inductor": [("TORCHINDUCTOR_CACHE_DIR", temporary / f"torchinductor_{_user()}", "inductor")],
    }
    return [
        RelocatedFolder(
            default if name == "huggingface" else Path(environ.get(variable) or default).expanduser().absolute(),
            root.cache / target,
            variable,
        )
        for variable, default, target in folders[name]
    ]


def _client_folders(environ: Mapping[str, str], home: Path) -> ClientFolders:
    """Return the folders of huggingface_hub; variables with a relative path are ignored.

    A relative path depends on the working folder of a program. An empty path is the working folder itself.
    """
    names = ("HF_XET_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    is_xet_relative = not Path(environ.get("HF_XET_CACHE", home)).is_absolute()
    kept = {name: value for name, value in environ.items() if name != "HF_XET_CACHE" or not is_xet_relative}
    for variables in (kept, {name: value for name, value in kept.items() if name not in names}):
        folders = client_folders(variables, home)
        if not folders.is_relative:
            return folders
    return client_folders({}, home)


def _conda_folders(
    root: layout.Root, environ: Mapping[str, str], home: Path, bases: Sequence[Path], named: Sequence[Path]
) -> list[RelocatedFolder]:
    """Return the folders `envs` and `pkgs` of every conda installation that this user can write, and of ~/.conda.

    The folder of $MAMBA_ROOT_PREFIX and the folders of `named` are added. All are relocated together, because
    environments have hard links to the files of packages.
    """
    tops = {base: base.name for base in bases if os.access(base, os.W_OK)}
    if bases or (home / ".conda").exists():
        tops[home / ".conda"] = "user"
    if environ.get("MAMBA_ROOT_PREFIX"):
        mamba = Path(environ["MAMBA_ROOT_PREFIX"])
        tops.setdefault(mamba, mamba.name)
    folders = []
    for number, (top, name) in enumerate(tops.items()):
        is_duplicate = name in list(tops.values())[:number]
        for part in ("envs", "pkgs"):
            target = root.path / "conda" / (f"{name}-{number}" if is_duplicate else name) / part
            folders.append(RelocatedFolder(top / part, target))
    sources = {folder.source for folder in folders}
    folders += [
        RelocatedFolder(path, root.path / "conda" / "named" / path.relative_to(home))
        for path in dict.fromkeys(named)
        if path not in sources
    ]
    return folders


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return str(os.getuid())


def _check_overlaps(folders: Sequence[RelocatedFolder], root: layout.Root) -> None:
    """Check that all folders can be relocated together.

    Raises:
        SpecError: two sources or two targets are equal or nested, a target lies in a folder that firstlight uses
            itself, or the root lies inside a source.
    """
    for number, folder in enumerate(folders):
        inside = folder.target.relative_to(root.path).parts
        if not inside or inside[0] in _RESERVED:
            raise SpecError(f"{folder.source} cannot move to {folder.target}: firstlight keeps its own files there.")
        if root.path.resolve().is_relative_to(folder.source.resolve()) and not folder.source.is_symlink():
            raise SpecError(
                f"the root {root.path} lies inside {folder.source}, so {folder.source} cannot be moved to the root. "
                "Relocate another folder, or pass another --root."
            )
        for other in folders[:number]:
            if folder.target.is_relative_to(other.target) or other.target.is_relative_to(folder.target):
                raise SpecError(
                    f"{folder.source} and {other.source} would both move to {folder.target}. Set another `to`."
                )
            if folder.source.is_relative_to(other.source) or other.source.is_relative_to(folder.source):
                raise SpecError(
                    f"{folder.source} and {other.source}: one lies inside the other. Relocate only one of them."
                )
