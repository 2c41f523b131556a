"""Runs a suite within its time budget: chooses the device, expands the suite into cases, measures and stores them."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import choose_device as device_choice
from bench.gpu import diagnosis
from bench.launch import worker_process
from bench.run import cases, dtype_support, measure_cases
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
    """Measure the suite of a request, and store the run.

    Raises:
        SpecError: the suite is not valid, or a name or a setting is unknown.
        BlockedError: the device, the interpreter or the disk cannot be used.
    """
    suite = cases.load_suite(run_request.suite)
    # Wrong names are rejected before a process is started.
    device_choice.check_name(run_request.device)
    cases.check_names(run_request.models, run_request.dtypes)
    settings(",".join(run_request.changes))
    pair = tuple(settings(text) for text in run_request.interleave) if run_request.interleave else None
    for flag, is_given in (("--in-process", run_request.in_process), ("--find-max", run_request.find_max)):
        if pair is not None and is_given:
            raise SpecError(f"{flag} cannot be combined with --interleave. Leave one of them out.")
    began = time.monotonic()
    bench = find_bench(run_request)
    device = choose_device(run_request, bench, progress)
    support, notes, cells = find_cells(suite, run_request, bench, device, progress)
    if run_request.find_max:
        cells = [replace(cell, find_max=True) for cell in cells]
    budget = run_request.budget_seconds or getattr(suite.budget, device.partition(":")[0])
    measured = measure_cases.Session(
        run_request, bench, budget, progress, began=began, dtype_support=support, notes=notes
    )
    with contextlib.closing(measured):
        results = measured.measure_pairs(cells, pair[0], pair[1]) if pair else measured.measure(cells)
    return measured.keep(results, interleaved=pair is not None)


def settings(text: str) -> dict[str, str]:
    """Return {axis: value} of a text "axis=value,axis=value".

    Raises:
        SpecError: the text is not of this form.
    """
    values = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        axis, sign, value = part.partition("=")
        if not (axis and sign and value):
            raise SpecError(f"{part!r} is not a setting. Write AXIS=VALUE, such as dtype=bf16.")
        values[axis.strip()] = value.strip()
    return values


def find_bench(run_request: RunRequest) -> BenchHost:
    """Return the root, the measured interpreter and the machine of a run.

    Raises:
        BlockedError: the interpreter does not exist.
    """
    host = host_config.load_host(run_request.host)
    envs = layout.envs_folder(run_request.envs)
    root = find_root(run_request)
    python = run_request.python or layout.interpreter(root.prefix(host.env))
    if not python.exists():
        setup = layout.next_command("setup")
        raise BlockedError(f"there is no interpreter {python}. Run `{setup}`, or name an interpreter with --python.")
    return BenchHost(root, python.absolute(), facts.probe(), envs)


def find_root(run_request: RunRequest) -> Root:
    """Return the root that the request names, or else the root of this host's provider profile.

    Raises:
        BlockedError: another user can change the records of the root.
    """
    envs = (run_request.envs or layout.shipped_envs()).absolute()
    host = host_config.load_host(run_request.host)
    chosen = provider.choose(run_request.root, host, envs, os.environ, Path.home())
    provider.require_trust(chosen, host, os.environ)
    return chosen.root


def choose_device(run_request: RunRequest, bench: BenchHost, progress: Progress) -> str:
    """Return the device of the run: "cpu", "cuda:N" or "mps".

    Raises:
        BlockedError: the requested device cannot be used.
    """
    # On a host without a GPU, "auto" is the CPU, and no worker has to import torch to find that out.
    needs_query = (
        run_request.device not in {"auto", "cpu"} or bool(bench.machine.gpus) or bench.machine.system == "darwin"
    )
    query = worker_process.query(bench.python) if needs_query and run_request.device != "cpu" else None
    machine = (
        diagnosis.Machine(bench.machine) if query is None else diagnosis.inspect_machine(bench.machine, bench.envs)
    )
    chosen = device_choice.choose(run_request.device, machine, query)
    if run_request.device == "auto" and chosen == "cpu" and bench.machine.gpus and query is not None:
        fault = diagnosis.diagnose(machine, query)
        progress.report(f"the CPU is used: {fault.text if fault is not None else 'torch lists no card'}")
    return chosen


def find_cells(
    suite: Suite, run_request: RunRequest, bench: BenchHost, device: str, progress: Progress
) -> tuple[dtype_support.DtypeSupport, tuple[str, ...], list[Cell]]:
    """Return what is known about the device's dtypes, the texts on how it changes the suite, and the cases.

    Raises:
        SpecError: no case is left.
    """
    support, notes = dtype_support.DtypeSupport(device), tuple[str, ...]()
    changes = settings(",".join(run_request.changes))
    named_dtypes = (*run_request.dtypes, *([changes["dtype"]] if "dtype" in changes else ()))
    if dtype_support.is_needed(suite, device, named_dtypes):
        progress.begin(f"  probing the dtypes of {device}")
        support = dtype_support.probe(
            bench.python,
            device,
            cpus=bench.machine.cpu_quota,
            on_received=lambda received: progress.update(lambda: f"  probing the dtypes of {device}: {received.phase}"),
        )
        notes = tuple(dtype_support.notes(support, suite, named_dtypes))
        for line in notes:
            progress.report(f"  {line}")
    capabilities = support.capabilities
    cells = cases.unroll(
        suite,
        device,
        only_models=run_request.models,
        only_dtypes=run_request.dtypes,
        changes=changes,
        capabilities=capabilities,
    )
    return support, notes, cells
