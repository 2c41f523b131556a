"""What every command of `provision` shares: its flags, its exit codes, and how a list of steps is run and shown."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provision.core import command_end
from provision.core.errors import SpecError
from provision.core.redact import redact
from provision.core.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from contextlib import AbstractContextManager

    from provision.cli import output
    from provision.core import step
    from provision.core.errors import Exit
    from provision.core.progress import Progress
    from provision.core.step import Outcome
    from provision.environments.definition import EnvironmentDefinition
    from provision.host.facts import HostFacts
    from provision.setup.host_plan import HostPlan
    from provision.volume import run_lock

RootFlag = Annotated[str | None, typer.Option("--root", help="The persistent folder.", metavar="DIR")]
HostFlag = Annotated[Path | None, typer.Option("--host", help="What this host should have.", metavar="FILE")]
EnvsFlag = Annotated[Path | None, typer.Option("--envs", help="Another envs/ folder.", metavar="DIR")]
OfflineFlag = Annotated[bool, typer.Option("--offline", help="Use no network.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Only faults and the summary.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", help="Also the machine, and why this build of torch.")]
NoColorFlag = Annotated[bool, typer.Option("--no-color", help="No colours (as NO_COLOR).")]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
WaitFlag = Annotated[
    float, typer.Option("--wait", help="Wait so long for another run on this root.", metavar="SECONDS", min=0)
]
YesFlag = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
CatalogueFlag = Annotated[str | None, typer.Option("--catalogue", help="More mirrors of yours.", metavar="FILE")]
ManifestFlag = Annotated[str | None, typer.Option("--manifest", help="More models of yours.", metavar="FILE")]

_CHANGING = {"setup", "repair", "env create", "relocate", "undo", "mirrors use", "mirrors restore"}


def _print_version(is_given: bool) -> None:
    """Print the version and end, if --version is given."""
    if is_given:
        print(f"provision {VERSION}")
        raise typer.Exit


VersionFlag = Annotated[
    bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
]


class OutputOptions:
    """How a command talks."""

    def __init__(self, json: bool, quiet: bool, verbose: bool, no_color: bool, wait: float = 0.0) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.color = not no_color and "NO_COLOR" not in os.environ
        self.wait = wait


def resolve_host(
    root: str | None,
    host: Path | None,
    envs: Path | None,
    *,
    offline: bool = False,
    retry: bool = False,
    changes: Mapping[str, object] | None = None,
) -> HostPlan:
    """Resolve the host from a command's flags, as `host_plan.resolve` does; `--help` imports nothing of it."""
    from provision.setup import host_plan

    return host_plan.resolve(root, host, envs, offline=offline, retry=retry, changes=changes)


def run_steps(
    name: str, plan: HostPlan, show: OutputOptions, *, dry_run: bool = False, only: Collection[str] | None = None
) -> Exit:
    """Run a command over the steps (`only` those of these names), print what became of them, return the exit code."""
    from provision.cli import output
    from provision.setup import plan as setup_plan
    from provision.volume.journal import Journal

    started = time.perf_counter()
    screen = output.Screen(json_output=show.json, quiet=show.quiet, color=show.color)
    with screen.during("looking at this host"):
        machine = plan.definition.machine
    journal = Journal(plan.root.journal, name)

    def build() -> list[step.Step]:
        steps = setup_plan.steps(plan, journal, screen.progress, screen.tell)
        if only is not None:
            steps = [each for each in steps if each.name in only]
        if name == "repair":
            steps = [each for each in steps if each.local or each.essential]
        return steps

    if show.verbose or (name == "env create" and not show.quiet):
        _say_machine(plan.definition.environment, machine)
    return _run(_Command(name, plan, build, show, dry_run), screen, started)


def run_list(
    name: str,
    plan: HostPlan,
    build: Callable[[Progress], list[step.Step]],
    show: OutputOptions,
    *,
    dry_run: bool = False,
    all_or_nothing: bool = False,
) -> Exit:
    """Run a list of steps of its own, which `build` makes; `all_or_nothing`: nothing is done where one is blocked."""
    from provision.cli import output

    screen = output.Screen(json_output=show.json, quiet=show.quiet, color=show.color)
    work = _Command(name, plan, lambda: build(screen.progress), show, dry_run, all_or_nothing)
    return _run(work, screen, time.perf_counter())


@dataclass(frozen=True)
class _Command:
    """A command over a list of steps; `build` makes the list, again where another run was waited for."""

    name: str
    plan: HostPlan
    build: Callable[[], list[step.Step]]
    show: OutputOptions
    dry_run: bool = False
    all_or_nothing: bool = False


