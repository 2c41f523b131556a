"""The commands `provision models`."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provision.cli.common import (
    DryRunFlag,
    EnvsFlag,
    HostFlag,
    JsonFlag,
    ManifestFlag,
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
    waiting,
)
from provision.core.errors import Exit, FirstlightError
from provision.core.redact import redact

if TYPE_CHECKING:
    from provision.cli.models_output import ModelRow
    from provision.config.models import ModelSpec
    from provision.models.hubs import Hubs
    from provision.models.manifest import Manifest
    from provision.setup.host_plan import HostPlan

app = typer.Typer(help="The models in the Hugging Face cache.", no_args_is_help=True, rich_markup_mode=None)

_NAME = "NAME[@VARIANT][+EXTRA...]; NAME is an entry of the manifest or the id of its repository"
Names = Annotated[list[str] | None, typer.Argument(help=f"{_NAME}; without any, this host's.")]
Name = Annotated[str, typer.Argument(help=f"{_NAME}.")]
EndpointFlag = Annotated[str | None, typer.Option("--endpoint", help="This hub alone.", metavar="URL")]


@dataclass(frozen=True)
class _ModelContext:
    """Where a command works: the host, the models by name, which of them are meant."""

    plan: HostPlan
    manifest: Manifest
    asked: list[str]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.manifest.name(each) for each in self.asked))

    def pick(self, name: str) -> ModelSpec:
        return self.manifest.pick(name)


@app.command("list")
def list_(
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show the models of the manifest, what of them is here, and what else is in the cache."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.models import inventory, stand_ins, step

        place = _place(None, root, host, envs, manifest)
        known = place.plan.root
        recorded = step.recorded(known)
        built = [name for name in place.manifest.models if stand_ins.snapshot_of(known, name) is not None]
        reasons = {name: recorded.get(name) for name in built}
        found = inventory.held(known, place.manifest)
        others = inventory.others(known, place.manifest)
        show = models_output.list_json if json else models_output.list_lines
        print(show(found, others, reasons))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
def pull(
    names: Names = None,
    endpoint: EndpointFlag = None,
    trust_mirror: Annotated[
        bool, typer.Option("--trust-mirror", help="Take a mirror's word for files that nobody has pinned.")
    ] = False,
    send_token_to: Annotated[
        list[str] | None, typer.Option("--send-token-to", help="A host that may see your token.", metavar="HOST")
    ] = None,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Build it with random weights instead, as stand-in/NAME.")
    ] = False,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    manifest: ManifestFlag = None,
    offline: OfflineFlag = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Fetch models into the cache: what is there is hashed, what is missing or corrupt is fetched and verified."""

    def act() -> Exit:
        from provision.cli import models_run
        from provision.core import layout
        from provision.models import inventory, load_line
        from provision.models.hubs import Hubs
        from provision.models.pull import Pull

        place = _place(names, root, host, envs, manifest)
        known = place.plan.root
        picked = [(name, place.pick(name)) for name in place.names]
        hubs = Hubs(known, os.environ, offline=offline, token_hosts=frozenset(send_token_to or ()), endpoint=endpoint)
        _check_token_hosts(send_token_to or [], hubs)
        try:
            inventory.cache_of(known, is_named=place.plan.chosen.named)
        except (FirstlightError, OSError) as error:
            if not (json and picked):
                raise
            return _end("models pull", models_run.refused(picked, error), json=json, quiet=quiet)

        def say(text: str) -> None:
            if dry_run or not quiet:
                print(redact(text), file=sys.stderr if json else sys.stdout, flush=True)

        rows: list[ModelRow] = []
        for name, model in picked:
            if stand_in:
                python = layout.interpreter(known.prefix(place.plan.host.env))
                rows.append(
                    models_run.stand_in(
                        known, name, model, place.plan.definition.envs, python, quiet=quiet or json, dry_run=dry_run
                    )
                )
            else:
                work = Pull(known, name, model, hubs, trust_mirror, place.manifest.revisions(model.repo))
                rows.append(models_run.pull(work, say, quiet=quiet, dry_run=dry_run))
                if rows[-1].state == "ok":
                    rows[-1].load = load_line.of_model(known, model, load_line.known(place.plan.definition.envs, model))
            if rows[-1].exit is Exit.BLOCKED:
                break  # no other one would do better
        return _end("models pull", rows, json=json, quiet=quiet)

    guard(act, json=json)


