"""Holds the locked packages and the pinned models of one host, which a mirror must have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from provision.mirrors import probe_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.config.torch import Variant
    from provision.lockfiles.conda_lock import CondaPackage


@dataclass(frozen=True)
class ProbeNeeds:
    """Hold the locked packages and the models of a host; each tool selects its probe files from them.

    `folder`: the lock folder of the environment. `variant`: the variant of torch.
    `hashes`: {normalized name of a package: (version, sha256 digests)} of the variant's pip lock file.
    `platform`: conda's name of this host's platform; None if conda has no name for it.
    `conda`: the locked conda packages of that platform.
    `models`: the entries of the manifest that the host definition contains.
    """

    folder: Path
    variant: Variant
    hashes: Mapping[str, tuple[str, frozenset[str]]]
    platform: str | None
    conda: Sequence[CondaPackage]
    models: Sequence[ModelSpec]

    @cached_property
    def rows(self) -> probe_files.LockedRows:
        """Return the probe files of the environment from witnesses.toml, which is read once.

        Raises:
            SpecError: witnesses.toml is not valid.
        """
        return probe_files.read(self.folder)
