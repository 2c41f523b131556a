"""What people write: host.toml, models.toml, torch.toml; read strictly, faults named by file, line and key."""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from provision.errors import SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Sequence

# Weights, configuration and text. What is not named here may be a pickle, a library or a program.
_TAKEN_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja", ".yaml", ".yml", ".bpe", ".vocab", "")

# A home or a flag to a shell, the folder of a repository, what Windows has no name for, and its devices.
_NO_NAME = re.compile(r"^[~-]|^\.git$|[<>:\"|?*]|^(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)

NAME = r"^[A-Za-z0-9][\w.-]*$"  # of an environment: one plain folder


class Strict(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _safe_path(path: str) -> str:
    """A path inside a snapshot that can neither leave it nor carry code, and is that path on every system."""
    pure = PurePosixPath(path)
    control = any(unicodedata.category(each) in {"Cc", "Cf", "Cs"} for each in path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path == "." or control:
        raise ValueError(f"{path!r} is not a plain relative path")
    if any(_NO_NAME.search(part) for part in pure.parts):
        raise ValueError(f"{path!r} has a part that is no name of a file everywhere, or means something else")
    # Some file systems drop a space or a dot at the end of a name: what they keep may have another suffix.
    is_bent = any(part.endswith((" ", ".")) for part in pure.parts)
    if is_bent or pure.name.startswith(".") or pure.suffix.lower() not in _TAKEN_SUFFIXES:
        taken = ", ".join(filter(None, _TAKEN_SUFFIXES))
        raise ValueError(f"{path!r} can carry code; only safetensors and text files are taken ({taken}, or no suffix)")
    return path


class ModelFile(Strict):
    """One file of a model. What is None is not known yet, and is asked of the official hub alone.

    A git hash is of the size and the content: where it is all that is pinned, the size is pinned too.
    """

    path: Annotated[str, AfterValidator(_safe_path)]
    size: Annotated[int, Field(ge=0)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    git_sha1: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None

    @property
    def locked(self) -> bool:
        """Whether its content is pinned here."""
        return self.sha256 is not None or self.git_sha1 is not None

    @model_validator(mode="after")
    def _sized(self) -> ModelFile:
        if self.git_sha1 is not None and self.sha256 is None and self.size is None:
            raise ValueError(f"{self.path!r} has a git_sha1 and no size: git hashes both, add the size")
        return self


def _one_path_each(files: Sequence[ModelFile]) -> None:
    """Refuse two paths that one file system or another takes for the same, and a file where others need a folder."""
    seen: dict[str, str] = {}
    for file in files:
        for part in [file.path, *map(str, PurePosixPath(file.path).parents)][:-1]:
            key = unicodedata.normalize("NFC", part).casefold()
            kind = "file" if part == file.path else "folder"
            if (kind == "file" and key in seen) or seen.get(key, f"folder {part}") != f"folder {part}":
                raise ValueError(f"{file.path!r} is there twice, or differs from another path by its case alone")
            seen[key] = f"{kind} {part}"


_ALIAS = r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$"


class ModelSpec(Strict):
    """One model of the manifest.

    `extras`: {name: files that NAME+EXTRA adds}; empty where the entry has them anyway. `aliases`: former names of the
    entry and, with a slash, former ids of its repository.
    """

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    variant: str | None = None
    license: str
    architecture: str
    note: str = ""
    aliases: list[Annotated[str, Field(pattern=_ALIAS)]] = []
    files: Annotated[list[ModelFile], Field(min_length=1)]
    extras: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], list[ModelFile]] = {}

    @model_validator(mode="after")
    def _paths(self) -> ModelSpec:
        _one_path_each([*self.files, *(file for extra in self.extras.values() for file in extra)])
        return self

    @property
    def folder(self) -> str:
        """The name of its folder in a hub cache (the client's layout)."""
        return cache_folder(self.repo)

    @property
    def former_repos(self) -> list[str]:
        """The former ids of its repository."""
        return [alias for alias in self.aliases if "/" in alias]

    @property
    def bytes(self) -> int | None:
        """The size of all its files; None where the size of one with weights is not pinned."""
        if any(file.size is None and file.path.endswith(".safetensors") for file in self.files):
            return None
        return sum(file.size or 0 for file in self.files)


def cache_folder(repo: str) -> str:
    """Return the name of a model repository's folder in a hub cache (the client's layout)."""
    return f"models--{repo.replace('/', '--')}"


class Variant(Strict):
    """One build of torch and the machines that it fits; `torch` is None for an environment without it."""

    name: str
    torch: str | None = None
    system: str = "linux"
    machine: str | None = None
    driver: str | None = None
    architectures: list[str] = []
    python: list[str] = []
    find_links: str | None = None
    instead: str | None = None
    instead_cost: str | None = None
    download_bytes: int | None = None
    install_bytes: int | None = None
    hashes: list[str] = []


class TorchSpec(Strict):
    """torch.toml: the Pythons that the locks hold wheels for, the variants, best first, and cards known by name."""

    python: Annotated[list[str], Field(min_length=1)]
    variant: Annotated[list[Variant], Field(min_length=1)]
    older_cards: dict[str, str] = {}


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
    return _TAGS[0] if isinstance(value, str) else _TAGS[1]


_TAGS = (
    "a name",
    "a folder",
    "a table",
)  # of the union: they stand in a fault's location, and are taken out of its message
Name = Literal["huggingface", "conda", "pip", "uv", "torch", "triton", "inductor", "modules", "datasets"]
Relocated = Annotated[
    Annotated[Name, Tag(_TAGS[0])] | Annotated[Folder, Tag(_TAGS[1])],
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
    return _TAGS[0] if isinstance(value, str) else _TAGS[2]


Tool = Literal["pip", "conda", "torch", "hf"]


class HostSpec(Strict):
    """host.toml: every key is optional."""

    root: str | None = None
    env: Annotated[str, Field(pattern=NAME)] = "diffusers"
    interpreter: Literal["auto", "conda", "system"] = "auto"
    variant: str = "auto"
    relocate: list[Relocated] | None = None
    mirror: Annotated[
        Annotated[str, Tag(_TAGS[0])] | Annotated[dict[Tool, str], Tag(_TAGS[2])], Discriminator(_name_or_table)
    ] = "auto"
    catalogue: str | None = None
    models: list[str] = ["ddpm-cat-256", "stable-diffusion-v1-5"]
    manifest: str | None = None
    login: bool = False


_S = TypeVar("_S", bound=BaseModel)


def load(path: Path, model: type[_S]) -> _S:
    """Read one TOML file into a record.

    Raises:
        SpecError: it cannot be read, is no TOML, or a key or type is wrong; with file, line and key.
    """
    text, data = _parse(path)
    return _validate(path, text, data, model, ())


def load_tables(path: Path, model: type[_S]) -> dict[str, _S]:
    """Read a TOML file whose top level is a table for each name.

    Raises:
        SpecError: as `load`.
    """
    text, data = _parse(path)
    return {name: _validate(path, text, table, model, (name,)) for name, table in data.items()}


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


def parse_toml(text: str) -> dict[str, Any]:
    """Read a TOML text as it is, whatever it means.

    Raises:
        ValueError: it is no TOML.
    """
    return tomllib.loads(text)


def choose(name: str, available: Sequence[str], what: str) -> str:
    """Return `name` where it exists.

    Raises:
        SpecError: it does not; the message lists what does.
    """
    if name not in available:
        raise SpecError(f"unknown {what} {name!r}; there is: {', '.join(available) or 'none'}.")
    return name


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except FileNotFoundError:
        raise SpecError(f"{path} is not there.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None


def _validate(path: Path, text: str, data: object, model: type[_S], prefix: tuple[str, ...]) -> _S:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = (*prefix, *(part for part in first["loc"] if part not in _TAGS))
        key = ".".join(str(part) for part in location)
        line = line_of(text, location)
        known = ""
        if first["type"] == "extra_forbidden":
            known = f" Known keys: {', '.join(_fields(model, first['loc']))}."
            message = "unknown key"
        else:
            message = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{path}, line {line}, key {key}: {message}.{known}") from None


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that stand beside the unknown one."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        inner = str(model.model_fields[part].annotation) if part in model.model_fields else ""
        for candidate in Strict.__subclasses__():
            if candidate.__name__ in inner:
                model = candidate
                break
    return list(model.model_fields)


def line_of(text: str, location: Sequence[int | str]) -> int:
    """The line (from 1) where a key stands in a TOML text; the nearest enclosing one where it is not written.

    Args:
        text: the file.
        location: the keys and list indexes from the top, as a validator reports them.
    """
    names = [str(part) for part in location if isinstance(part, str)]
    indexes = [part for part in location if isinstance(part, int)]
    table: list[str] = []
    seen_tables = -1
    best = 1
    depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[(\[?)\s*([^\]]+?)\s*\]", line)
        if header:
            table = [part.strip().strip("\"'") for part in header.group(2).split(".")]
            if header.group(1) and table == names[: len(table)]:
                seen_tables += 1
            in_reach = table == names[: len(table)] and not (header.group(1) and indexes and seen_tables != indexes[0])
            if in_reach and len(table) >= depth:
                best, depth = number, len(table)
            continue
        key = re.match(r"\s*(\"[^\"]+\"|'[^']+'|[\w-]+(?:\.[\w-]+)*)\s*=", line)
        if not key:
            continue
        path = [*table, *(part.strip("\"'") for part in key.group(1).split("."))]
        wrong_element = bool(table) and seen_tables >= 0 and bool(indexes) and seen_tables != indexes[0]
        if path == names[: len(path)] and len(path) > depth and not wrong_element:
            best, depth = number, len(path)
    return best
