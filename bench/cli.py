"""The command `bench`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import BYTES_FOR_A_RUN, Exit
from provision.errors import FirstlightError, SpecError, from_os_error

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

OutFlag = Annotated[Path, typer.Option("--out", help="Where runs are kept.", metavar="DIR")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NoColorFlag = Annotated[bool, typer.Option("--no-color", help="No colours (as NO_COLOR).")]
_OUT = Path("results")


def main() -> None:
    """Run the command. SIGTERM ends it as Ctrl-C does, and its worker with it."""
    signal.signal(signal.SIGTERM, _interrupt)
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

    _guard(act)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="A suite's name, or a .toml file.")] = "quick",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
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
    python: Annotated[Path | None, typer.Option("--python", help="Measure this interpreter.")] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No process a case: for a debugger, not for figures.")
    ] = False,
    root: Annotated[str | None, typer.Option("--root", help="The persistent folder.", metavar="DIR")] = None,
    host: Annotated[Path | None, typer.Option("--host", help="What this host has.", metavar="FILE")] = None,
    envs: Annotated[Path | None, typer.Option("--envs", help="Another envs/ folder.", metavar="DIR")] = None,
    out: OutFlag = _OUT,
    budget: Annotated[float | None, typer.Option("--budget", help="Seconds for the whole suite.", min=1)] = None,
    json: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    no_color: NoColorFlag = False,
) -> None:
    """Measure a suite, case by case, each in a fresh process."""

    def act() -> Exit:
        from bench import compare, report, running, verdict
        from bench.result import dumps

        wish = running.Wish(
            suite,
            device,
            model or [],
            dtype or [],
            python,
            root,
            host,
            envs,
            out,
            budget,
            find_max=find_max,
            interleave=interleave,
            changes=tuple(change or ()),
            in_process=in_process,
            command=_said(),
        )
        done = running.run(wish, _Progress(quiet=quiet))
        if json:
            print(dumps(done))
        else:
            color, width = _paper(no_color)
            print(report.terminal(done, color=color, width=width), end="")
            if done.interleaved:
                print(report.comparison(compare.pairs(done), color=color, width=width), end="")
            print(f"kept: {out / done.id / 'run.json'}")
            place = out / done.id / "report.html"
            place.write_text(_html(done, place.parent, None, no_color), encoding="utf-8")
            print(f"page: {place}")
        return verdict.exit_of(done.verdict)

    _guard(act)


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
    out: OutFlag = _OUT,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Show a kept run in one of its forms."""

    def act() -> Exit:
        from bench import runs
        from provision import spec

        wanted = "json" if json else spec.choose(form, list(_FORMS), "format")
        cost = _price(price)
        if cost is not None and wanted not in {"csv", "html"}:
            raise SpecError(f"--price is for --format csv and html; {wanted} shows no cost.")
        if wanted == "schema":
            text = _FORMS[wanted](None, Path(), cost, no_color)
        else:
            file = runs.find(run, out)
            text = _FORMS[wanted](runs.load(run, out), file.parent, cost, no_color)
        if to is None:
            print(text, end="" if text.endswith("\n") else "\n")
        else:
            to.write_text(text, encoding="utf-8")
        return Exit.GOOD

    _guard(act)


def _terminal(run: Run, _: Path, __: float | None, no_color: bool) -> str:
    from bench import report

    color, width = _paper(no_color)
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
    from bench.result import dumps

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


def _price(text: str | None) -> float | None:
    """Money an hour, as it was written; which money is up to whoever reads it."""
    if text is None:
        return None
    try:
        amount = float(text.removesuffix("/h"))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise SpecError(f"--price {text}: an amount an hour, such as 2.5/h.")
    return amount


@app.command()
def keep(
    name: Annotated[str, typer.Argument(help="The baseline's name.")],
    run: Annotated[str, typer.Argument(help="A run's id, its folder, or its run.json; default: the last one.")] = "",
    out: OutFlag = _OUT,
) -> None:
    """Keep a run as a baseline, by a name that `compare` takes."""

    def act() -> Exit:
        from bench import runs

        print(f"kept: {runs.keep_baseline(runs.load(run, out), name, out)}")
        return Exit.GOOD

    _guard(act)


@app.command("compare")
def compare_(
    before: Annotated[str, typer.Argument(help="A run or a baseline; one that was interleaved needs no other.")],
    after: Annotated[str | None, typer.Argument(help="The newer run; default: the last one.")] = None,
    fail_over: Annotated[
        str, typer.Option("--fail-over", help="The smallest slowdown that counts.", metavar="PERCENT")
    ] = "3%",
    out: OutFlag = _OUT,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Hold a run against another; 3 where a case became slower, 5 where none could be judged."""

    def act() -> Exit:
        from bench import compare, report, runs
        from bench.result import dumps, plain

        least = _percent(fail_over)
        old = runs.load(before, out)
        if old.interleaved and after is None:
            found = compare.pairs(old, least=least)
        else:
            found = compare.compare(old, runs.load(after or "", out), least=least)
        if json:
            print(dumps({"schema": 1, **plain(found), "exit": int(found.exit)}))
        else:
            color, width = _paper(no_color)
            print(report.comparison(found, color=color, width=width), end="")
        return found.exit

    _guard(act)


def _percent(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise SpecError(f"--fail-over {text}: a percentage, such as 5%.")
    return share


def _paper(no_color: bool) -> tuple[bool, int | None]:
    """(whether colours are wanted, columns where the terminal does not tell)."""
    color = sys.stdout.isatty() and not no_color and "NO_COLOR" not in os.environ
    return color, None if sys.stdout.isatty() else 160


def _said() -> str:
    """The command as it was typed, or as make typed it."""
    return shlex.join(["bench", *sys.argv[1:]])


class _Progress:
    """A line a case to stderr; on a terminal, the case at work stands there too until its line replaces it.

    Nothing moves meanwhile: a parent that draws would take time from what is measured.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def begin(self, line: str) -> None:
        """A case begins."""
        if self.terminal and not self.quiet:
            print(f"{line} …", end="", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Something is known."""
        if not self.quiet:
            print(f"\r\x1b[K{line}" if self.terminal else line, file=sys.stderr, flush=True)


def _guard(act: Callable[[], Exit]) -> None:
    """Turn every failure that is known into its message and its exit code."""
    try:
        code = int(act())
    except FirstlightError as error:
        code = _fault(error)
    except BrokenPipeError:
        # The reader has enough (`| head`). Python would complain once more when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = int(Exit.FAILED)
    except OSError as error:
        code = _fault(from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag="--out"))
    except KeyboardInterrupt:
        print("interrupted; no worker is left. Run the same command again.", file=sys.stderr)
        code = int(Exit.INTERRUPTED)
    raise typer.Exit(code)


def _fault(error: FirstlightError) -> int:
    from provision.command import redact

    print(f"error: {redact(str(error))}", file=sys.stderr)
    return int(error.exit)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
