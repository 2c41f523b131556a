"""The commands `provision env`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from provision.cli.common import (
    EnvsFlag,
    HostFlag,
    JsonFlag,
    NoColorFlag,
    OfflineFlag,
    OutputOptions,
    QuietFlag,
    RootFlag,
    VerboseFlag,
    WaitFlag,
    YesFlag,
    again,
    confirmed,
    during,
    guard,
    resolve_host,
    run_steps,
    waiting,
)
from provision.core.errors import BlockedError, Exit, SpecError

app = typer.Typer(help="The environments.", no_args_is_help=True, rich_markup_mode=None)

NameArgument = Annotated[str | None, typer.Argument(help="The environment; host.toml's, where none is named.")]


@app.command("list")
def list_(
    root: RootFlag = None,
    host: HostFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show the environments of this machine: ours, conda's and virtual ones, and what is mixed in them."""

    def act() -> Exit:
        from provision.cli import output
        from provision.environments import discover

        plan = resolve_host(root, host, None)
        with during("looking at the environments", OutputOptions(json, False, False, False)):
            found = discover.environments(plan.root, plan.home, os.environ)
        print(output.environments_json(found) if json else output.environments(found))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
def where(name: NameArgument = None, root: RootFlag = None, host: HostFlag = None, json: JsonFlag = False) -> None:
    """Print the environment's folder."""

    def act() -> Exit:
        from provision.cli import output
        from provision.core import layout

        plan = resolve_host(root, host, None, changes={"env": name})
        prefix = plan.root.prefix(plan.host.env)
        is_there = layout.interpreter(prefix).exists()
        told = output.told_json("env where", env=plan.host.env, prefix=str(prefix), is_there=is_there)
        print(told if json else prefix)
        return Exit.GOOD

    guard(act, json=json)


@app.command()
def create(
    name: NameArgument = None,
    variant: Annotated[str | None, typer.Option(help="The build of torch, such as cu128.")] = None,
    interpreter: Annotated[str | None, typer.Option(help="auto, conda or system.")] = None,
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
    """Make one environment from its locks, or mend it."""

    def act() -> Exit:
        from provision.config import toml

        if interpreter is not None:
            toml.choose(interpreter, ["auto", "conda", "system"], "interpreter")
        changes = {"env": name, "variant": variant, "interpreter": interpreter}
        plan = resolve_host(root, host, envs, offline=offline, changes=changes)
        env = plan.host.env
        only = {"volume", "mirror settings", f"environment {env}", f"conda sees {env}"}
        return run_steps("env create", plan, OutputOptions(json, quiet, verbose, no_color, wait), only=only)

    guard(act, json=json)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The environment.")],
    yes: YesFlag = False,
    root: RootFlag = None,
    host: HostFlag = None,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
) -> None:
    """Remove an environment that firstlight made; the package caches stay."""

    def act() -> Exit:
        from provision.cli import output
        from provision.environments import remove as remove_environment
        from provision.volume.journal import Journal
        from provision.volume.run_lock import holding

        plan = resolve_host(root, host, None, changes={"env": name})
        prefix = plan.root.prefix(name)
        show = OutputOptions(json, False, False, False, wait)
        with during(f"looking at {prefix}", show):
            size = remove_environment.removable(prefix, plan.root)
        what = f"{prefix} ({size:,} bytes) with all that was added to it"
        if not confirmed(f"Remove {what}?", f"this removes {what}", yes, json):
            return Exit.GOOD
        with holding(plan.root, again(), waiting(show)) as has_waited, during(f"removing {prefix}", show):
            size = remove_environment.removable(prefix, plan.root) if has_waited else size
            remove_environment.remove(prefix, plan.root, plan.home, Journal(plan.root.journal, "env remove"))
        told = output.told_json("env remove", prefix=str(prefix), bytes=size)
        print(told if json else f"removed {prefix}, {size:,} bytes")
        return Exit.GOOD

    guard(act, json=json)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    argv: Annotated[list[str], typer.Argument(metavar="CMD...", help="A program and its arguments, after --.")],
    name: Annotated[str | None, typer.Option("--env", help="The environment; else host.toml's.")] = None,
    root: RootFlag = None,
    host: HostFlag = None,
) -> None:
    """Run a program in the environment, as if it were activated: provision env run -- python -V."""

    def act() -> Exit:
        from provision.core import layout
        from provision.environments import activation
        from provision.mirrors.tools import all_tools
        from provision.volume import variables

        plan = resolve_host(root, host, None, changes={"env": name})
        prefix = plan.root.prefix(plan.host.env)
        if not layout.interpreter(prefix).exists():
            raise BlockedError(
                f"{prefix} is not there. Run `{layout.next_command('setup')}`, "
                f"or `{layout.program()} env create {plan.host.env}`."
            )
        environment = activation.activated(prefix, os.environ)
        environment |= variables.for_child(plan.root, os.environ, all_tools.variable_groups())
        try:
            os.execvpe(argv[0], argv, environment)  # noqa: S606 (it takes our place: signals and exit code are its own)
        except FileNotFoundError:
            raise SpecError(f"{argv[0]} is neither in {prefix} nor on the PATH.") from None

    guard(act)


@app.command()
def lock(
    name: Annotated[str, typer.Argument(help="The environment.")] = "diffusers",
    envs: EnvsFlag = None,
    platform: Annotated[list[str] | None, typer.Option(help="Solve conda's part for it, such as linux-64.")] = None,
    virtual: Annotated[list[str] | None, typer.Option(help="As if it were there, such as __cuda=12.8.")] = None,
    keep_conda: Annotated[bool, typer.Option("--keep-conda", help="Leave conda's part as it is.")] = False,
    tool: Annotated[str, typer.Option("--with", help="What solves conda's part: rattler or conda-lock.")] = "rattler",
    json: JsonFlag = False,
) -> None:
    """Write the environment's locks anew: conda's part from environment.yml, pip's from requirements.in."""

    def act() -> Exit:
        from provision.cli import output
        from provision.config import toml
        from provision.core import layout
        from provision.environments import write_locks
        from provision.installers import conda_settings
        from provision.lockfiles import conda_lock

        folder = layout.envs_folder(envs)
        layout.require_own(folder)
        for each in platform or []:
            toml.choose(each, conda_lock.PLATFORMS, "platform")
        toml.choose(tool, ["rattler", "conda-lock"], "tool")
        mirrored = conda_settings.mirrors(os.environ, Path.home())
        host = write_locks.LockHost(platform, mirrored, virtual or [], keep_conda=keep_conda, tool=tool)
        with during(f"locking {name}", OutputOptions(json, False, False, False)):
            written = [str(file) for file in write_locks.lock(folder, name, host)]
        print(output.told_json("env lock", written=written) if json else "\n".join(written))
        return Exit.GOOD

    guard(act, json=json)
