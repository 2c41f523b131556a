"""Defines the command `bench` and its subcommands that measure cases, and that show, store and compare runs."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 (typer evaluates the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import common
from bench.cli import host as host_cli
from bench.cli.common import (
    OUT,
    DeviceFlag,
    JsonFlag,
    OutFlag,
    OutputFlags,
    ProgressFlags,
    PythonFlag,
    RootFlag,
    RunFlags,
    VersionFlag,
)
from bench.core.errors import Exit
from bench.report import terminal
from provision.core import command_end, flags, streams, umask
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.core.result import Run

app = typer.Typer(
    help="Measure diffusion on this machine, and report how reliable the figures are.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command()(host_cli.validate)
app.command()(host_cli.history)


@app.callback()
def _program(version: VersionFlag = False) -> None:
    """Handle the flags that stand before a subcommand."""


def main() -> None:
    """Run the command; SIGTERM and SIGHUP end the command and its worker, as Ctrl-C does."""
    streams.prepare()
    umask.forbid_writing_to_all()
    sys.exit(command_end.run_app(app, "bench"))


@app.command("list")
def list_(json: JsonFlag = False) -> None:
    """List the suites, models, dtypes, schedulers and devices."""

    def act() -> Exit:
        from bench.core import axes
        from bench.core.codec import dumps
        from bench.run import cases

        suites = {name: cases.load_suite(name).description for name in cases.suites()}
        models = {name: list(axes.tasks(name)) for name in axes.models()}
        values: dict[str, Iterable[str]] = {
            "dtype": axes.DTYPES,
            "scheduler": axes.SCHEDULERS,
            "layout": axes.LAYOUTS,
            "attention": axes.ATTENTIONS,
            "compile": axes.COMPILES,
            "offload": axes.OFFLOADS,
            "vae": axes.VAES,
            "device": axes.DEVICES,
        }
        if json:
            axis_values = {axis: list(names) for axis, names in values.items()}
            print(dumps({"schema": 1, "command": "list", "suites": suites, "models": models, "axes": axis_values}))
            return Exit.GOOD
        for name, description in suites.items():
            print(f"suite      {name:<28} {description}")
        for name, tasks in models.items():
            print(f"model      {name:<28} {', '.join(tasks)}")
        for axis, names in values.items():
            print(f"{axis:<10} {', '.join(names)}")
        return Exit.GOOD

    common.guard(act, json=json)


@app.command()
@flags.expand
def run(
    suite: Annotated[str, typer.Argument(help="The name of a suite, or a .toml file.")] = "quick",
    *,
    device: DeviceFlag = "auto",
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this model (repeatable).")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="Only this dtype (repeatable).")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set an axis of all cases, such as steps=50 (repeatable).", metavar="AXIS=VALUE"),
    ] = None,
    interleave: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--interleave",
            help="Measure each case in two settings whose images are made in turns, such as:"
            " dtype=fp32 dtype=bf16,layout=channels_last; python=PATH is a setting too.",
            metavar="A B",
        ),
    ] = None,
    find_max: Annotated[
        bool, typer.Option("--find-max", help="Search the largest batch and image that fit in memory.")
    ] = False,
    python: PythonFlag = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run cases in this process, for a debugger; its figures are not valid.")
    ] = False,
    folders: RunFlags,
    budget: Annotated[float | None, typer.Option("--budget", help="Seconds for the whole suite.", min=1)] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 5 if a figure is disturbed or doubtful; otherwise that is a warning."),
    ] = False,
    output: ProgressFlags,
) -> None:
    """Measure the cases of a suite, each in a new process."""

    def act() -> Exit:
        from bench.core import verdict
        from bench.core.codec import dumps
        from bench.report import tables
        from bench.run import compare, suite_run

        request = folders.request(
            suite,
            device=device,
            python=python,
            budget_seconds=budget,
            models=tuple(model or ()),
            dtypes=tuple(dtype or ()),
            find_max=find_max,
            interleave=interleave,
            changes=tuple(change or ()),
            in_process=in_process,
            command=common.command_line(),
        )
        measured = suite_run.run(request, common.Progress(quiet=output.quiet))
        if output.json:
            print(dumps(measured))
        else:
            color, width = terminal.color_and_width(output.no_color)
            print(tables.terminal(measured, color=color, width=width), end="")
            if measured.interleaved:
                print(tables.comparison(compare.compare_pairs(measured), color=color, width=width), end="")
            _keep_page(measured, folders.out)
        return verdict.exit_code(measured.verdict, strict=strict)

    common.guard(act, json=output.json)


def _keep_page(run: Run, out: Path) -> None:
    """Write the HTML page of a run beside its file, and print the paths of both."""
    from bench.report import formats

    page = out / run.id / "report.html"
    page.write_text(formats.html(run, formats.ReportContext(page.parent)), encoding="utf-8")
    print(f"kept: {page.with_name('run.json')}")
    print(f"page: {page}")


@app.command()
@flags.expand
def tune(
    *,
    model: Annotated[str, typer.Option("--model", help="The model whose fastest setting is searched.")],
    device: DeviceFlag = "auto",
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Fix an axis, such as batch=1: it is not searched (repeatable).", metavar="AXIS=VALUE"
        ),
    ] = None,
    python: PythonFlag = None,
    folders: RunFlags,
    budget: Annotated[float | None, typer.Option("--budget", help="Seconds for the whole search.", min=1)] = None,
    output: ProgressFlags,
) -> None:
    """Search a model's fastest setting that computes correct numbers, and print the code for it."""

    def act() -> Exit:
        from bench.core.codec import dumps
        from bench.report import tables
        from bench.run import tune as tune_search

        request = folders.request(
            "tune",
            device=device,
            python=python,
            budget_seconds=budget,
            models=(model,),
            changes=tuple(change or ()),
            command=common.command_line(),
        )
        tuned = tune_search.tune(request, common.Progress(quiet=output.quiet))
        if output.json:
            print(dumps(tune_search.to_json(tuned)))
        else:
            color, width = terminal.color_and_width(output.no_color)
            print(tables.tuning_table(tuned, color=color, width=width), end="")
            _keep_page(tuned.run, folders.out)
        return tuned.exit

    common.guard(act, json=output.json)


