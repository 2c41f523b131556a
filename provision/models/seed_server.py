"""Serves the models of a hub cache to other hosts, read-only, as a hub; they verify what they download.

Source of the protocol: the requests of huggingface_hub for a snapshot.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from provision.models import inventory
from provision.net.http_server import FilePart, HttpResponse, HttpServer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from provision.core.layout import Root
    from provision.models.manifest import Manifest
    from provision.net.http_server import HttpLimits, HttpRequest

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")


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


def complete_models(root: Root, manifest: Manifest) -> tuple[list[str], list[ServedModel]]:
    """Return the names and the servable files of the models that are complete in the hub in use.

    A model has an entry for each of its repository ids, former ones included.
    """
    names, models = [], []
    for cached in inventory.cached_models(root, manifest):
        if cached.state == "whole":
            names.append(cached.name)
            snapshot, paths = inventory.snapshot_of(root, cached.model), [file.path for file in cached.model.files]
            models += [
                served(repo, cached.model.revision, cached.model.license, snapshot, paths)
                for repo in (cached.model.repo, *cached.model.former_repos)
            ]
    return names, models


def served(repo: str, revision: str, license_: str, snapshot: Path, paths: list[str]) -> ServedModel:
    """Return a model with the files that can be served: those whose blob has a hash as its name.

    Only the first link is followed. A blob may itself be a link into the store that repositories share, where the
    file has another hash as its name.

    Args:
        repo: the id of the repository.
        revision: the pinned commit.
        license_: the name of the licence.
        snapshot: the folder of the snapshot.
        paths: the paths of the model's files in the snapshot.
    """
    files = {}
    for path in paths:
        link = snapshot / path
        if link.is_symlink() and link.is_file() and _BLOB.fullmatch(link.readlink().name):
            files[path] = link.parent / link.readlink()
    return ServedModel(repo, revision, license_, files)


def server(
    models: list[ServedModel], host: str, port: int, token: str | None = None, limits: HttpLimits | None = None
) -> HttpServer:
    """Return a server of these models; `serve_forever` runs it.

    Args:
        models: the models.
        host: the address of the server.
        port: the port; 0 selects a free one.
        token: the token that a client must send (`Authorization: Bearer TOKEN`); None: every client may download.
        limits: the limits of the server; default: those of HttpLimits.

    Raises:
        OSError: the port is in use, or the host does not have the address.
    """
    return HttpServer((host, port), _Routes(models, token).answer, limits)


def addresses() -> list[str]:
    """Return the IPv4 addresses of this host in its networks, to be shown to the user."""
    import psutil

    addresses_found = []
    for rows in psutil.net_if_addrs().values():
        addresses_found += [
            row.address for row in rows if row.family == socket.AF_INET and not row.address.startswith("127.")
        ]
    return sorted(addresses_found)


class _Routes:
    """Answers the requests of huggingface_hub for a snapshot of the models.

    Args:
        models: the models.
        token: the token that every request must have, or None.
    """

    def __init__(self, models: list[ServedModel], token: str | None) -> None:
        self._models = models
        self._token = token

    def answer(self, request: HttpRequest) -> HttpResponse:
        """Return the response to a request."""
        if self._token is not None and not self._is_allowed(request):
            return HttpResponse(401, headers={"WWW-Authenticate": "Bearer"})
        try:
            path = urlsplit(request.target).path
        except ValueError:  # an invalid IPv6 address
            return HttpResponse(400)
        if request.method == "POST":
            return self._paths_info(path, request.body)
        if request.method in {"GET", "HEAD"}:
            return self._get(unquote(path), request.headers.get("range", ""))
        return HttpResponse(405, headers={"Allow": "GET, HEAD, POST"})

    def _get(self, path: str, range_header: str) -> HttpResponse:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tree|revision)/([^/]+)/?", path):
            return self._description(match.group(1), match.group(2), match.group(3))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._description(match.group(1), "revision", None)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match.group(1), match.group(2), match.group(3), range_header)
        return _missing("RepoNotFound")

    def _is_allowed(self, request: HttpRequest) -> bool:
        sent = request.headers.get("authorization", "").encode("latin-1")
        return hmac.compare_digest(sent, f"Bearer {self._token}".encode())

    def _paths_info(self, path: str, body: bytes) -> HttpResponse:
        """Answer `paths-info`, the listing of some files, which a caching proxy requests."""
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", path)
        model = self._model(match.group(1), match.group(2)) if match else None
        if model is None:
            return _missing("RepoNotFound")
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            paths = json.loads(body).get("paths", [])
            return _json([row for row in model.listing() if row["path"] in paths])
        return HttpResponse(400)

    def _description(self, repo: str, kind: str, revision: str | None) -> HttpResponse:
        """Answer `tree` with the listing of a revision, and `revision` with its information; None is any revision."""
        model = self._model(repo, revision)
        if model is None:
            is_served = any(candidate.repo == repo for candidate in self._models)
            return _missing("RevisionNotFound" if is_served else "RepoNotFound")
        if kind == "tree":
            return _json(model.listing())
        names = [{"rfilename": path} for path in sorted(model.files)]
        card = {"license": model.license}
        return _json({"id": repo, "modelId": repo, "sha": model.revision, "siblings": names, "cardData": card})

    def _model(self, repo: str, revision: str | None) -> ServedModel | None:
        """Return a model with the files of all entries of its revision; None stands for any revision."""
        candidates = [
            candidate
            for candidate in self._models
            if candidate.repo == repo and revision in {candidate.revision, "main", None}
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

    def _file(self, repo: str, revision: str, path: str, range_header: str) -> HttpResponse:
        """Answer with a file, or with the valid range of it that the request names."""
        model = self._model(repo, revision)
        blob = model.files.get(path) if model else None
        if model is None or blob is None:
            return _missing("EntryNotFound" if model else "RepoNotFound")
        try:
            file = blob.open("rb")
        except OSError:  # the model was removed after the server had started
            return _missing("EntryNotFound")
        size = os.fstat(file.fileno()).st_size
        first, last = 0, size - 1
        match = _RANGE.fullmatch(range_header)
        if match and match.group(2) and int(match.group(2)) < int(match.group(1)):
            match = None  # an invalid range is ignored (RFC 9110, 14.1.1)
        if match:
            first = int(match.group(1))
            last = min(last, int(match.group(2))) if match.group(2) else last
            if first >= size:
                file.close()
                return HttpResponse(416, headers={"Content-Range": f"bytes */{size}"})
        headers = {
            "ETag": f'"{blob.name}"',
            "X-Repo-Commit": model.revision,
            "X-Linked-Size": str(size),
            "X-Linked-Etag": f'"{blob.name}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if match:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return HttpResponse(206 if match else 200, FilePart(file, first, last - first + 1), headers)


def _json(value: object) -> HttpResponse:
    return HttpResponse(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _missing(code: str) -> HttpResponse:
    return HttpResponse(404, headers={"X-Error-Code": code})
