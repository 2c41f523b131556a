"""Runs the programs that build `.venv`, and shows the written bytes and the elapsed seconds while one takes long.

The bootstrap imports this module, so it uses the standard library only and no syntax newer than Python 3.6.
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

# The bytes that `.venv` and uv's cache gain during a fresh installation. (measured: Linux x86-64, Python 3.11)
EXPECTED_BYTES = {"requirements.lock": 392491577, "dev.lock": 500971674}
# Seconds between two progress lines where stderr is not a terminal, and between two measurements of the files.
LINE_SECONDS, LOOK_SECONDS = 10.0, 1.0


class BootstrapError(Exception):
    """Report that `.venv` could not be built; the message names the cause and the next command."""


def emit(line: str) -> None:
    """Print one line to stderr, after the word "bootstrap:"; stdout is reserved for data."""
    sys.stderr.write("bootstrap: %s\n" % line)
    sys.stderr.flush()


class BootstrapProgress:
    """Runs programs one after another, and shows the progress of a program that takes long.

    In a terminal a live counter is rewritten in place. Elsewhere a line is printed every LINE_SECONDS.
    """

    def __init__(self, checkout: str, lock: str) -> None:
        """Note the start time, and start to count the bytes that `.venv` and uv's cache contain at the start.

        Args:
            checkout: the folder that holds `envs/` and `.venv`.
            lock: the name of the lock file, a key of EXPECTED_BYTES.
        """
        cache = os.environ.get("UV_CACHE_DIR") or os.path.join(checkout, ".cache", "uv")
        self.folder = checkout
        self.folders = (os.path.join(checkout, ".venv"), cache)
        self.expected = EXPECTED_BYTES[lock]
        self.started = time.time()
        self.before = None  # type: int | None
        # The count runs in a thread, because it takes minutes for a cache on a network file system.
        self.counting = threading.Thread(target=self._count, daemon=True)
        self.counting.start()
        self.is_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def _count(self) -> None:
        self.before = tree_bytes(self.folders)

    def run(self, argv: "list[str]", task: str, failure: str, environment: "dict[str, str]") -> str:
        """Run a program to its end and return its stdout.

        Args:
            argv: the program and its arguments.
            task: the description of the work in the progress lines, such as "making .venv".
            failure: the first line of the error message if the program fails.
            environment: all environment variables of the program.

        Raises:
            BootstrapError: the exit code is not 0; the message ends in the last 12 lines of the program's output.
        """
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=environment,
            start_new_session=os.name == "posix",  # a process group, so that an interrupt also ends its children
        )
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(task, ended), daemon=True)
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

    def _watch(self, task: str, ended: threading.Event) -> None:
        last = time.time()
        shown = False
        pause = LOOK_SECONDS
        while not ended.wait(pause):
            now = time.time()
            if not self.is_terminal and now - last < LINE_SECONDS:
                continue
            last = now
            line = self._line(task)
            pause = max(LOOK_SECONDS, 20 * (time.time() - now))  # a large cache takes long to measure
            if self.is_terminal:
                columns = shutil.get_terminal_size().columns  # a wrapped line cannot be overwritten
                sys.stderr.write("\r\x1b[K%s" % ("bootstrap: %s" % line)[: columns - 1])
                sys.stderr.flush()
                shown = True
            else:
                emit(line)
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _line(self, task: str) -> str:
        seconds = time.time() - self.started
        if self.before is None:
            return "%s: %d s" % (task, seconds)
        written = max(0, tree_bytes(self.folders) - self.before)
        text = "%s: %d" % (task, written / 1e6)
        if written < self.expected:
            text += " of about %d" % (self.expected / 1e6)
        text += " MB written, %d s" % seconds
        if self.expected / 10 < written < self.expected:
            text += ", about %d s left" % (seconds * (self.expected - written) / written)
        return text


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program and its child processes.

    SIGTERM comes first, so that they can delete their temporary files. SIGKILL follows after 5 seconds.
    """
    for name, seconds in (("SIGTERM", 5.0), ("SIGKILL", None)):
        try:
            if os.name == "posix":
                os.killpg(process.pid, getattr(signal, name))
            else:
                process.kill()
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
        except OSError:  # the process has ended already
            process.wait()
        return


def tree_bytes(folders: "Iterable[str]") -> int:
    """Return the total size of all files in the folders and below them, in bytes.

    A file with several hard links counts once, because uv links files from its cache into environments.
    """
    total = 0
    linked = set()
    for folder in folders:
        for top, _, names in os.walk(folder):
            for name in names:
                try:
                    stat = os.lstat(os.path.join(top, name))
                except OSError:  # another process has deleted the file
                    continue
                if stat.st_nlink == 1 or stat.st_ino not in linked:
                    total += stat.st_size
                if stat.st_nlink > 1:
                    linked.add(stat.st_ino)
    return total
