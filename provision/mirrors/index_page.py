"""Reads the files and checksums that an index page lists; a page with links for find-links is read in the same way."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from provision.core.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Iterator

# The Accept header of a request for an index page (source: PEP 691, with the weights that pip and uv send).
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
PLAIN_NAME = re.compile(r"[\w.+!-]+\.(whl|tar\.gz|zip)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_FILE_BYTES = 1 << 40
_MOST_ENTRIES, _MOST_VALUES = 400_000, 3_000_000  # of a page; the largest public ones have a third of these


class NoIndexError(FirstlightError):
    """Report that a response is not an index page; it is most likely a login page."""


@dataclass(frozen=True)
class IndexFile:
    """Describe one file that a page lists.

    `name`: the name of the file. `url`: its URL.
    `sha256`: in hex; None if the page does not have it. `size`: in bytes; None if the page does not have it.
    """

    name: str
    url: str
    sha256: str | None = None
    size: int | None = None


@dataclass
class _Anchors(HTMLParser):
    """Collects the attributes of all links in an HTML page, and its title."""

    links: list[dict[str, str | None]] = field(default_factory=list)
    title: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Store the attributes of a link, and note whether this is the start of the title."""
        if tag == "a":
            self.links.append(dict(attrs))
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        """Store the title, which is shown in the error message so that the user can recognize a login page."""
        if self._in_title:
            self.title = " ".join(f"{self.title} {data}".split())
            self._in_title = False


def read(content: bytes, content_type: str, url: str) -> list[IndexFile]:
    """Return the files that a page lists. A row that describes no file, such as one with an invalid URL, is left out.

    Args:
        content: the body of the response.
        content_type: the Content-Type header of the response.
        url: the URL of the page after redirects; the links of the page can be relative to it.

    Raises:
        NoIndexError: the content is neither an index page in JSON nor HTML with a link to a file, or it has too many
            entries.
    """
    # Counted before it is parsed, since a list of 20 million empty lists takes 3 GB of memory.
    if max(content.count(b"{") + content.count(b"["), content.count(b"<")) > _MOST_ENTRIES or (
        content.count(b",") > _MOST_VALUES
    ):
        raise NoIndexError("its page has too many entries")
    if "json" in content_type:
        return list(_json_files(content, url))
    parser = _Anchors()
    parser.feed(content.decode("utf-8", "replace"))
    files = [file for file in (_link_file(attributes, url) for attributes in parser.links) if file is not None]
    if not files:
        title = f" ({parser.title[:60]!r})" if parser.title else ""
        raise NoIndexError(f"its page has no link to a file{title}: the page is a login page, or not an index")
    return files


def _json_files(content: bytes, url: str) -> Iterator[IndexFile]:
    try:
        rows = json.loads(content)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        rows = None
    if not isinstance(rows, list):
        raise NoIndexError("its JSON page is not an index page")
    for row in rows:
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a wrong row does not hide the right ones
            size, digest = row.get("size"), row.get("hashes", {}).get("sha256")
            is_size = type(size) is int and 0 <= size <= _LARGEST_FILE_BYTES
            file = IndexFile(
                str(row["filename"]), urljoin(url, str(row["url"])), _sha256(digest), size if is_size else None
            )
            if PLAIN_NAME.fullmatch(file.name):
                yield file


def _link_file(attributes: dict[str, str | None], url: str) -> IndexFile | None:
    try:
        target, fragment = urldefrag(urljoin(url, attributes.get("href") or ""))
        name = unquote(urlsplit(target).path.rpartition("/")[2])
    except ValueError:  # an invalid IPv6 address
        return None
    if not PLAIN_NAME.fullmatch(name):
        return None
    kind, _, digest = fragment.partition("=")
    return IndexFile(name, target, _sha256(digest) if kind == "sha256" else None)


def _sha256(digest: object) -> str | None:
    """Return a checksum of a page in lower case; None if the value is no sha256."""
    text = digest.lower() if isinstance(digest, str) else ""
    return text if _SHA256.fullmatch(text) else None
