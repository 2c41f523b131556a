"""The command `bench`."""

from __future__ import annotations

import io
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench import console
from bench.console import (
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
from bench.errors import Exit
from provision.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from bench.result import Run

app = typer.Typer(
    help="Measure diffusion on this machine, and say how far the figures can be believed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command. SIGTERM and SIGHUP end it as Ctrl-C does, and its worker with it."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has one of them
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no boxes shows their numbers
    app()


@app.command("list")
def list_() -> None:
    """Say which suites, models, dtypes, schedulers and devices there are."""

    def act() -> Exit:
        from bench import axes, cases

        for name in cases.suites():
            print(f"suite      {name:<28} {cases.load_suite(name).description}")
        for name in axes.models():
            print(f"model      {name:<28} {', '.join(axes.tasks(name))}")
        for axis, values in (
            ("dtype", axes.DTYPES),
            ("scheduler", axes.SCHEDULERS),
            ("layout", axes.LAYOUTS),
            ("attention", axes.ATTENTIONS),
            ("compile", axes.COMPILES),
            ("offload", axes.OFFLOADS),
            ("vae", axes.VAES),
        ):
            print(f"{axis:<10} {', '.join(values)}")
        print(f"device     {', '.join(axes.DEVICES)}")
        return Exit.GOOD

    console.guard(act)


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
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Measure a suite, case by case, each in a fresh process."""

    def act() -> Exit:
        from bench import compare, report, running, verdict
        from bench.codec import dumps

        place = running.Wish(suite=suite, out=out, device=device, python=python, root=root, host=host, envs=envs)
        wish = replace(
            place,
            budget_seconds=budget,
            models=tuple(model or ()),
            dtypes=tuple(dtype or ()),
            find_max=find_max,
            interleave=interleave,
            changes=tuple(change or ()),
            in_process=in_process,
            command=console.said(),
        )
        done = running.run(wish, console.Progress(quiet=quiet))
        if json:
            print(dumps(done))
        else:
            color, width = console.paper(no_color)
            print(report.terminal(done, color=color, width=width), end="")
            if done.interleaved:
                print(report.comparison(compare.pairs(done), color=color, width=width), end="")
            _keep_page(done, out)
        return verdict.exit_of(done.verdict)

    console.guard(act)


def _keep_page(run: Run, out: Path) -> None:
    """The page beside the run, and where both lie."""
    place = out / run.id / "report.html"
    place.write_text(_html(run, place.parent, None, False), encoding="utf-8")
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
        from bench import report, running, tuning
        from bench.codec import dumps

        place = running.Wish(suite="tune", out=out, device=device, python=python, root=root, host=host, envs=envs)
        given = tuple(change or ())
        wish = replace(place, budget_seconds=budget, models=(model,), changes=given, command=console.said())
        found = tuning.tune(wish, console.Progress(quiet=quiet))
        if json:
            print(dumps(tuning.told(found)))
        else:
            color, width = console.paper(no_color)
            print(report.tuned(found, color=color, width=width), end="")
            _keep_page(found.run, out)
        return found.exit

    console.guard(act)


@app.command("report")
def report_(
    run: Annotated[
        str, typer.Argument(help="A run's id, its folder, its run.json, or a baseline; default: the last one.")
    ] = "",
    form: Annotated[
        str, typer.Option("--format", help="markdown, terminal, html, csv, json, pytest-benchmark or schema.")
    ] = "markdown",
    to: Annotated[Path | None, typer.Option("--to", help="Write it there, not to stdout.", metavar="FILE")] = None,
    price: Annotated[
        str | None, typer.Option("--price", help="What an hour costs, such as 2.5/h: adds what 1000 images cost.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="A run or a baseline that the page draws it against.", metavar="RUN")
    ] = None,
    out: OutFlag = OUT,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Show a kept run in one of its forms."""

    def act() -> Exit:
        from bench import runs
        from provision import spec

        wanted = "json" if json else spec.choose(form, list(_FORMS), "format")
        cost = console.price(price)
        if cost is not None and wanted not in {"csv", "html"}:
            raise SpecError(f"--price is for --format csv and html; {wanted} shows no cost.")
        if against is not None and wanted != "html":
            raise SpecError(f"--against is for --format html; for the figures: bench compare {against}.")
        if wanted == "schema":
            text = _FORMS[wanted](None, Path(), cost, no_color)
        elif against is not None:
            from bench import page

            text = page.html(runs.load(run, out), runs.find(run, out).parent, cost, runs.load(against, out))
        else:
            text = _FORMS[wanted](runs.load(run, out), runs.find(run, out).parent, cost, no_color)
        if to is not None and to.is_dir():
            raise SpecError(f"--to {to} is a folder: name a file in it.")
        if to is None:
            print(text, end="" if text.endswith("\n") else "\n")
        else:
            to.write_text(text, encoding="utf-8")
        return Exit.GOOD

    console.guard(act)


def _terminal(run: Run, _: Path, __: float | None, no_color: bool) -> str:
    from bench import report

    color, width = console.paper(no_color)
    return report.terminal(run, color=color, width=width)


def _markdown(run: Run, *_: object) -> str:
    from bench import report

    return report.markdown(run)


def _html(run: Run, folder: Path, cost: float | None, _: bool) -> str:
    from bench import page

    return page.html(run, folder, cost)


def _csv(run: Run, _: Path, cost: float | None, __: bool) -> str:
    from bench import export

    return export.csv_text(run, cost)


def _json(run: Run, *_: object) -> str:
    from bench.codec import dumps

    return dumps(run)


def _pytest_benchmark(run: Run, *_: object) -> str:
    import json

    from bench import export

    return json.dumps(export.pytest_benchmark(run), indent=1)


def _schema(*_: object) -> str:
    import json

    from bench import schema

    return json.dumps(schema.of_run(), indent=1)


_FORMS: dict[str, Callable[..., str]] = {
    "markdown": _markdown,
    "terminal": _terminal,
    "html": _html,
    "csv": _csv,
    "json": _json,
    "pytest-benchmark": _pytest_benchmark,
    "schema": _schema,
}


@app.command()
def keep(
    name: Annotated[str, typer.Argument(help="The baseline's name.")],
    run: Annotated[str, typer.Argument(help="A run's id, its folder, or its run.json; default: the last one.")] = "",
    out: OutFlag = OUT,
) -> None:
    """Keep a run as a baseline, by a name that `compare` takes."""

    def act() -> Exit:
        from bench import runs

        print(f"kept: {runs.keep_baseline(runs.load(run, out), name, out)}")
        return Exit.GOOD

    console.guard(act)


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
        from bench import compare, report, runs
        from bench.codec import dumps, plain

        least = console.percent(fail_over)
        old = runs.load(before, out)
        if old.interleaved and after is None:
            found = compare.pairs(old, least=least)
        else:
            found = compare.compare(old, runs.load(after or "", out), least=least)
        if json:
            print(dumps({"schema": 1, **plain(found), "exit": int(found.exit)}))
        else:
            color, width = console.paper(no_color)
            print(report.comparison(found, color=color, width=width), end="")
        return found.exit

    console.guard(act)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
