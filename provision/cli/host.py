"""The commands that look after a host: doctor, relocate, undo, gc."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

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
from provision.core.errors import Exit

if TYPE_CHECKING:
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.setup import undo as undo_runs

app = typer.Typer(rich_markup_mode=None)


@app.command()
def doctor(root: RootFlag = None, host: HostFlag = None, envs: EnvsFlag = None, json: JsonFlag = False) -> None:
    """Say what kind of host this is, what its folder can do, and what is amiss. Exit 4 when a person must act."""

    def act() -> Exit:
        from provision.cli import output
        from provision.setup import doctor as host_doctor

        plan = resolve_host(root, host, envs)
        with during("doctor", OutputOptions(json, False, False, False)):
            findings = host_doctor.examine(plan)
        print(output.findings_json(plan.chosen, findings) if json else output.findings(findings))
        return Exit.BLOCKED if any(finding.state == "bad" for finding in findings) else Exit.GOOD

    guard(act, json=json)


@app.command()
def relocate(
    path: Annotated[str, typer.Argument(help="A folder, or the name of a cache such as pip or conda.")],
    to: Annotated[str | None, typer.Option("--to", help="Its place on the root.", metavar="PLACE")] = None,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Move one folder onto the root and leave a link; from then on it is kept as host.toml's are."""

    def act() -> Exit:
        from provision.host import tool_caches

        plan = resolve_host(root, host, envs, offline=True)
        label, thing = tool_caches.parse_argument(path, to, plan.home)
        plan = plan.with_relocated(thing)
        only = {"volume", f"relocate {label}", "relink.sh"}
        return run_steps(
            "relocate", plan, OutputOptions(json, quiet, False, no_color, wait), dry_run=dry_run, only=only
        )

    guard(act, json=json)


@app.command()
def undo(
    run: Annotated[str | None, typer.Argument(help="A run; else the newest that is not undone.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the runs.")] = False,
    root: RootFlag = None,
    host: HostFlag = None,
    offline: OfflineFlag = False,  # noqa: ARG001 (it never uses the network; every command takes the flag)
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    no_color: NoColorFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Put back the bytes, modes, links and folders that a run has changed; all of them, or none."""

    def act() -> Exit:
        from provision.cli import output
        from provision.setup import undo as undo_runs
        from provision.volume.journal import Journal
        from provision.volume.journal_acts import RunUndone

        plan = resolve_host(root, host, None, offline=True)
        if list_:
            found = undo_runs.runs(plan.root)
            print(output.runs_json(found) if json else output.runs(found))
            return Exit.GOOD
        chosen: list[undo_runs.JournaledRun] = []
        journal = Journal(plan.root.journal, "undo")

        def build(progress: Progress) -> list[Step]:
            chosen[:] = [undo_runs.choose(plan.root, run)]
            return undo_runs.steps(chosen[0], plan.root, plan.home, journal, progress)

        show = OutputOptions(json, quiet, False, no_color, wait)
        code = run_list("undo", plan, build, show, dry_run=dry_run, all_or_nothing=True)
        if code is Exit.GOOD and not dry_run and not chosen[0].undone:
            journal.record(RunUndone(chosen[0].name))
        lines = sys.stderr if json else sys.stdout
        for text in undo_runs.kept_changes(chosen[0]):
            print(f"  {text}", file=lines)
        return code

    guard(act, json=json)


@app.command()
def gc(
    yes: YesFlag = False,
    root: RootFlag = None,
    host: HostFlag = None,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
) -> None:
    """Drop the backups of earlier runs, after showing what that frees; their files cannot be undone then."""

    def act() -> Exit:
        from provision.cli import output
        from provision.setup import undo as undo_runs
        from provision.volume.run_lock import holding

        plan = resolve_host(root, host, None, offline=True)
        every = undo_runs.runs_with_backups(plan.root)
        total = sum(run.backup_bytes for run in every)
        lines = [f"{run.name}  {run.backup_bytes:>12,} bytes  {run.header.command or ''}" for run in every]
        shown = "\n".join([*lines, f"{len(every)} backups, {total:,} bytes"])
        print(shown, file=sys.stderr if json else sys.stdout)
        dropped: list[str] = []
        question = "Drop them? What these runs changed in files cannot be undone then."
        if every and confirmed(question, "this deletes the backups, and these runs can no longer be undone", yes, json):
            with holding(plan.root, again(), waiting(OutputOptions(json, False, False, False, wait))):
                for folder in undo_runs.delete_backups(every):
                    dropped.append(str(folder))
                    print(f"dropped {folder}", file=sys.stderr if json else sys.stdout)
        if json:
            print(output.told_json("gc", backups=[run.to_dict() for run in every], bytes=total, dropped=dropped))
        return Exit.GOOD

    guard(act, json=json)
