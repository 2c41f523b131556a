"""Defines the commands `provision models …`."""

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
    JsonFlag,
    ManifestFlag,
    OfflineFlag,
    OutputOptions,
    PlaceFlags,
    QuietFlag,
    WaitFlag,
    YesFlag,
    again,
    confirmed,
    during,
    guard,
    resolve_host,
    waiting,
)
from provision.core import flags
from provision.core.errors import Exit, FirstlightError
from provision.core.redact import redact

if TYPE_CHECKING:
    from provision.cli.models_output import ModelRow
    from provision.config.models import ModelSpec
    from provision.models.manifest import Manifest
    from provision.setup.host_plan import HostPlan

app = typer.Typer(help="Manage the models of the Hugging Face cache.", no_args_is_help=True, rich_markup_mode=None)

_NAME = "NAME[@VARIANT][+EXTRA...]; NAME is an entry of the manifest or the id of its repository"
Names = Annotated[list[str] | None, typer.Argument(help=f"{_NAME}. Default: the models of host.toml.")]
Name = Annotated[str, typer.Argument(help=f"{_NAME}.")]
EndpointFlag = Annotated[str | None, typer.Option("--endpoint", help="Use this hub only.", metavar="URL")]


@dataclass(frozen=True)
class _ModelContext:
    """Hold the values that the commands share: the host plan, the manifest, and the models that the user names."""

    plan: HostPlan
    manifest: Manifest
    requested: list[str]

    @property
    def envs(self) -> Path:
        return self.plan.definition.envs

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.manifest.name(name) for name in self.requested))

    def pick(self, name: str) -> ModelSpec:
        return self.manifest.pick(name)


@app.command("list")
@flags.expand
def list_(
    *,
    place: PlaceFlags,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
) -> None:
    """List the models of the manifest with their state, and the other content of the cache."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.models import hub_in_use, inventory, stand_ins, step

        context = _context(None, place, manifest)
        used_root = context.plan.root
        recorded = step.recorded(used_root)
        built = [name for name in context.manifest.models if stand_ins.snapshot_of(used_root, name) is not None]
        reasons = {name: recorded.get(name) for name in built}
        cached = inventory.cached_models(used_root, context.manifest)
        unlisted = inventory.unlisted(used_root, context.manifest)
        show = models_output.list_json if json else models_output.list_lines
        print(show(hub_in_use.of(used_root), cached, unlisted, reasons))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def pull(
    names: Names = None,
    endpoint: EndpointFlag = None,
    trust_mirror: Annotated[
        bool, typer.Option("--trust-mirror", help="Accept a mirror's hashes for files without a pinned hash.")
    ] = False,
    send_token_to: Annotated[
        list[str] | None, typer.Option("--send-token-to", help="Also send your token to this host.", metavar="HOST")
    ] = None,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Build a stand-in with random weights instead, as stand-in/NAME.")
    ] = False,
    *,
    place: PlaceFlags,
    manifest: ManifestFlag = None,
    offline: OfflineFlag = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Download models into the cache. Present files are hashed; missing or corrupt ones are downloaded and verified."""

    def act() -> Exit:
        from provision.cli import models_output, models_run
        from provision.core import layout
        from provision.models import hub_in_use, inventory, load_line
        from provision.models.hubs import Hubs
        from provision.models.pull import Pull

        context = _context(names, place, manifest)
        used_root = context.plan.root
        picked = [(name, context.pick(name)) for name in context.names]
        token_hosts = frozenset(send_token_to or ())
        hubs = Hubs(used_root, os.environ, offline=offline, token_hosts=token_hosts, endpoint=endpoint)
        models_run.check_token_hosts(send_token_to or [], hubs)
        try:
            inventory.cache_of(used_root, is_named=context.plan.chosen.named)
        except (FirstlightError, OSError) as error:
            if not (json and picked):
                raise
            return _end("models pull", models_run.failed_rows(picked, error), json=json, quiet=quiet)

        def emit(text: str) -> None:
            if dry_run or not quiet:
                print(redact(text), file=sys.stderr if json else sys.stdout, flush=True)

        rows: list[ModelRow] = []
        hub = hub_in_use.of(used_root)
        emit("\n".join(models_output.hub_lines(hub)))
        for name, model in picked:
            if stand_in:
                python = layout.interpreter(used_root.prefix(context.plan.host.env))
                rows.append(
                    models_run.stand_in(
                        used_root,
                        name,
                        model,
                        context.envs,
                        python,
                        quiet=quiet or json,
                        dry_run=dry_run,
                    )
                )
            else:
                work = Pull(used_root, name, model, hubs, trust_mirror, context.manifest.revisions(model.repo))
                rows.append(models_run.pull(work, emit, quiet=quiet, dry_run=dry_run))
                if rows[-1].state == "ok":
                    architecture = load_line.architecture_of(context.envs, model)
                    rows[-1].load = load_line.of_model(used_root, model, architecture)
            if rows[-1].exit is Exit.BLOCKED:
                break  # the next model would fail for the same reason
        models_output.add_problem(rows, hub)
        return _end("models pull", rows, json=json, quiet=quiet, is_found=hub.is_found)

    guard(act, json=json)


