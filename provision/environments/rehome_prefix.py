"""Rewrites a prefix that was moved: the paths in scripts, records and binaries."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from base64 import urlsafe_b64encode
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def rewrite(prefix: Path, old: str, new: str) -> None:
    """Make every script of an environment name `new` where it names `old`, and every RECORD agree.

    Args:
        prefix: the environment's folder as it lies now.
        old: the path that its scripts carry.
        new: the path that they shall carry.
    """
    before, after = os.fsencode(old), os.fsencode(new)
    changed = {}
    scripts = prefix / ("Scripts" if sys.platform == "win32" else "bin")
    for script in sorted(scripts.iterdir()) if scripts.is_dir() else []:
        if script.is_symlink() or not script.is_file() or _is_binary(script):
            continue
        content = script.read_bytes()
        # Whole path components alone: /data/env is not meant by /data/env2.
        fresh = re.sub(re.escape(before) + rb"(?=[/\"'\s:;)]|$)", lambda _: after, content)
        if fresh != content:
            part = script.with_name(f".{script.name}.part")
            part.write_bytes(fresh)
            shutil.copymode(script, part)
            part.replace(script)
            changed[script.name] = (hashlib.sha256(fresh).digest(), len(fresh))
    for pattern in ("lib/python3*/site-packages", "Lib/site-packages"):
        for record in prefix.glob(f"{pattern}/*.dist-info/RECORD"):
            _rerecord(record, changed)


def _rerecord(record: Path, changed: dict[str, tuple[bytes, int]]) -> None:
    text = record.read_text(encoding="utf-8")
    if "../bin/" not in text and "../Scripts/" not in text:
        return
    lines = text.splitlines()
    fresh = []
    for line in lines:
        path = line.partition(",")[0]
        name = path.rpartition("/")[2]
        if path.startswith("../") and path.split("/")[-2:-1] in (["bin"], ["Scripts"]) and name in changed:
            digest, size = changed[name]
            line = f"{path},sha256={urlsafe_b64encode(digest).rstrip(b'=').decode()},{size}"  # noqa: PLW2901 (its row)
        fresh.append(line)
    if fresh != lines:
        part = record.with_name("RECORD.part")
        part.write_text("\n".join(fresh) + "\n", encoding="utf-8")
        part.replace(record)


def _is_binary(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"\0" in opened.read(1024)
