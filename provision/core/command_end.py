"""Ends a command: its exit code, its message on stderr and, with --json, the one object on stdout.

A command that fails under --json prints this object, its keys in this order (schema 1):

    {"schema": 1, "command": "env create", "error": {"kind": …, "message": …, "next": …}, "exit": 4}

`kind` is a stable word:

| kind | means | exit |
| --- | --- | --- |
| usage | a flag, an argument or a file that a person wrote is wrong | 2 |
| blocked | a person must act first; finer: no-space, read-only, permission, locked, not-mounted | 4 |
| failed | it did not work; finer: source (no server delivered), content (another hash), program (a child failed) | 1 |
| interrupted | Ctrl-C, SIGTERM or SIGHUP; the state is consistent | 130 |
| internal | a fault of firstlight; its traceback is on stderr alone | 1 |

`next` is the command or the act that comes next; null where there is none. Secrets are taken out of every text. A
command that prints an object of its own for what failed (such as the outcomes of `setup`) prints that one alone. A
reader that closed the pipe gets nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core import layout, streams
from provision.core.errors import Exit, FirstlightError, from_os_error
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA = 1
INTERRUPTED = "interrupted; what stands is whole. Run the same command again, it goes on from here."
# What comes next where a message about a flag or a file names what there is, and no act.
CORRECTED = "Correct it, then run the same command again"
# The words by which our messages begin the sentence that says what to do.
_ADVICE = re.compile(
    r"(Accept|Add|Change|Choose|Close|End|Fetch|Free|Give|Install|Keep|Leave|Lock|Look|Make|Mend|Mount|Move|Name|Pass|Pull|"
    r"Put|Relocate|Remount|Remove|Report|Restart|Restore|Run|Say|Set|Take|Try|Unmount|Unset|Use|Wait|Write)\b"
)
_TO_DO_IT = re.compile(r"To \w+ it: (.+)")
_GROUPS = {"env", "mirrors", "models"}


@dataclass(frozen=True)
class Fault:
    """Describe what ended a command."""

    kind: str
    message: str
    next: str | None
    exit: int

    def to_json(self, command: str) -> str:
        """The object that --json prints."""
        error = {
            "kind": self.kind,
            "message": redact(self.message),
            "next": None if self.next is None else redact(self.next),
        }
        return json.dumps({"schema": SCHEMA, "command": command, "error": error, "exit": self.exit})


def fault_of(
    error: BaseException,
    interrupted: str = INTERRUPTED,
    os_error: Callable[[OSError], FirstlightError] = from_os_error,
) -> Fault:
    """Describe what was raised.

    Args:
        error: what was raised.
        interrupted: what a person reads after Ctrl-C.
        os_error: turns what the system says into one of our errors.
    """
    if isinstance(error, OSError):
        error = os_error(error)
    if isinstance(error, FirstlightError):
        act = error.next_act or next_of(str(error)) or (CORRECTED if error.kind == "usage" else None)
        return Fault(error.kind, str(error), act, int(error.exit))
    if isinstance(error, KeyboardInterrupt):
        return Fault("interrupted", interrupted, "Run the same command again", int(Exit.INTERRUPTED))
    text = f"{type(error).__name__}: {error}"
    return Fault("internal", f"{text}. This is a fault of firstlight", "Report it", int(Exit.FAILED))


def next_of(message: str) -> str | None:
    """Return what a message tells a person to do: the one command in backquotes, else the sentence; None without one.

    Only the first line counts: what follows is the output of another program, or a comparison of files.
    """
    sentences: list[str] = re.split(r"(?<=[.:;!?])\s+(?=[A-Z])", message.partition("\n")[0])
    advice = next((each for each in reversed(sentences) if _ADVICE.match(each)), None)
    if advice is None and (named := _TO_DO_IT.match(sentences[-1])):
        return str(named.group(1)).rstrip(". ")
    commands: list[str] = re.findall(r"`([^`]+)`", advice or message.partition("\n")[0])
    if len(commands) == 1:
        return commands[0]
    return None if advice is None else advice.rstrip(". ")


def command_of(argv: list[str]) -> tuple[str, bool]:
    """Return (the command's name, whether --json is among its flags) of a command line without its program."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    name = next((count for count, word in enumerate(words) if word.startswith("-")), len(words))
    length = 2 if words and words[0] in _GROUPS else 1
    return " ".join(words[: min(name, length)]), "--json" in words


def run(
    act: Callable[[], int],
    *,
    json: bool,
    interrupted: str = INTERRUPTED,
    os_error: Callable[[OSError], FirstlightError] = from_os_error,
) -> int:
    """Run a command, print its end, and return its exit code.

    Args:
        act: the command.
        json: stdout gets one object: what the command prints is held until it has ended.
        interrupted: what a person reads after Ctrl-C.
        os_error: turns what the system says into one of our errors.
    """
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held) if json else contextlib.nullcontext():
            code = int(act())
        _write(held.getvalue())
    except BrokenPipeError:
        return _reader_is_gone()
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, it becomes one message and one exit code
        return _fail(error, fault_of(error, interrupted, os_error), json=json)
    return code


