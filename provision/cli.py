"""The command `provision`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provision.errors import BlockedError, Exit, FirstlightError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from provision import facts, report, step
    from provision.plan import Wish
    from provision.step import Outcome

app = typer.Typer(
    help="Make a host ready for diffusion work, keep it so, and bring it back after a wipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
env_app = typer.Typer(help="The environments.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(env_app, name="env")

RootFlag = Annotated[str | None, typer.Option("--root", help="The persistent folder.", metavar="DIR")]
HostFlag = Annotated[Path | None, typer.Option("--host", help="What this host should have.", metavar="FILE")]
EnvsFlag = Annotated[Path | None, typer.Option("--envs", help="Another envs/ folder.", metavar="DIR")]
OfflineFlag = Annotated[bool, typer.Option("--offline", help="Use no network.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Only faults and the summary.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", help="Also the machine, and why this build of torch.")]
NoColorFlag = Annotated[bool, typer.Option("--no-color", help="No colours (as NO_COLOR).")]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def main() -> None:
    """Run the command. SIGTERM ends it as Ctrl-C does: children are ended, files are whole."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _command(name: str, does: str) -> None:
    """Add a command over all steps: they differ in what `_steps` does, not in their flags."""

    def act(
        root: RootFlag = None,
        host: HostFlag = None,
        envs: EnvsFlag = None,
        offline: OfflineFlag = False,
        json: JsonFlag = False,
        quiet: QuietFlag = False,
        verbose: VerboseFlag = False,
        no_color: NoColorFlag = False,
    ) -> None:
        _go(name, root, host, envs, offline, _Show(json, quiet, verbose, no_color))

    app.command(name, help=does)(act)


_command("plan", "Say what setup would do. Exit 3 when there is something.")
_command("setup", "Make the host ready; what already stands is left alone.")
_command("status", "Look quickly whether everything stands. Exit 3 on drift, 4 when a person must act.")
_command("verify", "Look thoroughly: hash every file and run the smoke step again.")


