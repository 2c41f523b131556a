"""Provides a hub on loopback with one repository, whose content and faults a test sets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any


@dataclass
class FakeHub:
    """Holds the content and the faults of a hub on loopback with one repository.

    `faults` changes responses by these keys: "status" is the HTTP status of every response, "tree" the text of the
    listing, "content" {path: bytes sent instead}, and "cut" {path: length of the first response, which ends early}.
    `seen` records (method, path, Authorization header) of each request.
    """

    files: dict[str, bytes]
    repo: str = "owner/model"
    revision: str = "a" * 40
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    faults: dict[str, Any] = field(default_factory=dict)
    url: str = ""

    def entries(self) -> list[dict[str, Any]]:
        rows = []
        for path, content in self.files.items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if path.endswith(".safetensors"):
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        return rows

    def manifest(self, name: str = "model", *, pinned: bool = True) -> str:
        lines = [f'[{name}]\nrepo = "{self.repo}"\nrevision = "{self.revision}"\nlicense = "mit"']
        lines += ['architecture = "tiny-ddpm"\nfiles = [']
        for path, content in self.files.items():
            pins = f', size = {len(content)}, sha256 = "{hashlib.sha256(content).hexdigest()}"' if pinned else ""
            lines.append(f'  {{path = "{path}"{pins}}},')
        return "\n".join([*lines, "]"]) + "\n"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (one class, whose methods are counted together)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            hub.seen.append((self.command, self.path, self.headers.get("Authorization")))
            if "status" in hub.faults:
                self.reply(hub.faults["status"], b"no", {}, body=body)
            elif self.path.startswith(f"/api/models/{hub.repo}/tree/{hub.revision}"):
                text = hub.faults.get("tree", json.dumps(hub.entries())).encode()
                self.reply(200, text, {"Content-Type": "application/json"}, body=body)
            elif self.path.startswith(f"/{hub.repo}/resolve/{hub.revision}/"):
                self.file(self.path.removeprefix(f"/{hub.repo}/resolve/{hub.revision}/"), body=body)
            else:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)

        def file(self, path: str, *, body: bool) -> None:
            content = hub.faults.get("content", {}).get(path, hub.files.get(path))
            if content is None:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
                return
            entry = next(row for row in hub.entries() if row["path"] == path)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.revision, "Accept-Ranges": "bytes"}
            requested = self.headers.get("Range")
            if requested and requested != "bytes=0-0":
                first = int(requested.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                self.reply(206, content[first:], headers, body=body)
                return
            cut = hub.faults.get("cut", {}).pop(path, None) if body else None
            self.reply(200, content, headers, body=body, cut=cut)

        def reply(
            self, code: int, content: bytes, headers: dict[str, str], *, body: bool, cut: int | None = None
        ) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content if cut is None else content[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler
