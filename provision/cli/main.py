"""Assembles the command `provision`, and defines the commands that check or apply all setup steps."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from provision.cli.adopt import AdoptFlag, with_adoption
from provision.cli.common import (
    DryRunFlag,
    JsonFlag,
    NoColorFlag,
    OfflineFlag,
    OutputFlags,
    OutputOptions,
    PlaceFlags,
    QuietFlag,
    VerboseFlag,
    VersionFlag,
    guard,
    resolve_host,
    run_steps,
)
from provision.cli.env import app as env_app
from provision.cli.host import app as host_app
from provision.cli.mirrors import app as mirrors_app
from provision.cli.mirrors import shellenv
from provision.cli.models import app as models_app
from provision.core import command_end, flags, streams, umask

if TYPE_CHECKING:
    from provision.core.errors import Exit

app = typer.Typer(
    help="Prepare a host for diffusion work, keep it in that state, and restore it after a wipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(env_app, name="env")
app.add_typer(mirrors_app, name="mirrors")
app.add_typer(models_app, name="models")
app.command()(shellenv)
app.add_typer(host_app)  # without a name, so that the commands of this group are top-level commands of `provision`


@app.callback()
def _program(version: VersionFlag = False) -> None:
    """Define the flags that stand before the name of a command, such as --version."""


def main() -> None:
    """Run the command `provision` and exit.

    SIGTERM and SIGHUP end the command as Ctrl-C does: child processes are ended, and no file is left half written.
    """
    streams.prepare()
    umask.forbid_writing_to_all()
    sys.exit(command_end.run_app(app, "provision"))


def _add_check(name: str, help_text: str) -> None:
    """Add a command that checks all setup steps and applies none: "plan", "status" or "verify".

    By the name, `run_steps` selects the depth of the checks and the output.
    """

    @flags.expand
    def act(
        *,
        place: PlaceFlags,
        offline: OfflineFlag = False,
        json: JsonFlag = False,
        quiet: QuietFlag = False,
        verbose: VerboseFlag = False,
        no_color: NoColorFlag = False,
    ) -> None:
        options = OutputOptions(json, quiet, verbose, no_color)
        guard(
            lambda: run_steps(
                name,
                resolve_host(place.root, place.host, place.envs, trust=place.trust_volume, offline=offline),
                options,
            ),
            json=json,
        )

    app.command(name, help=help_text)(act)


_add_check("plan", "Show what setup would do. Exit 3 if there is something to do.")
_add_check(
    "status", "Check quickly whether the host is set up. Exit 3 if setup has work to do, 4 if you must act first."
)
_add_check("verify", "Check thoroughly: hash every file and run the smoke test again.")


@app.command()
@flags.expand
def setup(
    *, place: PlaceFlags, offline: OfflineFlag = False, adopt: AdoptFlag = None, output_flags: OutputFlags
) -> None:
    """Set up the host. A step that is already done is not repeated."""

    def act() -> Exit:
        plan = resolve_host(place.root, place.host, place.envs, trust=place.trust_volume, offline=offline, retry=True)
        options = OutputOptions.of(output_flags)
        return run_steps("setup", with_adoption(plan, adopt, options), options)

    guard(act, json=output_flags.json)


@app.command()
@flags.expand
def repair(
    *,
    place: PlaceFlags,
    offline: OfflineFlag = False,  # noqa: ARG001 (repair never uses the network; every command takes the flag)
    adopt: AdoptFlag = None,
    output_flags: OutputFlags,
    dry_run: DryRunFlag = False,
) -> None:
    """Repair the host without the network: links after a wipe of the home, and environments from the caches."""

    def act() -> Exit:
        plan = resolve_host(place.root, place.host, place.envs, trust=place.trust_volume, offline=True)
        options = OutputOptions.of(output_flags)
        chosen = plan.with_adopted(adopt) if dry_run else with_adoption(plan, adopt, options)
        return run_steps("repair", chosen, options, dry_run=dry_run)

    guard(act, json=output_flags.json)
