"""Puts a pinned model into the hub cache, or says plainly that random weights stand in for it."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

from provision import download
from provision.download import Candidate, Ledger
from provision.errors import BlockedError, FirstlightError
from provision.hub import HubError, Listed
from provision.step import Check, State
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from provision.hub import Hub
    from provision.paths import Root
    from provision.spec import ModelFile, ModelSpec
    from provision.supply import Hubs

_PARALLEL = 4
_HEADROOM = 1.1
_SIGN_OF_LIFE_SECONDS = 1.0


class ModelStep:
    """Every file of one model lies in the hub cache, or a stand-in is on record with its reason.

    Args:
        root: the volume.
        name: the model's name in the manifest.
        spec: its entry.
        hubs: where it may come from.
        retry: look again for a hub that was silent before (setup does, status does not).
        progress: told the bytes that arrive, and how many will.
    """

    essential = False
    local = False

    def __init__(
        self,
        root: Root,
        name: str,
        spec: ModelSpec,
        hubs: Hubs,
        *,
        retry: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        """Take what the class says."""
        self.name = f"model {name}"
        self.root = root
        self.model = name
        self.spec = spec
        self.hubs = hubs
        self.ledger = Ledger()
        self.retry = retry
        self.progress = progress

    @property
    def folder(self) -> Path:
        """The model's folder in the hub cache (the client's layout)."""
        return self.root.hub_in_use / f"models--{self.spec.repo.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        """The folder of the pinned revision."""
        return self.folder / "snapshots" / self.spec.revision

    def describe(self) -> str:
        """The plan's line."""
        size = sum(file.size or 0 for file in self.spec.files)
        known = f"{size / 1e9:.2f} GB, " if size else ""
        return f"pull {self.spec.repo} ({known}{self.spec.license}) from {self.hubs.every()[0].endpoint}"

    def check(self, *, deep: bool = False) -> Check:
        """Look at every file's presence and size; `deep` hashes each against its pin."""
        wrong = [(file.path, reason) for file in self.spec.files if (reason := self._wrong(file, deep=deep))]
        if not wrong:
            size = sum((self.snapshot / file.path).stat().st_size for file in self.spec.files)
            fetched = self.ledger.summary()
            how = f"{', every hash right' if deep else ''}{f': {fetched}' if fetched else ''}"
            return Check(State.OK, f"{self.spec.repo}, {size:,} bytes{how}", "; ".join(self.ledger.loud()) or None)
        path, reason = wrong[0]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        detail = f"{path} {reason}{more}"
        stand_in = self._stand_ins().get(self.model)
        if stand_in is None or any(reason != "is missing" for _, reason in wrong):
            return Check(State.DRIFTED, detail)
        if self.retry and (back := self._hub_that_is_back()):
            return Check(State.DRIFTED, f"{back.endpoint} answers now")
        return Check(State.OK, "stand-in: random weights", f"{self.model}: random weights stand in ({stand_in})")

    def apply(self) -> None:
        """Pull what is missing; where the hub does not answer, put the stand-in on record."""
        self.retry = False
        try:
            self._pull(*self._ask([file for file in self.spec.files if self._wrong(file, deep=True)]))
        except (HubError, download.DownloadError) as error:
            self._record_stand_in(str(error))
        else:
            self._record_stand_in(None)

    def _wrong(self, file: ModelFile, *, deep: bool) -> str | None:
        path = self.snapshot / file.path
        try:
            size = path.stat().st_size
        except OSError:
            return "is missing"
        if file.size is not None and size != file.size:
            return f"has {size:,} bytes, pinned are {file.size:,}"
        if deep:
            pins = {"sha256": file.sha256, "git_sha1": file.git_sha1}
            if not file.locked:
                # Locked at its pull: the hub cache names each blob by its hash.
                blob = path.resolve().name
                pins = {"sha256" if len(blob) == 64 else "git_sha1": blob}
            for kind, pin in pins.items():
                if pin is not None and download.hash_file(path, kind) != pin:
                    return f"does not have its pinned {kind}"
        return None

    def _hub_that_is_back(self) -> Hub | None:
        for hub in self.hubs.every():
            with suppress(HubError):
                hub.listing(self.spec.repo, self.spec.revision, seconds=_SIGN_OF_LIFE_SECONDS)
                return hub
        return None

    def _ask(self, wanted: list[ModelFile]) -> tuple[list[tuple[ModelFile, Listed]], list[Hub]]:
        """What the first hub lists that lists all of it as pinned; it comes first among those that may be asked."""
        silent: list[str] = []
        wrong: FirstlightError | None = None
        for hub in self.hubs.every():
            try:
                listing = hub.listing(self.spec.repo, self.spec.revision)
                found = [self._pinned(file, listing, hub) for file in wanted]
            except HubError as error:
                silent.append(str(error))
            except FirstlightError as error:
                self.ledger.ban(hub.name, str(error))
                wrong = error
            else:
                return found, [hub, *(other for other in self.hubs.every() if other is not hub)]
        if wrong is not None:
            raise wrong
        raise HubError("; ".join(silent))

    def _pinned(self, file: ModelFile, listing: dict[str, Listed], hub: Hub) -> tuple[ModelFile, Listed]:
        listed = listing.get(file.path)
        if listed is None:
            raise HubError(f"{hub.endpoint} does not have {file.path} of {self.spec.repo}")
        if not file.locked and not hub.is_official:
            raise HubError(f"{file.path} is not pinned yet, and {hub.endpoint} is not the official hub")
        offered = {"size": listed.size, listed.kind: listed.blob}
        for what, offer in offered.items():
            pin = getattr(file, what)
            if pin is not None and pin != offer:
                raise FirstlightError(
                    f"{hub.endpoint} lists {file.path} of {self.spec.repo} with {what} {offer}, "
                    f"pinned is {pin}. It was not fetched. Use another endpoint: HF_ENDPOINT=…"
                )
        return file, listed

    def _pull(self, files: list[tuple[ModelFile, Listed]], hubs: list[Hub]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        blobs = self.folder / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        missing = [(file, listed) for file, listed in files if not self._blob_is_good(blobs / listed.blob, listed)]
        total = sum(listed.size for _, listed in missing)
        free = shutil.disk_usage(blobs).free
        if free < total * _HEADROOM:
            raise BlockedError(
                f"{blobs}: {free:,} bytes are free, {round(total * _HEADROOM):,} are needed for {self.model}. "
                "Free some, or give another --root, then run again."
            )
        with hubs[0].session() as session, ThreadPoolExecutor(_PARALLEL) as pool:
            for done in [pool.submit(self._fetch, session, file, listed, total, hubs) for file, listed in missing]:
                done.result()
        self._link(hubs)

    def _blob_is_good(self, blob: Path, listed: Listed) -> bool:
        """A blob that is there is taken only by its hash; a wrong one is moved aside, not deleted."""
        if not blob.exists():
            return False
        if download.hash_file(blob, listed.kind) == listed.blob:
            return True
        blob.rename(blob.with_name(f"{blob.name}.firstlight-corrupt"))
        return False

    def _fetch(self, session: object, file: ModelFile, listed: Listed, total: int, hubs: list[Hub]) -> None:
        import requests

        assert isinstance(session, requests.Session)  # noqa: S101 (for the type alone: requests loads late)
        blob = self.folder / "blobs" / listed.blob
        part = blob.with_name(f"{blob.name}.firstlight-part")
        pins = {listed.kind: {listed.blob}}
        if file.sha256:
            pins["sha256"] = {file.sha256}
        if file.git_sha1:
            pins["git_sha1"] = {file.git_sha1}
        # What is not pinned is right by the official hub's word alone.
        asked = [hub for hub in hubs if file.locked or hub.is_official]
        places = [
            Candidate(hub.name, hub.file_url(self.spec.repo, self.spec.revision, file.path), hub.headers())
            for hub in asked
        ]
        download.fetch(
            session,
            lambda: places,
            part,
            size=listed.size,
            pins=pins,
            ledger=self.ledger,
            progress=lambda count: self.progress(count, total),
            name=file.path,
        )
        part.replace(blob)

    def _link(self, hubs: list[Hub]) -> None:
        """Let the hub's own client link the blobs: its layout stays its business. It asks for no weights."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        *others, last = [hub for hub in hubs if hub.name in self.ledger.order(each.name for each in hubs)]
        for hub in [*others, last]:
            try:
                snapshot_download(
                    self.spec.repo,
                    revision=self.spec.revision,
                    cache_dir=self.root.hub_in_use,
                    endpoint=hub.endpoint,
                    token=hub.token or False,
                    allow_patterns=[file.path for file in self.spec.files],
                )
                break
            except Exception:  # whatever this hub's answers do to the client: the next one may be asked
                if hub is last:
                    raise
        main = self.folder / "refs" / "main"
        if not main.exists():  # offline, a program that names no revision needs one
            write_atomic(main, self.spec.revision)

    def _stand_ins(self) -> dict[str, str]:
        try:
            kept = json.loads(self.root.stand_ins.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(name): str(reason) for name, reason in kept.items()} if isinstance(kept, dict) else {}

    def _record_stand_in(self, reason: str | None) -> None:
        kept = self._stand_ins()
        wanted = {name: why for name, why in kept.items() if name != self.model}
        if reason is not None:
            wanted[self.model] = reason
        if wanted != kept:
            write_atomic(self.root.stand_ins, json.dumps(wanted, indent=1, sort_keys=True) + "\n")
