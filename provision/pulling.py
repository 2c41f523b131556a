"""Pulls a model into the hub cache: a plan, then every missing file, verified, shared with whoever pulls it too."""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provision import checking, digests, download, pins, snapshots
from provision.checking import Depth, FileState
from provision.download import Candidate, Ledger
from provision.errors import BlockedError, FirstlightError, from_os_error
from provision.hub import HubError, Listed
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import requests

    from provision.hub import Hub
    from provision.paths import Root
    from provision.spec import ModelFile, ModelSpec
    from provision.supply import Hubs

    Progress = Callable[[str, int], None]

AT_ONCE = 4
_HEADROOM = 1.1
_POLL_SECONDS = 0.2
PART, CORRUPT = ".firstlight-part", ".firstlight-corrupt"


@dataclass(frozen=True)
class Needed:
    """One file that is to be fetched, as the hub lists it; `have` bytes of it are here from an earlier run."""

    file: ModelFile
    listed: Listed
    have: int


@dataclass(frozen=True)
class Plan:
    """What a pull would do. `states` of all files; `needed` of them are fetched, from the first of `hubs` that can."""

    states: list[FileState]
    needed: list[Needed]
    hubs: list[Hub]
    free: int

    @property
    def bytes_wanted(self) -> int:
        """The bytes that would arrive."""
        return sum(each.listed.size - each.have for each in self.needed)

    @property
    def is_done(self) -> bool:
        """Whether every file is there and right."""
        return all(each.state == "ok" for each in self.states)


