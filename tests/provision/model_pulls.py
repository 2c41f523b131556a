"""Provides a small model, functions that pull this model, and checks of the pull's result."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

from provision.mirrors import chosen_mirrors
from provision.mirrors.chosen_mirrors import MirrorChoice, MirrorRecord, MirrorSource
from provision.models import manifest
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.verify import Depth
from tests.provision import hub_server

if TYPE_CHECKING:
    import pytest

    from provision.core.layout import Root
    from provision.net.source_health import SourceHealth
    from tests.provision.http_server import Server

REPO = "owner/model"
WEIGHTS = "unet/model.safetensors"
TOKEN = "hf_" + "T" * 30
FILES = {
    "model_index.json": b'{"_class_name": "X"}\n',
    "unet/config.json": b'{"a": 1}\n',
    WEIGHTS: random.Random(1).randbytes(3_000_000),  # noqa: S311 (weights, not secrets)
    "vae/model.safetensors": random.Random(2).randbytes(400_000),  # noqa: S311
}


def pull_of(root: Root, url: str, *, pinned: bool = True, trust: bool = False, tokens: tuple[str, ...] = ()) -> Pull:
    """Return a pull of the model `m` from the single hub at `url`; `trust` accepts hashes of a mirror."""
    path = root.path / "models.toml"
    path.write_text(hub_server.manifest_entry("m", REPO, FILES, pinned=pinned))
    hubs = Hubs(root, {"HF_ENDPOINT": url}, token_hosts=tokens)
    return Pull(root, "m", manifest.load(path).pick("m"), hubs, trust)


def hubs_of(root: Root, monkeypatch: pytest.MonkeyPatch, mirror: str, official: str) -> Hubs:
    """Return the hubs of a host with a selected mirror: first the mirror, then the official hub."""
    for module in ("hub_client", "hubs"):
        monkeypatch.setattr(f"provision.models.{module}.official_endpoint", lambda: official)
    chosen_mirrors.write(
        root,
        MirrorRecord({"hf": MirrorChoice("auto", (MirrorSource("mirror", mirror), MirrorSource("official", "")), "")}),
    )
    return Hubs(root, {})


def pull_from(root: Root, hubs: Hubs, text: str | None = None, *, pinned: bool = True, trust: bool = False) -> Pull:
    """Return a pull of the model `m` from several hubs; `text` is the manifest (default: one with FILES)."""
    path = root.path / "models.toml"
    path.write_text(text or hub_server.manifest_entry("m", REPO, FILES, pinned=pinned))
    return Pull(root, "m", manifest.load(path).pick("m"), hubs, trust)


def entry_of(*files: str) -> str:
    """Return the entry of the model `m` in a manifest; each of `files` is an inline table of TOML."""
    head = f'[m]\nrepo = "{REPO}"\nrevision = "{hub_server.REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
    return f"{head}files = [{', '.join(files)}]\n"


def run(work: Pull) -> list[tuple[str, int]]:
    """Run a pull, and return its progress reports as a list of (path, bytes)."""
    reports: list[tuple[str, int]] = []
    work.run(work.plan(), lambda path, count: reports.append((path, count)))
    return reports


def is_complete(work: Pull) -> bool:
    """Return whether every file of the model is present with its content."""
    return all(state.state == "ok" for state in work.check_files(Depth.HASH)) and all(
        (work.snapshot / path).read_bytes() == content for path, content in FILES.items()
    )


def count_gets(server: Server, path: str) -> int:
    """Return how many GET requests the server got whose path contains `path`."""
    return sum(method == "GET" and path in request_path for method, request_path, _ in server.requests)


def skip_waits(health: SourceHealth) -> tuple[list[str], list[float]]:
    """Make a run skip its waits; return two lists that the run fills: messages about waits, and skipped seconds."""
    texts: list[str] = []
    waits: list[float] = []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return self.is_set()

    health.tell = texts.append
    health.stopped = Stopped()
    return texts, waits
