"""Tests the site: mkdocs builds it without a warning, it needs no other server, and a dead link fails the build."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import CHECKOUT
from tests.docs import markdown

if TYPE_CHECKING:
    from pathlib import Path


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of the folder `source` as `make docs` does, into the folder `site`."""
    argv = [sys.executable, "-I", "-m", "mkdocs", "build", "--strict", "--config-file", str(source / "mkdocs.yml")]
    environment = dict(os.environ) | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*argv, "--site-dir", str(site)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site of this checkout, and return its folder."""
    folder = tmp_path_factory.mktemp("site") / "site"
    done = build(CHECKOUT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_has_a_page_marked_with_its_language(site: Path) -> None:
    for document in (*markdown.ENGLISH[1:], *markdown.CHINESE[1:]):
        page = site / document.relative_to(markdown.DOCS).with_suffix(".html")
        language = "zh" if document in markdown.CHINESE else "en"
        assert f'<html lang="{language}"' in page.read_text(encoding="utf-8"), page


def test_language_switch_links_to_the_same_page_in_the_other_language(site: Path) -> None:
    for place, other in (("mirrors.html", "zh/mirrors.html"), ("zh/mirrors.html", "../mirrors.html")):
        links = re.findall(r'<a href="([^"]+)" hreflang', (site / place).read_text(encoding="utf-8"))
        assert other in links, place
        assert all((site / place).parent.joinpath(link).is_file() for link in links), links


def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\">\s]+")
    for page in site.rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page
    for style in site.rglob("*.css"):
        assert re.findall(r"url\((?:https?:)?//", style.read_text(encoding="utf-8")) == [], style


def test_search_index_holds_both_languages_and_is_readable_without_a_server(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    text = "".join(entry["text"] for entry in index["docs"])
    assert "failover" in text
    assert "镜像源" in text
    # A browser that opens a page by file:// loads a script, but refuses to read a JSON file.
    assert (site / "search/search_index.js").is_file()
    assert "assets/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("link", ["no-page.md", "new-host.md#no-section", "#no-section"])
def test_dead_link_in_a_page_fails_the_build(link: str, tmp_path: Path) -> None:
    shutil.copytree(markdown.DOCS, tmp_path / "docs")
    shutil.copy(CHECKOUT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs/mirrors.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[dead]({link})\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert link in done.stderr
