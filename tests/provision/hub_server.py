"""Builds the content of a hub with repositories of real files, and a manifest that pins these files."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from tests.provision.fake_hub import git_sha1

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.http_server import Fault, Server

REVISION = "1" * 40


def files_of(folder: Path) -> dict[str, bytes]:
    """Return {relative path: content} of all files in the folder of a saved pipeline."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def entry(path: str, content: bytes) -> dict[str, Any]:
    """Return the entry of a file in the JSON listing of a hub; weights also have a sha256 (`lfs`)."""
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if path.endswith(".safetensors"):
        row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return row


def served(repo: str, files: dict[str, bytes], revision: str = REVISION, **changes: Any) -> tuple[Any, Any]:
    """Return ({URL path: content}, {URL path: headers}) of a hub with one repository.

    `changes` are keys and values that replace those in every entry of the repository's listing.
    """
    rows = [{**entry(path, content), **changes} for path, content in files.items()]
    siblings = [{"rfilename": path} for path in files]
    info = json.dumps({"id": repo, "sha": revision, "siblings": siblings, "cardData": {"license": "mit"}}).encode()
    listing = json.dumps(rows).encode()
    content = {f"/api/models/{repo}/tree/{revision}": listing, f"/api/models/{repo}": info}
    content |= {f"/api/models/{repo}/revision/{name}": info for name in (revision, "main")}
    headers = {path: {"Content-Type": "application/json"} for path in content}
    for path, data in files.items():
        url_path = f"/{repo}/resolve/{revision}/{path}"
        row = entry(path, data)
        etag = row["lfs"]["oid"] if "lfs" in row else row["oid"]
        content[url_path] = data
        headers[url_path] = {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
    return content, headers


def start(serve: Any, repo: str, files: dict[str, bytes], *faults: Fault, **changes: Any) -> Server:
    """Start a hub with one repository and these faults; `changes` are passed to `served`."""
    content, headers = served(repo, files, **changes)
    server: Server = serve(content, *faults)
    server.headers = headers
    return server


def add(server: Server, repo: str, files: dict[str, bytes]) -> None:
    """Add a repository with these files to a running hub."""
    content, headers = served(repo, files)
    server.content |= content
    server.headers |= headers


def manifest_entry(
    name: str, repo: str, files: dict[str, bytes], *, variant: str | None = None, pinned: bool = True, extra: str = ""
) -> str:
    """Return the TOML entry of a model for models.toml, with sizes and hashes if `pinned`, and `extra` appended."""
    lines = [f'[{name}]\nrepo = "{repo}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"']
    lines += [f'variant = "{variant}"'] if variant else []
    lines += ["files = ["]
    for path, content in files.items():
        pins = ""
        if pinned and path.endswith(".safetensors"):
            pins = f', size = {len(content)}, sha256 = "{hashlib.sha256(content).hexdigest()}"'
        elif pinned:
            pins = f', size = {len(content)}, git_sha1 = "{git_sha1(content)}"'
        lines.append(f'  {{path = "{path}"{pins}}},')
    return "\n".join([*lines, "]", extra]) + "\n"
