"""A marked block in the shell's start file, which restores the links at every login."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.core.shell import fish_quoted, powershell_quoted, shell_quoted
from provision.core.step import Check, State
from provision.fs.atomic import write_atomic
from provision.volume.changes import keep_backup, make_folders

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.core.layout import Root
    from provision.volume.journal import Journal

BEGIN = b"# >>> firstlight >>>"
END = b"# <<< firstlight <<<"
_OURS = b"# The file was made for this block."


class LoginStep:
    """The user's start file holds the block, or (where `wanted` is False) no start file does."""

    name = "login"
    essential = False
    local = True

    def __init__(self, root: Root, home: Path, environ: Mapping[str, str], journal: Journal, *, wanted: bool) -> None:
        """Take the home whose start files are meant, and the variables that tell the shell."""
        self.root = root
        self.journal = journal
        self.wanted = wanted
        self.every = start_files(environ, home)
        self.file = self.every[shell_of(environ)]

    def describe(self) -> str:
        """The plan's line."""
        if self.wanted:
            return f"put a marked block into {self.file}, which runs {self.root.relink} at login"
        return "take the block out of the shell's start file"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a file is read whole)
        """Look for the block."""
        holding = []
        for file in self.every.values():
            with contextlib.suppress(PermissionError):  # another shell's, which is not ours to read
                content = _read(file)
                holding += [file] if BEGIN in content or END in content else []
        for file in holding:
            content = _read(file)
            if content.count(BEGIN) != 1 or content.count(END) != 1 or content.find(END) < content.find(BEGIN):
                return Check(State.BLOCKED, f"the block in {file} is harmed. Take its lines out: {BEGIN.decode()}")
        if not self.wanted:
            if holding:
                return Check(State.DRIFTED, f"{holding[0]} holds the block, and login is not wanted")
            return Check(State.OK, "no start file holds the block")
        content = _read(self.file)
        if _with_block(content, self._block(made=_OURS in content)) != content:
            return Check(State.DRIFTED, f"{self.file} does not run {self.root.relink} yet")
        return Check(State.OK, f"{self.file} runs {self.root.relink}")

    def apply(self) -> None:
        """Put the block in, or take it out; every other byte stays."""
        if not self.wanted:
            for file in self.every.values():
                with contextlib.suppress(PermissionError):
                    content = _read(file)
                    if BEGIN in content:
                        self._replace(file, _without_block(content), gone=_OURS in content)
            return
        content = _read(self.file)
        made = _OURS in content or not self.file.exists()
        self._replace(self.file, _with_block(content, self._block(made=made)))

    def _replace(self, file: Path, content: bytes, *, gone: bool = False) -> None:
        # A start file is often a link into a folder of dotfiles: the link stays, what it leads to is written.
        real = file.resolve()
        make_folders(real.parent, self.journal)
        if real.exists() and not os.access(real, os.W_OK):
            raise BlockedError(
                f"{real} cannot be written. Add this to it yourself:\n{self._block(made=False).decode()}"
            )
        keep_backup(real, content if not gone or content else None, self.journal)
        if gone and not content:
            real.unlink()
            return
        write_atomic(real, content, like=real.stat() if real.exists() else None)

    def _block(self, *, made: bool) -> bytes:
        inner = _TEXTS.get(self.file.suffix, _POSIX)(self.root)
        lines = [BEGIN, *([_OURS] if made else []), *inner, END]
        return b"\n".join(lines) + b"\n"


def shell_of(environ: Mapping[str, str]) -> str:
    """The user's login shell, as far as we know it: bash, zsh, fish or powershell."""
    if sys.platform == "win32":
        return "powershell"
    name = Path(environ.get("SHELL") or "bash").name
    return name if name in {"zsh", "fish"} else "bash"


def start_files(environ: Mapping[str, str], home: Path) -> dict[str, Path]:
    """The file that each shell reads when a person logs in and works."""
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    return {
        "bash": home / (".bash_profile" if sys.platform == "darwin" else ".bashrc"),
        "zsh": Path(environ.get("ZDOTDIR") or home) / ".zshrc",
        "fish": config / "fish" / "config.fish",
        "powershell": home / "Documents" / "PowerShell" / "Microsoft.PowerShell_profile.ps1",
    }


def _posix(root: Root) -> list[bytes]:
    relink, variables = shell_quoted(str(root.relink)), shell_quoted(str(root.variables))
    return [
        b"[ ! -r %s ] || sh %s -q" % (relink, relink),
        b"[ ! -r %s ] || . %s" % (variables, variables),
    ]


def _fish(root: Root) -> list[bytes]:
    relink, variables = fish_quoted(str(root.relink)), fish_quoted(str(root.variables))
    return [
        b"test ! -r %s; or sh %s -q" % (relink, relink),
        b"test ! -r %s; or source %s" % (variables, variables),
    ]


def _powershell(root: Root) -> list[bytes]:
    script = powershell_quoted(str(root.relink.with_suffix(".ps1")))
    return [f"if (Test-Path -LiteralPath {script}) {{ & {script} }}".encode("utf-8", "surrogateescape")]


_POSIX = _posix
_TEXTS = {".fish": _fish, ".ps1": _powershell}


def _with_block(content: bytes, block: bytes) -> bytes:
    """The content with the block in its place, or at the end.

    A last line without its newline gets one, and the block then ends without: so taking it out can restore both.
    """
    start, end = content.find(BEGIN), content.find(END)
    if start >= 0 and end >= 0:
        return content[:start] + block.rstrip(b"\n") + content[end + len(END) :]
    if content and not content.endswith(b"\n"):
        return content + b"\n" + block.rstrip(b"\n")
    return content + block


def _without_block(content: bytes) -> bytes:
    start, end = content.find(BEGIN), content.find(END)
    if start < 0 or end < 0:
        return content
    after = content[end + len(END) :]
    if after.startswith(b"\n"):
        return content[:start] + after[1:]
    return content[:start].removesuffix(b"\n") + after


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
