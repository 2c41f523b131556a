"""A whole run: the cases of a suite one after another, within its budget; or in pairs, image by image in turns."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import choose_device as device_choice
from bench.gpu import diagnosis
from bench.launch import worker_process
from bench.run import cases, dtype_support, session
from bench.run.request import BenchHost, Progress, RunRequest
from provision.config import host as host_config
from provision.core import layout
from provision.core.errors import BlockedError, SpecError
from provision.host import facts, provider

if TYPE_CHECKING:
    from bench.core.result import Run
    from bench.run.cases import Cell, Suite
    from provision.core.layout import Root


def run(run_request: RunRequest, progress: Progress) -> Run:
    """Measure what is wished for, and keep it.

    Raises:
        SpecError: a suite, a name or a setting is wrong.
        BlockedError: the device, the interpreter or the disk cannot be used.
    """
    suite = cases.load_suite(run_request.suite)
    # A wrong name is told before anything is started.
    device_choice.check_name(run_request.device)
    cases.check_picks(run_request.models, run_request.dtypes)
    settings(",".join(run_request.changes))
    pair = tuple(settings(each) for each in run_request.interleave) if run_request.interleave else None
    for flag, is_given in (("--in-process", run_request.in_process), ("--find-max", run_request.find_max)):
        if pair is not None and is_given:
            raise SpecError(f"{flag} and --interleave: a pair is two processes that time images alone. Leave one out.")
    began = time.monotonic()
    bench = find_bench(run_request)
    chosen = choose_device(run_request, bench, progress)
    known, notes, cells = find_cells(suite, run_request, bench, chosen, progress)
    if run_request.find_max:
        cells = [replace(cell, find_max=True) for cell in cells]
    budget = run_request.budget_seconds or getattr(suite.budget, chosen.partition(":")[0])
    measured = session.Session(run_request, bench, budget, progress, began=began, dtype_support=known, notes=notes)
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


def find_bench(run_request: RunRequest) -> BenchHost:
    """Where the run is done.

    Raises:
        BlockedError: there is no interpreter.
    """
    host = host_config.load_host(run_request.host)
    envs = layout.envs_folder(run_request.envs)
    root = find_root(run_request)
    python = run_request.python or layout.interpreter(root.prefix(host.env))
    if not python.exists():
        setup = layout.next_command("setup")
        raise BlockedError(f"{python} is not there. Run `{setup}`, or name an interpreter with --python.")
    return BenchHost(root, python.absolute(), facts.probe(), envs)


def find_root(run_request: RunRequest) -> Root:
    """The persistent folder, as it is named or as this host's profile has it."""
    envs = layout.envs_folder(run_request.envs)
    return provider.choose(
        run_request.root, host_config.load_host(run_request.host), envs, os.environ, Path.home()
    ).root


def choose_device(run_request: RunRequest, bench: BenchHost, progress: Progress) -> str:
    """The device of the run.

    Raises:
        BlockedError: the one that is wished for cannot be used.
    """
    # Where auto can only mean the CPU, torch need not be asked: that saves its import.
    ask = run_request.device not in {"auto", "cpu"} or bool(bench.machine.gpus) or bench.machine.system == "darwin"
    found = worker_process.query(bench.python) if ask and run_request.device != "cpu" else None
    site = diagnosis.Machine(bench.machine) if found is None else diagnosis.inspect_machine(bench.machine, bench.envs)
    chosen = device_choice.choose(run_request.device, site, found)
    if run_request.device == "auto" and chosen == "cpu" and bench.machine.gpus and found is not None:
        why_not = diagnosis.diagnose(site, found)
        progress.say(f"on the CPU: {why_not.text if why_not is not None else 'torch lists no card'}")
    return chosen


def find_cells(
    suite: Suite, run_request: RunRequest, bench: BenchHost, chosen: str, progress: Progress
) -> tuple[dtype_support.DtypeSupport, tuple[str, ...], list[Cell]]:
    """Return what the device computes with, what that changes in the suite, and the suite's cases for it.

    Raises:
        SpecError: nothing is left.
    """
    known, notes = dtype_support.DtypeSupport(chosen), tuple[str, ...]()
    changes = settings(",".join(run_request.changes))
    named = (*run_request.dtypes, *([changes["dtype"]] if "dtype" in changes else ()))
    if dtype_support.needed(suite, chosen, named):
        progress.begin(f"  which dtypes {chosen} has kernels for")
        known = dtype_support.ask(
            bench.python,
            chosen,
            cpus=bench.machine.cpu_quota,
            on_received=lambda received: progress.at(
                lambda: f"  which dtypes {chosen} has kernels for: {received.phase}"
            ),
        )
        notes = tuple(dtype_support.notes(known, suite, named))
        for line in notes:
            progress.say(f"  {line}")
    means = known.means
    cells = cases.unroll(
        suite, chosen, only_models=run_request.models, only_dtypes=run_request.dtypes, changes=changes, means=means
    )
    return known, notes, cells
