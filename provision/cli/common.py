"""Defines the flags that commands of `provision` share, and runs a list of steps with its output and exit code."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
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

RootFlag = Annotated[
    str | None, typer.Option("--root", help="The root: firstlight's folder on the volume.", metavar="DIR")
]
HostFlag = Annotated[Path | None, typer.Option("--host", help="A file to read in place of host.toml.", metavar="FILE")]
EnvsFlag = Annotated[
    Path | None, typer.Option("--envs", help="A folder to use in place of the shipped envs folder.", metavar="DIR")
]
TrustFlag = Annotated[
    bool, typer.Option("--trust-volume", help="Use a root that other users can write to, and trust them.")
]
OfflineFlag = Annotated[bool, typer.Option("--offline", help="Use no network.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Print only errors and the summary.")]
VerboseFlag = Annotated[
    bool, typer.Option("--verbose", help="Also print the machine, and the reason for the PyTorch variant.")
]
NoColorFlag = Annotated[bool, typer.Option("--no-color", help="Use no colours. The variable NO_COLOR does the same.")]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Print what the command would do, and change nothing.")]
WaitFlag = Annotated[
    float,
    typer.Option("--wait", help="Wait at most this long for another run on this root.", metavar="SECONDS", min=0),
]
YesFlag = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
CatalogueFlag = Annotated[
    str | None,
    typer.Option("--catalogue", help="A file with your own mirrors, added to the shipped ones.", metavar="FILE"),
]
ManifestFlag = Annotated[
    str | None,
    typer.Option("--manifest", help="A file with your own models, added to the shipped ones.", metavar="FILE"),
]

# The commands that apply steps; the other commands only check them.
_APPLYING = {"setup", "repair", "env create", "relocate", "undo", "mirrors use", "mirrors restore"}


def _print_version(is_given: bool) -> None:
    """Print the version and exit, if the flag --version is set."""
    if is_given:
        print(f"provision {VERSION}")
        raise typer.Exit


VersionFlag = Annotated[
    bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
]


@dataclass(frozen=True)
class RootFlags:
    """Hold the flags --root and --host, which select the root, for commands that do not read the envs folder."""

    root: RootFlag = None
    host: HostFlag = None
    trust_volume: TrustFlag = False


@dataclass(frozen=True)
class PlaceFlags:
    """Hold the flags --root, --host and --envs, which select the root, host.toml and the envs folder."""

    root: RootFlag = None
    host: HostFlag = None
    envs: EnvsFlag = None
    trust_volume: TrustFlag = False


@dataclass(frozen=True)
class OutputFlags:
    """Hold the flags for the output of a command that changes the host, and --wait."""

    wait: WaitFlag = 0
    json: JsonFlag = False
    quiet: QuietFlag = False
    verbose: VerboseFlag = False
    no_color: NoColorFlag = False


@dataclass(frozen=True)
class BriefOutputFlags:
    """Hold the flags of OutputFlags except --verbose, for commands that do not print the machine."""

    wait: WaitFlag = 0
    json: JsonFlag = False
    quiet: QuietFlag = False
    no_color: NoColorFlag = False


@dataclass(frozen=True)
class OutputOptions:
    """Hold the options for the output of a command, and `wait`: the most seconds to wait for another run."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    no_color: bool = False
    wait: float = 0.0

    @classmethod
    def of(cls, flags: OutputFlags | BriefOutputFlags) -> OutputOptions:
        """Return the options from the flags of a command; an option without a flag has its default."""
        return cls(**asdict(flags))

    @property
    def color(self) -> bool:
        """Return whether the output may have colours: neither --no-color nor the variable NO_COLOR is set."""
        return not self.no_color and "NO_COLOR" not in os.environ


def resolve_host(
    root: str | None,
    host: Path | None,
    envs: Path | None,
    *,
    offline: bool = False,
    retry: bool = False,
    trust: bool | None = False,
    changes: Mapping[str, object] | None = None,
) -> HostPlan:
    """Return the host plan for the flags of a command; the parameters are those of `host_plan.resolve`.

    This function imports `host_plan` when it is called, so that `--help` stays fast.
    """
    from provision.setup import host_plan

    return host_plan.resolve(root, host, envs, offline=offline, retry=retry, trust=trust, changes=changes)


