"""Probes a mirror of conda channels or a hub, where the URL of each file is known from the lock file or manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_mirror import Prober


def check(prober: Prober, urls: Mapping[ProbeFile, str | None]) -> None:
    """Request each probe file from a mirror.

    The number of files that the mirror has, and a text for each missing file, are stored in the findings of `prober`.
    A small file is downloaded whole, and its checksum is compared. The speed is measured with the largest file. One
    byte of any other file is requested, and its size is compared.

    Args:
        prober: the prober of the mirror.
        urls: {probe file: its URL; None if the mirror does not have its channel}.

    Raises:
        UnusableError: a small file has a wrong checksum.
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
