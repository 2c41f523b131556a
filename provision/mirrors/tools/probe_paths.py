"""The probe of a channel or a hub, where the address of each file follows from the lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_mirror import Prober


def check(prober: Prober, urls: Mapping[ProbeFile, str | None]) -> None:
    """Probe each file, count the files that the mirror has, and store the reason for each missing one.

    A small file is downloaded whole to compare its checksum. The largest file measures the speed. Of any other file,
    one byte is requested to compare its size.

    Args:
        prober: the probe of one mirror.
        urls: {probe file: its address; None where the mirror lacks its channel}.
    """
    largest = max(urls, key=lambda probe_file: probe_file.size or 0, default=None)
    for probe_file, url in urls.items():
        reason = "the mirror has no such channel"
        if url is not None and probe_file.is_small:
            reason = prober.compare(url, probe_file)
        elif url is not None:
            reason = prober.measure(url, probe_file) if probe_file is largest else prober.check_size(url, probe_file)
        if reason:
            prober.update(missing=(*prober.findings.missing, f"lacks {probe_file}: {reason}"))
        else:
            prober.update(held=prober.findings.held + 1)
