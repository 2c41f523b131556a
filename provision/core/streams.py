"""Prepares stdin, stdout and stderr for every locale, for closed descriptors, and for a terminal that closes later."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed import ReadableBuffer

STDOUT = "standard output"
_ERRORS = "firstlight"
_BOXES = {"-": "─━╌┄═", "|": "│┃║", "+": "┌┐└┘├┤┬┴┼┏┓┗┛┣┫┳┻╋┡┩╇╈┠┨┯┷╭╮╰╯"}
_PLAIN = {box: plain for plain, boxes in _BOXES.items() for box in boxes} | {
    "…": "...",
    "±": "+/-",
    "\N{MULTIPLICATION SIGN}": "x",
    "→": "->",
    "\N{EN DASH}": "-",
}


class _TolerantStream(io.FileIO):
    """Writes to a file descriptor and ignores given system errors, so that they do not end the command."""

    def __init__(self, number: int, *, ignored: set[int] | None) -> None:
        """Take the file descriptor `number`, and the errno values to ignore; None ignores every error."""
        super().__init__(number, "w", closefd=False)
        self._ignored = ignored

    def write(self, data: ReadableBuffer, /) -> int:
        """Write the data, or drop it if the write fails with an ignored error.

        Raises:
            OSError: the write fails with an error that is not ignored; the error's `filename` is STDOUT.
        """
        try:
            return super().write(data)
        except OSError as error:
            if self._ignored is not None and error.errno not in self._ignored:
                raise OSError(error.errno, error.strerror, STDOUT) from None  # so that the message names the stream
            return memoryview(data).nbytes


def prepare() -> None:
    """Prepare stdin, stdout and stderr, and let SIGTERM and SIGHUP end a command as Ctrl-C does.

    A character that the locale cannot encode is replaced by an ASCII equivalent, else by its escape sequence. A byte
    of a path that is not a character is written unchanged. Output to a closed terminal (EIO) is dropped, and the work
    continues. No system error on stderr ends the work, because stderr only shows progress. A stream that the caller
    has closed becomes the null device.
    """
    codecs.register_error(_ERRORS, _encode)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (no path)
    sys.stdout = _tolerant(sys.stdout, {errno.EIO})
    sys.stderr = _tolerant(sys.stderr, None)
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup sets SIG_IGN
            signal.signal(number, _interrupt)


def _tolerant(stream: object, ignored: set[int] | None) -> io.TextIOWrapper:
    if not isinstance(stream, io.TextIOWrapper):
        # A program that replaces the streams does not call our main functions.
        raise TypeError(f"{stream!r} is not a standard stream")
    stream.flush()
    if sys.platform == "win32":  # the console of Windows is not a file
        stream.reconfigure(errors=_ERRORS)
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_TolerantStream(stream.fileno(), ignored=ignored)),
        encoding=stream.encoding,
        errors=_ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _encode(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    encoded = b""
    for character in error.object[error.start : error.end]:
        is_byte = 0xDC80 <= ord(character) <= 0xDCFF  # surrogateescape: an undecodable byte of a path
        plain = _PLAIN.get(character, character).encode("ascii", "backslashreplace")
        encoded += bytes([ord(character) - 0xDC00]) if is_byte else plain
    return encoded, error.end


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
