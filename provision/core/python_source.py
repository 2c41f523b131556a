"""The source of the python of an environment: conda or this machine."""

from __future__ import annotations

from enum import Enum


class PythonSource(Enum):
    """The source of an environment's python: conda's lock, or this machine.

    AUTO is only a request: conda where the environment has a lock for it and its packages can be fetched.
    """

    AUTO = "auto"
    CONDA = "conda"
    SYSTEM = "system"

    @property
    def is_auto(self) -> bool:
        """Return whether the request leaves the source open."""
        return self is PythonSource.AUTO

    @property
    def is_conda(self) -> bool:
        """Return whether python comes from conda, with conda's packages beside it."""
        return self is PythonSource.CONDA

    @property
    def is_system(self) -> bool:
        """Return whether python is this machine's, so that no conda package is installed."""
        return self is PythonSource.SYSTEM

    def accepts(self, other: PythonSource) -> bool:
        """Return whether a request for this source is met by an environment with the other one."""
        return self.is_auto or self is other

    def __str__(self) -> str:
        """Return the source in words, as messages name it."""
        return "the system" if self.is_system else self.value
