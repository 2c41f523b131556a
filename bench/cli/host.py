"""Defines the commands that examine a host instead of measuring cases: `validate` and `history`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import common
from bench.cli.common import (
    OUT,
    DeviceFlag,
    OutputFlags,
    ProgressFlags,
    PythonFlag,
    RootFlags,
    RunFlags,
)
from bench.core.errors import Exit
from bench.report import terminal
from provision.core import flags

if TYPE_CHECKING:
    from pathlib import Path


@flags.expand
def validate(
    *,
    device: DeviceFlag = "auto",
    soak: Annotated[
        str | None,
        typer.Option("--soak", help="Repeat the checks for this time afterwards, such as 30m.", metavar="TIME"),
    ] = None,
    python: PythonFlag = None,
    folders: RunFlags,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Seconds for all devices, without the soak.", min=30)
    ] = None,
    output: ProgressFlags,
) -> None:
    """Check that this host's GPUs are healthy and reach the expected speed; without a GPU, check its CPU."""

    def act() -> Exit:
        from bench.core import verdict
        from bench.core.codec import dumps
        from bench.report import formats
        from bench.validate import examine_host
        from bench.validate import history as validation_history

        seconds = examine_host.parse_soak(soak)
        request = folders.request(
            "validate", device=device, python=python, budget_seconds=budget, command=common.command_line()
        )
        progress = common.Progress(quiet=output.quiet)
        validation = examine_host.validate(request, progress, soak_seconds=seconds)
        for note in validation.notes:
            progress.report(f"note: {note}")
        run = validation.run
        kept = validation_history.runs_of_host(validation.kept, run.machine)
        context = formats.ReportContext(folders.out / run.id, no_color=output.no_color, kept=kept)
        page = context.folder / "report.html"
        page.write_text(formats.html(run, context), encoding="utf-8")
        if output.json:
            print(dumps(run))
        else:
            print(formats.terminal(run, context), end="")
            print(f"kept: {page.with_name('run.json')}\npage: {page}")
        code = verdict.exit_code(run.verdict)
        # If the verdict is "fail" although the soak was interrupted, its exit code counts.
        return Exit.INTERRUPTED if validation.interrupted and code is not Exit.VERDICT_FAIL else code

    common.guard(act, json=output.json)


@flags.expand
def history(
    *,
    all_hosts: Annotated[
        bool, typer.Option("--all", help="Show every host whose validations are on this volume.")
    ] = False,
    folders: RootFlags,
    output: OutputFlags,
) -> None:
    """Show how the validation results of this host change over time."""

    def act() -> Exit:
        from bench.core.codec import dumps, plain
        from bench.report import tables
        from bench.run import request, suite_run
        from bench.validate import history as validation_history
        from provision.host import facts

        run_request = request.RunRequest(suite="", out=OUT, **vars(folders))
        folder: Path = suite_run.find_root(run_request).validations
        kept = validation_history.load(folder)
        machine = facts.probe().to_dict()
        shown = replace(kept, runs=kept.runs if all_hosts else validation_history.runs_of_host(kept.runs, machine))
        if output.json:
            lines = [plain(line) | {"at": line.at.isoformat()} for line in validation_history.history_lines(shown.runs)]
            print(dumps({"schema": 1, "lines": lines, "unread": list(shown.unread)}))
            return Exit.GOOD
        color, width = terminal.color_and_width(output.no_color)
        if shown.runs:
            print(tables.trend(shown, color=color, width=width), end="")
        else:
            others = f" ({len(kept.runs)} of other hosts; --all shows them)" if kept.runs else ""
            print(f"{folder} has no validation of this host{others}. Run `bench validate` first.")
            print("".join(f"skipped: {reason}\n" for reason in shown.unread), end="")
        return Exit.GOOD

    common.guard(act, json=output.json)
