"""The commands of `bench` that look at a host rather than at cases: validate, and history."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import common
from bench.cli.common import (
    OUT,
    DeviceFlag,
    EnvsFlag,
    HostFlag,
    JsonFlag,
    NoColorFlag,
    OutFlag,
    PythonFlag,
    QuietFlag,
    RootFlag,
)
from bench.core.errors import Exit
from bench.report import terminal

if TYPE_CHECKING:
    from pathlib import Path


def validate(
    device: DeviceFlag = "auto",
    soak: Annotated[
        str | None, typer.Option("--soak", help="Repeat it for so long, such as 30m.", metavar="TIME")
    ] = None,
    python: PythonFlag = None,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    out: OutFlag = OUT,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Seconds for all devices, without a soak.", min=30)
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Say whether this host's GPUs are healthy and as fast as they should be; its CPU, where it has none."""

    def act() -> Exit:
        from bench.core.codec import dumps
        from bench.report import formats
        from bench.run import request, verdict
        from bench.validate import history as validation_history
        from bench.validate import host as host_validation

        seconds = host_validation.soak(soak)
        run_request = request.RunRequest(
            suite="validate", out=out, device=device, python=python, root=root, host=host, envs=envs
        )
        run_request = replace(run_request, budget_seconds=budget, command=common.said())
        progress = common.Progress(quiet=quiet)
        found = host_validation.validate(run_request, progress, soak_seconds=seconds)
        for note in found.notes:
            progress.say(f"note: {note}")
        run = found.run
        kept = validation_history.of_host(found.kept, run.machine)
        shown = formats.ReportContext(out / run.id, no_color=no_color, kept=kept)
        page = shown.folder / "report.html"
        page.write_text(formats.html(run, shown), encoding="utf-8")
        if json:
            print(dumps(run))
        else:
            print(formats.terminal(run, shown), end="")
            print(f"kept: {page.with_name('run.json')}\npage: {page}")
        code = verdict.exit_of(run.verdict)
        # What is proven stays so, whenever somebody has seen enough.
        return Exit.INTERRUPTED if found.interrupted and code is not Exit.VERDICT_FAIL else code

    common.guard(act, json=json)


def history(
    every: Annotated[bool, typer.Option("--all", help="Of every host that used this volume.")] = False,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Show how the validations of this host change over time."""

    def act() -> Exit:
        from bench.core.codec import dumps, plain
        from bench.report import tables
        from bench.run import request, suite_run
        from bench.validate import history as validation_history
        from provision.host import facts

        run_request = request.RunRequest(suite="", out=OUT, root=root, host=host, envs=envs)
        folder: Path = suite_run.find_root(run_request).validations
        kept = validation_history.load(folder)
        machine = facts.probe().to_dict()
        found = replace(kept, runs=kept.runs if every else validation_history.of_host(kept.runs, machine))
        if json:
            lines = [plain(line) | {"at": line.at.isoformat()} for line in validation_history.lines(found.runs)]
            print(dumps({"schema": 1, "lines": lines, "unread": list(found.unread)}))
            return Exit.GOOD
        color, width = terminal.color_and_width(no_color)
        if found.runs:
            print(tables.trend(found, color=color, width=width), end="")
        else:
            others = f", of other hosts {len(kept.runs)} (--all)" if kept.runs else ""
            print(f"no validation of this host is kept in {folder}{others}. Run `bench validate` first.")
            print("".join(f"passed over: {why}\n" for why in found.unread), end="")
        return Exit.GOOD

    common.guard(act, json=json)
