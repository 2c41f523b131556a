"""The command `bench`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path  # noqa: TC003 (typer looks at it)
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import common
from bench.cli import host as host_cli
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
    VersionFlag,
)
from bench.core.errors import Exit
from bench.report import terminal
from provision.core import command_end, streams
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.core.result import Run

app = typer.Typer(
    help="Measure diffusion on this machine, and say how far the figures can be believed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command()(host_cli.validate)
app.command()(host_cli.history)


@app.callback()
def _program(version: VersionFlag = False) -> None:
    """Take the flags that stand before a command."""


def main() -> None:
    """Run the command. SIGTERM and SIGHUP end it as Ctrl-C does, and its worker with it."""
    streams.prepare()
    sys.exit(command_end.run_app(app, "bench"))


@app.command("list")
def list_(json: JsonFlag = False) -> None:
    """Say which suites, models, dtypes, schedulers and devices there are."""

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
            axes_ = {axis: list(each) for axis, each in values.items()}
            print(dumps({"schema": 1, "command": "list", "suites": suites, "models": models, "axes": axes_}))
            return Exit.GOOD
        for name, description in suites.items():
            print(f"suite      {name:<28} {description}")
        for name, tasks in models.items():
            print(f"model      {name:<28} {', '.join(tasks)}")
        for axis, each in values.items():
            print(f"{axis:<10} {', '.join(each)}")
        return Exit.GOOD

    common.guard(act, json=json)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="A suite's name, or a .toml file.")] = "quick",
    device: DeviceFlag = "auto",
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this model (again for more).")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="Only this dtype (again for more).")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change every case, such as steps=50 (again for more).", metavar="AXIS=VALUE"),
    ] = None,
    interleave: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--interleave",
            help="Every case in two settings, its images in turns: dtype=fp32 dtype=bf16,layout=channels_last;"
            " python=PATH is a setting, too.",
            metavar="A B",
        ),
    ] = None,
    find_max: Annotated[bool, typer.Option("--find-max", help="Search the largest batch and image that fit.")] = False,
    python: PythonFlag = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No process a case: for a debugger, not for figures.")
    ] = False,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    out: OutFlag = OUT,
    budget: Annotated[float | None, typer.Option("--budget", help="Seconds for the whole suite.", min=1)] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 5 where a figure is disturbed or doubted; else that is a warning.")
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Measure a suite, case by case, each in a fresh process."""

    def act() -> Exit:
        from bench.core.codec import dumps
        from bench.report import tables
        from bench.run import compare, request, suite_run, verdict

        run_request = request.RunRequest(
            suite=suite, out=out, device=device, python=python, root=root, host=host, envs=envs
        )
        run_request = replace(
            run_request,
            budget_seconds=budget,
            models=tuple(model or ()),
            dtypes=tuple(dtype or ()),
            find_max=find_max,
            interleave=interleave,
            changes=tuple(change or ()),
            in_process=in_process,
            command=common.said(),
        )
        done = suite_run.run(run_request, common.Progress(quiet=quiet))
        if json:
            print(dumps(done))
        else:
            color, width = terminal.color_and_width(no_color)
            print(tables.terminal(done, color=color, width=width), end="")
            if done.interleaved:
                print(tables.comparison(compare.pairs(done), color=color, width=width), end="")
            _keep_page(done, out)
        return verdict.exit_of(done.verdict, strict=strict)

    common.guard(act, json=json)


def _keep_page(run: Run, out: Path) -> None:
    """The page beside the run, and where both lie."""
    from bench.report import formats

    place = out / run.id / "report.html"
    place.write_text(formats.html(run, formats.ReportContext(place.parent)), encoding="utf-8")
    print(f"kept: {place.with_name('run.json')}")
    print(f"page: {place}")


@app.command()
def tune(
    model: Annotated[str, typer.Option("--model", help="The model whose fastest setting is searched.")],
    device: DeviceFlag = "auto",
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Give an axis: it is not searched, such as batch=1 (again).", metavar="AXIS=VALUE"),
    ] = None,
    python: PythonFlag = None,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    out: OutFlag = OUT,
    budget: Annotated[float | None, typer.Option("--budget", help="Seconds for the whole search.", min=1)] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Search a model's fastest setting whose numbers are right, and print the code for it."""

    def act() -> Exit:
        from bench.core.codec import dumps
        from bench.report import tables
        from bench.run import request
        from bench.run import tune as tune_search

        run_request = request.RunRequest(
            suite="tune", out=out, device=device, python=python, root=root, host=host, envs=envs
        )
        given = tuple(change or ())
        run_request = replace(run_request, budget_seconds=budget, models=(model,), changes=given, command=common.said())
        found = tune_search.tune(run_request, common.Progress(quiet=quiet))
        if json:
            print(dumps(tune_search.told(found)))
        else:
            color, width = terminal.color_and_width(no_color)
            print(tables.tuning_table(found, color=color, width=width), end="")
            _keep_page(found.run, out)
        return found.exit

    common.guard(act, json=json)


