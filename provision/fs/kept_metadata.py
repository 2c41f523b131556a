"""Names the metadata that a copy keeps where a file system keeps less than all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KeptMetadata:
    """Name the metadata that a copy keeps, where its file system or that of the original keeps less than all.

    `mtime_ns` is the unit of modification times in nanoseconds; 0: a set time is not kept. `group`: the copy gets the
    group of its original; in a folder with the set-group-ID bit it keeps the group of the folder.
    """

    mtime_ns: int = 1
    modes: bool = True
    owners: bool = True
    attributes: bool = True
    group: bool = True

    def is_same_time(self, first_ns: int, second_ns: int) -> bool:
        """Return whether two modification times are equal as far as both file systems keep them."""
        return self.mtime_ns == 0 or abs(first_ns - second_ns) < self.mtime_ns


ALL_KEPT = KeptMetadata()
