"""The inputs that once ended a reader with another error than firstlight's own, or that it once accepted."""

from __future__ import annotations

import json

COMMIT, BLOB = "a" * 40, "b" * 40
EVERY = [b"", b"\0", b"\xff\xfe", b"[" * 40_000, b"[" * 900 + b"]" * 900, b"null", b"[]", b"{}", b'"x"', b"1", b"[[]]"]
_HEADER = b'{"schema": 2, "command": "setup"}\n'
_FILE = {"size": 1, "blob_id": BLOB}


def _tree(*names: str) -> bytes:
    return json.dumps({"format_version": 1, "files": dict.fromkeys(names, _FILE)}).encode()


def _mirror(url: object) -> bytes:
    source = {"name": "m", "url": url, "kind": "index", "channels": {}, "defaults": None}
    choice = {"asked": "m", "sources": [source], "why": ""}
    rest = {"written": [], "nodefaults": False, "restored": False}
    return json.dumps({"schema": 1, "choices": {"pip": choice, "hf": choice}, **rest}).encode()


_VARIABLES = [b'{"variables": {"A;touch x;B": "v", "LD_PRELOAD": "/x"}}', b'{"variables": {"HF_ENDPOINT": [1]}}']
KEPT: dict[str, list[bytes]] = {
    "journal": [
        _HEADER + b'{"act": "links", "paths": ["/a", "/b"], "targets": ["/c"]}\n',
        _HEADER + b'{"act": "texts", "paths": ["/a"], "was": [], "texts": ["x"]}\n',
        _HEADER
        + b'{"act": "file", "at": 1e999, "path": "/a", "backup": null, "mode": 1'
        + b"0" * 30
        + b', "sha256": "x"}\n',
        _HEADER + b'{"act": "folder", "at": 1' + b"0" * 400 + b', "path": "a\\u0000b"}\n',
    ],
    "links.json": [b'{"links": [{"path": "\\ud800", "target": "x"}]}', b'{"links": [{"path": ["x"], "target": "x"}]}'],
    "variables.json": _VARIABLES,
    "variables of a home": _VARIABLES,
    "mirrors.json": [_mirror("http://[::1"), _mirror("http://h:99999/"), _mirror(5), _mirror("\n")],
    "roots.json": [b'{"roots": [{"path": "/r", "id": "x", "mount": 5, "paths": []}]}'],
    ".firstlight.json": [b'{"prefix": 5}', b'{"prefix": "x"}', b'{"variant": ["cpu"]}'],
    "conda-meta": [b'{"name": "hello", "depends": [""]}', b'{"name": "hello", "paths_data": {"paths": [5]}}'],
    "RECORD": [
        b"\xff\xfe broken",
        b"hello/__init__.py,sha256=abc,x\n",
        b"hello/__init__.py,sha256=!,1\n",
        b'"\n',
        b"\0" * 4096,
    ],
    "tree": [_tree("a\0b"), _tree("file", "file/x"), _tree("/x"), _tree("../x"), _tree("a//b", "."), _tree("x" * 300)],
    "refs/main": [b"../../..", b"a\0b", b"a" * 5000],
    "uv.toml": [
        b"http-proxy = 2020-01-01\n",
        b"concurrent-downloads = inf\n",
        b'index = "x"\n',
        b"index = [{url = 'https://x', name = 2020-01-01}]\n",
        b"[pip]\nindex-url = {a = 1}\nextra-index-url = [{b = [2020-01-01]}]\n",
        b"no-index = [nan]\n",
    ],
    "changed uv.toml": [b'index = "x"\n', b"index = [5]\n", b"[index]\nurl = 1\n", b"index-url = 5\nindex = [[]]\n"],
    "conda's .condarc": [
        b"channel_alias: [a]\n",
        b"custom_channels: {a: [b], 5: c}\n",
        b"envs_dirs: 5\n",
        b"envs_dirs: [[a]]\n",
        b"a: 2020-99-99\n",
        b"? {a: b}\n: c\n",
    ],
    "changed .condarc": [b"a: 2020-99-99\n", b"custom_channels: [a]\n", b"? {a: b}\n: c\n"],
    "requirements.lock": [
        b"torch==1 ; python_version < 'x.y'\n",
        b"torch==1 ; extra == 'x'\n",
        b"torch>=1\n",
        b"torch==1.*\n",
        b"torch @ https://x\n",
    ],
    "conda-lock.yml": [b"version: 1\npackage: [5]\n", b"version: 1\npackage: [2020-99-99]\n"],
    "environment.yml": [
        b"dependencies: [2020-99-99]\n",
        b"dependencies: [a]\nchannels: 5\n",
        b"dependencies: [a]\nplatforms: {a: b}\nchannels: [[]]\n",
        b"dependencies: [a]\n5: x\ny: z\n",
    ],
    "architecture": [b'{"classes": {"unet": ["a"]}}', b'{"classes": []}', b'{"classes": {}, "native": 5}'],
    "seed server": [b"GET //[::1 HTTP/1.1\r\nHost: x\r\n\r\n", b"POST http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n"],
}
# {place of a file: its contents} for the commands that read it.
COMMANDS: dict[str, list[bytes]] = {
    "root/.firstlight/variables/*.json": _VARIABLES,
    "root/.firstlight/mirrors.json": [_mirror("http://[::1"), b"[" * 5000],
    "root/envs/diffusers/lib/*/site-packages/torch-*/RECORD": [b"\xff\xfe broken"],
}


def of(name: str) -> list[bytes]:
    """Return the inputs of a reader, with those that every reader gets."""
    return [*EVERY, *KEPT.get(name, [])]
