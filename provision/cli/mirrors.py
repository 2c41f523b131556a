"""The commands `provision mirrors`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from provision.cli.common import (
    CatalogueFlag,
    DryRunFlag,
    EnvsFlag,
    HostFlag,
    JsonFlag,
    NoColorFlag,
    OfflineFlag,
    OutputOptions,
    QuietFlag,
    RootFlag,
    WaitFlag,
    during,
    guard,
    resolve_host,
    run_list,
    run_steps,
)
from provision.core.errors import Exit

if TYPE_CHECKING:
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.mirrors.selection import MirrorSelector
    from provision.mirrors.tools.tool import Tool
    from provision.setup.host_plan import HostPlan

app = typer.Typer(help="Where packages and models come from.", no_args_is_help=True, rich_markup_mode=None)

ToolFlag = Annotated[list[str] | None, typer.Option("--tool", help="Only this one: pip, conda, torch or hf.")]


@app.command("list")
def list_(
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    catalogue: CatalogueFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show the catalogue, and what is chosen."""

    def act() -> Exit:
        from provision.cli import mirrors_output
        from provision.mirrors import record as mirror_record

        plan = resolve_host(root, host, envs, changes={"catalogue": catalogue})
        known = plan.definition.catalogue
        record = mirror_record.read(plan.root) or mirror_record.MirrorRecord()
        print(mirrors_output.catalogue_json(known, record) if json else mirrors_output.catalogue(known, record))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
def probe(
    tool: ToolFlag = None,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    catalogue: CatalogueFlag = None,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Ask every mirror whether it answers, holds the locked files, and how fast. Nothing is written."""

    def act() -> Exit:
        from provision.cli import mirrors_output

        plan = resolve_host(root, host, envs, changes={"catalogue": catalogue})
        tools = _tools(tool)
        chooser = _chooser(plan)
        asked = [each for tool in tools for each in chooser.targets(tool)]
        show = OutputOptions(json, False, False, no_color)
        with during(f"asking {len(asked)} mirrors", show):
            found = chooser.probe(asked)
        chosen = {tool.name: chooser.auto(tool, found) for tool in tools}
        if json:
            print(mirrors_output.probes_json(found, chosen))
        else:
            mirrors_output.print_probes(found, chosen, color=show.color)
        return Exit.GOOD

    guard(act, json=json)


@app.command()
def use(
    name: Annotated[str, typer.Argument(help="auto, official, or a mirror of the catalogue.")],
    tool: ToolFlag = None,
    nodefaults: Annotated[bool, typer.Option("--nodefaults", help="Leave conda's default channels out.")] = False,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    catalogue: CatalogueFlag = None,
    offline: OfflineFlag = False,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Choose a mirror, and write it into the environment's settings and yours; what you had can be restored."""

    def act() -> Exit:
        from provision.config import toml
        from provision.mirrors.record import OFFICIAL
        from provision.mirrors.tools import all_tools

        plan = resolve_host(root, host, envs, offline=offline, changes={"catalogue": catalogue})
        known = plan.definition.catalogue
        toml.choose(name, ["auto", OFFICIAL, *known.names()], "mirror")
        tools = all_tools.names()
        meant = [each.name for each in _tools(tool)] if tool else known.tools_of(name) or tools
        for each in meant:
            toml.choose(name, ["auto", OFFICIAL, *known.of(each)], f"mirror of {each}")
        plan = plan.with_mirrors({each: name if each in meant else "keep" for each in tools}, nodefaults=nodefaults)
        only = {"volume", "mirrors", "mirror settings"}
        return run_steps(
            "mirrors use", plan, OutputOptions(json, quiet, False, no_color, wait), dry_run=dry_run, only=only
        )

    guard(act, json=json)


@app.command()
def restore(
    force: Annotated[bool, typer.Option("--force", help="Also what you changed since; yours is kept beside.")] = False,
    root: RootFlag = None,
    host: HostFlag = None,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Put back the bytes, modes and absence of every file that was written for mirrors; all of them, or none."""

    def act() -> Exit:
        from provision.mirrors import write_config
        from provision.volume.journal import Journal

        plan = resolve_host(root, host, None, offline=True)
        journal = Journal(plan.root.journal, "mirrors restore")
        show = OutputOptions(json, quiet, False, no_color, wait)

        def build(_: Progress) -> list[Step]:
            return write_config.restore_steps(plan.root, journal, force=force)

        return run_list("mirrors restore", plan, build, show, dry_run=dry_run, all_or_nothing=True)

    guard(act, json=json)


def shellenv(
    shell: Annotated[str, typer.Option("--shell", help="bash, zsh, fish or powershell.")] = "bash",
    root: RootFlag = None,
    host: HostFlag = None,
) -> None:
    """Print the variables of this host for your shell: eval "$(provision shellenv)"."""

    def act() -> Exit:
        from provision.config import toml
        from provision.mirrors.tools import all_tools
        from provision.volume import variables

        toml.choose(shell, variables.SHELLS, "shell")
        plan = resolve_host(root, host, None)
        sys.stdout.buffer.write(
            variables.script(variables.for_child(plan.root, os.environ, all_tools.variable_groups()), shell)
        )
        sys.stdout.flush()
        return Exit.GOOD

    guard(act)


def _tools(asked: list[str] | None) -> list[Tool]:
    from provision.config import toml
    from provision.mirrors.tools import all_tools

    names = all_tools.names()
    return [all_tools.by_name(toml.choose(name, names, "tool")) for name in asked or names]


def _chooser(plan: HostPlan) -> MirrorSelector:
    from provision.mirrors import record as mirror_record
    from provision.mirrors.selection import MirrorSelector
    from provision.setup.plan import host_probe_needs

    needed = host_probe_needs(plan.definition)
    record = mirror_record.read(plan.root) or mirror_record.MirrorRecord()
    return MirrorSelector(plan.definition.catalogue, needed, os.environ, plan.home, record)
