"""Reads the page of an index, in JSON or HTML, or a listing of files: which files there are, and by which hashes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from provision.core.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Iterator

# What a page is asked for (source: PEP 691, with the weights that pip and uv send).
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
PLAIN_NAME = re.compile(r"[\w.+!-]+\.(whl|tar\.gz|zip)")


class NoIndexError(FirstlightError):
    """What came is no page of an index: a login page, most likely."""


@dataclass(frozen=True)
class IndexFile:
    """One file of a page. `sha256` is None where the page does not tell it, `size` likewise."""

    name: str
    url: str
    sha256: str | None = None
    size: int | None = None


@dataclass
class _Anchors(HTMLParser):
    """Collects every link with its attributes."""

    found: list[dict[str, str | None]] = field(default_factory=list)
    title: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a link says."""
        if tag == "a":
            self.found.append(dict(attrs))
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        """Keep the title, which names a login page better than we could."""
        if self._in_title:
            self.title = " ".join(f"{self.title} {data}".split())
            self._in_title = False


def read(content: bytes, content_type: str, url: str) -> list[IndexFile]:
    """The files of a page.

    Args:
        content: the body.
        content_type: as the server named it.
        url: where the page lay in the end; its links are relative to it.

    Raises:
        NoIndexError: it is neither JSON of an index nor HTML that links a file.
    """
    if "json" in content_type:
        return list(_of_json(content, url))
    parser = _Anchors()
    parser.feed(content.decode("utf-8", "replace"))
    files = [file for file in (_of_anchor(each, url) for each in parser.found) if file is not None]
    if not files:
        named = f" ({parser.title[:60]!r})" if parser.title else ""
        raise NoIndexError(f"it answers with a page that links no file{named}: a login page, or no index")
    return files


def _of_json(content: bytes, url: str) -> Iterator[IndexFile]:
    try:
        rows = json.loads(content)["files"]
        for row in rows:
            name = str(row["filename"])
            if PLAIN_NAME.fullmatch(name):
                size = row.get("size")
                digest = row.get("hashes", {}).get("sha256")
                yield IndexFile(name, urljoin(url, str(row["url"])), digest, size if isinstance(size, int) else None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NoIndexError("it answers with JSON that is no page of an index") from None


def _of_anchor(attributes: dict[str, str | None], url: str) -> IndexFile | None:
    target, fragment = urldefrag(urljoin(url, attributes.get("href") or ""))
    name = unquote(urlsplit(target).path.rpartition("/")[2])
    if not PLAIN_NAME.fullmatch(name):
        return None
    kind, _, digest = fragment.partition("=")
    return IndexFile(name, target, digest.lower() if kind == "sha256" and len(digest) == 64 else None)
