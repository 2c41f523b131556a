"""Reads the Markdown documents: headings, fenced blocks, code spans and the lines of shell blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

DOCS = CHECKOUT / "docs"
READMES = (CHECKOUT / "README.md", CHECKOUT / "README.zh-CN.md")
ENGLISH = (READMES[0], *sorted(DOCS.glob("*.md")))
CHINESE = (READMES[1], *sorted((DOCS / "zh").glob("*.md")))
# All Markdown documents except the changelog, whose old entries name commands that no longer exist.
DOCUMENTS = (*ENGLISH, *CHINESE, CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "tests/data").rglob("*.md")))

_FENCE = re.compile(
    r"^```(?P<language>\S*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_COMMENT = re.compile(r"\s+#\s.*$")


@dataclass(frozen=True)
class Fence:
    """Holds a fenced block: its language, its title ("" if it has none) and its lines."""

    language: str
    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """Holds a heading, its level (1 for #), and the text up to the next heading of any level."""

    level: int
    title: str
    text: str


def name_of(document: Path) -> str:
    """Return a document's path relative to the checkout, such as docs/models.md."""
    return document.relative_to(CHECKOUT).as_posix()


def counterpart(document: Path) -> Path:
    """Return the path of the Chinese translation of an English document."""
    return READMES[1] if document == READMES[0] else DOCS / "zh" / document.name


def fences(document: Path) -> list[Fence]:
    """Return the fenced blocks of a document, from top to bottom."""
    return fences_of(document.read_text(encoding="utf-8"))


def fences_of(text: str) -> list[Fence]:
    """Return the fenced blocks of a Markdown text, from top to bottom."""
    return [Fence(match["language"], match["title"] or "", match["text"]) for match in _FENCE.finditer(text)]


def prose(document: Path) -> str:
    """Return the text of a document without its fenced blocks."""
    return without_fences(document.read_text(encoding="utf-8"))


def without_fences(text: str) -> str:
    """Return a text without its fenced blocks."""
    return _FENCE.sub("", text)


def sections(document: Path) -> list[Section]:
    """Return the sections of a document, from top to bottom; a # line inside a fenced block is no heading."""
    text = document.read_text(encoding="utf-8")
    fenced = [match.span() for match in _FENCE.finditer(text)]
    starts = [
        match
        for match in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE)
        if not any(begin <= match.start() < end for begin, end in fenced)
    ]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [Section(len(match[1]), match[2], text[match.end() : end]) for match, end in zip(starts, ends, strict=True)]


def spans(document: Path) -> list[str]:
    """Return the texts between single backticks, outside of fenced and indented blocks."""
    text = re.sub(r"^ {4}.*$", "", prose(document), flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def command_lines(document: Path) -> list[str]:
    """Return the command lines of a document, without comments and empty lines.

    These are the lines of the fenced blocks in `sh`, then the indented lines that start with make, provision, bench or
    .venv/.
    """
    lines = [line for fence in fences(document) if fence.language == "sh" for line in fence.text.splitlines()]
    lines += [
        line.strip()
        for line in re.findall(r"^ {4}((?:make|provision|bench|\.venv/).*)$", prose(document), re.MULTILINE)
    ]
    return [line for line in map(without_comment, lines) if line]


def without_comment(line: str) -> str:
    """Return a line of shell without its trailing comment."""
    return _COMMENT.sub("", line).strip()
