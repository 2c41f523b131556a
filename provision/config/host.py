"""What people write: host.toml, models.toml, torch.toml; read strictly, faults named by file, line and key."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from provision.config.toml import TAGS, Strict, load

NAME = r"^[A-Za-z0-9][\w.-]*$"  # of an environment: one plain folder


def _plain_folder(path: str) -> str:
    """A folder inside another that it cannot leave."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts or "\0" in path:
        raise ValueError(f"{path!r} is not a plain relative path")
    return path


def _whole_path(path: str) -> str:
    """A path from the top, or from the home."""
    if not (Path(path).is_absolute() or path.startswith("~/")) or "\0" in path or not Path(path).name:
        raise ValueError(f"{path!r} is neither absolute nor in the home (~/…)")
    return path


class Folder(Strict):
    """A folder of the user's own, and its place on the root."""

    path: Annotated[str, AfterValidator(_whole_path)]
    to: Annotated[str, AfterValidator(_plain_folder)]


def _kind(value: object) -> str:
    return TAGS[0] if isinstance(value, str) else TAGS[1]


Name = Literal["huggingface", "conda", "pip", "uv", "torch", "triton", "inductor", "modules", "datasets"]
Relocated = Annotated[
    Annotated[Name, Tag(TAGS[0])] | Annotated[Folder, Tag(TAGS[1])],
    Discriminator(_kind),
]


class Sign(Strict):
    """Something by which a host shows itself: a variable that is set, or a path that is there."""

    env: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Sign:
        if (self.env is None) == (self.path is None):
            raise ValueError("a sign is either env or path")
        return self


class Profile(Strict):
    """A kind of rented host: one of `any` and each of `all` tells it; `roots` may hold patterns.

    `folder` lies in the root, where that itself is somebody's home.

    `relocate` is what is moved where the user does not say; `environments` whether its folder can hold them.
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
    """host.toml: every key is optional."""

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


def load_host(path: Path | None) -> HostSpec:
    """Read `path`, else `host.toml` of the working folder, else take the defaults.

    Raises:
        SpecError: as `load`; also where a named file is not there.
    """
    if path is None:
        path = Path("host.toml")
        if not path.exists():
            return HostSpec()
    return load(path, HostSpec)
