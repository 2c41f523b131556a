"""Tests that both languages have the same pages, sections and snippets, and that a README has no dead link."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from pymdownx import slugs

from tests.conftest import CHECKOUT
from tests.docs import markdown

if TYPE_CHECKING:
    from pathlib import Path

    from tests.docs.markdown import Section

PAIRS = pytest.mark.parametrize("english", markdown.ENGLISH, ids=map(markdown.name_of, markdown.ENGLISH))
READMES = pytest.mark.parametrize("readme", markdown.READMES, ids=map(markdown.name_of, markdown.READMES))
PICTURE = markdown.DOCS / "images" / "quick.svg"


def test_both_languages_have_the_same_pages() -> None:
    pages = [{document.name for document in language[1:]} for language in (markdown.ENGLISH, markdown.CHINESE)]
    assert {"without a Chinese page": pages[0] - pages[1], "without an English page": pages[1] - pages[0]} == {
        "without a Chinese page": set(),
        "without an English page": set(),
    }


@PAIRS
def test_both_languages_have_the_same_sections(english: Path) -> None:
    chinese = markdown.counterpart(english)
    assert differences(markdown.sections(english), markdown.sections(chinese)) == {}


@PAIRS
def test_both_languages_have_the_same_snippets(english: Path) -> None:
    pair = [markdown.fences(document) for document in (english, markdown.counterpart(english))]
    assert [(fence.language, fence.title) for fence in pair[0]] == [(fence.language, fence.title) for fence in pair[1]]
    for one, other in zip(*pair, strict=True):
        assert code_of(one) == code_of(other)


@pytest.mark.parametrize("number", range(1, len(markdown.sections(markdown.DOCS / "models.md"))))
def test_section_that_one_language_lacks_is_reported_by_its_title(number: int) -> None:
    sections = markdown.sections(markdown.DOCS / "models.md")
    fewer = sections[:number] + sections[number + 1 :]
    assert differences(sections, fewer) == {"in English alone": [sections[number].title]}
    assert differences(fewer, sections) == {"in Chinese alone": [sections[number].title]}


def test_each_promise_of_the_threat_model_names_a_test_that_exists() -> None:
    for page in (CHECKOUT / "docs/threat-model.md", CHECKOUT / "docs/zh/threat-model.md"):
        tables = page.read_text(encoding="utf-8").splitlines()
        promises = [line for line in tables if line.startswith("| ") and "`tests/" in line]
        assert len(promises) > 10
        paths = [path for line in promises for path in re.findall(r"`(tests/[^`]+)`", line)]
        assert [path for path in paths if not (CHECKOUT / path).exists()] == []


@READMES
def test_readme_has_at_most_150_lines(readme: Path) -> None:
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150


@READMES
def test_links_of_a_readme_lead_to_existing_files_and_sections(readme: Path) -> None:
    slug = slugs.slugify(case="lower")
    for target in re.findall(r"\]\(([^)]+)\)", markdown.prose(readme)):
        place, _, anchor = target.partition("#")
        file = readme.parent / (place or readme.name)
        assert file.is_file(), target
        assert not anchor or anchor in {slug(section.title, "-") for section in markdown.sections(file)}, target


def test_picture_of_a_run_shows_no_path_and_no_address_of_the_machine() -> None:
    text = "".join(ET.parse(PICTURE).getroot().itertext())  # noqa: S314 (a file of this repository)
    for word in ("make bench", "s/step", "verdict:", "whole run:"):
        assert word in text.replace("\N{NO-BREAK SPACE}", " ")
    assert re.findall(r"(?:^|\s)/\w+|/(?:home|root|tmp|Users)/", text) == []
    assert set(re.findall(r"https?://[^\"\s]+", PICTURE.read_text())) <= {
        "http://www.w3.org/2000/svg",
        "https://www.textualize.io",
    }


def differences(english: list[Section], chinese: list[Section]) -> dict[str, list[str]]:
    """Return {"in English alone" or "in Chinese alone": titles of the sections without a counterpart}.

    A section whose counterpart has another shape (`shape_of`) is in both lists. {} if the languages agree.
    """
    shapes = [[shape_of(section) for section in sections] for sections in (english, chinese)]
    matcher = difflib.SequenceMatcher(None, shapes[0], shapes[1], autojunk=False)
    found: dict[str, list[str]] = {}
    for kind, begin, end, other_begin, other_end in matcher.get_opcodes():
        if kind in {"delete", "replace"}:
            found.setdefault("in English alone", []).extend(section.title for section in english[begin:end])
        if kind in {"insert", "replace"}:
            found.setdefault("in Chinese alone", []).extend(section.title for section in chinese[other_begin:other_end])
    return found


def shape_of(section: Section) -> str:
    """Return the parts of a section that a translation keeps, as text.

    These are the level, the code, the code spans, and the numbers of table rows, list items and links.
    """
    code = [line for fence in markdown.fences_of(section.text) for line in code_of(fence)]
    prose = markdown.without_fences(section.text)
    spans = sorted(set(re.findall(r"`([^`\n]+)`", prose)))
    numbers = [len(re.findall(pattern, prose, re.MULTILINE)) for pattern in (r"^\|", r"^(?:-|\d+\.) ", r"\]\([^)]*\)")]
    return repr((section.level, code, spans, numbers))


def code_of(fence: markdown.Fence) -> list[str]:
    """Return the lines of a snippet without the parts that a translation changes: comments and descriptions."""
    if fence.language == "sh":
        return [markdown.without_comment(line) for line in fence.text.splitlines()]
    lines = [re.sub(r"\s+#\s.*$", "", line).rstrip() for line in fence.text.splitlines()]
    return [re.sub(r'^(description|source|reach) = ".*"$', r"\1", line) for line in lines]
