"""Quotes texts for sh, fish and PowerShell."""

from __future__ import annotations

import os


def shell_quoted(text: str) -> bytes:
    """Return a text quoted as one word of a POSIX shell, in bytes, so that any byte of a file name is kept."""
    return b"'" + os.fsencode(text).replace(b"'", b"'\\''") + b"'"


def powershell_quoted(text: str) -> str:
    """Return a text quoted as one word of PowerShell."""
    return "'" + text.replace("'", "''") + "'"


def fish_quoted(text: str) -> bytes:
    """Return a text quoted as one word of the shell fish, in bytes, so that any byte of a file name is kept."""
    return b"'" + os.fsencode(text).replace(b"\\", b"\\\\").replace(b"'", b"\\'") + b"'"
