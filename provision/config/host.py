"""Reads host.toml, and defines the records of relocated folders and provider profiles."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from provision.config.toml import TAGS, Strict, load

NAME = r"^[A-Za-z0-9][\w.-]*$"  # valid names of environments; the name is also the name of the environment's folder


def _plain_folder(path: str) -> str:
    """Return the path unchanged if it is a relative path that stays inside its parent folder.

    Raises:
        ValueError: the path is absolute, empty, or contains `..`, a backslash or a zero byte.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts or "\0" in path:
        raise ValueError(
            f"{path!r} is not a plain relative path such as folder/name; .., \\ and control characters are not allowed"
        )
    return path


def _absolute_or_home_path(path: str) -> str:
    """Return the path unchanged if it is absolute or begins with `~/`.

    Raises:
        ValueError: the path is relative, is `/`, or contains a zero byte.
    """
    if not (Path(path).is_absolute() or path.startswith("~/")) or "\0" in path or not Path(path).name:
        raise ValueError(f"{path!r} must be an absolute path other than /, or a path in the home (~/…)")
    return path


class Folder(Strict):
    """Describe a folder of the user's choice to relocate: its path, and (`to`) its new path relative to the root."""

    path: Annotated[str, AfterValidator(_absolute_or_home_path)]
    to: Annotated[str, AfterValidator(_plain_folder)]


def _kind(value: object) -> str:
    return TAGS[0] if isinstance(value, str) else TAGS[1]


Name = Literal["huggingface", "conda", "pip", "uv", "torch", "triton", "inductor", "modules", "datasets"]
Relocated = Annotated[
    Annotated[Name, Tag(TAGS[0])] | Annotated[Folder, Tag(TAGS[1])],
    Discriminator(_kind),
]


class Sign(Strict):
    """Describe a sign that identifies a provider: the environment variable `env` is set, or the path `path` exists."""

    env: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Sign:
        if (self.env is None) == (self.path is None):
            raise ValueError("a sign has either the key env or the key path, not both")
        return self


class Profile(Strict):
    """Describe a rental provider: the signs that identify it, and its folders.

    A host matches if at least one sign of `any` and every sign of `all` is present. `roots` are the possible mount
    points of the volume, as paths or glob patterns. firstlight's root is the folder `folder` on the volume; "" is the
    volume itself. `folder` is set if the volume is also the user's home. `relocate` is the default list of folders to
    relocate. `environments` is False if the volume cannot hold environments. `persists`, `wiped` and `traps` are texts
    for the user: the folders that survive a wipe, those that do not, and known problems. `source` names the
    documentation of these facts.
    """

    title: str
    any: list[Sign] = []
    all: list[Sign] = []
    roots: list[str]
    folder: str = ""
    relocate: list[Relocated]
    environments: bool = True
    persists: str
    wiped: str
    traps: list[str] = []
    source: str


def _name_or_table(value: object) -> str:
    return TAGS[0] if isinstance(value, str) else TAGS[2]


Tool = Literal["pip", "conda", "torch", "hf"]


class HostSpec(Strict):
    """Holds the content of host.toml; every key is optional."""

    root: str | None = None
    env: Annotated[str, Field(pattern=NAME)] = "diffusers"
    interpreter: Literal["auto", "conda", "system"] = "auto"
    variant: str = "auto"
    relocate: list[Relocated] | None = None
    mirror: Annotated[
        Annotated[str, Tag(TAGS[0])] | Annotated[dict[Tool, str], Tag(TAGS[2])], Discriminator(_name_or_table)
    ] = "auto"
    catalogue: str | None = None
    models: list[str] = ["ddpm-cat-256", "stable-diffusion-v1-5"]
    manifest: str | None = None
    login: bool = False
    trust_volume: bool = False


def load_host(path: Path | None) -> HostSpec:
    """Return the content of a host.toml.

    Args:
        path: the file; None: `host.toml` in the working folder, or the default values if that file does not exist.

    Raises:
        SpecError: the file `path` does not exist, or its content is wrong (see `toml.load`).
    """
    if path is None:
        path = Path("host.toml")
        if not path.exists():
            return HostSpec()
    return load(path, HostSpec)
