"""Probes a mirror whose pages have links to wheels: an index, or one page for find-links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.mirrors import index_page
from provision.mirrors.probe_mirror import UnusableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.mirrors.index_page import IndexFile
    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_mirror import Prober

_PAGE_BYTES = 32 << 20


def linked_files(prober: Prober, url: str, probe_file: ProbeFile) -> list[IndexFile]:
    """Return the locked files of a package to which a page has links; [] if the page has none of them.

    If the page has no checksums, they are the files with the locked version in their names.

    Args:
        prober: the prober of the mirror.
        url: the URL of the page.
        probe_file: the probe file of the package.

    Raises:
        UnusableError: the response is not an index page.
    """
    response = prober.get(url, limit=_PAGE_BYTES, headers={"Accept": index_page.ACCEPT})
    if response.status == 404 and prober.findings.asked > 1:
        return []
    if response.status != 200:
        raise UnusableError(f"answers {response.status}")
    try:
        files = index_page.read(response.content, response.headers.get("Content-Type", ""), response.url)
    except index_page.NoIndexError as error:
        raise UnusableError(str(error)) from None
    locked = [file for file in files if file.sha256 in probe_file.hashes]
    if locked or any(file.sha256 for file in files):
        if not locked and (newest := _newest(files)):
            prober.update(missing=(*prober.findings.missing, f"lacks {probe_file}; its newest version is {newest}"))
        return locked
    return [file for file in files if f"-{probe_file.version}-" in file.name]


def check(prober: Prober, files: Mapping[ProbeFile, Sequence[IndexFile]]) -> None:
    """Count the probe files to which the pages have links, compare the checksum of a small file, measure the speed.

    The results are stored in the findings of `prober`. The speed is measured with the largest file.

    Args:
        prober: the prober of the mirror.
        files: {probe file: its files on the page, as `linked_files` returns them}.

    Raises:
        UnusableError: the small file has a wrong checksum.
    """
    linked = {probe_file: links for probe_file, links in files.items() if links}
    text = " ".join(prober.findings.missing)
    lacks = [f"lacks {name}" for name, links in files.items() if not links and f"lacks {name}" not in text]
    prober.update(held=len(linked), missing=(*prober.findings.missing, *lacks))
    small = next((probe_file for probe_file in linked if probe_file.is_small), None)
    if small is not None:
        prober.compare(linked[small][0].url, small)
    if linked:
        largest = max(linked, key=lambda probe_file: probe_file.size or 0)
        prober.measure(linked[largest][0].url, None if small is largest else largest)


def _newest(files: Sequence[IndexFile]) -> str | None:
    """Return the newest version in the names of wheels; None without a wheel."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    versions = []
    for file in files:
        try:
            versions.append(parse_wheel_filename(file.name)[1])
        except InvalidWheelFilename:
            continue
    return str(max(versions)) if versions else None
