"""Tests the HTML page of a run: it needs no other file, its figures are right, and a browser renders it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core.result import Fit, Moment, Run, Sample, Status, Trust
from bench.core.verdict import Verdict, VerdictState
from bench.report import charts, html_page, tables
from tests.bench.conftest import a_case, a_result, a_run
from tests.bench.validation_samples import A100, validated

if TYPE_CHECKING:
    from pathlib import Path

    from bench.core.result import Result

# The smallest PNG: one grey pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415478da6368686800000304"
    "0181cbf2c1640000000049454e44ae426082"
)
FAST, SLOW = a_case(dtype="bf16"), a_case(scheduler="ddpm")
# A reference to another file, which the page must not have.
REFERENCE = re.compile(r"""(?:src|href|action|poster|data)\s*=\s*["'](?!data:|#)|@import|url\((?!#)""")


def timed(seconds: float, case: object = None, **changes: object) -> Result:
    """Return a result with six images of this many seconds each; `changes` replace fields."""
    samples = tuple(Sample(seconds, (seconds / 4,) * 4, seconds) for _ in range(6))
    result = a_result(a_case() if case is None else case, samples=samples)  # type: ignore[arg-type]
    return replace(result, **changes)  # type: ignore[arg-type]


@pytest.fixture
def run() -> Run:
    timeline = tuple(Moment(at / 2, "samples", 500_000_000 + at, None) for at in range(8))
    return a_run(
        timed(2.0, timeline=timeline, shares={"unet": 1.5, "scheduler": 0.1}, shares_of_seconds=2.0),
        timed(1.0, FAST, trust=Trust("contended", ("its threads waited 30% of the time for a core",))),
        timed(10.0, SLOW, fit=Fit(16, "memory", 512, "time")),
        timed(1.5, replace(FAST, batch=4)),
        a_result(a_case(dtype="fp16"), status=Status.SKIPPED, reason="predicted 9 s a step", samples=()),
        verdict=Verdict(VerdictState.WARN, ("something <b>odd</b>",)),
        command="bench run 'my suite.toml'",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "picture.png").write_bytes(PNG)
    return tmp_path / "run"


def test_page_refers_to_no_other_file(run: Run, folder: Path) -> None:
    text = html_page.html(run, folder)
    assert not REFERENCE.findall(text)
    assert REFERENCE.search('<img src="http://a/b.png">'), "the pattern matches a reference"


def test_text_from_the_run_is_escaped_in_the_page(run: Run, folder: Path) -> None:
    text = html_page.html(run, folder)
    assert "something &lt;b&gt;odd&lt;/b&gt;" in text
    assert "my suite.toml" in text


def test_page_of_a_run_is_the_same_every_time(run: Run, folder: Path) -> None:
    assert html_page.html(run, folder) == html_page.html(run, folder)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "absent.png", "text.png"])
def test_picture_that_is_absent_or_invalid_or_outside_of_the_run_folder_is_left_out(
    run: Run, folder: Path, name: str
) -> None:
    (folder.parent / "secret.png").write_bytes(PNG)
    (folder / "text.png").write_text("no picture")
    first = run.results[0]
    assert first.numerics is not None
    changed = replace(first, numerics=replace(first.numerics, image=name))
    text = html_page.html(replace(run, results=(changed,)), folder)
    assert "<img" not in text


def test_page_of_a_run_without_figures_has_the_reasons_and_no_table_or_chart(folder: Path) -> None:
    nothing = a_result(status=Status.ERROR, reason="it broke", samples=(), numerics=None)
    text = html_page.html(a_run(nothing, verdict=Verdict(VerdictState.FAIL, ("it broke",))), folder)
    assert "it broke" in text
    assert 'id="speed"' not in text
    assert "<svg" not in text


def test_charts_without_data_are_left_out(run: Run) -> None:
    steps = charts.step_times(run.results[:4], tables.label)
    assert steps is not None
    assert tables.label(FAST) in steps, "the chart has the label as text, not as outlines"
    assert charts.step_times([], tables.label) is None
    scaling = charts.batch_scaling(run.results[:4], tables.label)
    assert scaling is not None
    assert tables.label(FAST) in scaling
    assert tables.label(SLOW) not in scaling, "one batch size gives no scaling"
    assert charts.batch_scaling(run.results[:1], tables.label) is None
    assert charts.memory_over_time(run.results, tables.label) is not None
    assert charts.memory_over_time(run.results[1:], tables.label) is None


def test_page_compares_a_run_with_another_one_if_they_have_common_cases(run: Run, folder: Path) -> None:
    before = replace(run, id="before", results=tuple(timed(1.0, result.case) for result in run.results[:3]))
    text = html_page.html(run, folder, None, before)
    assert "Compared with before" in text
    assert "change of the seconds per image" in text
    assert "Compared with before" not in html_page.html(run, folder)
    nothing = replace(before, results=(timed(1.0, a_case(steps=9)),))
    assert "Compared with before" not in html_page.html(run, folder, None, nothing), "nothing in common"


