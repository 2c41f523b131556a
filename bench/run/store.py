"""Reads and writes runs: a folder per run with its run.json and pictures, and baselines by name."""

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
_VALIDATION = "-validate-"  # a part of each validation's id, since the id has the suite's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def keep(run: Run, folder: Path) -> Path:
    """Write a run's run.json into its folder, whole or not at all.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    return write(run, folder / "run.json")


def keep_baseline(run: Run, name: str, out: Path) -> Path:
    """Store a run as a baseline; it replaces a baseline of the same name.

    Raises:
        SpecError: the name is invalid.
        BlockedError: the disk is full, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} is not a baseline name. Use letters, digits, dots, dashes and underscores.")
    return write(run, out / _BASELINES / f"{name}.json")


def write(run: Run, path: Path, *, flag: str = "--out") -> Path:
    """Write a run's file, whole or not at all; `flag` is the flag that chooses another folder, for the error message.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(dumps(run) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        error.filename = error.filename or str(part)  # a failed write does not set it
        raise from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag=flag) from error
    return path


def baselines(out: Path) -> list[str]:
    """Return the names of the baselines in a folder."""
    return sorted(file.stem for file in (out / _BASELINES).glob("*.json"))


def find(name: str, out: Path, *, validation: bool | None = None) -> Path:
    """Return the path of a run's JSON file.

    `name`: a run's id, the path of its folder or of its file, or the name of a baseline; "" selects the last run.
    `validation`: applies to the last run only: it must be a validation (True), must not be one (False), or may be
    either (None).

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
    """Return the run that `find` locates.

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
    """Reject values that firstlight never writes and that the readers of a run cannot handle.

    Raises:
        ValueError: the run has such a value.
    """
    dumps(run).encode("utf-8")  # fails for half of a surrogate pair
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