@dataclass
class Pull:
    """One model on its way into a hub cache.

    `trust`: also take files that nobody has pinned from a hub that is not the official one. `arrived`: the bytes that
    came over the network.
    """

    root: Root
    name: str
    spec: ModelSpec
    hubs: Hubs
    trust: bool = False
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        """Know what is on record of its hashes."""
        self.spec = pins.apply(self.root, self.spec)
        self._stopped = threading.Event()
        self.arrived = 0

    @property
    def folder(self) -> Path:
        """The model's folder in the hub cache."""
        return self.root.hub_in_use / self.spec.folder

    @property
    def snapshot(self) -> Path:
        """The folder of the pinned revision."""
        return self.folder / "snapshots" / self.spec.revision

    def look(self, depth: Depth, progress: Progress | None = None) -> list[FileState]:
        """The state of every file, without the network."""
        return checking.look(self.snapshot, self.spec.files, depth, progress)

    def plan(self, progress: Progress | None = None) -> Plan:
        """What there is, hashed, and what is missing; a hub is asked only where something is.

        Raises:
            HubError: no hub answers with all of it.
            FirstlightError: the hubs that answer list other content than the pinned one.
            BlockedError: it does not fit.
        """
        states = self.look(Depth.HASH, progress)
        wanted = [file for file, state in zip(self.spec.files, states, strict=True) if state.state != "ok"]
        free = shutil.disk_usage(_standing(self.folder)).free
        if not wanted:
            return Plan(states, [], [], free)
        found, hubs = self._ask(wanted)
        corrupt = {state.path for state in states if state.state == "corrupt"}
        needed = [Needed(file, listed, 0 if file.path in corrupt else self._have(listed)) for file, listed in found]
        plan = Plan(states, needed, hubs, free)
        wants = round(plan.bytes_wanted * _HEADROOM)
        if free < wants:
            raise BlockedError(
                f"{self.folder}: {free:,} bytes are free, {wants:,} are needed for {self.name}. "
                "Free some, or give another --root, then run again."
            )
        return plan

    def run(self, plan: Plan, progress: Progress) -> None:
        """Fetch what the plan says, several files at once, and link it. An interrupt ends it at once.

        Raises:
            DownloadError: nobody delivered a file; what arrived of it stays.
            WrongContentError: who delivered sent wrong content.
            BlockedError: the disk is full, or cannot be written.
        """
        blobs = self.folder / "blobs"
        try:
            blobs.mkdir(parents=True, exist_ok=True)
            if plan.needed:
                self._fetch_all(plan, progress)
            self._link(plan)
        except OSError as error:
            raise from_os_error(error, needed_bytes=plan.bytes_wanted) from error

    def _have(self, listed: Listed) -> int:
        for name in (listed.blob, listed.blob + PART):
            blob = self.folder / "blobs" / name
            if blob.exists():
                return min(blob.stat().st_size, listed.size)
        return 0

    def _ask(self, wanted: Sequence[ModelFile]) -> tuple[list[tuple[ModelFile, Listed]], list[Hub]]:
        """What the first hub lists that lists all of it as pinned; it comes first among those that may be asked."""
        silent: list[HubError] = []
        wrong: FirstlightError | None = None
        for hub in self.hubs.every():
            try:
                listing = hub.listing(self.spec.repo, self.spec.revision)
                found = [self._pinned(file, listing, hub) for file in wanted]
            except HubError as error:
                silent.append(error)
            except FirstlightError as error:
                self.ledger.ban(hub.name, str(error))
                wrong = error
            else:
                fresh = [listed for file, listed in found if not file.locked]
                if fresh:
                    pins.keep(self.root, self.spec, fresh, hub.name)
                others = [other for other in self.hubs.every() if other is not hub]
                return found, [hub, *(other for other in others if not fresh or other.is_official)]
        if wrong is not None:
            raise wrong
        raise silent[0] if len(silent) == 1 else HubError("; ".join(map(str, silent)))

    def _pinned(self, file: ModelFile, listing: dict[str, Listed], hub: Hub) -> tuple[ModelFile, Listed]:
        listed = listing.get(file.path)
        if listed is None:
            raise HubError(f"{hub.endpoint} does not have {file.path} of {self.spec.repo}")
        if not file.locked and not hub.is_official and not self.trust:
            raise HubError(
                f"{file.path} is not pinned yet, and {hub.endpoint} is not the official hub: pull it from there, or "
                "take this one's word with --trust-mirror"
            )
        offered = {"size": listed.size, listed.kind: listed.blob}
        for what, offer in offered.items():
            pin = getattr(file, what)
            if pin is not None and pin != offer:
                raise FirstlightError(
                    f"{hub.endpoint} lists {file.path} of {self.spec.repo} with {what} {offer}, "
                    f"pinned is {pin}. It was not fetched. Use another endpoint: HF_ENDPOINT=…"
                )
        return file, listed

    def _fetch_all(self, plan: Plan, progress: Progress) -> None:
        """Threads that end with us: one that waits for a silent server must not hold an interrupt up."""
        waiting = deque(sorted(plan.needed, key=lambda each: -each.listed.size))
        faults: list[BaseException] = []
        self._stopped.clear()
        threading.Thread(target=_load_client, daemon=True).start()

        def told(path: str, count: int) -> None:
            if self._stopped.is_set():
                raise _StoppedError
            self.arrived += count
            progress(path, count)

        with plan.hubs[0].session() as session:
            workers = [
                threading.Thread(target=self._work, args=(session, plan, waiting, told, faults), daemon=True)
                for _ in range(min(AT_ONCE, len(waiting)))
            ]
            for worker in workers:
                worker.start()
            try:
                for worker in workers:
                    while worker.is_alive():
                        worker.join(_POLL_SECONDS)  # in turns, so that an interrupt arrives
            finally:
                self._stopped.set()
        if faults:
            raise self._access(plan) or faults[0]

    def _access(self, plan: Plan) -> HubError | None:
        """What a hub that lists the files, and gives them to some users alone, wants of this one."""
        for hub in plan.hubs:
            if hub.name in self.ledger.refusals:
                return hub.refusal(self.spec.repo, *self.ledger.refusals[hub.name])
        return None

    def _work(
        self,
        session: requests.Session,
        plan: Plan,
        waiting: deque[Needed],
        told: Progress,
        faults: list[BaseException],
    ) -> None:
        """Take file after file; those at which another process works come last, and are then there already."""
        busy = 0
        while not self._stopped.is_set():
            try:
                each = waiting.popleft()
            except IndexError:
                return
            lock = self._lock(each.listed.blob)
            if not lock.take():
                waiting.append(each)
                busy += 1
                if busy > len(waiting):
                    time.sleep(_POLL_SECONDS)
                continue
            busy = 0
            try:
                self._fetch(session, each, plan.hubs, told)
            except _StoppedError:
                return
            except BaseException as error:  # it is raised again where the threads were started
                faults.append(error)
                if not isinstance(error, download.DownloadError | download.WrongContentError):
                    self._stopped.set()  # the disk is full, most likely: no other file would do better
            finally:
                lock.release()

    def _fetch(self, session: requests.Session, each: Needed, hubs: Sequence[Hub], told: Progress) -> None:
        file, listed = each.file, each.listed
        blob = self.folder / "blobs" / listed.blob
        if blob.exists():
            if digests.hash_file(blob, listed.kind) == listed.blob:
                return  # another run has fetched it
            blob.replace(blob.with_name(blob.name + CORRUPT))
        part = blob.with_name(blob.name + PART)
        right = {listed.kind: {listed.blob}}
        right |= {kind: {pin} for kind, pin in (("sha256", file.sha256), ("git_sha1", file.git_sha1)) if pin}
        places = [
            Candidate(hub.name, hub.file_url(self.spec.repo, self.spec.revision, file.path), hub.headers())
            for hub in hubs
        ]
        download.fetch(
            session,
            lambda: places,
            part,
            size=listed.size,
            pins=right,
            ledger=self.ledger,
            progress=lambda count: told(file.path, count),
            name=file.path,
        )
        part.replace(blob)

    def _lock(self, blob: str) -> BlobLock:
        return BlobLock(self.root.hub_in_use / ".locks" / self.spec.folder / f"{blob}.lock")

    def _link(self, plan: Plan) -> None:
        """Let the hub's own client link the blobs: its layout stays its business. It asks for no weights.

        It gets no token, as it would follow a listing's next page to any host with it. Where no hub answers it then,
        the links are made as it makes them.
        """
        blobs = {each.file.path: each.listed.blob for each in plan.needed}
        good = set(self.ledger.order(hub.name for hub in plan.hubs))
        if not any(self._link_by_client(hub) for hub in plan.hubs if hub.name in good):
            snapshots.link(self.folder, self.spec.revision, sorted(blobs.items()))
        wrong = [path for path, blob in blobs.items() if (self.snapshot / path).resolve().name != blob]
        if wrong:  # the client took another file for it than the one that was verified
            snapshots.link(self.folder, self.spec.revision, [(path, blobs[path]) for path in wrong])
        main = self.folder / "refs" / "main"
        if not main.exists():  # offline, a program that names no revision needs one
            write_atomic(main, self.spec.revision)
        for tree in (self.folder / "trees").glob("*.json"):
            tree.chmod(0o644)  # the client writes it for its owner alone: nobody else could load from a shared cache

    def _link_by_client(self, hub: Hub) -> bool:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        constants.HF_HUB_DISABLE_XET = True  # it would ask its own data hosts, past the mirror
        try:
            snapshot_download(
                self.spec.repo,
                revision=self.spec.revision,
                cache_dir=self.root.hub_in_use,
                endpoint=hub.endpoint,
                token=False,
                allow_patterns=[_literally(file.path) for file in self.spec.files],
            )
        except Exception:  # whatever this hub's answers do to the client
            return False
        return True


class _StoppedError(Exception):
    """Another file's fault, or an interrupt, ends this one too; what arrived stays."""


class BlobLock:
    """The lock that the hub's own client takes for a blob: nobody fetches what another fetches already."""

    def __init__(self, path: Path) -> None:
        import filelock

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path, thread_local=False)

    def take(self) -> bool:
        """Whether it is ours now."""
        import filelock

        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        return True

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()


def _load_client() -> None:
    """Import what links in the end while the files arrive: it takes a fifth of a second."""
    from huggingface_hub import snapshot_download  # noqa: F401


def _literally(path: str) -> str:
    """A path as a pattern that means itself."""
    return "".join(f"[{each}]" if each in "*?[" else each for each in path)


def _standing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(each for each in (path, *path.parents) if each.exists())
