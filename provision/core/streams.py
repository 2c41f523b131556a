"""Makes the standard streams hold in every locale, where one is closed, and when the terminal goes away."""

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


class _Lasting(io.FileIO):
    """A stream on which a write never fails for the reasons that end no work."""

    def __init__(self, number: int, *, forgives: set[int] | None) -> None:
        """Take the descriptor, and the errors that are passed over; None: all of them."""
        super().__init__(number, "w", closefd=False)
        self._forgives = forgives

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop what cannot be written."""
        try:
            return super().write(data)
        except OSError as error:
            if self._forgives is not None and error.errno not in self._forgives:
                raise OSError(error.errno, error.strerror, STDOUT) from None  # so that the message names it
            return memoryview(data).nbytes


def prepare() -> None:
    """Prepare stdin, stdout and stderr, and let SIGTERM and SIGHUP end a command as Ctrl-C does.

    A character that the locale does not have is written as ASCII has it, else shown by its number; a byte of a path
    that is no character is written as it is. A terminal that has gone away (EIO) takes no output, and the work goes
    on. On stderr, which shows progress, no error of the system ends the work. A stream that was closed by the caller is
    the null device.
    """
    codecs.register_error(_ERRORS, _encode)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (no path)
    sys.stdout = _lasting(sys.stdout, {errno.EIO})
    sys.stderr = _lasting(sys.stderr, None)
    for name in ("SIGTERM", "SIGHUP"):  # Windows has one of them
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _interrupt)


def _lasting(stream: object, forgives: set[int] | None) -> io.TextIOWrapper:
    if not isinstance(stream, io.TextIOWrapper):
        raise TypeError(f"{stream!r} is no standard stream")  # a program that has replaced it calls no main of ours
    stream.flush()
    if sys.platform == "win32":  # the console there is no file
        stream.reconfigure(errors=_ERRORS)
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(stream.fileno(), forgives=forgives)),
        encoding=stream.encoding,
        errors=_ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _encode(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = b""
    for character in error.object[error.start : error.end]:
        is_byte = 0xDC80 <= ord(character) <= 0xDCFF  # as Python keeps a byte of a path that it cannot decode
        plain = _PLAIN.get(character, character).encode("ascii", "backslashreplace")
        shown += bytes([ord(character) - 0xDC00]) if is_byte else plain
    return shown, error.end


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
