"""Names the sources from which an environment gets its Python interpreter: conda, or this machine."""

from __future__ import annotations

from enum import Enum


class PythonSource(Enum):
    """Name the source of an environment's Python interpreter: CONDA (its conda lock file) or SYSTEM (this machine).

    AUTO is a request only. It means CONDA if the environment has a conda lock file and the packages can be downloaded,
    else SYSTEM.
    """

    AUTO = "auto"
    CONDA = "conda"
    SYSTEM = "system"

    @property
    def is_auto(self) -> bool:
        """Return whether this is AUTO: the request accepts either source."""
        return self is PythonSource.AUTO

    @property
    def is_conda(self) -> bool:
        """Return whether this is CONDA: the interpreter is a conda package, installed with other conda packages."""
        return self is PythonSource.CONDA

    @property
    def is_system(self) -> bool:
        """Return whether this is SYSTEM: the interpreter is this machine's, and no conda package is installed."""
        return self is PythonSource.SYSTEM

    def accepts(self, other: PythonSource) -> bool:
        """Return whether an environment with the source `other` satisfies a request for this source."""
        return self.is_auto or self is other

    def __str__(self) -> str:
        """Return the name of the source for messages: "the system", "conda" or "auto"."""
        return "the system" if self.is_system else self.value
