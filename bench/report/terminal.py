"""Decides how a report is shown on this terminal: its width, its colours, and the characters that it can show."""

from __future__ import annotations

import os
import sys


def paper(no_color: bool) -> tuple[bool, int | None]:
    """(whether colours are wanted, columns where the terminal does not tell)."""
    color = sys.stdout.isatty() and not no_color and "NO_COLOR" not in os.environ
    return color, None if sys.stdout.isatty() else 160