@app.command("report")
@flags.expand
def report_(
    run: Annotated[
        str,
        typer.Argument(help="The run: its id, folder or run.json, or the name of a baseline; default: the last run."),
    ] = "",
    *,
    form: Annotated[
        str, typer.Option("--format", help="markdown, terminal, html, csv, json, pytest-benchmark, ticket or schema.")
    ] = "markdown",
    to: Annotated[
        Path | None, typer.Option("--to", help="Write to this file instead of stdout.", metavar="FILE")
    ] = None,
    price: Annotated[
        str | None,
        typer.Option("--price", help="The host's price per hour, such as 2.5/h: adds the cost of 1000 images."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="A run or baseline that the HTML page compares this run with.", metavar="RUN"),
    ] = None,
    out: OutFlag = OUT,
    root: RootFlag = None,
    output: OutputFlags,
) -> None:
    """Show a run in one of the report formats."""

    def act() -> Exit:
        from bench.report import formats
        from bench.run import store
        from provision.config import toml

        chosen = "json" if output.json else toml.choose(form, list(formats.FORMS), "format")
        cost = common.price(price)
        if cost is not None and chosen not in {"csv", "html"}:
            raise SpecError(
                f"--price is only for the formats csv and html; the format {chosen} shows no cost. "
                "Add --format csv or --format html."
            )
        if against is not None and chosen != "html":
            raise SpecError(f"--against is only for --format html. To compare the figures: bench compare {against}.")
        if chosen == "schema":
            text = formats.schema_text()
        else:
            # Only a validation has a ticket, so the default is the last validation.
            file = store.find(run, out, validation=True if chosen == "ticket" else None)
            shown = store.load(str(file), out)
            baseline = store.load(against, out) if against is not None else None
            kept = _validations(shown, root) if chosen == "html" else ()
            text = formats.FORMS[chosen](
                shown, formats.ReportContext(file.parent, cost, baseline, output.no_color, kept)
            )
        if to is not None and to.is_dir():
            raise SpecError(f"--to {to} is a folder. Name a file in it.")
        if to is None:
            print(text, end="" if text.endswith("\n") else "\n")
        else:
            to.write_text(text, encoding="utf-8")
        return Exit.GOOD

    common.guard(act, json=output.json)


def _validations(run: Run, root: str | None) -> Sequence[Run]:
    """Return all validations of the host of a validation; an empty sequence for a run that is no validation."""
    from bench.run import request, suite_run
    from bench.validate import history

    if run.validation is None:
        return ()
    folder = suite_run.find_root(request.RunRequest(suite="", out=OUT, root=root)).validations
    return history.runs_of_host(history.load(folder).runs, run.machine)


@app.command()
def keep(
    name: Annotated[str, typer.Argument(help="The baseline's name.")],
    run: Annotated[str, typer.Argument(help="The run: its id, folder or run.json; default: the last run.")] = "",
    out: OutFlag = OUT,
    json: JsonFlag = False,
) -> None:
    """Keep a run as a baseline, under a name that `compare` accepts."""

    def act() -> Exit:
        from bench.core.codec import dumps
        from bench.run import store

        kept = store.keep_baseline(store.load(run, out, validation=False), name, out)
        print(dumps({"schema": 1, "command": "keep", "kept": str(kept)}) if json else f"kept: {kept}")
        return Exit.GOOD

    common.guard(act, json=json)


@app.command("compare")
@flags.expand
def compare_(
    before: Annotated[str, typer.Argument(help="A run or baseline; an interleaved run needs no second run.")],
    after: Annotated[str | None, typer.Argument(help="The newer run; default: the last run.")] = None,
    *,
    fail_over: Annotated[
        str, typer.Option("--fail-over", help="The smallest slowdown that counts.", metavar="PERCENT")
    ] = "3%",
    out: OutFlag = OUT,
    output: OutputFlags,
) -> None:
    """Compare two runs; exit code 3: a case became slower, 5: no case could be judged."""

    def act() -> Exit:
        from bench.core.codec import dumps, plain
        from bench.report import tables
        from bench.run import compare, store

        least = common.percent(fail_over)
        old = store.load(before, out)
        if old.interleaved and after is None:
            comparison = compare.compare_pairs(old, least=least)
        else:
            comparison = compare.compare(old, store.load(after or "", out, validation=False), least=least)
        if output.json:
            print(dumps({"schema": 1, **plain(comparison), "exit": int(comparison.exit)}))
        else:
            color, width = terminal.color_and_width(output.no_color)
            print(tables.comparison(comparison, color=color, width=width), end="")
        return comparison.exit

    common.guard(act, json=output.json)
