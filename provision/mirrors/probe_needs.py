"""The locked files of one host, which its mirrors must hold."""

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
    """Hold the locks of an environment and the models of a host. Each tool picks its probe files from them.

    `folder` holds the locks of the environment. `variant` is its build of torch.
    `hashes` is {package: (version, sha256s)} of the pip lock.
    `platform` is conda's name of this machine, and `conda` are the locked packages of that platform.
    """

    folder: Path
    variant: Variant
    hashes: Mapping[str, tuple[str, frozenset[str]]]
    platform: str | None
    conda: Sequence[CondaPackage]
    models: Sequence[ModelSpec]

    @cached_property
    def rows(self) -> probe_files.LockedRows:
        """Return the probe files that the environment's folder names; the file is read once.

        Raises:
            SpecError: the file is wrong.
        """
        return probe_files.read(self.folder)
