"""Serves the models of a hub cache to other hosts, read-only, as a hub; they verify what they download.

Source of the protocol: the requests of huggingface_hub for a snapshot.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")
_LARGEST_BODY = 1 << 20  # bytes of a request


@dataclass(frozen=True)
class ServedModel:
    """Describe one model: {path: blob} of its pinned revision."""

    repo: str
    revision: str
    license: str
    files: Mapping[str, Path]

    def listing(self) -> list[dict[str, object]]:
        """Return the files as a hub lists them: large ones with their sha256, small ones with git's sha1."""
        rows = []
        for path, blob in sorted(self.files.items()):
            size = blob.stat().st_size
            row: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": blob.name[:40]}
            if len(blob.name) == 64:
                row["lfs"] = {"oid": blob.name, "size": size, "pointerSize": 135}
            rows.append(row)
        return rows


def served(repo: str, revision: str, license_: str, snapshot: Path, paths: list[str]) -> ServedModel:
    """Return the servable files of a model: those whose blob is named by a hash.

    A link is followed one step, since a blob may be a link into a store that repositories share, where it has another
    hash as its name.
    """
    files = {}
    for path in paths:
        link = snapshot / path
        if link.is_symlink() and link.is_file() and _BLOB.fullmatch(link.readlink().name):
            files[path] = link.parent / link.readlink()
    return ServedModel(repo, revision, license_, files)


def server(models: list[ServedModel], host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of these models; `serve_forever` runs it.

    Raises:
        OSError: the port is in use, or the host does not have the address.
    """
    return _Server((host, port), _handler({model.repo: model for model in models}, models))


def addresses() -> list[str]:
    """Return the IPv4 addresses of this host in its networks, to be shown to the user."""
    import psutil

    addresses_found = []
    for rows in psutil.net_if_addrs().values():
        addresses_found += [
            row.address for row in rows if row.family == socket.AF_INET and not row.address.startswith("127.")
        ]
    return sorted(addresses_found)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Print the traceback of an error, unless the client has closed the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(repos: Mapping[str, ServedModel], models: list[ServedModel]) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (one class, whose methods are counted together)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = "firstlight"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            """Answer `paths-info`, the listing of some files, which a caching proxy requests."""
            content = self.body()
            if content is None:
                return
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", urlsplit(self.path).path)
            model = self.model(match.group(1), match.group(2)) if match else None
            if model is None:
                self.missing("RepoNotFound")
                return
            with suppress(ValueError, TypeError, AttributeError, RecursionError):
                paths = json.loads(content).get("paths", [])
                self.json([row for row in model.listing() if row["path"] in paths], body=True)
                return
            self.reply(400, b"", {}, body=True)

        def body(self) -> bytes | None:
            """Return the body of a request; None after an error response.

            After an error the connection is closed, because the rest of the body was not read.
            """
            length = self.headers.get("Content-Length", "0")
            if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]+", length):
                self.reply(411, b"", {"Connection": "close"}, body=True)
            elif len(length) > 9 or int(length) > _LARGEST_BODY:
                self.reply(413, b"", {"Connection": "close"}, body=True)
            else:
                return self.rfile.read(int(length))
            return None

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tree|revision)/([^/]+)/?", path):
                repo, kind, revision = match.groups()
                model = self.model(repo, revision)
                if model is None:
                    self.missing("RevisionNotFound" if repo in repos else "RepoNotFound", body=body)
                elif kind == "tree":
                    self.json(model.listing(), body=body)
                else:
                    self.info(model, body=body)
            elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)) and match.group(1) in repos:
                self.info(repos[match.group(1)], body=body)
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                model = self.model(match.group(1), match.group(2))
                blob = model.files.get(match.group(3)) if model else None
                if model is None or blob is None:
                    self.missing("EntryNotFound" if model else "RepoNotFound", body=body)
                else:
                    self.file(blob, model.revision, body=body)
            else:
                self.missing("RepoNotFound", body=body)

        def model(self, repo: str, revision: str) -> ServedModel | None:
            candidates = [
                candidate for candidate in models if candidate.repo == repo and revision in {candidate.revision, "main"}
            ]
            if not candidates:
                return None
            # Entries with the same repository and revision, such as two variants, form one snapshot.
            files = {
                path: blob
                for candidate in candidates
                if candidate.revision == candidates[0].revision
                for path, blob in candidate.files.items()
            }
            return ServedModel(repo, candidates[0].revision, candidates[0].license, files)

        def info(self, model: ServedModel, *, body: bool) -> None:
            names = [{"rfilename": path} for path in sorted(model.files)]
            card = {"license": model.license}
            self.json(
                {"id": model.repo, "modelId": model.repo, "sha": model.revision, "siblings": names, "cardData": card},
                body=body,
            )

        def file(self, blob: Path, revision: str, *, body: bool) -> None:
            with blob.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                first, last = 0, size - 1
                match = _RANGE.fullmatch(self.headers.get("Range", ""))
                if match and match.group(2) and int(match.group(2)) < int(match.group(1)):
                    match = None  # an invalid range is ignored (RFC 9110, 14.1.1)
                if match:
                    first = int(match.group(1))
                    last = min(last, int(match.group(2))) if match.group(2) else last
                    if first >= size:
                        self.reply(416, b"", {"Content-Range": f"bytes */{size}"}, body=body)
                        return
                headers = {
                    "ETag": f'"{blob.name}"',
                    "X-Repo-Commit": revision,
                    "X-Linked-Size": str(size),
                    "X-Linked-Etag": f'"{blob.name}"',
                    "Accept-Ranges": "bytes",
                    "Content-Type": "application/octet-stream",
                    "Content-Length": str(last - first + 1),
                }
                if match:
                    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
                self.begin(206 if match else 200, headers)
                if body and size:
                    self.send(file, first, last - first + 1)

        def send(self, file: BinaryIO, first: int, count: int) -> None:
            self.wfile.flush()
            # sendfile, where the system has it, does not copy the bytes through this process.
            if self.connection.sendfile(file, first, count) < count:
                self.close_connection = True  # the file became shorter than the declared length

        def json(self, value: object, *, body: bool) -> None:
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=body)

        def missing(self, code: str, *, body: bool = True) -> None:
            self.reply(404, b"", {"X-Error-Code": code}, body=body)

        def reply(self, status: int, content: bytes, headers: Mapping[str, str], *, body: bool) -> None:
            self.begin(status, {**headers, "Content-Length": str(len(content))})
            if body:
                self.wfile.write(content)

        def begin(self, status: int, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler
