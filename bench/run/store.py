"""Reads and writes runs: each run has a folder with run.json and pictures; a baseline is a run stored under a name."""

from __future__ import annotations

import re
from types import NoneType
from typing import TYPE_CHECKING

from bench.core.codec import dumps, loads
from bench.core.errors import BYTES_FOR_A_RUN
from bench.core.result import SCHEMA, Run
from provision.core import layout
from provision.core.errors import FirstlightError, SpecError, from_os_error

if TYPE_CHECKING:
    from pathlib import Path

_BASELINES = "baselines"
_VALIDATION = "-validate-"  # the id of every validation contains this, since the suite's name is a part of an id
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def keep(run: Run, folder: Path) -> Path:
    """Write a run into the run.json of its folder, and return the path.

    A file is either written completely or not at all.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    return write(run, folder / "run.json")


def keep_baseline(run: Run, name: str, out: Path) -> Path:
    """Store a run as the baseline of this name, in place of an earlier one; return the path.

    Raises:
        SpecError: the name is invalid.
        BlockedError: the disk is full, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} is not a baseline name. Use letters, digits, dots, dashes and underscores.")
    return write(run, out / _BASELINES / f"{name}.json")


def write(run: Run, path: Path, *, flag: str = "--out") -> Path:
    """Write a run to a file, completely or not at all, and return the path.

    Args:
        run: the run.
        path: the file.
        flag: the flag with which the user can choose another folder, for the message of an error.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(dumps(run) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        error.filename = error.filename or str(part)  # the error of a failed write has no file name
        raise from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag=flag) from error
    return path


def baselines(out: Path) -> list[str]:
    """Return the sorted names of the baselines in the folder of all runs."""
    return sorted(file.stem for file in (out / _BASELINES).glob("*.json"))


def find(name: str, out: Path, *, validation: bool | None = None) -> Path:
    """Return the path of a run's JSON file.

    Args:
        name: the id of a run, the path of its folder or of its file, or the name of a baseline; "" selects the last
            run.
        out: the folder of all runs.
        validation: for the last run: select the last validation (True), the last other run (False), or the last of all
            (None).

    Raises:
        FirstlightError: there is no such run.
    """
    ids = sorted(file.parent.name for file in out.glob("*/run.json"))
    if not name:
        of_kind = [run_id for run_id in ids if validation is None or (_VALIDATION in run_id) is validation]
        if not of_kind:
            kind, command = ("validation", "bench validate") if validation else ("run", layout.next_command("bench"))
            raise FirstlightError(f"{out} has no {kind}. Run `{command}` first.")
        name = of_kind[-1]
    candidates = [out / name / "run.json", out / _BASELINES / f"{name}.json", out.__class__(name)]
    file = next((path for path in [*candidates, candidates[-1] / "run.json"] if path.is_file()), None)
    if file is None:
        names = ", ".join([*ids, *baselines(out)]) or "none"
        raise FirstlightError(f"there is no run {name!r}. The runs in {out} are: {names}.")
    return file


def load(name: str, out: Path, *, validation: bool | None = None) -> Run:
    """Return the run whose file `find` returns for these arguments.

    Raises:
        FirstlightError: there is no such run, or this version cannot read it.
    """
    file = find(name, out, validation=validation)
    try:
        run = loads(file.read_text(encoding="utf-8"), Run)
        _check(run)
    except (ValueError, RecursionError) as error:  # brackets nested a thousand deep
        raise FirstlightError(f"{file} is not a run that this version can read: {error}.") from None
    if not 1 <= run.schema <= SCHEMA:
        raise FirstlightError(f"{file} has schema {run.schema}, but this version reads only 1 to {SCHEMA}.")
    return run


def _check(run: Run) -> None:
    """Reject values that firstlight never writes and that reports cannot handle.

    Raises:
        ValueError: the run has such a value.
    """
    dumps(run).encode("utf-8")  # raises for a lone surrogate, which JSON can hold and UTF-8 cannot
    gpus = run.machine.get("gpus", [])
    is_list = isinstance(gpus, list) and all(isinstance(gpu, dict) for gpu in gpus)
    names = [gpu.get("name") for gpu in gpus] if is_list else [None]
    numbers = [run.machine.get(key) for key in ("memory_bytes", "cores", "cpu_quota")]
    is_named = all(isinstance(name, str) for name in names)
    if not is_named or not all(isinstance(number, (int, float, NoneType)) for number in numbers):
        raise ValueError("Run.machine has a field of the wrong type")
    if run.interleaved and len(run.results) % 2:
        raise ValueError("Run.results of an interleaved run are not pairs")
    for number, result in enumerate(run.results):
        case = result.case
        if min(case.batch, case.steps, case.height, case.width) < 1:
            raise ValueError(f"Run.results[{number}].case has a size below 1")
        times = [
            seconds for image in (*result.warmups, *result.samples) for seconds in (image.seconds, *image.step_seconds)
        ]
        if min([*times, *result.work.peak_flops_per_second.values()], default=1.0) <= 0:
            raise ValueError(f"Run.results[{number}] has a time or a rate that is not above 0")