def _run(work: _Command, screen: output.Screen, started: float) -> Exit:
    from provision.cli import output
    from provision.core import step

    name, show = work.name, work.show
    with screen.during("reading what is wanted"):
        steps = work.build()
    screen.total = len(steps)
    try:
        if name in _CHANGING and not work.dry_run:
            outcomes = _converge(work, steps, screen)
        else:
            outcomes = step.check_all(steps, deep=name == "verify", listen=screen.listen)
    finally:
        screen.end()
    if name == "plan" or work.dry_run:
        _say_plan(steps, outcomes, show)
    seconds = time.perf_counter() - started
    if show.json:
        print(output.to_json(name, work.plan.chosen, outcomes, seconds))
    else:
        print(output.summary(name, work.plan.chosen, outcomes, seconds))
    return step.exit_of(outcomes)


def _converge(work: _Command, steps: list[step.Step], screen: output.Screen) -> list[Outcome]:
    """Apply under the volume's lock; where nothing has drifted, take no lock and so make no write."""
    from provision.core import step
    from provision.volume import marker, run_lock

    root = work.plan.root
    looked = _looked(work, steps, screen)
    if looked is not None:
        return looked
    if work.name in {"repair", "undo", "mirrors restore"}:
        marker.require(root)
    with run_lock.holding(root, again(), waiting(work.show)) as has_waited:
        if has_waited:  # what the other run has changed is not known to these steps
            steps = work.build()
            screen.total = len(steps)
            looked = _looked(work, steps, screen)
        return looked or step.converge(steps, listen=screen.listen, guard=lambda: marker.require(root))


def _looked(work: _Command, steps: list[step.Step], screen: output.Screen) -> list[Outcome] | None:
    """Return the outcomes of a look where nothing is to be done or may be done; else None."""
    from provision.core import step

    found = step.check_all(steps, listen=screen.watch)
    refused = any((each.essential or work.all_or_nothing) and out.error for each, out in zip(steps, found, strict=True))
    if not refused and any(outcome.after is step.State.DRIFTED for outcome in found):
        return None
    for each, outcome in zip(steps, found, strict=True):  # one look is enough to say that nothing is to be done
        screen.listen(each, outcome)
    return found


def during(what: str, show: OutputOptions) -> AbstractContextManager[None]:
    """Show that something is at work which is no step, on stderr."""
    from provision.cli import output

    return output.Screen(json_output=show.json, quiet=show.quiet, color=show.color).during(what)


def waiting(show: OutputOptions) -> run_lock.LockWait:
    """Return a lock's wait for another run, shown on stderr."""
    from provision.volume import run_lock

    def tell(text: str) -> None:
        if not show.quiet:
            print(f"  {text}", file=sys.stderr, flush=True)

    return run_lock.LockWait(show.wait, tell)


def _say_plan(steps: list[step.Step], outcomes: list[Outcome], show: OutputOptions) -> None:
    from provision.core.step import State

    lines = sys.stderr if show.json else sys.stdout
    for each, outcome in zip(steps, outcomes, strict=True):
        if outcome.after is State.DRIFTED:
            print(redact(f"  would    {each.name:<28} {each.describe()}"), file=lines)


def _say_machine(wanted: EnvironmentDefinition, machine: HostFacts) -> None:
    cards = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    memory = f"{machine.memory_bytes / 1e9:.1f} GB"
    print(f"machine: {machine.cpu}, {machine.cores} cores, {memory}, {cards}", file=sys.stderr)
    if wanted.variants[0].torch:
        print(f"torch: {wanted.variants[0].torch}, {wanted.variants[0].name} ({wanted.reason})", file=sys.stderr)


def confirmed(question: str, loss: str, yes: bool, json: bool) -> bool:
    """Ask a person before something is deleted; `yes` stands for the answer.

    Raises:
        SpecError: stdin is not a terminal, or --json is given.
    """
    if yes:
        return True
    if json or not sys.stdin.isatty():
        why = "--json asks nothing" if json else "stdin is not a terminal"
        raise SpecError(f"{loss}, and {why}. Pass --yes to confirm.")
    try:
        return typer.confirm(question)
    except typer.Abort:  # Ctrl-C or Ctrl-D
        raise KeyboardInterrupt from None


def again() -> str:
    """Return this command as a person types it again, without its --wait."""
    from provision.core import layout

    words, is_seconds = [layout.program()], False
    for word in sys.argv[1:]:
        if not (is_seconds or word.partition("=")[0] == "--wait"):
            words.append(word)
        is_seconds = word == "--wait"
    return shlex.join(words)


def guard(act: Callable[[], Exit], *, json: bool = False) -> None:
    """Run a command and leave with its exit code; every failure becomes a message, with `json` an object too."""
    sys.exit(command_end.run(act, json=json))
