"""Runs the bootstrap's programs and shows what they do while they take long: the bytes and the seconds.

Standard library alone and no syntax newer than Python 3.6: the bootstrap imports it.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Iterable

# What has come into `.venv` and uv's cache when a fresh toolbox is whole. (measured: Linux x86-64, Python 3.11)
EXPECTED_BYTES = {"requirements.lock": 392491577, "dev.lock": 500971674}
# Seconds between two lines of progress where stderr is no terminal, and between two looks at the files.
LINE_SECONDS, LOOK_SECONDS = 10.0, 1.0


class BootstrapError(Exception):
    """Raised with what is missing and what to do, in one line."""


def say(line: str) -> None:
    """Print progress to stderr; stdout belongs to data."""
    sys.stderr.write("bootstrap: %s\n" % line)
    sys.stderr.flush()


class BootstrapProgress:
    """Runs programs one after another, with a line or a live counter while they take long."""

    def __init__(self, checkout: str, lock: str) -> None:
        """Remember what lies there already, and when it began."""
        cache = os.environ.get("UV_CACHE_DIR") or os.path.join(checkout, ".cache", "uv")
        self.folder = checkout
        self.folders = (os.path.join(checkout, ".venv"), cache)
        self.expected = EXPECTED_BYTES[lock]
        self.started = time.time()
        self.before = None  # type: int | None
        self.counting = threading.Thread(target=self._count, daemon=True)  # a cache on a network may take minutes
        self.counting.start()
        self.is_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def _count(self) -> None:
        self.before = tree_bytes(self.folders)

    def run(self, argv: "list[str]", what: str, failure: str, environment: "dict[str, str]") -> str:
        """Run a program to its end and return what it prints to stdout.

        Raises:
            BootstrapError: it failed; the message ends in its last lines.
        """
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=environment,
            start_new_session=os.name == "posix",  # so that its children end with it
        )
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(what, ended), daemon=True)
        watch.start()
        try:
            stdout, stderr = (text.decode("utf-8", "replace") for text in process.communicate())
        except BaseException:
            _end(process)
            raise
        finally:
            ended.set()
            watch.join()
        if process.returncode != 0:
            output = (stdout + stderr).strip()
            lines = [line for line in output.splitlines() if not line.startswith("WARNING: Location")]
            raise BootstrapError("%s:\n%s" % (failure, redact("\n".join(lines[-12:]))))
        return stdout

    def _watch(self, what: str, ended: threading.Event) -> None:
        last = time.time()
        shown = False
        pause = LOOK_SECONDS
        while not ended.wait(pause):
            now = time.time()
            if not self.is_terminal and now - last < LINE_SECONDS:
                continue
            last = now
            line = self._line(what)
            pause = max(LOOK_SECONDS, 20 * (time.time() - now))  # a large cache takes long to look at
            if self.is_terminal:
                columns = shutil.get_terminal_size().columns  # a line that wraps cannot be written over
                sys.stderr.write("\r\x1b[K%s" % ("bootstrap: %s" % line)[: columns - 1])
                sys.stderr.flush()
                shown = True
            else:
                say(line)
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _line(self, what: str) -> str:
        seconds = time.time() - self.started
        if self.before is None:
            return "%s: %d s" % (what, seconds)
        written = max(0, tree_bytes(self.folders) - self.before)
        text = "%s: %d" % (what, written / 1e6)
        if written < self.expected:
            text += " of about %d" % (self.expected / 1e6)
        text += " MB written, %d s" % seconds
        if self.expected / 10 < written < self.expected:
            text += ", about %d s left" % (seconds * (self.expected - written) / written)
        return text


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program and what it started: first kindly, so that it can tidy its own files."""
    for name, seconds in (("SIGTERM", 5.0), ("SIGKILL", None)):
        try:
            if os.name == "posix":
                os.killpg(process.pid, getattr(signal, name))
            else:
                process.kill()
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
        except OSError:  # it has ended
            process.wait()
        return


def tree_bytes(folders: "Iterable[str]") -> int:
    """Return the bytes of all files in some folders; a file with several links, as uv makes them, counts once."""
    total = 0
    linked = set()
    for folder in folders:
        for top, _, names in os.walk(folder):
            for name in names:
                try:
                    stat = os.lstat(os.path.join(top, name))
                except OSError:  # it has gone meanwhile
                    continue
                if stat.st_nlink == 1 or stat.st_ino not in linked:
                    total += stat.st_size
                if stat.st_nlink > 1:
                    linked.add(stat.st_ino)
    return total