def run_steps(
    name: str, plan: HostPlan, options: OutputOptions, *, dry_run: bool = False, only: Collection[str] | None = None
) -> Exit:
    """Run a command on the setup steps of a host, print the result of each step, and return the exit code.

    Args:
        name: the name of the command; steps are applied only if it is in `_APPLYING`.
        plan: the host plan.
        options: the options for the output.
        dry_run: only check the steps.
        only: the names of the steps to run; None runs all of them.
    """
    from provision.cli import output
    from provision.setup import plan as setup_plan
    from provision.volume.journal import Journal

    started = time.perf_counter()
    screen = output.Screen(json_output=options.json, quiet=options.quiet, color=options.color)
    with screen.during("reading the facts of this machine"):
        machine = plan.definition.machine
    journal = Journal(plan.root.journal, name)

    def build() -> list[step.Step]:
        for_environment = only is None or f"environment {plan.host.env}" in only
        steps = setup_plan.steps(plan, journal, screen.progress, screen.emit, for_environment=for_environment)
        if only is not None:
            steps = [item for item in steps if item.name in only]
        if name == "repair":
            steps = [item for item in steps if item.local or item.essential]
        return steps

    if options.verbose or (name == "env create" and not options.quiet):
        _print_machine(plan.definition.environment, machine)
    return _run(_Command(name, plan, build, options, dry_run), screen, started)


def run_list(
    name: str,
    plan: HostPlan,
    build: Callable[[Progress], list[step.Step]],
    options: OutputOptions,
    *,
    dry_run: bool = False,
    all_or_nothing: bool = False,
) -> Exit:
    """Run a command on its own list of steps, print the result of each step, and return the exit code.

    Args:
        name: the name of the command; steps are applied only if it is in `_APPLYING`.
        plan: the host plan.
        build: returns the steps, which report their progress to the callback that is passed to it.
        options: the options for the output.
        dry_run: only check the steps.
        all_or_nothing: if a step is blocked, apply no step; if a step fails, apply no later step.
    """
    from provision.cli import output

    screen = output.Screen(json_output=options.json, quiet=options.quiet, color=options.color)
    command = _Command(name, plan, lambda: build(screen.progress), options, dry_run, all_or_nothing)
    return _run(command, screen, time.perf_counter())


@dataclass(frozen=True)
class _Command:
    """Hold a command that runs a list of steps.

    `build` returns the list. It is called again after a wait for another run, which may have changed the host.
    """

    name: str
    plan: HostPlan
    build: Callable[[], list[step.Step]]
    options: OutputOptions
    dry_run: bool = False
    all_or_nothing: bool = False


def _run(command: _Command, screen: output.Screen, started: float) -> Exit:
    from provision.cli import output
    from provision.core import step

    name, options = command.name, command.options
    with screen.during("planning the steps"):
        steps = command.build()
    screen.total = len(steps)
    try:
        if name in _APPLYING and not command.dry_run:
            outcomes = _converge(command, steps, screen)
        else:
            outcomes = step.check_all(steps, deep=name == "verify", listen=screen.listen)
            if command.dry_run and _would_apply(command, steps, outcomes):
                _require_marker(command)
    finally:
        screen.end()
    if name == "plan" or command.dry_run:
        _print_plan(steps, outcomes, options)
    seconds = time.perf_counter() - started
    if options.json:
        print(output.to_json(name, command.plan.chosen, outcomes, seconds))
    else:
        print(output.summary(name, command.plan.chosen, outcomes, seconds))
    return step.exit_of(outcomes)


def _converge(command: _Command, steps: list[step.Step], screen: output.Screen) -> list[Outcome]:
    """Apply the steps while holding the run lock; if there is nothing to apply, take no lock and write nothing."""
    from provision.core import step
    from provision.volume import marker, run_lock

    root = command.plan.root
    final = _outcomes_without_apply(command, steps, screen)
    if final is not None:
        return final
    _require_marker(command)
    with run_lock.holding(root, again(), waiting(command.options)) as has_waited:
        if has_waited:  # the other run has changed the host, so the steps and their checks are out of date
            steps = command.build()
            screen.total = len(steps)
            final = _outcomes_without_apply(command, steps, screen)

        def guard() -> None:
            marker.require(root)  # before the lock is checked: on an absent volume, the lock is absent, too
            run_lock.require(root.state)

        return final or step.converge(steps, listen=screen.listen, guard=guard, stop_at_failure=command.all_or_nothing)


