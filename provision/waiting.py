"""Runs the bootstrap's programs and shows what they do while they take long: the bytes and the seconds.

Standard library alone and no syntax newer than Python 3.6: the bootstrap imports it.
"""

import os
import re
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

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


class Wait:
    """Runs programs one after another, with a line or a live counter while they take long."""

    def __init__(self, checkout: str, lock: str) -> None:
        """Remember what lies there already, and when it began."""
        cache = os.environ.get("UV_CACHE_DIR") or os.path.join(checkout, ".cache", "uv")
        self.folder = checkout
        self.folders = (os.path.join(checkout, ".venv"), cache)
        self.expected = EXPECTED_BYTES[lock]
        self.started = time.time()
        self.before = tree_bytes(self.folders)
        self.is_terminal = sys.stderr.isatty()

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
        )
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(what, ended), daemon=True)
        watch.start()
        try:
            stdout, stderr = (text.decode("utf-8", "replace") for text in process.communicate())
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            ended.set()
            watch.join()
        if process.returncode != 0:
            output = (stdout + stderr).strip()
            lines = [line for line in output.splitlines() if not line.startswith("WARNING: Location")]
            text = re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_…", "\n".join(lines[-12:]))
            raise BootstrapError("%s:\n%s" % (failure, text))
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
                sys.stderr.write("\r\x1b[Kbootstrap: %s" % line)
                sys.stderr.flush()
                shown = True
            else:
                say(line)
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _line(self, what: str) -> str:
        written = max(0, tree_bytes(self.folders) - self.before)
        seconds = time.time() - self.started
        text = "%s: %d" % (what, written / 1e6)
        if written < self.expected:
            text += " of about %d" % (self.expected / 1e6)
        text += " MB written, %d s" % seconds
        if self.expected / 10 < written < self.expected:
            text += ", about %d s left" % (seconds * (self.expected - written) / written)
        return text


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
