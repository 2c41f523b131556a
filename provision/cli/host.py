"""Defines the commands for one host: doctor, relocate, undo and gc."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from provision.cli.common import (
    BriefOutputFlags,
    DryRunFlag,
    JsonFlag,
    OfflineFlag,
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
    run_list,
    run_steps,
    waiting,
)
from provision.core import flags
from provision.core.errors import Exit

if TYPE_CHECKING:
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.setup import undo as undo_runs
    from provision.setup.host_plan import HostPlan

app = typer.Typer(rich_markup_mode=None)


@app.command()
@flags.expand
def doctor(*, place: PlaceFlags, json: JsonFlag = False) -> None:
    """Examine the host: its provider, the features of its root, and faults. Exit 4 if there is a fault."""

    def act() -> Exit:
        from provision.cli import output
        from provision.setup import doctor as host_doctor

        plan = resolve_host(place.root, place.host, place.envs, trust=None)
        with during("doctor", OutputOptions(json=json)):
            findings = host_doctor.examine(plan)
        print(output.findings_json(plan.chosen, findings) if json else output.findings(findings))
        return Exit.BLOCKED if any(finding.state == "bad" for finding in findings) else Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def relocate(
    path: Annotated[str, typer.Argument(help="A folder, or the name of a cache such as pip or conda.")],
    to: Annotated[
        str | None, typer.Option("--to", help="The new path of the folder, relative to the root.", metavar="PLACE")
    ] = None,
    *,
    place: PlaceFlags,
    output_flags: BriefOutputFlags,
    dry_run: DryRunFlag = False,
) -> None:
    """Move a folder to firstlight's root and leave a symbolic link; setup keeps it there, as if host.toml listed it."""

    def act() -> Exit:
        from provision.host import tool_caches
        from provision.setup import relocated_folders

        plan = resolve_host(place.root, place.host, place.envs, trust=place.trust_volume, offline=True)
        label, folder = tool_caches.parse_argument(path, to, plan.home)
        plan = plan.with_relocated(folder)
        relocated_folders.require_present(plan, folder, is_target_named=to is not None)
        only = {"volume", f"relocate {label}", "relink.sh"}
        options = OutputOptions.of(output_flags)
        return run_steps("relocate", plan, options, dry_run=dry_run, only=only)

    guard(act, json=output_flags.json)


@app.command()
@flags.expand
def undo(
    run: Annotated[
        str | None,
        typer.Argument(help="The name of a run; default: the newest run of this host and home that is not undone."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the runs and undo none.")] = False,
    yes: YesFlag = False,
    *,
    place: RootFlags,
    offline: OfflineFlag = False,  # noqa: ARG001 (undo never uses the network; every command takes the flag)
    output_flags: BriefOutputFlags,
    dry_run: DryRunFlag = False,
) -> None:
    """Undo a run: restore every file, link and folder that it changed. If one of these cannot be restored, none is.

    A run of another host or home is undone only by its name, and with --yes or after a question.
    """

    def act() -> Exit:
        from provision.cli import output
        from provision.setup import undo as undo_runs
        from provision.volume import links, marker, owner
        from provision.volume.journal import Journal
        from provision.volume.journal_acts import RunUndone

        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume, offline=True)
        marker.require(plan.root)
        if list_:
            runs = undo_runs.runs(plan.root)
            print(output.runs_json(runs) if output_flags.json else output.runs(runs))
            return Exit.GOOD
        own = owner.current(plan.home)
        chosen = [undo_runs.choose(plan.root, run, own)]
        journal = Journal(plan.root.journal, "undo")
        is_own = chosen[0].header.owner in links.own_owners(plan.root, own)
        if not is_own and not _may_undo_of_another(plan, chosen[0], yes, dry_run, output_flags.json):
            return Exit.BLOCKED

        def build(progress: Progress) -> list[Step]:
            # After a wait for another run, the newest run of this owner may be that other run.
            chosen[:] = [undo_runs.choose(plan.root, run, own)]
            return undo_runs.steps(chosen[0], plan.root, plan.home, journal, progress)

        code = run_list("undo", plan, build, OutputOptions.of(output_flags), dry_run=dry_run, all_or_nothing=True)
        if code is Exit.GOOD and not dry_run and not chosen[0].undone:
            journal.record(RunUndone(chosen[0].name))
        for text in undo_runs.kept_changes(chosen[0]) if code in {Exit.GOOD, Exit.CHANGES} else []:
            print(f"  {text}", file=sys.stderr if output_flags.json else sys.stdout)
        return code

    guard(act, json=output_flags.json)


def _may_undo_of_another(plan: HostPlan, run: undo_runs.JournaledRun, yes: bool, dry_run: bool, json: bool) -> bool:
    """Print the effects of the undo of another owner's run, and return whether the user confirms the undo.

    Raises:
        BlockedError: --yes is missing, and stdin is not a terminal or --json is given.
    """
    from provision.core.errors import BlockedError
    from provision.setup import undo as undo_runs
    from provision.setup import undo_report
    from provision.volume.journal import Journal

    steps = undo_runs.steps(run, plan.root, plan.home, Journal(plan.root.journal, "undo"))
    lines = "\n  ".join(undo_report.losses(run, steps, plan.root, plan.home))
    if not yes and (json or not sys.stdin.isatty()):
        raise BlockedError(f"{lines}\nNothing was changed. Pass --yes to undo this run here: `{again()} --yes`")
    print(f"  {lines}", file=sys.stderr if json else sys.stdout)
    return yes or dry_run or confirmed("Undo this run here?", "this undoes the run of another host or home", yes, json)


@app.command()
@flags.expand
def gc(
    yes: YesFlag = False,
    *,
    place: RootFlags,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
) -> None:
    """List the backups of this home's earlier runs, and delete them. Afterwards these runs can no longer be undone."""

    def act() -> Exit:
        from provision.cli import output
        from provision.setup import undo as undo_runs
        from provision.volume.owner import current
        from provision.volume.run_lock import holding, require

        stream = sys.stderr if json else sys.stdout
        plan = resolve_host(place.root, place.host, None, trust=place.trust_volume, offline=True)
        runs = undo_runs.runs_with_backups(plan.root, current(plan.home))
        total = sum(run.backup_bytes for run in runs)
        lines = [f"{run.name}  {run.backup_bytes:>12,} bytes  {run.header.command or ''}" for run in runs]
        print("\n".join([*lines, f"{len(runs)} backups, {total:,} bytes"]), file=stream)
        deleted: list[str] = []
        question = "Delete these backups? Then the files that these runs changed can no longer be restored."
        if runs and confirmed(question, "this deletes the backups, and these runs can no longer be undone", yes, json):
            with holding(plan.root, again(), waiting(OutputOptions(json=json, wait=wait))):
                for folder in undo_runs.delete_backups(runs):
                    deleted.append(str(folder))
                    print(f"deleted {folder}", file=stream)
                    require(plan.root.state)
        if json:
            print(output.success_json("gc", backups=[run.to_dict() for run in runs], bytes=total, dropped=deleted))
        return Exit.GOOD

    guard(act, json=json)
