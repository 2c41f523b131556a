"""Defines the records of torch.toml: the variants of PyTorch and their requirements."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from provision.config.toml import Strict


class Variant(Strict):
    """Describe one variant of PyTorch, and the machines on which it runs.

    `torch` is the version; None: the environment has no torch. `system` and `machine` are the operating system and the
    CPU architecture; None: every CPU. `driver` is the oldest NVIDIA driver that can run the variant; None: the variant
    needs no NVIDIA GPU. `architectures` are the compute capabilities for which the wheels have machine code. `python`
    lists the Python versions if the variant has fewer than `TorchSpec.python`. `find_links` is a page with the wheel of
    torch, used if no other source has it. `instead` is the variant to install if that page does not have the wheel
    either, and `instead_cost` describes its drawback. `hashes` are sha256 digests of wheels of torch that are accepted
    in addition to those in the lock file.
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

    `python` lists the Python versions for which the lock files have wheels. `variant` lists the variants, the best
    first. `older_cards` has {part of a GPU's name: compute capability}, for GPUs whose compute capability cannot be
    read.
    """

    python: Annotated[list[str], Field(min_length=1)]
    variant: Annotated[list[Variant], Field(min_length=1)]
    older_cards: dict[str, str] = {}
