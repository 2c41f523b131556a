"""What can be relocated by name: where each tool keeps its files on this host, and their place on the volume."""

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
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.config.host import Name, Relocated

_OURS = (".firstlight", "envs", "pkgs")  # places on the volume that are taken


@dataclass(frozen=True)
class RelocatedFolder:
    """One folder to relocate: its old path, its new one, and the variable that does the same without a link."""

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
    """The folders of each thing that a host relocates, by its label.

    Args:
        relocate: names, or folders of the user's own.
        root: the volume.
        environ: the tools' own variables say where they keep their files.
        home: whose files they are.
        bases: the conda installations of this machine.
        named: folders of the home that the user has named to conda.

    Raises:
        SpecError: two of them would share a place, or one lies where the volume keeps its own things.
    """
    found = {}
    for each in relocate:
        if isinstance(each, FolderSpec):
            source = Path(each.path.replace("~", str(home), 1) if each.path.startswith("~") else each.path).absolute()
            found[str(each.path)] = [RelocatedFolder(source, root.path / each.to)]
        elif each == "conda":
            found[each] = _conda(root, environ, home, bases, named)
        else:
            found[each] = _named(each, root, environ, home)
    _apart([place for group in found.values() for place in group], root)
    return found


def named(path: str, to: str | None, home: Path) -> tuple[str, Relocated]:
    """What one word on the command line asks to be relocated, with its label: a known name, or a folder.

    Raises:
        SpecError: the place is not a plain one, or a known name is given another.
    """
    if path in (*NAMES, "conda"):
        if to is not None:
            raise SpecError(f"{path} has its own place on the root; --to is for folders of your own.")
        return path, path
    source = Path(path).expanduser().absolute()
    inside = source.relative_to(home) if source.is_relative_to(home) else source.relative_to(source.anchor)
    label = f"~/{inside}" if source.is_relative_to(home) else str(source)
    try:
        return label, FolderSpec(path=label, to=to or f"relocated/{inside}")
    except ValueError as error:
        raise SpecError(f"{path} cannot go to {to}: it is not a plain place on the root.") from error


def link_paths(environ: Mapping[str, str], home: Path) -> list[Path]:
    """The old paths of everything that has a name: by their links a home remembers its root."""
    root = layout.Root(home)
    return [place.source for name in NAMES for place in _named(name, root, environ, home)]


NAMES: tuple[Name, ...] = ("huggingface", "pip", "uv", "torch", "triton", "inductor", "modules", "datasets")


def _named(name: str, root: layout.Root, environ: Mapping[str, str], home: Path) -> list[RelocatedFolder]:
    """Sources: each tool's documented variables and defaults."""
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    hugging = Path(environ.get("HF_HOME") or cache / "huggingface")
    triton = Path(environ.get("TRITON_HOME") or home)
    temporary = Path(tempfile.gettempdir())
    if sys.platform == "win32":
        local = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
        own = {"pip": local / "pip" / "Cache", "uv": local / "uv" / "cache"}
    else:
        own = {"pip": home / "Library/Caches/pip" if sys.platform == "darwin" else cache / "pip", "uv": cache / "uv"}
    known = {
        "huggingface": [
            ("HF_HUB_CACHE", layout.hub_cache(environ, home), "huggingface/hub"),
            ("HF_XET_CACHE", hugging / "xet", "huggingface/xet"),
        ],
        "modules": [("HF_MODULES_CACHE", hugging / "modules", "huggingface/modules")],
        "datasets": [("HF_DATASETS_CACHE", hugging / "datasets", "huggingface/datasets")],
        "pip": [("PIP_CACHE_DIR", own["pip"], "pip")],
        "uv": [("UV_CACHE_DIR", own["uv"], "uv")],
        "torch": [("TORCH_HOME", cache / "torch", "torch")],
        "triton": [("TRITON_CACHE_DIR", triton / ".triton" / "cache", "triton")],
        "inductor": [("TORCHINDUCTOR_CACHE_DIR", temporary / f"torchinductor_{_user()}", "inductor")],
    }
    return [
        RelocatedFolder(Path(environ.get(variable) or usual).expanduser().absolute(), root.cache / place, variable)
        for variable, usual, place in known[name]
    ]


def _conda(
    root: layout.Root, environ: Mapping[str, str], home: Path, bases: Sequence[Path], named: Sequence[Path]
) -> list[RelocatedFolder]:
    """Environments and packages of every conda that is ours, together: their files are hard links to each other."""
    tops = {base: base.name for base in bases if os.access(base, os.W_OK)}
    if bases or (home / ".conda").exists():
        tops[home / ".conda"] = "user"
    if environ.get("MAMBA_ROOT_PREFIX"):
        mamba = Path(environ["MAMBA_ROOT_PREFIX"])
        tops.setdefault(mamba, mamba.name)
    found = []
    for number, (top, name) in enumerate(tops.items()):
        taken = name in list(tops.values())[:number]
        for part in ("envs", "pkgs"):
            place = root.path / "conda" / (f"{name}-{number}" if taken else name) / part
            found.append(RelocatedFolder(top / part, place))
    known = {place.source for place in found}
    found += [
        RelocatedFolder(folder, root.path / "conda" / "named" / folder.relative_to(home))
        for folder in dict.fromkeys(named)
        if folder not in known
    ]
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _apart(every: Sequence[RelocatedFolder], root: layout.Root) -> None:
    """No two places are one, or one inside the other, on either side; none is the volume's own."""
    for number, place in enumerate(every):
        inside = place.target.relative_to(root.path).parts
        if not inside or inside[0] in _OURS:
            raise SpecError(f"{place.source} cannot go to {place.target}: firstlight keeps its own things there.")
        if root.path.resolve().is_relative_to(place.source.resolve()) and not place.source.is_symlink():
            raise SpecError(f"the root {root.path} lies inside {place.source}, which is to be moved onto it.")
        for other in every[:number]:
            if place.target.is_relative_to(other.target) or other.target.is_relative_to(place.target):
                raise SpecError(
                    f"{place.source} and {other.source} would both go to {place.target}. Name another `to`."
                )
            if place.source.is_relative_to(other.source) or other.source.is_relative_to(place.source):
                raise SpecError(f"{place.source} and {other.source} lie one inside the other. Relocate one of them.")