@app.command()
@flags.expand
def verify(
    names: Names = None,
    depth: Annotated[str, typer.Option("--depth", help="The depth of the check: size, header or hash.")] = "hash",
    *,
    place: PlaceFlags,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Verify all files of the models without the network, and repair lost links and refs (not with --dry-run)."""

    def act() -> Exit:
        from provision.cli import models_run
        from provision.config import toml
        from provision.models import inventory
        from provision.models.hubs import Hubs
        from provision.models.pull import Pull
        from provision.models.verify import Depth

        context = _context(names, place, manifest)
        used_root = context.plan.root
        level = Depth[toml.choose(depth, [level.name.lower() for level in Depth], "depth").upper()]
        repair = "" if dry_run else models_run.repair(used_root, context.manifest)
        if not names:  # the present models that host.toml does not name are verified as well
            cached = inventory.cached_models(used_root, context.manifest)
            present = {entry.name for entry in cached if entry.state != "absent"}
            bases = {name.partition("+")[0] for name in present}
            absent = {name for name in context.names if name.partition("+")[0] not in bases}
            context = replace(context, requested=sorted(present | absent))
        hubs = Hubs(used_root, os.environ, offline=True)
        rows = [
            models_run.verify(Pull(used_root, name, context.pick(name), hubs), level, quiet=quiet)
            for name in context.names
        ]
        if repair and not json:
            print(repair)
        return _end("models verify", rows, json=json, quiet=quiet, every_file=True)

    guard(act, json=json)


@app.command()
@flags.expand
def show(
    name: Name,
    *,
    place: PlaceFlags,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show the components, parameters, scheduler and licence of a model, without loading it."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.models import inventory, load_line, pipeline_info

        context = _context([name], place, manifest)
        canonical, model = context.names[0], context.pick(name)
        structure = pipeline_info.read(inventory.snapshot_of(context.plan.root, model), model, context.envs)
        load = load_line.of_cached(context.plan.root, context.envs, canonical, model)
        report = models_output.structure_json if json else models_output.structure_lines
        print(report(canonical, model, structure, load))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def lock(
    names: Annotated[list[str], typer.Argument(help="The names of models in the manifest.")],
    *,
    place: PlaceFlags,
    manifest: ManifestFlag = None,
    json: JsonFlag = False,
) -> None:
    """Write the sizes and hashes that the official hub lists into the manifest; nothing is downloaded."""

    def act() -> Exit:
        from provision.cli import output
        from provision.core import layout
        from provision.mirrors import official as official_hub
        from provision.models import hub_client, lock_manifest

        context = _context(names, place, manifest)
        official = hub_client.Hub(os.environ, endpoint=official_hub.official_endpoint())
        own, shipped = context.plan.host.manifest, context.envs / "models.toml"
        rows = []
        for name in context.names:
            base = name.partition("+")[0]
            entry = context.manifest.models[base]
            path = Path(own).expanduser() if own and base in context.manifest.added else shipped
            layout.require_own(path.parent)
            with during(f"locking {base}", OutputOptions(json, False, False, False)):
                count = lock_manifest.lock(path, base, entry, official)
            rows.append({"name": base, "completed": count, "manifest": str(path)})
            if not json:
                text = f"{count} files are now pinned in {path}" if count else "every file is pinned already"
                print(f"{base}: {text}")
        if json:
            print(output.success_json("models lock", models=rows))
        return Exit.GOOD

    guard(act, json=json)


@app.command()
@flags.expand
def remove(
    name: Annotated[str, typer.Argument(help="NAME[@VARIANT], NAME+EXTRA (only the extra), or stand-in/NAME.")],
    yes: YesFlag = False,
    *,
    place: PlaceFlags,
    manifest: ManifestFlag = None,
    wait: WaitFlag = 0,
    json: JsonFlag = False,
    dry_run: DryRunFlag = False,
) -> None:
    """Remove a model from the cache, except for files that another model or revision needs."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.models import remove as remove_model
        from provision.models import stand_ins, step
        from provision.volume import run_lock

        context = _context(None, place, manifest)
        used_root = context.plan.root
        removal = remove_model.removal(used_root, context.manifest, name)
        is_present = bool(removal.links or removal.blobs)
        summary = models_output.removal_line(name, removal) if is_present else f"{name}: no removable file is present"
        code = Exit.CHANGES if dry_run and is_present else Exit.GOOD
        if not json:
            print(summary)
        removed = False
        if is_present and not dry_run and confirmed("Remove it?", f"this removes {name} from the cache", yes, json):
            patience = waiting(OutputOptions(json, False, False, False, wait))
            exclusive = run_lock.holding(used_root, again(), patience) if used_root.marker.is_file() else nullcontext()
            with exclusive:
                remove_model.remove(used_root, context.manifest, name)
            for recorded in step.recorded(used_root):
                if stand_ins.repo_of(recorded) == name:
                    step.record(used_root, recorded, None)
            removed = True
        if json:
            print(models_output.removal_json(name, removal, int(code), removed=removed))
        return code

    guard(act, json=json)


@app.command()
@flags.expand
def seed(
    bind: Annotated[
        str, typer.Option("--bind", help="The address of the server; 0.0.0.0 serves all networks of this host.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port; 0 selects a free one.")] = 8090,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="FIRSTLIGHT_SEED_TOKEN", help="Serve only clients that send this token."),
    ] = None,
    *,
    place: PlaceFlags,
    manifest: ManifestFlag = None,
) -> None:
    """Serve the complete models of this host to other hosts, read-only, as a hub for --endpoint or HF_ENDPOINT."""

    def act() -> Exit:
        from provision.cli import models_output
        from provision.core import layout
        from provision.models import seed_server

        context = _context(None, place, manifest)
        with during("checking the models", OutputOptions(False, False, False, False)):
            names, models = seed_server.complete_models(context.plan.root, context.manifest)
        if not models:
            raise FirstlightError(
                f"no model of the manifest is complete on this host. Pull one first: `{layout.program()} models pull`."
            )
        with seed_server.server(models, bind, port, token) as server:
            hosts = seed_server.addresses() if bind == "0.0.0.0" else [bind]  # noqa: S104
            lines = models_output.seed_lines(names, hosts, server.server_address[1], needs_token=token is not None)
            print(lines, flush=True)
            server.serve_forever()
        return Exit.GOOD

    guard(act)


def _context(names: list[str] | None, place: PlaceFlags, manifest: str | None) -> _ModelContext:
    plan = resolve_host(place.root, place.host, place.envs, trust=place.trust_volume, changes={"manifest": manifest})
    return _ModelContext(plan, plan.definition.manifest, names or list(plan.host.models))


def _end(
    command: str,
    rows: list[ModelRow],
    *,
    json: bool,
    quiet: bool,
    every_file: bool = False,
    is_found: bool = True,
) -> Exit:
    from provision.cli import models_output

    code = Exit.GOOD if is_found else Exit.CHANGES
    if any(row.state not in {"ok", "stand-in"} for row in rows):
        code = max((row.exit for row in rows if row.error), default=Exit.CHANGES)
    if json:
        print(models_output.rows_json(command, rows, int(code)))
        return code
    for row in rows:
        if not quiet or not is_found or row.state not in {"ok", "stand-in"}:
            print(models_output.row_lines(row, every_file=every_file))
    return code
