"""Fetches one file over HTTP into a partial that survives a kill, its hash computed on the way."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

from provision.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import requests

_BLOCK = 1 << 20
_ATTEMPTS = 4


class DownloadError(FirstlightError):
    """The source did not deliver; the partial stays for the next run."""


class Hash(Protocol):
    """What hashlib's objects offer."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest so far."""


def content_hash(kind: str, size: int) -> Hash:
    """A fresh hash of a kind that a hub pins.

    Args:
        kind: "sha256", or "git_sha1" (git's blob hash: sha1 over "blob SIZE", a zero byte and the content).
        size: the file's bytes; only git's hash needs it.
    """
    if kind == "sha256":
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % size)
    return digest


def hash_file(path: Path, kind: str) -> str:
    """The content hash of a file on disk, in a kind of `content_hash`."""
    digest = content_hash(kind, path.stat().st_size)
    _add_file(path, digest)
    return digest.hexdigest()


def fetch(
    session: requests.Session,
    url: str,
    part: Path,
    *,
    size: int,
    digest_kinds: tuple[str, ...],
    headers: Mapping[str, str],
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Fetch `url` into `part`, from the last good byte on where a part is there already.

    A stored part is hashed again before it is added to: its bytes are trusted only by the final digest.

    Args:
        session: carries proxies and TLS settings.
        url: the file.
        part: the partial; it stays when this fails.
        size: the file's bytes, as pinned or as the hub lists them.
        digest_kinds: kinds of `content_hash` to compute on the way.
        headers: sent along.
        progress: told the bytes that arrive.

    Returns:
        The digest of each kind. Comparing it is the caller's part.

    Raises:
        DownloadError: the source refused, broke off again and again, or sent another length.
    """
    import requests

    failure = "nothing was tried"
    for _ in range(_ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        digests = {kind: content_hash(kind, size) for kind in digest_kinds}
        for digest in digests.values():
            if have:
                _add_file(part, digest)
        if have == size and part.exists():
            return {kind: digest.hexdigest() for kind, digest in digests.items()}
        try:
            _append(session, url, part, have, digests, headers, progress)
        except requests.RequestException as error:
            failure = type(error).__name__
            continue
        if part.stat().st_size == size:
            return {kind: digest.hexdigest() for kind, digest in digests.items()}
        failure = f"it sent {part.stat().st_size:,} of {size:,} bytes"
    raise DownloadError(f"{url} could not be fetched: {failure}. What arrived is kept; run again to go on.")


def _append(
    session: requests.Session,
    url: str,
    part: Path,
    have: int,
    digests: dict[str, Hash],
    headers: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    # identity: a body that is compressed on the way would have other bytes than the ones that are pinned
    asked = {**headers, "Accept-Encoding": "identity"}
    if have:
        asked["Range"] = f"bytes={have}-"
    with session.get(url, headers=asked, stream=True, timeout=(10, 60)) as response:
        if response.status_code >= 400:
            raise DownloadError(f"{url} answers {response.status_code} {response.reason}.")
        if have and response.status_code != 206:
            part.unlink()
            raise DownloadError(f"{url} ignores ranges; the partial was dropped. Run again.")
        with part.open("ab") as file:
            for block in response.iter_content(_BLOCK):
                file.write(block)
                for digest in digests.values():
                    digest.update(block)
                progress(len(block))


def _add_file(path: Path, digest: Hash) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
