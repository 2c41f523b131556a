"""Quotes a text for sh, fish and PowerShell."""

from __future__ import annotations

import os


def shell_quoted(text: str) -> bytes:
    """A word for a POSIX shell, whatever bytes it has."""
    return b"'" + os.fsencode(text).replace(b"'", b"'\\''") + b"'"


def powershell_quoted(text: str) -> str:
    """A word for PowerShell."""
    return "'" + text.replace("'", "''") + "'"


def fish_quoted(text: str) -> bytes:
    """A text as one word of fish."""
    return b"'" + os.fsencode(text).replace(b"\\", b"\\\\").replace(b"'", b"\\'") + b"'"
