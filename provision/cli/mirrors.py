"""Defines the commands `provision mirrors` and `provision shellenv`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from provision.cli.common import (
    BriefOutputFlags,
    CatalogueFlag,
    DryRunFlag,
    JsonFlag,
    NoColorFlag,
    OfflineFlag,
    OutputOptions,
    PlaceFlags,
    RootFlags,
    during,
    guard,
    resolve_host,
    run_list,
    run_steps,
)
from provision.core import flags
from provision.core.errors import Exit

if TYPE_CHECKING:
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.mirrors.selection import MirrorSelector
    from provision.mirrors.tools.tool import Tool
    from provision.setup.host_plan import HostPlan

app = typer.Typer(
    help="The mirrors from which packages and models are downloaded.", no_args_is_help=True, rich_markup_mode=None
)

ToolFlag = Annotated[
    list[str] | None, typer.Option("--tool", help="Only this tool: pip, conda, torch or hf. May be repeated.")
]


@app.command("list")
@flags.expand
def list_(*, place: PlaceFlags, catalogue: CatalogueFlag = None, json: JsonFlag = False) -> None:
    """List the mirrors of the catalogue, and the ones that are selected."""

    def act() -> Exit:
        from provision.cli import mirrors_output
        from provision.mirrors import chosen_mirrors

        plan = resolve_host(
            place.root, place.host, place.envs, trust=place.trust_volume, changes={"catalogue": catalogue}
        )
        mirrors = plan.definition.catalogue
        record = chosen_mirrors.read(plan.root) or chosen_mirrors.MirrorRecord()
        print(mirrors_output.catalogue_json(mirrors, record) if json else mirrors_output.catalogue(mirrors, record))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def probe(
    *,
    tool: ToolFlag = None,
    place: PlaceFlags,
    catalogue: CatalogueFlag = None,
    json: JsonFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Probe every mirror: check that it is reachable and has the locked files, and measure its speed. Write nothing."""

    def act() -> Exit:
        from provision.cli import mirrors_output

        plan = resolve_host(
            place.root, place.host, place.envs, trust=place.trust_volume, changes={"catalogue": catalogue}
        )
        tools = _tools(tool)
        selector = _selector(plan)
        targets = [target for tool in tools for target in selector.targets(tool)]
        options = OutputOptions(json=json, no_color=no_color)
        with during(f"probing {len(targets)} mirrors", options):
            results = selector.probe(targets)
        choices = {tool.name: selector.auto(tool, results) for tool in tools}
        if json:
            print(mirrors_output.probes_json(results, choices))
        else:
            mirrors_output.print_probes(results, choices, color=options.color)
        return Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def use(
    name: Annotated[str, typer.Argument(help="auto, official, or the name of a mirror in the catalogue.")],
    tool: ToolFlag = None,
    nodefaults: Annotated[bool, typer.Option("--nodefaults", help="Leave out conda's default channels.")] = False,
    *,
    place: PlaceFlags,
    catalogue: CatalogueFlag = None,
    offline: OfflineFlag = False,
    output_flags: BriefOutputFlags,
    dry_run: DryRunFlag = False,
) -> None:
    """Select a mirror, and write it to the settings files of the environment and of your user.

    `mirrors restore` restores these files.
    """

    def act() -> Exit:
        from provision.config import toml
        from provision.mirrors.chosen_mirrors import OFFICIAL
        from provision.mirrors.tools import all_tools

        plan = resolve_host(
            place.root,
            place.host,
            place.envs,
            trust=place.trust_volume,
            offline=offline,
            changes={"catalogue": catalogue},
        )
        mirrors = plan.definition.catalogue
        toml.choose(name, ["auto", OFFICIAL, *mirrors.names()], "mirror")
        tools = all_tools.names()
        selected = [item.name for item in _tools(tool)] if tool else mirrors.tools_of(name) or tools
        for tool_name in selected:
            toml.choose(name, ["auto", OFFICIAL, *mirrors.of(tool_name)], f"mirror of {tool_name}")
        mirror = {tool_name: name if tool_name in selected else "keep" for tool_name in tools}
        plan = plan.with_mirrors(mirror, nodefaults=nodefaults)
        only = {"volume", "mirrors", "mirror settings"}
        return run_steps("mirrors use", plan, OutputOptions.of(output_flags), dry_run=dry_run, only=only)

    guard(act, json=output_flags.json)


@app.command()
@flags.expand
def restore(
    *,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also restore files that you have changed since; your version is kept as a copy."),
    ] = False,
    place: RootFlags,
    output_flags: BriefOutputFlags,
    dry_run: DryRunFlag = False,
) -> None:
    """Restore every file that was written for mirrors. If a file cannot be restored, no file is changed."""

    def act() -> Exit:
        from provision.mirrors import write_config
        from provision.volume.journal import Journal

        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume, offline=True)
        journal = Journal(plan.root.journal, "mirrors restore")

        def build(_: Progress) -> list[Step]:
            return write_config.restore_steps(plan.root, journal, force=force)

        options = OutputOptions.of(output_flags)
        return run_list("mirrors restore", plan, build, options, dry_run=dry_run, all_or_nothing=True)

    guard(act, json=output_flags.json)


@flags.expand
def shellenv(
    *,
    shell: Annotated[str, typer.Option("--shell", help="bash, zsh, fish or powershell.")] = "bash",
    place: RootFlags,
) -> None:
    """Print the environment variables of this host for your shell: eval "$(provision shellenv)"."""

    def act() -> Exit:
        from provision.config import toml
        from provision.mirrors.tools import all_tools
        from provision.volume import variables

        toml.choose(shell, variables.SHELLS, "shell")
        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume)
        sys.stdout.buffer.write(
            variables.script(variables.for_child(plan.root, os.environ, all_tools.variable_groups()), shell)
        )
        sys.stdout.flush()
        return Exit.GOOD

    guard(act)


def _tools(selected: list[str] | None) -> list[Tool]:
    from provision.config import toml
    from provision.mirrors.tools import all_tools

    names = all_tools.names()
    return [all_tools.by_name(toml.choose(name, names, "tool")) for name in selected or names]


def _selector(plan: HostPlan) -> MirrorSelector:
    from provision.mirrors import chosen_mirrors
    from provision.mirrors.selection import MirrorSelector
    from provision.setup.plan import host_probe_needs

    needs = host_probe_needs(plan.definition)
    record = chosen_mirrors.read(plan.root) or chosen_mirrors.MirrorRecord()
    return MirrorSelector(plan.definition.catalogue, needs, os.environ, plan.home, record)
