"""Provides the setup step for the login block: a marked block in the shell's start file that restores the links."""

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
from provision.volume.variables import shell_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.core.layout import Root
    from provision.volume.journal import Journal

BEGIN = b"# >>> firstlight >>>"
END = b"# <<< firstlight <<<"
# This line marks a start file that firstlight created; the file is deleted with its block if it holds nothing else.
_OURS = b"# The file was made for this block."


class LoginStep:
    """Adds the login block to the start file of the user's shell, or removes it from all start files.

    If the volume is mounted, the block runs relink.sh and reads the variables of this home.
    """

    name = "login"
    essential = False
    local = True

    def __init__(self, root: Root, home: Path, environ: Mapping[str, str], journal: Journal, *, wanted: bool) -> None:
        """Take the paths, the environment variables, and whether the block should exist.

        Args:
            root: the root with relink.sh and variables.sh.
            home: the home folder with the start files.
            environ: the environment variables; SHELL names the user's shell.
            journal: the journal of this run.
            wanted: True adds the block, False removes it from all start files.
        """
        self.root = root
        self.journal = journal
        self.wanted = wanted
        self.files = start_files(environ, home)
        self.file = self.files[shell_of(environ)]

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        if self.wanted:
            return f"add a marked block to {self.file} that runs {self.root.relink} at login"
        return "remove the marked block from the shell's start file"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a file is read completely)
        """Check that the start file of the user's shell has an intact block; if unwanted, that no start file has it."""
        with_block = []
        for file in self.files.values():
            with contextlib.suppress(PermissionError):  # a start file that this user may not read holds no block
                content = _read(file)
                with_block += [file] if BEGIN in content or END in content else []
        for file in with_block:
            content = _read(file)
            if content.count(BEGIN) != 1 or content.count(END) != 1 or content.find(END) < content.find(BEGIN):
                return Check(
                    State.BLOCKED,
                    f"the firstlight block in {file} is damaged. Remove its lines, which begin with {BEGIN.decode()}, "
                    "then run again.",
                )
        if not self.wanted:
            if with_block:
                return Check(State.DRIFTED, f"{with_block[0]} has the login block, but `login` in host.toml is false")
            return Check(State.OK, "no start file has the login block")
        content = _read(self.file)
        if _with_block(content, self._block(is_ours=_OURS in content)) != content:
            return Check(State.DRIFTED, f"{self.file} does not run {self.root.relink} at login yet")
        return Check(State.OK, f"{self.file} runs {self.root.relink} at login")

    def apply(self) -> None:
        """Add the block to the start file, or remove it; every other byte of the file stays."""
        if not self.wanted:
            for file in self.files.values():
                with contextlib.suppress(PermissionError):
                    content = _read(file)
                    if BEGIN in content:
                        self._replace(file, _without_block(content), remove_empty=_OURS in content)
            return
        content = _read(self.file)
        is_ours = _OURS in content or not self.file.exists()
        self._replace(self.file, _with_block(content, self._block(is_ours=is_ours)))

    def _replace(self, file: Path, content: bytes, *, remove_empty: bool = False) -> None:
        # A start file is often a link into a folder of dotfiles, so its target is written and the link stays.
        real = file.resolve()
        make_folders(real.parent, self.journal)
        if real.exists() and not os.access(real, os.W_OK):
            raise BlockedError(
                f"{real} is not writable. Add these lines to this file yourself:\n{self._block(is_ours=False).decode()}"
            )
        keep_backup(real, content if not remove_empty or content else None, self.journal)
        if remove_empty and not content:
            real.unlink()
            return
        write_atomic(real, content, like=real.stat() if real.exists() else None)

    def _block(self, *, is_ours: bool) -> bytes:
        inner = _TEXTS.get(self.file.suffix, _POSIX)(self.root)
        lines = [BEGIN, *([_OURS] if is_ours else []), *inner, END]
        return b"\n".join(lines) + b"\n"


def shell_of(environ: Mapping[str, str]) -> str:
    """Return the user's login shell: "bash", "zsh", "fish" or "powershell"; "bash" for any other shell."""
    if sys.platform == "win32":
        return "powershell"
    name = Path(environ.get("SHELL") or "bash").name
    return name if name in {"zsh", "fish"} else "bash"


def start_files(environ: Mapping[str, str], home: Path) -> dict[str, Path]:
    """Return {shell: path of the start file that the shell reads when an interactive session starts}."""
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    return {
        "bash": home / (".bash_profile" if sys.platform == "darwin" else ".bashrc"),
        "zsh": Path(environ.get("ZDOTDIR") or home) / ".zshrc",
        "fish": config / "fish" / "config.fish",
        "powershell": home / "Documents" / "PowerShell" / "Microsoft.PowerShell_profile.ps1",
    }


def _posix(root: Root) -> list[bytes]:
    own = _test_of_owner(root)
    state, relink, variables = (shell_quoted(str(path)) for path in (root.state, root.relink, shell_file(root)))
    return [
        b"if [ %s %s ] && [ %s %s ]; then sh %s -q; fi" % (own, state, own, relink, relink),
        b"if [ %s %s ] && [ %s %s ]; then . %s; fi" % (own, state, own, variables, variables),
    ]


def _fish(root: Root) -> list[bytes]:
    own = _test_of_owner(root)
    state, relink, variables = (fish_quoted(str(path)) for path in (root.state, root.relink, shell_file(root)))
    return [
        b"test %s %s; and test %s %s; and sh %s -q" % (own, state, own, relink, relink),
        b"test %s %s; and test %s %s; and source %s" % (own, state, own, variables, variables),
    ]


def _test_of_owner(root: Root) -> bytes:
    """Return the option of `test` for a file whose commands this user may run at login: -O, the user owns it.

    On a file system that shows another owner for this user's files, and on a volume whose users are trusted, it is -r.
    """
    is_own = not root.state.exists() or root.state.stat().st_uid == os.geteuid()
    return b"-O" if is_own else b"-r"


def _powershell(root: Root) -> list[bytes]:
    script = powershell_quoted(str(root.relink.with_suffix(".ps1")))
    return [f"if (Test-Path -LiteralPath {script}) {{ & {script} }}".encode("utf-8", "surrogateescape")]


_POSIX = _posix
_TEXTS = {".fish": _fish, ".ps1": _powershell}


def _with_block(content: bytes, block: bytes) -> bytes:
    """Return the content of a start file with the block: in place of an earlier block, else at the end.

    If the last line has no newline, it gets one, and the block ends without a newline. So the removal of the block
    restores the content exactly.
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
