"""Decide how a report is printed: with colours or not, and how wide."""

from __future__ import annotations

import os
import sys


def color_and_width(no_color: bool) -> tuple[bool, int | None]:
    """Return (whether to use colours, the width in columns); a width of None means the width of the terminal.

    Output that is not a terminal is 160 columns wide. `no_color` and the variable NO_COLOR turn colours off.
    """
    color = sys.stdout.isatty() and not no_color and "NO_COLOR" not in os.environ
    return color, None if sys.stdout.isatty() else 160
