"""Probes files whose addresses follow from the lock, as those of a channel or a hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.prober import Prober


def check(prober: Prober, urls: Mapping[ProbeFile, str | None]) -> None:
    """Fetch small files whole, for their hash; of a larger one a byte, for its size; of the largest, for the rate.

    Args:
        prober: the mirror.
        urls: {probe file: its address; None where its channel is not there}.
    """
    largest = max(urls, key=lambda probe_file: probe_file.size or 0, default=None)
    for probe_file, url in urls.items():
        reason = "its channel is not there"
        if url is not None and probe_file.is_small:
            reason = prober.compare(url, probe_file)
        elif url is not None:
            reason = prober.measure(url, probe_file) if probe_file is largest else prober.check_size(url, probe_file)
        if reason:
            prober.keep(missing=(*prober.findings.missing, f"lacks {probe_file}: {reason}"))
        else:
            prober.keep(held=prober.findings.held + 1)
