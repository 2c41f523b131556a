"""Names the metadata that a copy keeps if one of the two file systems cannot store all metadata."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KeptMetadata:
    """Name the metadata that a copy keeps if its file system, or that of the original, cannot store all metadata.

    `mtime_ns` is the coarser unit of modification times in nanoseconds; 0: a set time is not kept. `attributes` are
    the extended attributes. `group`: the copy gets the group of its original; False: it keeps the group that the
    set-group-ID bit of its folder gives it.
    """

    mtime_ns: int = 1
    modes: bool = True
    owners: bool = True
    attributes: bool = True
    group: bool = True

    def is_same_time(self, first_ns: int, second_ns: int) -> bool:
        """Return whether two modification times are equal within the unit `mtime_ns`; True if times are not kept."""
        return self.mtime_ns == 0 or abs(first_ns - second_ns) < self.mtime_ns


ALL_KEPT = KeptMetadata()
