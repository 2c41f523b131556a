"""The runs that are kept: a folder for each with its run.json and pictures, and baselines by name."""

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
_VALIDATION = "-validate-"  # in the id of each: see validating.SUITE
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def keep(run: Run, folder: Path) -> Path:
    """Write a run into its folder, whole or not at all.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    return write(run, folder / "run.json")


def keep_baseline(run: Run, name: str, out: Path) -> Path:
    """Keep a run by a name; the run that had it before loses it.

    Raises:
        SpecError: no such name can be.
        BlockedError: the disk is full, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} is no name for a baseline: letters, digits, dots, dashes and underscores.")
    return write(run, out / _BASELINES / f"{name}.json")


def write(run: Run, path: Path, *, flag: str = "--out") -> Path:
    """Write a run's file, whole or not at all; `flag` is the one that names another place.

    Raises:
        BlockedError: the disk is full, or cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(dumps(run) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        error.filename = error.filename or str(part)  # a write that fails does not name its file
        raise from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag=flag) from error
    return path


def baselines(out: Path) -> list[str]:
    """The names that baselines have."""
    return sorted(file.stem for file in (out / _BASELINES).glob("*.json"))


def find(name: str, out: Path, *, validation: bool | None = None) -> Path:
    """The file of a run: by its id, its folder, its file, a baseline's name; "" for the last one.

    `validation`: whether the last one has to be a validation, or must not be one; None for either.

    Raises:
        FirstlightError: there is none.
    """
    known = sorted(file.parent.name for file in out.glob("*/run.json"))
    if not name:
        of_kind = [each for each in known if validation is None or (_VALIDATION in each) is validation]
        if not of_kind:
            which, command = ("validation", "bench validate") if validation else ("run", layout.next_command("bench"))
            raise FirstlightError(f"no {which} is kept in {out}. Run `{command}` first.")
        name = of_kind[-1]
    tried = [out / name / "run.json", out / _BASELINES / f"{name}.json", out.__class__(name)]
    file = next((path for path in [*tried, tried[-1] / "run.json"] if path.is_file()), None)
    if file is None:
        names = ", ".join([*known, *baselines(out)]) or "none"
        raise FirstlightError(f"no run {name!r}; in {out} there is: {names}.")
    return file


def load(name: str, out: Path, *, validation: bool | None = None) -> Run:
    """Read a run, by what `find` knows it.

    Raises:
        FirstlightError: there is none, or this version cannot read it.
    """
    file = find(name, out, validation=validation)
    try:
        found = loads(file.read_text(encoding="utf-8"), Run)
        _check(found)
    except (ValueError, RecursionError) as error:  # brackets may be nested a thousand deep
        raise FirstlightError(f"{file} is not a run that this version can read: {error}.") from None
    if not 1 <= found.schema <= SCHEMA:
        raise FirstlightError(f"{file} has schema {found.schema}, this version reads 1 to {SCHEMA}.")
    return found


def _check(run: Run) -> None:
    """Refuse what no run of ours can hold, and what every reader would stumble over.

    Raises:
        ValueError: it does hold it.
    """
    dumps(run).encode("utf-8")  # half a character is none
    gpus = run.machine.get("gpus", [])
    is_list = isinstance(gpus, list) and all(isinstance(gpu, dict) for gpu in gpus)
    names = [gpu.get("name") for gpu in gpus] if is_list else [None]
    numbers = [run.machine.get(key) for key in ("memory_bytes", "cores", "cpu_quota")]
    is_named = all(isinstance(name, str) for name in names)
    if not is_named or not all(isinstance(number, (int, float, NoneType)) for number in numbers):
        raise ValueError("Run.machine is none that a run of ours describes")
    if run.interleaved and len(run.results) % 2:
        raise ValueError("Run.results are no pairs")
    for number, result in enumerate(run.results):
        case = result.case
        if min(case.batch, case.steps, case.height, case.width) < 1:
            raise ValueError(f"Run.results[{number}].case has no size")
        times = [second for each in (*result.warmups, *result.samples) for second in (each.seconds, *each.step_seconds)]
        if min([*times, *result.work.peak_flops_per_second.values()], default=1.0) <= 0:
            raise ValueError(f"Run.results[{number}] has a time or a rate that is not above 0")
