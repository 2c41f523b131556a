"""Sets the rights of new files and folders."""

from __future__ import annotations

import os


def forbid_writing_to_all() -> None:
    """Take the right of every user to write from what this process and its children make, as umask 002 does.

    Other users could otherwise change the programs of an environment where the user's umask is 000.
    """
    os.umask(os.umask(0o022) | 0o002)
