"""A whole run: the cases of a suite one after another, within its budget; or in pairs, image by image in turns."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench import cases, causes, device, precisions, runner, session
from provision import facts, paths, profiles, spec
from provision.errors import BlockedError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.cases import Cell, Suite
    from bench.result import Run
    from provision.facts import Facts
    from provision.paths import Root


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a run is asked for. `interleave`: the two settings of a pair, as people write them."""

    suite: str
    out: Path
    device: str = "auto"
    python: Path | None = None
    root: str | None = None
    host: Path | None = None
    envs: Path | None = None
    budget_seconds: float | None = None
    models: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    find_max: bool = False
    interleave: tuple[str, str] | None = None
    changes: tuple[str, ...] = ()
    in_process: bool = False
    command: str | None = None


class Progress(Protocol):
    """Who is told what happens."""

    def begin(self, line: str) -> None:
        """A case begins."""

    def at(self, line: Callable[[], str]) -> None:
        """Something is being done; the line is made where it is shown."""

    def say(self, line: str) -> None:
        """Something is known."""


@dataclass(frozen=True)
class Bench:
    """Where and on what a run is done."""

    root: Root
    python: Path
    machine: Facts
    envs: Path


def run(wish: Wish, progress: Progress) -> Run:
    """Measure what is wished for, and keep it.

    Raises:
        SpecError: a suite, a name or a setting is wrong.
        BlockedError: the device, the interpreter or the disk cannot be used.
    """
    suite = cases.load_suite(wish.suite)
    # A wrong name is told before anything is started.
    device.check_name(wish.device)
    cases.check_picks(wish.models, wish.dtypes)
    settings(",".join(wish.changes))
    pair = tuple(settings(each) for each in wish.interleave) if wish.interleave else None
    for flag, is_given in (("--in-process", wish.in_process), ("--find-max", wish.find_max)):
        if pair is not None and is_given:
            raise SpecError(f"{flag} and --interleave: a pair is two processes that time images alone. Leave one out.")
    began = time.monotonic()
    bench = find_bench(wish)
    chosen = choose_device(wish, bench, progress)
    known, notes, cells = find_cells(suite, wish, bench, chosen, progress)
    if wish.find_max:
        cells = [replace(cell, find_max=True) for cell in cells]
    budget = wish.budget_seconds or getattr(suite.budget, chosen.partition(":")[0])
    measured = session.Session(wish, bench, budget, progress, began=began)
    measured.know(known, notes)
    results = measured.measure_pairs(cells, pair[0], pair[1]) if pair else measured.measure(cells)
    return measured.keep(results, interleaved=pair is not None)


def settings(text: str) -> dict[str, str]:
    """Read "axis=value,axis=value".

    Raises:
        SpecError: it is not of this form.
    """
    found = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        axis, sign, value = part.partition("=")
        if not (axis and sign and value):
            raise SpecError(f"{part!r} is no setting: write AXIS=VALUE, such as dtype=bf16.")
        found[axis.strip()] = value.strip()
    return found


def find_bench(wish: Wish) -> Bench:
    """Where the run is done.

    Raises:
        BlockedError: there is no interpreter.
    """
    host = spec.load_host(wish.host)
    envs = (wish.envs or paths.shipped_envs()).absolute()
    root = find_root(wish)
    python = wish.python or paths.interpreter(root.prefix(host.env))
    if not python.exists():
        raise BlockedError(f"{python} is not there. Run `make setup`, or name an interpreter with --python.")
    return Bench(root, python.absolute(), facts.probe(), envs)


def find_root(wish: Wish) -> Root:
    """The persistent folder, as it is named or as this host's profile has it."""
    envs = (wish.envs or paths.shipped_envs()).absolute()
    return profiles.choose(wish.root, spec.load_host(wish.host), envs, os.environ, Path.home()).root


def choose_device(wish: Wish, bench: Bench, progress: Progress) -> str:
    """The device of the run.

    Raises:
        BlockedError: the one that is wished for cannot be used.
    """
    # Where auto can only mean the CPU, torch need not be asked: that saves its import.
    ask = wish.device not in {"auto", "cpu"} or bool(bench.machine.gpus) or bench.machine.system == "darwin"
    found = runner.query(bench.python) if ask and wish.device != "cpu" else None
    site = causes.Site(bench.machine) if found is None else causes.site(bench.machine, bench.envs)
    chosen = device.choose(wish.device, site, found)
    if wish.device == "auto" and chosen == "cpu" and bench.machine.gpus and found is not None:
        why_not = causes.cause(site, found)
        progress.say(f"on the CPU: {why_not.text if why_not is not None else 'torch lists no card'}")
    return chosen


def find_cells(
    suite: Suite, wish: Wish, bench: Bench, chosen: str, progress: Progress
) -> tuple[precisions.Known, tuple[str, ...], list[Cell]]:
    """Return what the device computes with, what that changes in the suite, and the suite's cases for it.

    Raises:
        SpecError: nothing is left.
    """
    known, notes = precisions.Known(chosen), tuple[str, ...]()
    changes = settings(",".join(wish.changes))
    named = (*wish.dtypes, *([changes["dtype"]] if "dtype" in changes else ()))
    if precisions.needed(suite, chosen, named):
        progress.begin(f"  which dtypes {chosen} has kernels for")
        known = precisions.ask(
            bench.python,
            chosen,
            cpus=bench.machine.cpu_quota,
            tell=lambda heard: progress.at(lambda: f"  which dtypes {chosen} has kernels for: {heard.phase}"),
        )
        notes = tuple(precisions.notes(known, suite, named))
        for line in notes:
            progress.say(f"  {line}")
    means = known.means
    cells = cases.unroll(suite, chosen, only_models=wish.models, only_dtypes=wish.dtypes, changes=changes, means=means)
    return known, notes, cells