def test_page_shows_the_share_of_the_data_sheet_only_for_a_card_in_the_table(folder: Path) -> None:
    """Use steps of 34.5 MFLOP in 0.5 s on a card with 65 TFLOP/s, and then a card without an entry."""
    card = timed(2.0, a_case(dtype="fp16", device="cuda:0"), software={"device": "Tesla T4"})
    assert "of data sheet" in html_page.html(a_run(card), folder)
    unknown = replace(card, software={"device": "NVIDIA GeForce RTX 4090 D"})
    assert "of data sheet" not in html_page.html(a_run(unknown), folder)


def test_page_shows_how_far_each_picture_is_from_that_in_fp32(folder: Path) -> None:
    both = timed(2.0), timed(1.0, FAST)
    text = html_page.html(a_run(*both), folder)
    assert "Compared with fp32" in text
    assert f"{tables.label(FAST)} and fp32: equal" in text


class TestRendered:
    """Renders the page in Chromium; its test is skipped if Chromium is not installed. `.ci/run` installs it."""

    @pytest.fixture
    def rendered(self, run: Run, folder: Path, tmp_path: Path) -> dict[str, object]:
        browser = shutil.which("chromium")
        if browser is None:
            pytest.skip("no chromium here")
        # Click twice on the heading "seconds per image", which sorts the table; read the first column each time.
        script = """<script>
        const read = () => [...document.querySelectorAll("#speed tbody tr")].map(row => row.cells[0].innerText);
        const button = document.querySelectorAll("#speed th button")[1];
        const seen = {first: read()};
        button.click(); seen.up = read();
        button.click(); seen.down = read();
        seen.verdict = document.querySelector("#verdict").innerText;
        seen.drawn = [...document.querySelectorAll("svg")].every(svg => svg.getBoundingClientRect().width > 300);
        seen.charts = document.querySelectorAll("svg").length;
        seen.pictures = [...document.images].map(image => image.naturalWidth);
        seen.left = document.querySelector("#left").innerText;
        seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
        document.title = "seen:" + JSON.stringify(seen);
        </script></body>"""
        file = tmp_path / "page.html"
        file.write_text(html_page.html(run, folder, 2.5).replace("</body>", script), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1200,900",
                 f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]  # fmt: skip
        done = subprocess.run([browser, *flags, file.as_uri()], capture_output=True, text=True, check=True, timeout=600)
        match = re.search(r"<title>seen:(.*?)</title>", done.stdout, re.DOTALL)
        assert match, done.stdout[:2000]
        text = match.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        return dict(json.loads(text))

    def test_browser_sorts_the_table_draws_the_charts_and_fits_the_window(
        self, rendered: dict[str, object], run: Run
    ) -> None:
        names = [tables.label(result.case) for result in run.results[:4]]
        first, up, down = ([str(name) for name in rendered[key]] for key in ("first", "up", "down"))  # type: ignore[attr-defined]
        assert [name.split(" disturbed")[0] for name in first] == names
        # 0.375 s per image at batch 4, then 1, 2 and 10 s.
        assert [name.split(" disturbed")[0] for name in up] == [names[3], names[1], names[0], names[2]]
        assert down == up[::-1]
        assert "disturbed: its threads waited 30%" in first[1]
        assert str(rendered["verdict"]).startswith("Pass, with warnings")
        assert "something <b>odd</b>" in str(rendered["verdict"]), "the browser shows the escaped text"
        assert rendered["drawn"] is True
        assert rendered["charts"] == 3
        assert set(rendered["pictures"]) == {1}  # type: ignore[call-overload]
        assert "skipped, predicted 9 s a step" in str(rendered["left"])
        assert rendered["wide"] is True, "no horizontal scrolling"


def test_page_has_a_trend_chart_for_a_device_with_two_validations(run: Run, folder: Path) -> None:
    kept = [validated(2), validated(3), validated(4, card=replace(A100, uuid="GPU-other"))]
    text = html_page.html(run, folder, kept=kept)
    assert "Over time: NVIDIA A100-SXM4-80GB, GPU-a100" in text
    assert "per cent of its best" in text
    assert "GPU-other" not in text
    assert all(f"<td>{cell}</td>" in text for cells in tables.trend_rows(kept) for cell in cells)
    alone = html_page.html(run, folder)
    assert "Over time" not in alone
    assert 'id="trend"' not in alone


def test_page_of_a_validation_has_verdict_and_trend_table_and_no_chart_of_one_value(folder: Path) -> None:
    bad = validated(2)
    text = html_page.html(
        replace(bad, verdict=Verdict(VerdictState.FAIL, ("cuda:0: it is slow.",))), folder, kept=[bad]
    )
    assert "<p>cuda:0: it is slow.</p>" in text
    assert 'id="trend"' in text
    assert "Over time" not in text
    assert not REFERENCE.search(text)
