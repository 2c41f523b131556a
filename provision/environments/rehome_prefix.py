"""Replaces the path of a moved environment in its scripts, and updates their hashes in RECORD, the list of a wheel."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

from provision.fs import records


def rewrite(prefix: Path, old: str, new: str) -> None:
    """Replace the path `old` by `new` in all scripts of an environment, and update their hashes and sizes in RECORD.

    Args:
        prefix: the current folder of the environment.
        old: the path of the environment in the scripts.
        new: the path that replaces `old`.
    """
    if not Path(old).is_absolute():  # the marker of an older version has no path
        return
    old_bytes, new_bytes = os.fsencode(old), os.fsencode(new)
    changed = {}
    scripts = prefix / ("Scripts" if sys.platform == "win32" else "bin")
    for script in sorted(scripts.iterdir()) if scripts.is_dir() else []:
        if script.is_symlink() or not script.is_file() or _is_binary(script):
            continue
        content = script.read_bytes()
        # Match only whole components of a path: /data/env must not match in /data/env2.
        rewritten = re.sub(re.escape(old_bytes) + rb"(?=[/\"'\s:;)]|$)", lambda _: new_bytes, content)
        if rewritten != content:
            part = script.with_name(f".{script.name}.part")
            part.write_bytes(rewritten)
            shutil.copymode(script, part)
            part.replace(script)
            changed[script.name] = (hashlib.sha256(rewritten).digest(), len(rewritten))
    for pattern in ("lib/python3*/site-packages", "Lib/site-packages"):
        for record in prefix.glob(f"{pattern}/*.dist-info/RECORD"):
            _update_record(record, changed)


def _update_record(record: Path, changed: dict[str, tuple[bytes, int]]) -> None:
    """Write the new hashes and sizes of changed scripts into a RECORD file.

    A damaged RECORD is left as it is.

    Args:
        record: the path of the RECORD file.
        changed: {name of a script: (sha256 digest, size in bytes)}.
    """
    try:
        text = records.read_bytes(record).decode("utf-8")
    except ValueError:  # the package is damaged, and the next check reports it
        return
    if "../bin/" not in text and "../Scripts/" not in text:
        return
    lines = text.splitlines()
    new_lines = []
    for line in lines:
        path = line.partition(",")[0]
        name = path.rpartition("/")[2]
        if path.startswith("../") and path.split("/")[-2:-1] in (["bin"], ["Scripts"]) and name in changed:
            digest, size = changed[name]
            line = f"{path},sha256={urlsafe_b64encode(digest).rstrip(b'=').decode()},{size}"  # noqa: PLW2901 (the new row replaces the old one)
        new_lines.append(line)
    if new_lines != lines:
        part = record.with_name("RECORD.part")
        part.write_text("\n".join(new_lines) + "\n", encoding="utf-8")
        part.replace(record)


def _is_binary(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" in stream.read(1024)
