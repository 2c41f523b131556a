"""Ends a command: sets the exit code, prints the error message to stderr and, with --json, one object to stdout.

A command that fails under --json prints this object, with its keys in this order (schema 1):

    {"schema": 1, "command": "env create", "error": {"kind": …, "message": …, "next": …}, "exit": 4}

`kind` is a stable word:

| kind | meaning | exit |
| --- | --- | --- |
| usage | a flag, an argument or a file of the user is wrong | 2 |
| blocked | the user must act first | 4 |
| no-space, read-only, permission, locked, not-mounted | special cases of blocked | 4 |
| failed | the work failed | 1 |
| source, content, program | special cases of failed: no server delivered, wrong hash, a child process failed | 1 |
| interrupted | Ctrl-C, SIGTERM or SIGHUP; the state is consistent | 130 |
| internal | a bug in firstlight; its traceback is printed to stderr only | 1 |

`next` is the next command or action for the user, or null. Secrets are removed from every text. A command that prints
an object of its own for a failure, such as the results of the steps of `setup`, prints only that object. Nothing is
printed after the reader of stdout has closed the pipe.
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
INTERRUPTED = "interrupted; the state is consistent. Run the same command again, it continues from here."
# The next action after a message about a wrong flag or file that lists the valid values but no action.
CORRECTED = "Correct the flag or the file, then run the same command again"
# The first words of the sentences that give advice in firstlight's messages.
_ADVICE = re.compile(
    r"(Accept|Add|Change|Choose|Close|End|Fetch|Fix|Free|Give|Install|Keep|Leave|Lock|Look|Make|Mend|Mount|Move|Name|"
    r"Pass|Pull|Put|Relocate|Remount|Remove|Report|Restart|Restore|Run|Say|Set|Stop|Take|Try|Unmount|Unset|Use|Wait|"
    r"Write)\b"
)
_TO_DO_IT = re.compile(r"To \w+ it: (.+)")
_GROUPS = {"env", "mirrors", "models"}


@dataclass(frozen=True)
class Fault:
    """Describe the error that ended a command, with the keys of the JSON object that the module documents."""

    kind: str
    message: str
    next: str | None
    exit: int

    def to_json(self, command: str) -> str:
        """Return the object that --json prints, as JSON text; `command` is the command's name, such as "env create"."""
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
    """Return the kind, message, next action and exit code for the exception that ended a command.

    Args:
        error: the exception.
        interrupted: the message after Ctrl-C.
        os_error: turns an OSError into one of firstlight's errors.
    """
    if isinstance(error, OSError):
        error = os_error(error)
    if isinstance(error, FirstlightError):
        act = error.next_act or next_of(str(error)) or (CORRECTED if error.kind == "usage" else None)
        return Fault(error.kind, str(error), act, int(error.exit))
    if isinstance(error, KeyboardInterrupt):
        return Fault("interrupted", interrupted, "Run the same command again", int(Exit.INTERRUPTED))
    text = f"{type(error).__name__}: {error}"
    return Fault("internal", f"{text}. This is a bug in firstlight", "Report this bug", int(Exit.FAILED))


def next_of(message: str) -> str | None:
    """Return the next command or action that a message contains, or None.

    It is the command in backquotes if there is exactly one, else the last sentence that gives advice. Only the first
    line is read, because the other lines are the output of a program or a comparison of files.
    """
    sentences: list[str] = re.split(r"(?<=[.:;!?])\s+(?=[A-Z])", message.partition("\n")[0])
    advice = next((sentence for sentence in reversed(sentences) if _ADVICE.match(sentence)), None)
    if advice is None and (command := _TO_DO_IT.match(sentences[-1])):
        return str(command.group(1)).rstrip(". ")
    commands: list[str] = re.findall(r"`([^`]+)`", advice or message.partition("\n")[0])
    if len(commands) == 1:
        return commands[0]
    return None if advice is None else advice.rstrip(". ")


def command_of(argv: list[str]) -> tuple[str, bool]:
    """Return (name of the command, whether the flag --json is set) for the arguments of a command line."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    first_flag = next((position for position, word in enumerate(words) if word.startswith("-")), len(words))
    length = 2 if words and words[0] in _GROUPS else 1
    return " ".join(words[: min(first_flag, length)]), "--json" in words


def run(
    act: Callable[[], int],
    *,
    json: bool,
    interrupted: str = INTERRUPTED,
    os_error: Callable[[OSError], FirstlightError] = from_os_error,
) -> int:
    """Run a command, print the error message or object if it fails, and return its exit code.

    Args:
        act: the command; returns its exit code.
        json: buffer the command's stdout until the command has ended; after an error print one JSON object instead.
        interrupted: the message after Ctrl-C.
        os_error: turns an OSError into one of firstlight's errors.
    """
    buffer = io.StringIO()
    try:
        with contextlib.redirect_stdout(buffer) if json else contextlib.nullcontext():
            code = int(act())
        _write(buffer.getvalue())
    except BrokenPipeError:
        return _end_after_closed_pipe()
    except (Exception, KeyboardInterrupt) as error:  # every error becomes one message and one exit code
        return _fail(error, fault_of(error, interrupted, os_error), json=json)
    return code


def run_app(app: Callable[..., object], name: str) -> int:
    """Run a typer application and return its exit code; with --json, a wrong flag also prints a JSON object.

    Args:
        app: the application.
        name: the name of the program: "provision" or "bench".
    """
    import typer

    command, is_json = command_of(sys.argv[1:])
    try:
        code = app(standalone_mode=False, prog_name=name)  # commands raise SystemExit; typer's own parts return a code
    except (typer.Abort, KeyboardInterrupt):
        code = int(Exit.INTERRUPTED)
    except BrokenPipeError:
        return _end_after_closed_pipe()
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:  # not an error of typer's parser
            return _fail(error, fault_of(error), json=is_json)
        show()
        text = str(error.format_message())  # type: ignore[attr-defined]  # typer has no public name for this class
        # The context has the parsed command words, without an unknown command. It is None if a flag lacks its value.
        context = getattr(error, "ctx", None)
        parsed = str(context.command_path).split(" ")[1:] if context is not None else command.split()
        help_command = shlex.join([layout.program(name), *parsed, "--help"])
        return _print(Fault("usage", text, help_command, int(Exit.USAGE)), command, json=is_json)
    if code == Exit.INTERRUPTED:
        return interrupted_early()
    return code if isinstance(code, int) else int(Exit.GOOD)


def interrupted_early() -> int:
    """Print the message for an interrupt before the command started, and return the exit code."""
    error = KeyboardInterrupt()
    _, is_json = command_of(sys.argv[1:])
    return _fail(error, fault_of(error, "interrupted before the command started; nothing was changed."), json=is_json)


def _fail(error: BaseException, fault: Fault, *, json: bool) -> int:
    if fault.kind == "interrupted":
        text = fault.message
    elif fault.kind == "internal":
        trace = "".join(traceback.format_exception(error))
        text = f"{redact(trace)}\nerror: this is a bug in firstlight. Report it with the lines above."
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
    """Write JSON to stdout with every character outside ASCII escaped, so that the locale cannot change the text."""
    sys.stdout.write(re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match.group())[1:-1], text))
    sys.stdout.flush()


def _end_after_closed_pipe() -> int:
    """Drop stdout after the reader has closed the pipe (`| head`), and return the exit code."""
    _drop_stdout()
    return int(Exit.FAILED)


def _drop_stdout() -> None:
    # Python flushes stdout at its exit, and would report the closed pipe again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
