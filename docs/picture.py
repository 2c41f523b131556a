"""Render the last run of the benchmark as docs/images/quick.svg: the terminal's report through rich's SVG export."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from bench.report import tables
from bench.run import store
from provision.core.errors import FirstlightError

COLUMNS = 128
IMAGE = Path(__file__).resolve().parent / "images" / "quick.svg"


def render(run: str, results: Path, image: Path) -> None:
    """Write the picture of a kept run.

    Args:
        run: the run's id, its folder or its run.json; empty for the last one.
        results: the folder of the kept runs.
        image: the SVG file to write.

    Raises:
        FirstlightError: there is no such run.
    """
    report = tables.terminal(store.load(run, results, validation=False), color=True, width=COLUMNS)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("$ make bench", style="bold green"))
    console.print(Text.from_ansi(report))
    svg = console.export_svg(title="firstlight", theme=MONOKAI, unique_id="firstlight")
    # The export loads a font from a content delivery network; without it the reader's monospace font is used.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    try:
        render(sys.argv[1] if len(sys.argv) > 1 else "", Path("results"), IMAGE)
    except FirstlightError as error:
        sys.exit(f"picture: {error}")
    print(f"picture: {IMAGE}")