def run_app(app: Callable[..., object], name: str) -> int:
    """Run a typer application and return its exit code; a wrong flag becomes an object as well.

    Args:
        app: the application.
        name: the program's.
    """
    import typer

    command, is_json = command_of(sys.argv[1:])
    try:
        code = app(standalone_mode=False, prog_name=name)  # `run` leaves by SystemExit: what comes back is typer's own
    except (typer.Abort, KeyboardInterrupt):
        code = int(Exit.INTERRUPTED)
    except BrokenPipeError:
        return _reader_is_gone()
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:  # none of the errors that typer's parser raises
            return _fail(error, fault_of(error), json=is_json)
        show()
        text = str(error.format_message())  # type: ignore[attr-defined]  # typer has no public name for this class
        # The words that the parser knows: an unknown command is none of them. A flag without its value has no context.
        context = getattr(error, "ctx", None)
        known = str(context.command_path).split(" ")[1:] if context is not None else command.split()
        ask = shlex.join([layout.program(name), *known, "--help"])
        return _print(Fault("usage", text, ask, int(Exit.USAGE)), command, json=is_json)
    if code == Exit.INTERRUPTED:
        return interrupted_early()
    return code if isinstance(code, int) else int(Exit.GOOD)


def interrupted_early() -> int:
    """End a command that was interrupted before it began."""
    error = KeyboardInterrupt()
    _, is_json = command_of(sys.argv[1:])
    return _fail(error, fault_of(error, "interrupted; nothing was begun."), json=is_json)


def _fail(error: BaseException, fault: Fault, *, json: bool) -> int:
    if fault.kind == "interrupted":
        text = fault.message
    elif fault.kind == "internal":
        trace = "".join(traceback.format_exception(error))
        text = f"{redact(trace)}\nerror: this is a fault of firstlight. Report it."
    else:
        text = f"error: {redact(fault.message)}"
    print(text, file=sys.stderr)
    if isinstance(error, OSError) and error.filename == streams.STDOUT:
        _drop_stdout()
        return fault.exit
    return _print(fault, command_of(sys.argv[1:])[0], json=json)


def _print(fault: Fault, command: str, *, json: bool) -> int:
    try:
        _write(f"{fault.to_json(command)}\n" if json else "")
    except BrokenPipeError:
        _drop_stdout()
    return fault.exit


def _write(text: str) -> None:
    """Write to stdout, where what is held is JSON: in ASCII, so that no locale bends it."""
    sys.stdout.write(re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match.group())[1:-1], text))
    sys.stdout.flush()


def _reader_is_gone() -> int:
    """End a command whose reader has enough (`| head`)."""
    _drop_stdout()
    return int(Exit.FAILED)


def _drop_stdout() -> None:
    # Python would complain once more when it flushes at its exit.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