@app.command("report")
def report_(
    run: Annotated[
        str, typer.Argument(help="A run's id, its folder, its run.json, or a baseline; default: the last one.")
    ] = "",
    form: Annotated[
        str, typer.Option("--format", help="markdown, terminal, html, csv, json, pytest-benchmark, ticket or schema.")
    ] = "markdown",
    to: Annotated[Path | None, typer.Option("--to", help="Write it there, not to stdout.", metavar="FILE")] = None,
    price: Annotated[
        str | None, typer.Option("--price", help="What an hour costs, such as 2.5/h: adds what 1000 images cost.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="A run or a baseline that the page draws it against.", metavar="RUN")
    ] = None,
    out: OutFlag = OUT,
    root: RootFlag = None,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Show a kept run in one of its forms."""

    def act() -> Exit:
        from bench.report import formats
        from bench.run import store
        from provision.config import toml

        wanted = "json" if json else toml.choose(form, list(formats.FORMS), "format")
        cost = common.price(price)
        if cost is not None and wanted not in {"csv", "html"}:
            raise SpecError(f"--price is for --format csv and html; {wanted} shows no cost.")
        if against is not None and wanted != "html":
            raise SpecError(f"--against is for --format html; for the figures: bench compare {against}.")
        if wanted == "schema":
            text = formats.schema_text()
        else:
            # A ticket is of a validation alone.
            file = store.find(run, out, validation=True if wanted == "ticket" else None)
            found = store.load(str(file), out)
            baseline = store.load(against, out) if against is not None else None
            kept = _validations(found, root) if wanted == "html" else ()
            text = formats.FORMS[wanted](found, formats.ReportContext(file.parent, cost, baseline, no_color, kept))
        if to is not None and to.is_dir():
            raise SpecError(f"--to {to} is a folder: name a file in it.")
        if to is None:
            print(text, end="" if text.endswith("\n") else "\n")
        else:
            to.write_text(text, encoding="utf-8")
        return Exit.GOOD

    common.guard(act, json=json)


def _validations(run: Run, root: str | None) -> Sequence[Run]:
    """The validations of a run's host that the volume keeps; none of a run that is no validation."""
    from bench.run import request, suite_run
    from bench.validate import history

    if run.validation is None:
        return ()
    folder = suite_run.find_root(request.RunRequest(suite="", out=OUT, root=root)).validations
    return history.of_host(history.load(folder).runs, run.machine)


@app.command()
def keep(
    name: Annotated[str, typer.Argument(help="The baseline's name.")],
    run: Annotated[str, typer.Argument(help="A run's id, its folder, or its run.json; default: the last one.")] = "",
    out: OutFlag = OUT,
    json: JsonFlag = False,
) -> None:
    """Keep a run as a baseline, by a name that `compare` takes."""

    def act() -> Exit:
        from bench.core.codec import dumps
        from bench.run import store

        kept = store.keep_baseline(store.load(run, out, validation=False), name, out)
        print(dumps({"schema": 1, "command": "keep", "kept": str(kept)}) if json else f"kept: {kept}")
        return Exit.GOOD

    common.guard(act, json=json)


@app.command("compare")
def compare_(
    before: Annotated[str, typer.Argument(help="A run or a baseline; one that was interleaved needs no other.")],
    after: Annotated[str | None, typer.Argument(help="The newer run; default: the last one.")] = None,
    fail_over: Annotated[
        str, typer.Option("--fail-over", help="The smallest slowdown that counts.", metavar="PERCENT")
    ] = "3%",
    out: OutFlag = OUT,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Hold a run against another; 3 where a case became slower, 5 where none could be judged."""

    def act() -> Exit:
        from bench.core.codec import dumps, plain
        from bench.report import tables
        from bench.run import compare, store

        least = common.percent(fail_over)
        old = store.load(before, out)
        if old.interleaved and after is None:
            found = compare.pairs(old, least=least)
        else:
            found = compare.compare(old, store.load(after or "", out, validation=False), least=least)
        if json:
            print(dumps({"schema": 1, **plain(found), "exit": int(found.exit)}))
        else:
            color, width = terminal.color_and_width(no_color)
            print(tables.comparison(found, color=color, width=width), end="")
        return found.exit

    common.guard(act, json=json)
