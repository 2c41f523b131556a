"""Pulls a model into the hub cache: a plan, then every missing file, verified, shared with whoever pulls it too."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from provision.core import hashing
from provision.core.errors import BlockedError, FirstlightError, from_os_error
from provision.models import former_ids, hf_listing, snapshots, verify
from provision.models.blob_lock import BlobLock
from provision.models.hub_client import HubError, ListedFile
from provision.models.pull_plan import FileToFetch, PullPlan, content_name
from provision.models.resolver import FileResolver
from provision.models.verify import Depth, FileState
from provision.net import download
from provision.net.resumable_request import Source
from provision.net.source_health import SourceHealth

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    import requests

    from provision.config.models import ModelFile, ModelSpec
    from provision.core.layout import Root
    from provision.models.hub_client import Hub
    from provision.models.hubs import Hubs

if TYPE_CHECKING:
    Progress = Callable[[str, int], None]

AT_ONCE = 4
_HEADROOM = 1.1
_POLL_SECONDS = 0.2
PART, CORRUPT = ".firstlight-part", ".firstlight-corrupt"


@dataclass
class Pull:
    """One model on its way into a hub cache.

    `trust`: also take files that nobody has pinned from a hub that is not the official one. `pinned`: every revision of
    its repository that the manifest pins. `arrived`: the bytes that came over the network. `notes`: what its owner
    should know besides.
    """

    root: Root
    name: str
    spec: ModelSpec
    hubs: Hubs
    trust: bool = False
    pinned: Collection[str] = ()
    health: SourceHealth = field(default_factory=SourceHealth)

    def __post_init__(self) -> None:
        """Know what is on record of its hashes."""
        self._asking = FileResolver(self.root, self.name, self.spec, self.health, self.trust)
        self.spec = self._asking.spec
        self._stopped = threading.Event()
        self._told: set[str] = set()
        self.arrived = 0
        self.notes: list[str] = []

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
        return verify.look(self.snapshot, self.spec.files, depth, progress)

    def plan(self, progress: Progress | None = None) -> PullPlan:
        """What there is, hashed, and what is missing; a hub is asked only where something is.

        Raises:
            HubError: no hub answers with all of it.
            FirstlightError: the hubs that answer list other content than the pinned one.
            BlockedError: it does not fit.
        """
        self.health.stopped.clear()  # an earlier run has ended all waiting
        states = self.look(Depth.HASH, progress)
        every = self.hubs.every()
        pairs = list(zip(self.spec.files, states, strict=True))
        wanted = [file for file, state in pairs if state.state != "ok"]
        doubted = [file for file, state in pairs if state.state == "ok" and self._asking.is_doubted(file)]
        free = shutil.disk_usage(_standing(self.folder)).free
        needed: list[FileToFetch] = []
        hubs: list[Hub] = []
        if wanted:
            found, hubs = self._asking.patiently(wanted, every)
            corrupt = {state.path for state in states if state.state == "corrupt"}
            needed = [
                FileToFetch(file, listed, 0 if file.path in corrupt else self._have(file, listed))
                for file, listed in found
            ]
        by_mirrors: Counter[str] = Counter()
        unproven = 0
        official = [hub for hub in every if hub.is_official]
        try:  # its word alone may say that what is here is wrong, and what is here may stay where it says nothing
            told, others = self._asking.once(doubted, official, every) if doubted else ([], [])
        except HubError:
            by_mirrors.update(self._asking.provisional[file.path] for file in doubted if file.locked)
            unproven = len(doubted) - by_mirrors.total()
        else:
            hubs = hubs or others
            here = {file.path: file for file in doubted}
            # Compared as it was looked at: the official hub's word has no pins of a mirror's beside it.
            wrong = {
                file.path: FileToFetch(file, listed, 0)
                for file, listed in told
                if not self._is_as(here[file.path], listed)
            }
            needed += wrong.values()
            states = [_now_wrong(state) if state.path in wrong else state for state in states]
        self._asking.apply_pins()
        self.spec = self._asking.spec
        plan = PullPlan(states, needed, hubs, free, unproven, by_mirrors)
        # A size that nobody has pinned is one hub's word: it must not be what stops a pull.
        sure = sum(each.listed.size - each.have for each in plan.fetched if each.size is not None)
        if free < round(sure * _HEADROOM):
            raise BlockedError(
                f"{self.folder}: {free:,} bytes are free, {round(sure * _HEADROOM):,} are needed for {self.name}. "
                "Free some, or give another --root, then run again."
            )
        return plan

    def run(self, plan: PullPlan, progress: Progress) -> None:
        """Fetch what the plan says, several files at once, and link it. An interrupt ends it at once.

        Raises:
            DownloadError: nobody delivered a file; what arrived of it stays.
            WrongContentError: who delivered sent wrong content.
            BlockedError: the disk is full, or cannot be written.
        """
        try:
            if plan.needed:
                (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
                self._fetch_all(plan, progress)
                self._list_by_client(plan)
            note = snapshots.name_main(self.folder, self.spec.revision, self.pinned)
            self.notes += [note] if note else []
            self.notes += former_ids.make(self.root.hub_in_use, self.spec)
        except OSError as error:
            raise from_os_error(error, needed_bytes=plan.bytes_wanted if plan.needed else None) from error

    def _is_as(self, file: ModelFile, listed: ListedFile) -> bool:
        """Whether what is here is what a hub lists; a blob bears its hash, which was compared, as its name."""
        path = self.snapshot / file.path
        compared = verify.pins_of(file, path).get(listed.kind)
        return listed.blob in {compared, hashing.hash_file(path, listed.kind) if compared is None else compared}

    def _have(self, file: ModelFile, listed: ListedFile) -> int:
        for name in (listed.blob, content_name(file, listed) + PART):
            blob = self.folder / "blobs" / name
            if blob.exists():
                return min(blob.stat().st_size, listed.size)
        return 0

    def _fetch_all(self, plan: PullPlan, progress: Progress) -> None:
        """Threads that end with us: one that waits for a silent server must not hold an interrupt up."""
        waiting = deque(sorted(plan.fetched, key=lambda each: -each.listed.size))
        faults: list[BaseException] = []
        self._stopped.clear()
        self.health.stopped.clear()
        threading.Thread(target=hf_listing.load, daemon=True).start()

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
                self.health.stopped.set()
        if faults:
            raise self._fault(plan, faults)

    def _fault(self, plan: PullPlan, faults: list[BaseException]) -> BaseException:
        """The one that stops everything, else what a hub wants of this user, else all of them in one."""
        soft = [each for each in faults if isinstance(each, download.DownloadError | download.WrongContentError)]
        if len(soft) < len(faults):
            return next(each for each in faults if each not in soft)
        refused = [each for each in soft if isinstance(each, download.DownloadError) and each.refusals]
        if len(refused) == len(soft):
            refusing = next((hub for hub in plan.hubs if hub.name in refused[0].refusals), None)
            if refusing is not None:
                found = refusing.refusal(self.spec.repo, *refused[0].refusals[refusing.name])
                others = "; ".join(f"{name}: {why}" for name, why in refused[0].others.items())
                return type(found)(f"{found}. Of the other hubs, {others}") if others else found
        more = f" And {len(soft) - 3} more files." if len(soft) > 3 else ""
        told = " ".join(map(str, soft[:3])) + more
        wrong = isinstance(soft[0], download.WrongContentError)
        return download.WrongContentError(told) if wrong else download.DownloadError(told, {}, {})

    def _work(
        self,
        session: requests.Session,
        plan: PullPlan,
        waiting: deque[FileToFetch],
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
            try:
                lock = self._lock(each.content)
                if not lock.take():
                    waiting.append(each)
                    busy += 1
                    if busy > len(waiting):
                        self._tell_once(f"{each.file.path} is being fetched by another process; waiting for it")
                        time.sleep(_POLL_SECONDS)
                    continue
                busy = 0
                try:
                    self._fetch(session, each, plan, told)
                finally:
                    lock.release()
            except _StoppedError:
                return
            except BaseException as error:  # it is raised again where the threads were started
                faults.append(error)
                if not isinstance(error, download.DownloadError | download.WrongContentError):
                    self._stopped.set()  # the disk is full, most likely: no other file would do better
                    self.health.stopped.set()

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.health.tell(text)

    def _fetch(self, session: requests.Session, each: FileToFetch, plan: PullPlan, told: Progress) -> None:
        """Fetch one content, and name it for every file that has it."""
        file, listed, proof = each.file, each.listed, each.proof
        paths = [other.file.path for other in plan.needed if other.content == each.content]
        blobs = self.folder / "blobs"
        blob = blobs / listed.blob
        if blob.exists():
            if all(hashing.hash_file(blob, kind) in right for kind, right in proof.items()):
                self._place(paths, blob.name)  # another run has fetched it
                return
            blob.replace(blob.with_name(blob.name + CORRUPT))
        part = blobs / (each.content + PART)
        places = [
            Source(hub.name, hub.file_url(self.spec.repo, self.spec.revision, file.path), hub.headers())
            for hub in plan.hubs
        ]
        download.download(
            session,
            lambda: places,
            part,
            size=each.size,
            pins=proof,
            health=self.health,
            progress=lambda count: told(file.path, count),
            name=file.path,
        )
        # A listing's word for a hash that nobody has pinned is no name: it could be any.
        name = listed.blob if listed.kind in proof else hashing.hash_file(part, listed.kind)
        part.replace(blobs / name)
        self._place(paths, name)

    def _place(self, paths: Sequence[str], blob: str) -> None:
        """Name a verified blob at once: what a run that fails later has brought can be seen, used and removed."""
        snapshots.link(self.folder, self.spec.revision, [(path, blob) for path in paths])

    def _lock(self, blob: str) -> BlobLock:
        return BlobLock(self.root.hub_in_use / ".locks" / self.spec.folder / f"{blob}.lock")

    def _list_by_client(self, plan: PullPlan) -> None:
        """What it finds missing it would fetch unproven: it is let in where nothing is missing, and looked after."""
        before = self._seen()
        if None in before.values():
            raise FirstlightError(f"{self.name}: files went away while others arrived. Run again.")
        good = set(self.health.order(hub.name for hub in plan.hubs))
        for hub in plan.hubs:
            if hub.name in good and hf_listing.list_snapshot(
                self.spec.repo, self.spec.revision, before, self.root.hub_in_use, hub.endpoint
            ):
                break
        hf_listing.open_listings(self.folder)
        if self._seen() != before and any(state.state != "ok" for state in self.look(Depth.HASH)):
            raise FirstlightError(f"{self.name}: files changed while others arrived. Run again.")

    def _seen(self) -> dict[str, tuple[int, ...] | None]:
        """{path: what tells one file from another, None where it is not there}."""
        found: dict[str, tuple[int, ...] | None] = {}
        for file in self.spec.files:
            try:
                told = (self.snapshot / file.path).stat()
                found[file.path] = (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)
            except OSError:
                found[file.path] = None
        return found


class _StoppedError(Exception):
    """Another file's fault, or an interrupt, ends this one too; what arrived stays."""


def _now_wrong(state: FileState) -> FileState:
    return replace(state, state="corrupt", reason="is not what the hub lists")


def _standing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(each for each in (path, *path.parents) if each.exists())
