"""The locked packages and pinned models of one host, which a mirror must have."""

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
    """Hold the locks of an environment and the models of a host. Each tool selects its probe files from them.

    `folder` is the folder of the environment's lock files. `variant` is its build of PyTorch.
    `hashes` is {package: (version, sha256 sums)} of the pip lock.
    `platform` is conda's name for this machine's platform, and `conda` are the locked packages of that platform.
    """

    folder: Path
    variant: Variant
    hashes: Mapping[str, tuple[str, frozenset[str]]]
    platform: str | None
    conda: Sequence[CondaPackage]
    models: Sequence[ModelSpec]

    @cached_property
    def rows(self) -> probe_files.LockedRows:
        """Return the environment's probe files, which witnesses.toml in its folder lists. The file is read once.

        Raises:
            SpecError: witnesses.toml is not valid.
        """
        return probe_files.read(self.folder)
