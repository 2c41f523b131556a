"""Records the tensors and configurations of architectures, so that a stand-in is built without an import of torch.

Run this module after a lock file or an architecture has changed:
python -m provision.models.record_architecture ROOT/envs/diffusers/bin/python NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path

from provision.core import layout
from provision.models import architectures, stand_ins


def record(envs: Path, python: Path, names: list[str]) -> None:
    """Run describe_architecture.py for architectures, and write its output to `envs/architectures/recorded`.

    Args:
        envs: the folder `envs` of a checkout.
        python: the interpreter of an environment that has diffusers, under which the script runs.
        names: the names of the architectures.

    Raises:
        BlockedError: the folder belongs to an installed firstlight, not to a checkout.
        FirstlightError: an architecture does not exist, or the interpreter cannot describe it.
    """
    layout.require_own(envs)
    for name in names:
        architecture = architectures.load(envs, name)
        architectures.record(envs, architecture, stand_ins.describe(architecture, python))


if __name__ == "__main__":
    record(layout.envs_folder(None), Path(sys.argv[1]), sys.argv[2:])
