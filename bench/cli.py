"""The command `bench`."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import Exit
from provision.errors import BlockedError, FirstlightError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from bench.result import Case, Result, Run
    from provision.facts import Facts
    from provision.paths import Root

app = typer.Typer(
    help="Measure diffusion on this machine, and say how far the figures can be believed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_BYTES_FOR_A_RUN = 16 * 1024 * 1024
_FIRST_OVERHEAD_SECONDS = 6.0  # until the first case has told


@dataclass(frozen=True)
class _Wish:
    """What a run is asked for."""

    suite: str
    device: str
    models: list[str]
    dtypes: list[str]
    python: Path | None
    root: str | None
    host: Path | None
    envs: Path | None
    out: Path
    budget_seconds: float | None


@dataclass(frozen=True)
class _Bench:
    """Where and on what a run is done."""

    root: Root
    python: Path
    machine: Facts
    envs: Path


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
            print(f"suite      {name:<24} {cases.load_suite(name).description}")
        for name in axes.models():
            print(f"model      {name:<24} {axes.architecture(name)['source']}")
        print(f"dtype      {', '.join(axes.DTYPES)}")
        print(f"scheduler  {', '.join(axes.SCHEDULERS)}")
        print(f"device     {', '.join(axes.DEVICES)}")
        return Exit.GOOD

    _guard(act)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="A suite's name, or a .toml file.")] = "quick",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this model (again for more).")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="Only this dtype (again for more).")] = None,
    python: Annotated[Path | None, typer.Option("--python", help="Measure this interpreter.")] = None,
    root: Annotated[str | None, typer.Option("--root", help="The persistent folder.", metavar="DIR")] = None,
    host: Annotated[Path | None, typer.Option("--host", help="What this host has.", metavar="FILE")] = None,
    envs: Annotated[Path | None, typer.Option("--envs", help="Another envs/ folder.", metavar="DIR")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where runs are kept.", metavar="DIR")] = Path("results"),
    budget: Annotated[float | None, typer.Option("--budget", help="Seconds for the whole suite.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the run as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours (as NO_COLOR).")] = False,
) -> None:
    """Measure a suite, case by case, each in a fresh process."""

    def act() -> Exit:
        from bench import report, verdict
        from bench.result import dumps

        wish = _Wish(suite, device, model or [], dtype or [], python, root, host, envs, out, budget)
        done = _run(wish, _Progress(quiet=quiet))
        if json:
            print(dumps(done))
        else:
            color = sys.stdout.isatty() and not no_color and "NO_COLOR" not in os.environ
            width = None if sys.stdout.isatty() else 160
            print(report.terminal(done, color=color, width=width), end="")
            print(f"kept: {out / done.id / 'run.json'}")
        return verdict.exit_of(done.verdict)

    _guard(act)


@app.command("report")
def report_(
    run: Annotated[str, typer.Argument(help="A run's id, its folder, or its run.json; default: the last one.")] = "",
    out: Annotated[Path, typer.Option("--out", help="Where runs are kept.", metavar="DIR")] = Path("results"),
    json: Annotated[bool, typer.Option("--json", help="Print the run as one JSON object.")] = False,
) -> None:
    """Show a kept run as Markdown."""

    def act() -> Exit:
        from bench import report
        from bench.result import dumps

        found = _load(run, out)
        print(dumps(found) if json else report.markdown(found), end="\n" if json else "")
        return Exit.GOOD

    _guard(act)


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


def _run(wish: _Wish, progress: _Progress) -> Run:
    import datetime as dt
    import uuid

    from bench import cases, device, verdict
    from bench.result import SCHEMA, Run, dumps

    suite = cases.load_suite(wish.suite)
    # A wrong name is told before anything is started.
    device.check_name(wish.device)
    cases.unroll(suite, "cpu", only_models=wish.models, only_dtypes=wish.dtypes)
    bench = _bench(wish)
    chosen = _device(wish, bench, progress)
    cells = cases.unroll(suite, chosen, only_models=wish.models, only_dtypes=wish.dtypes)
    started = dt.datetime.now(dt.timezone.utc)
    run_id = f"{started:%Y%m%dT%H%M%SZ}-{Path(wish.suite).stem}-{uuid.uuid4().hex[:6]}"
    folder = wish.out / run_id
    began = time.monotonic()
    folder.mkdir(parents=True)
    budget = wish.budget_seconds or getattr(suite.budget, chosen.partition(":")[0])
    results = _measure(cells, bench, folder, began + budget, progress)
    done = Run(
        schema=SCHEMA,
        id=run_id,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 3),
        machine=bench.machine.to_dict(),
        suite=Path(wish.suite).stem,
        results=tuple(results),
        verdict=verdict.judge(results),
    )
    part = folder / "run.json.part"
    try:
        part.write_text(dumps(done) + "\n", encoding="utf-8")
        part.replace(folder / "run.json")
    except OSError as error:
        error.filename = error.filename or str(part)  # a write that fails does not name its file
        raise from_os_error(error, needed_bytes=_BYTES_FOR_A_RUN, flag="--out") from error
    return done


def _measure(cells: list[Case], bench: _Bench, folder: Path, ends: float, progress: _Progress) -> list[Result]:
    """Run the cases one after another; what one leaves of its share of the budget goes to the later ones."""
    from bench import cases, runner
    from bench.result import Result, Status
    from bench.worker import Request
    from provision import spec

    manifest = spec.load_tables(bench.envs / "models.toml", spec.ModelSpec)
    results: list[Result] = []
    overhead = _FIRST_OVERHEAD_SECONDS
    for number, case in enumerate(cells):
        left = ends - time.monotonic()
        later = len(cells) - number - 1
        where = f"  [{number + 1}/{len(cells)}] {case.name:<52}"
        # The cases that follow need at least their start-up; what is left beyond that is this one's to use.
        share, limit = left / (later + 1), left - later * overhead
        if limit < overhead:
            reason = f"the budget leaves {max(left, 0):.0f} s, and starting a case takes {overhead:.0f} s"
            results.append(Result(case, Status.SKIPPED, reason=reason))
            progress.say(f"{where} {_outcome(results[-1])}")
            continue
        progress.begin(where)
        asked = time.monotonic()
        weights = cases.weights(case.model, manifest, bench.root)
        image = folder / f"{case.name}.png"
        request = Request(case, time.time(), share, limit, str(weights) if weights else None, str(image.absolute()))
        result = runner.run_case(request, bench.python, hub=bench.root.hub_in_use)
        results.append(result)
        sampled = sum(sample.seconds for sample in result.samples) + (result.phases.first_image_seconds or 0.0)
        overhead = max(overhead, time.monotonic() - asked - sampled) if result.samples else overhead
        progress.say(f"{where} {_outcome(result)}")
    return results


def _bench(wish: _Wish) -> _Bench:
    from provision import facts, paths, profiles, spec

    host = spec.load_host(wish.host)
    envs = (wish.envs or paths.shipped_envs()).absolute()
    root = profiles.choose(wish.root, host, envs, os.environ, Path.home()).root
    python = wish.python or paths.interpreter(root.prefix(host.env))
    if not python.exists():
        raise BlockedError(f"{python} is not there. Run `make setup`, or name an interpreter with --python.")
    return _Bench(root, python.absolute(), facts.probe(), envs)


def _device(wish: _Wish, bench: _Bench, progress: _Progress) -> str:
    from bench import device, runner

    # Where auto can only mean the CPU, torch need not be asked: that saves its import.
    ask = wish.device not in {"auto", "cpu"} or bool(bench.machine.gpus) or bench.machine.system == "darwin"
    found = runner.query(bench.python) if ask and wish.device != "cpu" else None
    chosen = device.choose(wish.device, bench.machine, found)
    if wish.device == "auto" and chosen == "cpu" and bench.machine.gpus and found is not None:
        progress.say(f"on the CPU: {device.cuda_fault(bench.machine, found)}")
    return chosen


def _load(name: str, out: Path) -> Run:
    from bench.result import SCHEMA, Run, loads

    known = sorted(file.parent.name for file in out.glob("*/run.json"))
    if not name:
        if not known:
            raise FirstlightError(f"no run is kept in {out}. Run `make bench` first.")
        name = known[-1]
    tried = [out / name / "run.json", Path(name), Path(name) / "run.json"]
    file = next((path for path in tried if path.is_file()), None)
    if file is None:
        raise FirstlightError(f"no run {name!r}; in {out} there is: {', '.join(known) or 'none'}.")
    try:
        found = loads(file.read_text(encoding="utf-8"), Run)
    except (ValueError, UnicodeDecodeError) as error:
        raise FirstlightError(f"{file} is not a run that this version can read: {error}.") from None
    if found.schema != SCHEMA:
        raise FirstlightError(f"{file} has schema {found.schema}, this version reads {SCHEMA}.")
    return found


def _outcome(result: Result) -> str:
    from bench import stats

    steps = stats.step_seconds(result)
    if result.status.value == "ok" and steps is not None:
        return f"{steps.median:.3g} s/step over {len(result.samples)} images"
    first = (result.reason or "").splitlines()[:1]
    return ": ".join([result.status.value, *first])


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
        code = _fault(from_os_error(error, needed_bytes=_BYTES_FOR_A_RUN, flag="--out"))
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
