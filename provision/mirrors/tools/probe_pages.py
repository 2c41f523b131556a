"""The probe of an index or a page of links: the locked wheels that it links, and their checksums."""

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
    """Return the locked files of a package that the page at `url` links.

    A page without checksums is matched by the locked version in the file names.

    Raises:
        UnusableError: the response is not a page of an index.
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
    """Count the probe files that have links, compare the checksum of a small one, and measure with the largest.

    Args:
        prober: the probe of one mirror.
        files: {probe file: its links, as `linked_files` returns them}.
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
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    versions = []
    for file in files:
        try:
            versions.append(parse_wheel_filename(file.name)[1])
        except InvalidWheelFilename:
            continue
    return str(max(versions)) if versions else None
