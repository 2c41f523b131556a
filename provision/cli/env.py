"""Defines the commands `provision env`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from provision.cli.common import (
    EnvsFlag,
    JsonFlag,
    OfflineFlag,
    OutputFlags,
    OutputOptions,
    PlaceFlags,
    RootFlags,
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
from provision.core import flags
from provision.core.errors import BlockedError, Exit, SpecError

app = typer.Typer(
    help="List, create, lock and remove environments, and run programs in them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[str | None, typer.Argument(help="The environment. Default: the one in host.toml.")]


@app.command("list")
@flags.expand
def list_(*, place: RootFlags, json: JsonFlag = False) -> None:
    """List the conda and virtual environments of this machine, with packages that both conda and pip installed."""

    def act() -> Exit:
        from provision.cli import output
        from provision.environments import discover

        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume)
        with during("reading the environments", OutputOptions(json, False, False, False)):
            environments = discover.environments(plan.root, plan.home, os.environ)
        print(output.environments_json(environments) if json else output.environments(environments))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def where(name: NameArgument = None, *, place: RootFlags, json: JsonFlag = False) -> None:
    """Print the folder of an environment."""

    def act() -> Exit:
        from provision.cli import output
        from provision.core import layout

        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume, changes={"env": name})
        prefix = plan.root.prefix(plan.host.env)
        is_there = layout.interpreter(prefix).exists()
        result = output.success_json("env where", env=plan.host.env, prefix=str(prefix), is_there=is_there)
        print(result if json else prefix)
        return Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def create(
    name: NameArgument = None,
    variant: Annotated[str | None, typer.Option(help="The variant of torch, such as cu128.")] = None,
    interpreter: Annotated[str | None, typer.Option(help="Source of Python: auto, conda or system.")] = None,
    *,
    place: PlaceFlags,
    offline: OfflineFlag = False,
    output: OutputFlags,
) -> None:
    """Build an environment from its lock files, or repair it."""

    def act() -> Exit:
        from provision.config import toml

        if interpreter is not None:
            toml.choose(interpreter, ["auto", "conda", "system"], "interpreter")
        changes = {"env": name, "variant": variant, "interpreter": interpreter}
        plan = resolve_host(
            place.root, place.host, place.envs, trust=place.trust_volume, offline=offline, changes=changes
        )
        env = plan.host.env
        only = {"volume", "mirror settings", f"environment {env}", f"conda sees {env}"}
        show = OutputOptions(output.json, output.quiet, output.verbose, output.no_color, output.wait)
        return run_steps("env create", plan, show, only=only)

    guard(act, json=output.json)


@app.command()
@flags.expand
def remove(
    name: Annotated[str, typer.Argument(help="The environment.")],
    *,
    yes: YesFlag = False,
    place: RootFlags,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
) -> None:
    """Remove an environment that firstlight made; the package caches stay."""

    def act() -> Exit:
        from provision.cli import output
        from provision.environments import remove as remove_environment
        from provision.volume.journal import Journal
        from provision.volume.run_lock import holding

        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume, changes={"env": name})
        prefix = plan.root.prefix(name)
        show = OutputOptions(json, False, False, False, wait)
        with during(f"reading {prefix}", show):
            size = remove_environment.removable_bytes(prefix, plan.root)
        removal = f"{prefix} ({size:,} bytes) with all packages and files that you added"
        if not confirmed(f"Remove {removal}?", f"this removes {removal}", yes, json):
            return Exit.GOOD
        with holding(plan.root, again(), waiting(show)) as has_waited, during(f"removing {prefix}", show):
            size = remove_environment.removable_bytes(prefix, plan.root) if has_waited else size
            remove_environment.remove(prefix, plan.root, plan.home, Journal(plan.root.journal, "env remove"))
        result = output.success_json("env remove", prefix=str(prefix), bytes=size)
        print(result if json else f"removed {prefix}, {size:,} bytes")
        return Exit.GOOD

    guard(act, json=json)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@flags.expand
def run(
    argv: Annotated[list[str], typer.Argument(metavar="CMD...", help="A program and its arguments, after --.")],
    name: Annotated[str | None, typer.Option("--env", help="The environment. Default: the one in host.toml.")] = None,
    *,
    place: RootFlags,
) -> None:
    """Run a program in an activated environment, for example: provision env run -- python -V."""

    def act() -> Exit:
        from provision.core import layout
        from provision.environments import activation
        from provision.mirrors.tools import all_tools
        from provision.volume import variables

        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume, changes={"env": name})
        prefix = plan.root.prefix(plan.host.env)
        if not layout.interpreter(prefix).exists():
            raise BlockedError(
                f"{prefix} has no environment. Run `{layout.next_command('setup')}`, "
                f"or `{layout.program()} env create {plan.host.env}`."
            )
        environment = activation.activated_variables(prefix, os.environ)
        environment |= variables.for_child(plan.root, os.environ, all_tools.variable_groups())
        try:
            os.execvpe(argv[0], argv, environment)  # noqa: S606 (the program replaces this process, so it gets the signals and sets the exit code)
        except FileNotFoundError:
            raise SpecError(
                f"{argv[0]} is neither in {prefix} nor on the PATH. Check the name of the program."
            ) from None

    guard(act)


@app.command()
def lock(
    name: Annotated[str, typer.Argument(help="The environment.")] = "diffusers",
    envs: EnvsFlag = None,
    platform: Annotated[
        list[str] | None, typer.Option(help="A platform to solve conda packages for, such as linux-64.")
    ] = None,
    virtual: Annotated[
        list[str] | None, typer.Option(help="A virtual package for the solver, such as __cuda=12.8.")
    ] = None,
    keep_conda: Annotated[bool, typer.Option("--keep-conda", help="Keep the existing conda lock.")] = False,
    tool: Annotated[
        str, typer.Option("--with", help="The solver of conda packages: rattler or conda-lock.")
    ] = "rattler",
    json: JsonFlag = False,
) -> None:
    """Write the lock files of an environment: conda's from environment.yml, pip's from requirements.in."""

    def act() -> Exit:
        from provision.cli import output
        from provision.config import toml
        from provision.core import layout
        from provision.environments import write_locks
        from provision.installers import conda_settings
        from provision.lockfiles import conda_lock

        folder = layout.envs_folder(envs)
        layout.require_own(folder)
        for platform_name in platform or []:
            toml.choose(platform_name, conda_lock.PLATFORMS, "platform")
        toml.choose(tool, ["rattler", "conda-lock"], "tool")
        mirrors = conda_settings.mirrors(os.environ, Path.home())
        options = write_locks.SolverOptions(platform, mirrors, virtual or [], keep_conda=keep_conda, tool=tool)
        with during(f"locking {name}", OutputOptions(json, False, False, False)):
            paths = [str(path) for path in write_locks.lock(folder, name, options)]
        print(output.success_json("env lock", written=paths) if json else "\n".join(paths))
        return Exit.GOOD

    guard(act, json=json)