def _outcomes_without_apply(command: _Command, steps: list[step.Step], screen: output.Screen) -> list[Outcome] | None:
    """Check all steps. Return None if steps are to be applied; else print and return the results of the checks."""
    from provision.core import step

    outcomes = step.check_all(steps, listen=screen.watch)
    if _would_apply(command, steps, outcomes):
        return None
    for item, outcome in zip(steps, outcomes, strict=True):  # the outcomes are final, so print them
        screen.listen(item, outcome)
    return outcomes


def _would_apply(command: _Command, steps: list[step.Step], outcomes: list[Outcome]) -> bool:
    """Return whether a run would apply a step: a step has drifted, and no failed check stops the run before."""
    from provision.core import step

    is_blocked = any(
        (item.essential or command.all_or_nothing) and outcome.error
        for item, outcome in zip(steps, outcomes, strict=True)
    )
    return not is_blocked and any(outcome.after is step.State.DRIFTED for outcome in outcomes)


def _require_marker(command: _Command) -> None:
    """Check that the root has a marker, for the commands that never make a marker: repair, undo, mirrors restore.

    A dry run checks this, too, so that it ends with the same exit code as the run.
    """
    from provision.volume import marker

    if command.name in {"repair", "undo", "mirrors restore"}:
        marker.require(command.plan.root)


def during(work: str, options: OutputOptions) -> AbstractContextManager[None]:
    """Show on stderr, during a `with` block, that work is in progress that is not a step; `work` describes it."""
    from provision.cli import output

    return output.Screen(json_output=options.json, quiet=options.quiet, color=options.color).during(work)


def waiting(options: OutputOptions) -> run_lock.LockWait:
    """Return how to wait for the run lock: for the seconds of --wait, with progress lines on stderr."""
    from provision.volume import run_lock

    def emit(text: str) -> None:
        if not options.quiet:
            print(f"  {text}", file=sys.stderr, flush=True)

    return run_lock.LockWait(options.wait, emit)


def _print_plan(steps: list[step.Step], outcomes: list[Outcome], options: OutputOptions) -> None:
    from provision.core.step import State

    stream = sys.stderr if options.json else sys.stdout
    for item, outcome in zip(steps, outcomes, strict=True):
        if outcome.after is State.DRIFTED:
            print(redact(f"  would    {item.name:<28} {item.describe()}"), file=stream)


def _print_machine(environment: EnvironmentDefinition, machine: HostFacts) -> None:
    cards = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    memory = f"{machine.memory_bytes / 1e9:.1f} GB"
    print(f"machine: {machine.cpu}, {machine.cores} cores, {memory}, {cards}", file=sys.stderr)
    variant = environment.variants[0]
    if variant.torch:
        print(f"torch: {variant.torch}, {variant.name} ({environment.reason})", file=sys.stderr)


def confirmed(question: str, loss: str, yes: bool, json: bool) -> bool:
    """Return whether the user confirms a deletion: by the flag --yes, or by an answer at the terminal.

    Args:
        question: the question for the user.
        loss: a clause for the error message that names the deleted things, such as "this removes NAME".
        yes: the flag --yes is set.
        json: the flag --json is set; then no question is asked.

    Raises:
        SpecError: --yes is missing, and stdin is not a terminal or --json is given.
    """
    if yes:
        return True
    if json or not sys.stdin.isatty():
        reason = "--json allows no question" if json else "stdin is not a terminal"
        raise SpecError(f"{loss}, and {reason}. Pass --yes to confirm.")
    try:
        return typer.confirm(question)
    except typer.Abort:  # Ctrl-C or Ctrl-D
        raise KeyboardInterrupt from None


def again() -> str:
    """Return the command line of this process, quoted for a shell, without the flag --wait."""
    from provision.core import layout

    words, is_seconds = [layout.program()], False
    for word in sys.argv[1:]:
        if not (is_seconds or word.partition("=")[0] == "--wait"):
            words.append(word)
        is_seconds = word == "--wait"
    return shlex.join(words)


def guard(act: Callable[[], Exit], *, json: bool = False) -> None:
    """Run a command and exit with its exit code; an error is printed as a message, and with `json` as a JSON object."""
    sys.exit(command_end.run(act, json=json))
