"""The command `provision`."""

from __future__ import annotations

import sys

import typer

from provision.cli.common import (
    DryRunFlag,
    EnvsFlag,
    HostFlag,
    JsonFlag,
    NoColorFlag,
    OfflineFlag,
    OutputOptions,
    QuietFlag,
    RootFlag,
    VerboseFlag,
    VersionFlag,
    WaitFlag,
    guard,
    resolve_host,
    run_steps,
)
from provision.cli.env import app as env_app
from provision.cli.host import app as host_app
from provision.cli.mirrors import app as mirrors_app
from provision.cli.mirrors import shellenv
from provision.cli.models import app as models_app
from provision.core import command_end, streams

app = typer.Typer(
    help="Make a host ready for diffusion work, keep it so, and bring it back after a wipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(env_app, name="env")
app.add_typer(mirrors_app, name="mirrors")
app.add_typer(models_app, name="models")
app.command()(shellenv)
app.add_typer(host_app)  # without a name its commands stand beside ours


@app.callback()
def _program(version: VersionFlag = False) -> None:
    """Take the flags that stand before a command."""


def main() -> None:
    """Run the command. SIGTERM and SIGHUP end it as Ctrl-C does: children are ended, files are whole."""
    streams.prepare()
    sys.exit(command_end.run_app(app, "provision"))


def _command(name: str, does: str) -> None:
    """Add a command that looks at all steps: they differ in what `run_steps` does, not in their flags."""

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
        show = OutputOptions(json, quiet, verbose, no_color)
        guard(lambda: run_steps(name, resolve_host(root, host, envs, offline=offline), show), json=json)

    app.command(name, help=does)(act)


_command("plan", "Say what setup would do. Exit 3 when there is something.")
_command("status", "Look quickly whether everything stands. Exit 3 on drift, 4 when a person must act.")
_command("verify", "Look thoroughly: hash every file and run the smoke step again.")


@app.command()
def setup(
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    offline: OfflineFlag = False,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Make the host ready; what already stands is left alone."""
    show = OutputOptions(json, quiet, verbose, no_color, wait)
    guard(lambda: run_steps("setup", resolve_host(root, host, envs, offline=offline, retry=True), show), json=json)


@app.command()
def repair(
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    offline: OfflineFlag = False,  # noqa: ARG001 (it always is; every command takes the flag)
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
    no_color: NoColorFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Mend what needs no network: the links after a wipe of the home, and the environment from the caches."""
    show = OutputOptions(json, quiet, verbose, no_color, wait)
    guard(lambda: run_steps("repair", resolve_host(root, host, envs, offline=True), show, dry_run=dry_run), json=json)
