"""Runs `provision` commands in forked children that have their own host name, and kills them at a requested call.

Each line of stdin is a request in JSON, and each line of stdout its reply: {"code", "calls"}. This process has imported
all modules, so a fork of it saves the start of an interpreter.
"""

import ctypes
import functools
import importlib
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_NEW_UTS = 0x04000000  # CLONE_NEWUTS of linux/sched.h
_NOT_IMPORTED = {"provision.__main__", "provision.bootstrap"}


def main() -> None:
    import typer

    import provision
    from provision.cli import main as program

    for module in pkgutil.walk_packages(provision.__path__, "provision."):
        if module.name not in _NOT_IMPORTED and not module.name.endswith("_worker"):
            importlib.import_module(module.name)
    # Building the tree of commands and flags takes longer than most commands, so every child gets the same one.
    setattr(typer.main, "get_command", functools.cache(typer.main.get_command))  # noqa: B010 (mypy: it is a function)
    typer.main.get_command(program.app)
    killer = ctypes.CDLL(None, use_errno=True)
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _run(request, killer, program.main, writing)
        os.close(writing)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(reading) as pipe:
            calls = int(pipe.read() or 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "calls": calls}), flush=True)


def _run(request: dict[str, Any], killer: ctypes.CDLL, command: Callable[[], None], writing: int) -> None:
    code = 70
    try:
        host = request["host"].encode()
        assert killer.unshare(_NEW_UTS) == killer.sethostname(host, len(host)) == 0, "no right to set the host name"
        setattr(platform, "_uname_cache", None)  # noqa: B010 (the types do not know it)
        os.environ["HOME"] = request["home"]
        os.chdir(request["home"])
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number in (1, 2):
            os.dup2(out, number)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 (the process ends with the command)
        sys.argv = ["provision", *request["argv"]]
        if request.get("after"):
            killer.kill_after(ctypes.c_long(request["after"]))
        killer.kill_at(ctypes.c_long(request.get("at") or -1))
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        calls = killer.calls()
        killer.kill_at(ctypes.c_long(-1))
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writing, str(calls).encode())
        os._exit(code)


if __name__ == "__main__":
    main()
