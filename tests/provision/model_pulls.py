"""A small model, a pull of it, and what became of it."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

from provision.mirrors import record
from provision.mirrors.record import MirrorChoice, MirrorRecord, MirrorSource
from provision.models import manifest
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.verify import Depth
from tests.provision import hub_server

if TYPE_CHECKING:
    import pytest

    from provision.core.layout import Root
    from provision.net.source_health import SourceHealth
    from tests.provision.http_server import Played

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
    path = root.path / "models.toml"
    path.write_text(hub_server.manifest_entry("m", REPO, FILES, pinned=pinned))
    found = Hubs(root, {"HF_ENDPOINT": url}, token_hosts=tokens)
    return Pull(root, "m", manifest.load(path).pick("m"), found, trust)


def hubs_of(root: Root, monkeypatch: pytest.MonkeyPatch, mirror: str, official: str) -> Hubs:
    """The hubs of a host that has chosen a mirror: it comes first, the official one after it."""
    for module in ("hub_client", "hubs"):
        monkeypatch.setattr(f"provision.models.{module}.official_endpoint", lambda: official)
    record.write(
        root,
        MirrorRecord({"hf": MirrorChoice("auto", (MirrorSource("mirror", mirror), MirrorSource("official", "")), "")}),
    )
    return Hubs(root, {})


def pull_from(root: Root, hubs: Hubs, text: str | None = None, *, pinned: bool = True, trust: bool = False) -> Pull:
    """A pull of `m` as a manifest of this text has it."""
    path = root.path / "models.toml"
    path.write_text(text or hub_server.manifest_entry("m", REPO, FILES, pinned=pinned))
    return Pull(root, "m", manifest.load(path).pick("m"), hubs, trust)


def entry_of(*files: str) -> str:
    """An entry whose files are given as TOML."""
    head = f'[m]\nrepo = "{REPO}"\nrevision = "{hub_server.REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
    return f"{head}files = [{', '.join(files)}]\n"


def run(work: Pull) -> list[tuple[str, int]]:
    told: list[tuple[str, int]] = []
    work.run(work.plan(), lambda path, count: told.append((path, count)))
    return told


def is_whole(work: Pull) -> bool:
    return all(state.state == "ok" for state in work.look(Depth.HASH)) and all(
        (work.snapshot / path).read_bytes() == content for path, content in FILES.items()
    )


def gets(played: Played, path: str) -> int:
    return sum(method == "GET" and path in asked for method, asked, _ in played.requests)


def quick(health: SourceHealth) -> tuple[list[str], list[float]]:
    """Let a run wait no time: (what it says of that, the seconds that it would have waited)."""
    told: list[str] = []
    slept: list[float] = []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            slept.append(timeout or 0.0)
            return self.is_set()

    health.tell = told.append
    health.stopped = Stopped()
    return told, slept