@app.command()
def repair(
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    offline: OfflineFlag = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    no_color: NoColorFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Mend what needs no network: the links after a wipe of the home."""
    _go("repair", root, host, envs, offline, _Show(json, quiet, verbose, no_color), dry_run=dry_run)


@env_app.command()
def where(root: RootFlag = None, host: HostFlag = None) -> None:
    """Print the environment's folder."""

    def act() -> Exit:
        from provision import paths, spec

        wanted = spec.load_host(host)
        print(paths.Root.named(root or wanted.root).prefix(wanted.env))
        return Exit.GOOD

    _guard(act)


@env_app.command()
def lock(
    name: Annotated[str, typer.Argument(help="The environment.")] = "diffusers",
    envs: EnvsFlag = None,
    platform: Annotated[list[str] | None, typer.Option(help="Solve conda's part for it, such as linux-64.")] = None,
    virtual: Annotated[list[str] | None, typer.Option(help="As if it were there, such as __cuda=12.8.")] = None,
    keep_conda: Annotated[bool, typer.Option("--keep-conda", help="Leave conda's part as it is.")] = False,
) -> None:
    """Write the environment's locks anew: conda's part from environment.yml, pip's from requirements.in."""

    def act() -> Exit:
        from provision import conda_lock, locks, paths, rattler, spec

        for each in platform or []:
            spec.choose(each, conda_lock.PLATFORMS, "platform")
        host = locks.LockHost(platform, rattler.mirrors(os.environ, Path.home()), virtual or [], keep_conda=keep_conda)
        for written in locks.lock((envs or paths.shipped_envs()).absolute(), name, host):
            print(written)
        return Exit.GOOD

    _guard(act)


class _Show:
    """How a command talks."""

    def __init__(self, json: bool, quiet: bool, verbose: bool, no_color: bool) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.color = not no_color and "NO_COLOR" not in os.environ


def _go(
    name: str,
    root: str | None,
    host: Path | None,
    envs: Path | None,
    offline: bool,
    show: _Show,
    *,
    dry_run: bool = False,
) -> None:
    def act() -> Exit:
        from provision import paths, spec
        from provision.plan import Wish

        wanted = spec.load_host(host)
        wish = Wish(
            root=paths.Root.named(root or wanted.root),
            host=wanted,
            envs=(envs or paths.shipped_envs()).absolute(),
            home=Path.home(),
            offline=offline,
            retry=name == "setup",
        )
        return _steps(name, wish, show, dry_run=dry_run)

    _guard(act)


def _steps(name: str, wish: Wish, show: _Show, *, dry_run: bool) -> Exit:
    from provision import facts, plan, report, step
    from provision.journal import Journal

    started = time.perf_counter()
    machine = facts.probe()
    journal = Journal(wish.root.journal)
    screen: report.Screen | None = None

    def progress(arrived: int, total: int) -> None:
        if screen is not None:
            screen.progress(arrived, total)

    steps = plan.steps(wish, machine, journal, progress)
    if name == "repair":
        steps = [each for each in steps if each.local or each.essential]
    screen = report.Screen(total=len(steps), json_output=show.json, quiet=show.quiet, color=show.color)
    if show.verbose:
        _say_machine(wish, machine)
    if name in {"setup", "repair"} and not dry_run:
        outcomes = _converge(wish, steps, screen, repair=name == "repair")
    else:
        outcomes = step.look(steps, deep=name == "verify", listen=screen.listen)
        if name == "plan" or dry_run:
            _say_plan(steps, outcomes, show)
    seconds = time.perf_counter() - started
    if show.json:
        print(report.to_json(name, wish.root.path, outcomes, seconds))
    else:
        print(report.summary(name, wish.root.path, outcomes, seconds))
    return step.exit_of(outcomes)


def _converge(wish: Wish, steps: list[step.Step], screen: report.Screen, *, repair: bool) -> list[Outcome]:
    """Apply under the volume's lock; where nothing has drifted, take no lock and so make no write."""
    import filelock

    from provision import step

    def silent(_: step.Step, __: Outcome | None) -> None: ...

    found = step.look(steps, listen=silent)
    absent = any(each.essential and outcome.error for each, outcome in zip(steps, found, strict=True))
    if absent or all(outcome.after is not step.State.DRIFTED for outcome in found):
        return step.look(steps, listen=screen.listen)
    if repair and found[0].after is step.State.DRIFTED:
        raise BlockedError(
            f"{wish.root.path} bears no .firstlight marker: it is not mounted, or was never set up. "
            "Mount it and run `make repair`, or run `make setup`."
        )
    held = filelock.FileLock(wish.root.lock, timeout=0)
    wish.root.state.mkdir(parents=True, exist_ok=True)
    try:
        with held:
            return step.converge(steps, listen=screen.listen)
    except filelock.Timeout:
        raise BlockedError(
            f"another run holds {wish.root.lock}. Wait for it, then run `make {'repair' if repair else 'setup'}`."
        ) from None


def _say_plan(steps: list[step.Step], outcomes: list[Outcome], show: _Show) -> None:
    from provision.step import State

    lines = sys.stderr if show.json else sys.stdout
    for each, outcome in zip(steps, outcomes, strict=True):
        if outcome.after is State.DRIFTED:
            print(f"  would    {each.name:<28} {each.describe()}", file=lines)


def _say_machine(wish: Wish, machine: facts.Facts) -> None:
    from provision import plan

    wanted = plan.environment(wish.envs, wish.host, machine)
    cards = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    memory = f"{machine.memory_bytes / 1e9:.1f} GB"
    print(f"machine: {machine.cpu}, {machine.cores} cores, {memory}, {cards}", file=sys.stderr)
    print(f"torch: {wanted.variants[0].name} ({wanted.reason})", file=sys.stderr)


def _guard(act: Callable[[], Exit]) -> None:
    """Turn every failure that is known into its message and its exit code."""
    try:
        code = act()
    except FirstlightError as error:
        code = _fault(error)
    except BrokenPipeError:
        # The reader has enough (`| head`). Python would complain once more when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.FAILED
    except OSError as error:
        code = _fault(from_os_error(error))
    except KeyboardInterrupt:
        print(
            "interrupted; what stands is whole. Run the same command again, it goes on from here.",
            file=sys.stderr,
        )
        code = Exit.INTERRUPTED
    raise typer.Exit(int(code))


def _fault(error: FirstlightError) -> Exit:
    from provision.command import redact

    print(f"error: {redact(str(error))}", file=sys.stderr)
    return error.exit


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
