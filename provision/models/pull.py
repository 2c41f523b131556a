"""Downloads the missing files of a model into the hub cache, verifies them, and shares them with parallel pulls."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provision.core import hashing
from provision.core.errors import FirstlightError, from_os_error
from provision.fs import durable
from provision.models import former_ids, hf_listing, local_copies, main_ref, snapshots, verify
from provision.models.blob_lock import BlobLock
from provision.models.match_listings import FileResolver
from provision.models.pull_plan import PART, local_candidates, make_plan
from provision.models.verify import Depth
from provision.net import download
from provision.net.resumable_request import Source
from provision.net.source_health import SourceHealth

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    import requests

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.hubs import Hubs
    from provision.models.pull_plan import FileToFetch, PullPlan
    from provision.models.verify import FileState

    Progress = Callable[[str, int], None]

AT_ONCE = 4  # files that are downloaded at the same time
_POLL_SECONDS = 0.2
CORRUPT = ".firstlight-corrupt"  # the suffix of a file that was set aside because its content is wrong


@dataclass
class Pull:
    """Downloads the missing files of one model into a hub cache.

    `trust`: accept a mirror's hash for a file without a pinned hash.
    `pinned`: the revisions of the repository that the manifest pins.
    `arrived`: the bytes that were downloaded.
    `notes`: further messages for the user.
    """

    root: Root
    name: str
    spec: ModelSpec
    hubs: Hubs
    trust: bool = False
    pinned: Collection[str] = ()
    health: SourceHealth = field(default_factory=SourceHealth)

    def __post_init__(self) -> None:
        """Read the recorded pins."""
        self._resolver = FileResolver(self.root, self.name, self.spec, self.health, self.trust)
        self.spec = self._resolver.spec
        self._stopped = threading.Event()
        self._reported: set[str] = set()
        self._locks: dict[str, BlobLock] = {}
        self.arrived = 0
        self.notes: list[str] = []

    @property
    def folder(self) -> Path:
        """Return the model's folder in the hub cache."""
        return self.root.hub_in_use / self.spec.folder

    @property
    def snapshot(self) -> Path:
        """Return the folder of the pinned revision."""
        return self.folder / "snapshots" / self.spec.revision

    def look(self, depth: Depth, progress: Progress | None = None) -> list[FileState]:
        """Return the state of every file without the network; `progress` gets (path, bytes) while files are hashed."""
        return verify.look(self.snapshot, self.spec.files, depth, progress)

    def plan(self, progress: Progress | None = None) -> PullPlan:
        """Hash the present files, and look up the missing ones at the hubs.

        Present files that the official hub has not confirmed are compared with its listing, too. If every file is
        present and confirmed, no request is made.

        Args:
            progress: called with (path, bytes) while files are hashed.

        Raises:
            HubError: the hubs that answer do not list all missing files.
            FirstlightError: a hub lists other content than the pinned one.
            BlockedError: the free disk space is not sufficient.
        """
        self.health.stopped.clear()  # set at the end of an earlier `run`
        states = self.look(Depth.HASH, progress)
        plan = make_plan(self.root.hub_in_use, self._resolver, self.hubs.every(), states)
        self.spec = self._resolver.spec
        return plan

    def run(self, plan: PullPlan, progress: Progress) -> None:
        """Download the files of the plan, several at the same time, and link them into the snapshot.

        An interrupt ends all downloads at once.

        Args:
            plan: the result of `plan`.
            progress: called with (path, bytes) while files arrive.

        Raises:
            DownloadError: no hub delivered a file; the received part is kept.
            WrongContentError: every hub that delivered a file sent wrong content.
            BlockedError: the disk is full or cannot be written.
        """
        try:
            if plan.needed:
                (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
                self._fetch_all(plan, progress)
                self._list_by_client(plan)
            note = main_ref.set_main(self.folder, self.spec.revision, self.pinned)
            self.notes += [note] if note else []
            self.notes += former_ids.make(self.root.hub_in_use, self.spec)
        except OSError as error:
            raise from_os_error(error, needed_bytes=plan.bytes_wanted if plan.needed else None) from error

    def _fetch_all(self, plan: PullPlan, progress: Progress) -> None:
        """Download the files in daemon threads.

        Such a thread may wait for a silent server, and must not delay the end of the program after an interrupt.
        """
        queue = deque(sorted(plan.fetched, key=lambda file: -file.listed.size))
        errors: list[BaseException] = []
        self._stopped.clear()
        self.health.stopped.clear()
        threading.Thread(target=hf_listing.load, daemon=True).start()

        def report(path: str, count: int) -> None:
            if self._stopped.is_set():
                raise _StoppedError
            self.arrived += count
            progress(path, count)

        with plan.hubs[0].session() as session:
            workers = [
                threading.Thread(target=self._work, args=(session, plan, queue, report, errors), daemon=True)
                for _ in range(min(AT_ONCE, len(queue)))
            ]
            for worker in workers:
                worker.start()
            try:
                for worker in workers:
                    while worker.is_alive():
                        worker.join(_POLL_SECONDS)  # with a timeout, so that an interrupt can be handled
            finally:
                self._stopped.set()
                self.health.stopped.set()
        if errors:
            raise self._error(plan, errors)

    def _error(self, plan: PullPlan, errors: list[BaseException]) -> BaseException:
        """Return the error to raise for the errors of all files.

        An error that stops the whole pull has priority over a hub's refusal with the user's next step. Otherwise the
        errors of the files are joined in one message.
        """
        file_errors = [
            error for error in errors if isinstance(error, download.DownloadError | download.WrongContentError)
        ]
        if len(file_errors) < len(errors):
            return next(error for error in errors if error not in file_errors)
        refusals = [error for error in file_errors if isinstance(error, download.DownloadError) and error.refusals]
        if len(refusals) == len(file_errors):
            refusing_hub = next((hub for hub in plan.hubs if hub.name in refusals[0].refusals), None)
            if refusing_hub is not None:
                refusal = refusing_hub.refusal(self.spec.repo, *refusals[0].refusals[refusing_hub.name])
                others = "; ".join(f"{name}: {reason}" for name, reason in refusals[0].others.items())
                return type(refusal)(f"{refusal}. Of the other hubs, {others}") if others else refusal
        more = f" And {len(file_errors) - 3} more files." if len(file_errors) > 3 else ""
        text = " ".join(map(str, file_errors[:3])) + more
        is_wrong_content = isinstance(file_errors[0], download.WrongContentError)
        return download.WrongContentError(text) if is_wrong_content else download.DownloadError(text, {}, {})

    def _work(
        self,
        session: requests.Session,
        plan: PullPlan,
        queue: deque[FileToFetch],
        report: Progress,
        errors: list[BaseException],
    ) -> None:
        """Download one file after another.

        Files that another process downloads are moved to the end of the queue; they are complete when their turn comes
        again.
        """
        locked_in_a_row = 0
        while not self._stopped.is_set():
            try:
                target = queue.popleft()
            except IndexError:
                return
            try:
                lock = self._lock(target.content)
                if not lock.take():
                    queue.append(target)
                    locked_in_a_row += 1
                    if locked_in_a_row > len(queue):
                        self._report_once(f"{target.file.path} is being downloaded by another process; waiting for it")
                        time.sleep(_POLL_SECONDS)
                    continue
                locked_in_a_row = 0
                for text in lock.taken_over:
                    self._report_once(f"{target.file.path}: took over its lock: {text}")
                try:
                    self._fetch(session, target, plan, report)
                finally:
                    lock.release()
            except _StoppedError:
                return
            except BaseException as error:  # _fetch_all raises it in the main thread
                errors.append(error)
                if not isinstance(error, download.DownloadError | download.WrongContentError):
                    self._stopped.set()  # most likely the disk is full, so other files would fail as well
                    self.health.stopped.set()

    def _report_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.health.tell(text)

    def _fetch(self, session: requests.Session, target: FileToFetch, plan: PullPlan, report: Progress) -> None:
        """Download one content, and link it for every file that has this content."""
        file, listed, proof = target.file, target.listed, target.proof
        paths = [other.file.path for other in plan.needed if other.content == target.content]
        blobs = self.folder / "blobs"
        blob = blobs / listed.blob
        if blob.exists():
            if all(hashing.hash_file(blob, kind) in digests for kind, digests in proof.items()):
                self._link(paths, blob.name)  # another run has downloaded it
                return
            blob.replace(blob.with_name(blob.name + CORRUPT))
        local_copy = local_copies.verified(local_candidates(self.root.hub_in_use, self.spec, file, listed), proof)
        if local_copy is not None:
            name = listed.blob if listed.kind in proof else hashing.hash_file(local_copy, listed.kind)
            local_copies.place(local_copy, blobs / name)
            self._link(paths, name)
            return
        part = blobs / (target.content + PART)
        sources = [
            Source(hub.name, hub.file_url(self.spec.repo, self.spec.revision, file.path), hub.headers())
            for hub in plan.hubs
        ]
        download.download(
            session,
            lambda: sources,
            part,
            size=target.size,
            pins=proof,
            health=self.health,
            progress=lambda count: report(file.path, count),
            name=file.path,
        )
        # The blob is named by a verified hash. The hash in a listing counts only if it is the proof.
        name = listed.blob if listed.kind in proof else hashing.hash_file(part, listed.kind)
        durable.sync_file(part)  # a blob's name is taken for its content: it must not stand for what was lost
        self._lock(target.content).require()
        part.replace(blobs / name)
        self._link(paths, name)

    def _link(self, paths: Sequence[str], blob: str) -> None:
        """Link a verified blob into the snapshot at once.

        The file can then be used and removed even if the run fails later.
        """
        snapshots.link(self.folder, self.spec.revision, [(path, blob) for path in paths])

    def _lock(self, blob: str) -> BlobLock:
        """Return the lock of a blob: the same one for each attempt, since it observes whether the holder is alive."""
        if blob not in self._locks:
            self._locks[blob] = BlobLock(self.root.hub_in_use / ".locks" / self.spec.folder / f"{blob}.lock")
        return self._locks[blob]

    def _list_by_client(self, plan: PullPlan) -> None:
        """Let huggingface_hub store its listing of the snapshot.

        huggingface_hub downloads missing files without checking our hashes. So it is called only if all files are
        present, and the files are verified afterwards.

        Raises:
            FirstlightError: files were removed or changed meanwhile.
        """
        before = self._identities()
        if None in before.values():
            raise FirstlightError(f"{self.name}: files were removed during the download. Run again.")
        usable = set(self.health.order(hub.name for hub in plan.hubs))
        for hub in plan.hubs:
            if hub.name in usable and hf_listing.list_snapshot(
                self.spec.repo, self.spec.revision, before, self.root.hub_in_use, hub.endpoint
            ):
                break
        hf_listing.open_listings(self.folder)
        if self._identities() != before and any(state.state != "ok" for state in self.look(Depth.HASH)):
            raise FirstlightError(f"{self.name}: files were changed during the download. Run again.")

    def _identities(self) -> dict[str, tuple[int, ...] | None]:
        """Return {path: (device, inode, size, mtime in ns)} of each file; None for a missing one."""
        identities: dict[str, tuple[int, ...] | None] = {}
        for file in self.spec.files:
            try:
                status = (self.snapshot / file.path).stat()
                identities[file.path] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            except OSError:
                identities[file.path] = None
        return identities


class _StoppedError(Exception):
    """Report that an interrupt or the error of another file has stopped a download; the received part is kept."""
