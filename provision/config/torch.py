"""Reads torch.toml: the builds of torch, and what they need."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from provision.config.toml import Strict


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
