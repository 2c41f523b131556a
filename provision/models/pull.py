"""Downloads the missing files of a model into the hub cache and verifies them.

Several pulls can run at the same time; each content is downloaded by one of them.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provision.core import hashing, layout
from provision.core.errors import BlockedError, FirstlightError, from_os_error
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
CORRUPT = ".firstlight-corrupt"  # the suffix of a file that was renamed because its content is wrong


@dataclass
class Pull:
    """Downloads the missing files of one model into the hub cache in use.

    `root`: the root.
    `name`: the name of the model in messages.
    `spec`: the entry of the manifest; recorded sizes and hashes are added to it.
    `hubs`: the hubs to use.
    `trust`: accept a mirror's hash for a file without a pinned hash.
    `pinned`: the revisions of the repository that the manifest pins.
    `health`: the deliveries and failures of the hubs in this run.
    `arrived`: the number of downloaded bytes.
    `notes`: messages for the user about refs/main and links by former ids, after `run`.
    """

    root: Root
    name: str
    spec: ModelSpec
    hubs: Hubs
    trust: bool = False
    pinned: Collection[str] = ()
    health: SourceHealth = field(default_factory=SourceHealth)

    def __post_init__(self) -> None:
        """Add the recorded sizes and hashes to `spec`."""
        self._resolver = FileResolver(self.root, self.name, self.spec, self.health, self.trust)
        self.spec = self._resolver.spec
        self._stopped = threading.Event()
        self._reported: set[str] = set()
        self._locks: dict[str, BlobLock] = {}
        self.arrived = 0
        self.notes: list[str] = []

    @property
    def folder(self) -> Path:
        """Return the folder of the model's repository in the hub cache."""
        return self.root.hub_in_use / self.spec.folder

    @property
    def snapshot(self) -> Path:
        """Return the folder of the pinned revision, with the links to its blobs."""
        return self.folder / "snapshots" / self.spec.revision

    def check_files(self, depth: Depth, progress: Progress | None = None) -> list[FileState]:
        """Return the state of every file, without a request to a hub.

        Args:
            depth: the depth of the check.
            progress: called with (path, number of bytes hashed since the last call).
        """
        return verify.check_files(self.snapshot, self.spec.files, depth, progress)

    def plan(self, progress: Progress | None = None) -> PullPlan:
        """Hash the present files, find the missing files in the listings of the hubs, and return the plan.

        Args:
            progress: called with (path, number of bytes hashed since the last call).

        Raises:
            HubError, FirstlightError, BlockedError: as for `make_plan`.
        """
        self.health.stopped.clear()  # set at the end of an earlier `run`
        states = self.check_files(Depth.HASH, progress)
        plan = make_plan(self.root.hub_in_use, self._resolver, self.hubs.every(), states)
        self.spec = self._resolver.spec
        return plan

    def run(self, plan: PullPlan, progress: Progress) -> None:
        """Download the files of the plan, several at the same time, and link them into the snapshot.

        It also sets refs/main, and makes the links by former ids. An interrupt ends all downloads at once.

        Args:
            plan: the result of `plan`.
            progress: called with (path, number of bytes received since the last call).

        Raises:
            DownloadError: no hub delivered a file; the received part is kept.
            WrongContentError: no hub delivered the right content of a file, and at least one sent wrong content.
            AccessError: a hub denied access to the repository.
            BlockedError: the disk is full or cannot be written, or a link to the hub cache leads nowhere.
            FirstlightError: a file was removed or changed meanwhile.
        """
        try:
            if plan.needed:
                self._make_blobs()
                self._download_all(plan, progress)
                self._store_listing(plan)
            note = main_ref.set_main(self.folder, self.spec.revision, self.pinned)
            self.notes += [note] if note else []
            self.notes += former_ids.make(self.root.hub_in_use, self.spec)
        except OSError as error:
            raise from_os_error(error, needed_bytes=plan.bytes_wanted if plan.needed else None) from error

    def _make_blobs(self) -> None:
        """Make the folder of the model's blobs.

        Raises:
            BlockedError: a link on its path leads nowhere, as the link of a hub cache whose volume is not mounted.
            OSError: the folder cannot be made.
        """
        blobs = self.folder / "blobs"
        try:
            blobs.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            lost = next((path for path in (blobs, *blobs.parents) if path.is_symlink() and not path.exists()), None)
            if lost is None:
                raise
            raise BlockedError(
                f"{lost} is a link to {lost.readlink()}, which does not exist. Mount the volume and run "
                f"`{layout.next_command('repair')}`, or remove the link: rm {shlex.quote(str(lost))}"
            ) from None

    def _download_all(self, plan: PullPlan, progress: Progress) -> None:
        """Download the files of the plan in daemon threads.

        A daemon thread does not delay the end of the program after an interrupt, even while it waits for a server.
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
                threading.Thread(
                    target=self._download_from_queue, args=(session, plan, queue, report, errors), daemon=True
                )
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

        An error that stops the whole pull, such as a full disk, has priority. If a hub has denied access to every
        failed file, the error has the user's next step. Otherwise the messages of up to three files are joined.
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
                return type(refusal)(f"{refusal}. The other hubs failed too: {others}") if others else refusal
        more = f" {len(file_errors) - 3} more files failed." if len(file_errors) > 3 else ""
        text = " ".join(map(str, file_errors[:3])) + more
        is_wrong_content = isinstance(file_errors[0], download.WrongContentError)
        return download.WrongContentError(text) if is_wrong_content else download.DownloadError(text, {}, {})

    def _download_from_queue(
        self,
        session: requests.Session,
        plan: PullPlan,
        queue: deque[FileToFetch],
        report: Progress,
        errors: list[BaseException],
    ) -> None:
        """Download one file of the queue after another, until the queue is empty or the pull is stopped.

        A file that another process downloads is moved to the end of the queue, because it is most likely complete
        when it is reached again.

        Args:
            session: the HTTP session.
            plan: the plan of the pull.
            queue: the files to download, which all threads share.
            report: called with (path, number of bytes received since the last call).
            errors: the list to which each error is appended.
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
                    self._report_once(f"{target.file.path}: the lock of an earlier process was taken over: {text}")
                try:
                    self._download_content(session, target, plan, report)
                finally:
                    lock.release()
            except _StoppedError:
                return
            except BaseException as error:  # _download_all raises it in the main thread
                errors.append(error)
                if not isinstance(error, download.DownloadError | download.WrongContentError):
                    self._stopped.set()  # most likely the disk is full, so other files would fail as well
                    self.health.stopped.set()

    def _report_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.health.tell(text)

    def _download_content(
        self, session: requests.Session, target: FileToFetch, plan: PullPlan, report: Progress
    ) -> None:
        """Download the content of one file, and link it at the path of every file in the plan with this content.

        If the hub cache has the content already, it is linked without a download.
        """
        file, listed, proof = target.file, target.listed, target.proof
        paths = [other.file.path for other in plan.needed if other.content == target.content]
        blobs = self.folder / "blobs"
        blob = blobs / listed.blob
        if blob.exists():
            if all(hashing.hash_file(blob, kind) in digests for kind, digests in proof.items()):
                self._link(paths, blob.name)  # another run has downloaded the blob
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
        # The name of a blob is a verified hash. The hash in a listing is verified only if its kind is in `proof`.
        name = listed.blob if listed.kind in proof else hashing.hash_file(part, listed.kind)
        durable.sync_file(part)  # programs trust a blob by its name, so its content must survive a power cut
        self._lock(target.content).require()
        part.replace(blobs / name)
        self._link(paths, name)

    def _link(self, paths: Sequence[str], blob: str) -> None:
        """Link a verified blob into the snapshot, at each of the paths.

        This is done after each download, so that the file can be used and removed even if the pull fails later.
        """
        snapshots.link(self.folder, self.spec.revision, [(path, blob) for path in paths])

    def _lock(self, blob: str) -> BlobLock:
        """Return the lock of a blob.

        Each call for a blob returns the same object, which observes over several attempts whether the holder is alive.
        """
        if blob not in self._locks:
            self._locks[blob] = BlobLock(self.root.hub_in_use / ".locks" / self.spec.folder / f"{blob}.lock")
        return self._locks[blob]

    def _store_listing(self, plan: PullPlan) -> None:
        """Call huggingface_hub, so that it stores its listing of the snapshot.

        huggingface_hub downloads a missing file without comparing it with the pinned hash. So it is called only if all
        files are present. If a file has changed after the call, all files are verified again.

        Raises:
            FirstlightError: a file was removed, or a file has wrong content after the call.
        """
        before = self._identities()
        if None in before.values():
            raise FirstlightError(f"{self.name}: a file was removed during the pull. Run the same command again.")
        usable = set(self.health.order(hub.name for hub in plan.hubs))
        for hub in plan.hubs:
            if hub.name in usable and hf_listing.list_snapshot(
                self.spec.repo, self.spec.revision, before, self.root.hub_in_use, hub.endpoint
            ):
                break
        hf_listing.open_listings(self.folder)
        if self._identities() != before and any(state.state != "ok" for state in self.check_files(Depth.HASH)):
            raise FirstlightError(f"{self.name}: a file was changed during the pull. Run the same command again.")

    def _identities(self) -> dict[str, tuple[int, ...] | None]:
        """Return {path in the snapshot: (device, inode, size, mtime in ns)}, with None for a missing file."""
        identities: dict[str, tuple[int, ...] | None] = {}
        for file in self.spec.files:
            try:
                status = (self.snapshot / file.path).stat()
                identities[file.path] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            except OSError:
                identities[file.path] = None
        return identities


class _StoppedError(Exception):
    """Report that a download was stopped by an interrupt or by an error of another file; the received part is kept."""