@app.command()
def verify(
    names: Names = None,
    depth: Annotated[str, typer.Option("--depth", help="size, header or hash.")] = "hash",
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Prove that every byte is right, without the network; lost links and refs are mended (not with --dry-run)."""

    def act() -> Exit:
        from provision.cli import models_run
        from provision.config import toml
        from provision.models import inventory
        from provision.models.hubs import Hubs
        from provision.models.pull import Pull
        from provision.models.verify import Depth

        place = _place(names, root, host, envs, manifest)
        known = place.plan.root
        wanted = Depth[toml.choose(depth, [each.name.lower() for each in Depth], "depth").upper()]
        said = "" if dry_run else models_run.heal(known, place.manifest)
        if not names:  # also what was pulled beside this host's own
            here = {each.asked for each in inventory.held(known, place.manifest) if each.state != "absent"}
            covered = {name.partition("+")[0] for name in here}
            own = {name for name in place.names if name.partition("+")[0] not in covered}
            place = replace(place, asked=sorted(here | own))
        hubs = Hubs(known, os.environ, offline=True)
        rows = [
            models_run.verify(Pull(known, name, place.pick(name), hubs), wanted, quiet=quiet) for name in place.names
        ]
        if said and not json:
            print(said)
        return _end("models verify", rows, json=json, quiet=quiet, every_file=True)

    guard(act, json=json)


@app.command()
def show(
    name: Name,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show what a model is made of: components, parameters, scheduler, licence. Nothing of it is loaded."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.models import inventory, load_line, pipeline_info

        place = _place([name], root, host, envs, manifest)
        known, model = place.names[0], place.pick(name)
        found = pipeline_info.read(inventory.snapshot_of(place.plan.root, model), model, place.plan.definition.envs)
        load = load_line.here(place.plan.root, place.plan.definition.envs, known, model)
        print((models_output.structure_json if json else models_output.structure_lines)(known, model, found, load))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
def lock(
    names: Annotated[list[str], typer.Argument(help="Models of the manifest.")],
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
) -> None:
    """Write the sizes and hashes that the official hub tells into the manifest; nothing is fetched."""

    def act() -> Exit:
        from provision.cli import output
        from provision.core import layout
        from provision.mirrors import official as official_hub
        from provision.models import hub_client, lock_manifest

        place = _place(names, root, host, envs, manifest)
        official = hub_client.Hub(os.environ, endpoint=official_hub.official_endpoint())
        own, shipped = place.plan.host.manifest, place.plan.definition.envs / "models.toml"
        rows = []
        for name in place.names:
            base = name.partition("+")[0]
            whole = place.manifest.models[base]
            path = Path(own).expanduser() if own and base in place.manifest.added else shipped
            layout.require_own(path.parent)
            with during(f"locking {base}", OutputOptions(json, False, False, False)):
                count = lock_manifest.lock(path, base, whole, official)
            rows.append({"name": base, "completed": count, "manifest": str(path)})
            if not json:
                told = f"{count} files were completed in {path}" if count else "every file is pinned already"
                print(f"{base}: {told}")
        if json:
            print(output.told_json("models lock", models=rows))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="NAME[@VARIANT], NAME+EXTRA (the extra alone), or stand-in/NAME.")],
    yes: YesFlag = False,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    manifest: ManifestFlag = None,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Take a model out of the cache; what another model or revision needs stays."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.models import remove as remove_model
        from provision.models import stand_ins, step
        from provision.volume import run_lock

        place = _place(None, root, host, envs, manifest)
        known = place.plan.root
        gone = remove_model.removal(known, place.manifest, name)
        is_here = bool(gone.links or gone.blobs)
        said = models_output.removal_line(name, gone) if is_here else f"{name}: nothing of it alone is here"
        code = Exit.CHANGES if dry_run and is_here else Exit.GOOD
        if not json:
            print(said)
        removed = False
        if is_here and not dry_run and confirmed("Remove it?", f"this removes {name} from the cache", yes, json):
            patience = waiting(OutputOptions(json, False, False, False, wait))
            alone = run_lock.holding(known, again(), patience) if known.marker.is_file() else nullcontext()
            with alone:
                remove_model.remove(known, place.manifest, name)
            for recorded in step.recorded(known):
                if stand_ins.repo_of(recorded) == name:
                    step.record(known, recorded, None)
            removed = True
        if json:
            print(models_output.removal_json(name, gone, int(code), removed=removed))
        return code

    guard(act, json=json)


@app.command()
def seed(
    bind: Annotated[str, typer.Option("--bind", help="The address to listen at.")] = "0.0.0.0",  # noqa: S104 (the LAN is what it is for)
    port: Annotated[int, typer.Option("--port", help="The port; 0: a free one.")] = 8090,
    root: RootFlag = None,
    host: HostFlag = None,
    envs: EnvsFlag = None,
    manifest: ManifestFlag = None,
) -> None:
    """Serve the manifest's models that are here to other hosts, read-only, as a hub that they name by HF_ENDPOINT."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.core import layout
        from provision.models import inventory, seed_server

        place = _place(None, root, host, envs, manifest)
        with during("looking at the models", OutputOptions(False, False, False, False)):
            found = [each for each in inventory.held(place.plan.root, place.manifest) if each.state == "whole"]
        models = []
        for each in found:
            snapshot = inventory.snapshot_of(place.plan.root, each.model)
            paths_ = [file.path for file in each.model.files]
            models += [
                seed_server.served(repo, each.model.revision, each.model.license, snapshot, paths_)
                for repo in (each.model.repo, *each.model.former_repos)
            ]
        if not models:
            raise FirstlightError(
                f"no model of the manifest is whole here. Pull one first: `{layout.program()} models pull`."
            )
        with seed_server.server(models, bind, port) as running:
            known = seed_server.addresses() if bind == "0.0.0.0" else [bind]  # noqa: S104
            print(
                models_output.seed_lines([each.asked for each in found], known, running.server_address[1]), flush=True
            )
            running.serve_forever()
        return Exit.GOOD

    guard(act)


def _check_token_hosts(named: list[str], hubs: Hubs) -> None:
    """Refuse a word that would change nothing: the host that is meant is asked under another name, or not at all."""
    from provision.core.errors import SpecError
    from provision.models.hub_client import is_host

    for each in named:
        try:
            found = any(is_host(each, hub.endpoint) for hub in hubs.every())
        except ValueError:
            found = False
        if not found:
            asked = ", ".join(hub.shown for hub in hubs.every())
            raise SpecError(f"--send-token-to {each}: no hub of this pull is there. Asked are: {asked}.")


def _place(
    names: list[str] | None, root: str | None, host: Path | None, envs: Path | None, manifest: str | None
) -> _ModelContext:
    plan = resolve_host(root, host, envs, changes={"manifest": manifest})
    return _ModelContext(plan, plan.definition.manifest, names or list(plan.host.models))


def _end(command: str, rows: list[ModelRow], *, json: bool, quiet: bool, every_file: bool = False) -> Exit:
    from provision.cli import models_output

    code = Exit.GOOD
    if any(row.state not in {"ok", "stand-in"} for row in rows):
        code = max((row.exit for row in rows if row.error), default=Exit.CHANGES)
    if json:
        print(models_output.rows_json(command, rows, int(code)))
        return code
    for row in rows:
        if not quiet or row.state not in {"ok", "stand-in"}:
            print(models_output.row_lines(row, every_file=every_file))
    return code
