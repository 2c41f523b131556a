"""Defines the records of torch.toml: the variants of PyTorch and their requirements."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from provision.config.toml import Strict


class Variant(Strict):
    """Describe one variant of PyTorch, and the machines on which it runs.

    `torch` is the version, or None for an environment without torch. `driver` is the oldest NVIDIA driver, and
    `architectures` are the compute capabilities with machine code in the build. `instead` is the variant to use if no
    source has this one, and `instead_cost` describes its drawback. `hashes` are sha256 digests of further
    wheels of torch that are accepted besides those in the lock file.
    """

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
    """Holds the content of torch.toml.

    `python` lists the Python versions for which the locks have wheels. `variant` lists the variants, the best first.
    `older_cards` has {part of a GPU's name: compute capability} for GPUs that are recognized by name.
    """

    python: Annotated[list[str], Field(min_length=1)]
    variant: Annotated[list[Variant], Field(min_length=1)]
    older_cards: dict[str, str] = {}
