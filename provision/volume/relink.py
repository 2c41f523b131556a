"""Writes relink.sh and relink.ps1, the scripts that make the recorded links again with nothing but a shell."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from provision.core.shell import powershell_quoted, shell_quoted
from provision.fs.atomic import write_atomic
from provision.volume.links import SCHEMA, Link, recorded, relative_to_home
from provision.volume.marker import read_marker

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from provision.core.layout import Root


def write(root: Root, home: Path, links: Iterable[Link]) -> None:
    """Write the record of these links, and the scripts that restore them."""
    for path, content in files(root, home, links).items():
        write_atomic(path, content)


def files(root: Root, home: Path, links: Iterable[Link]) -> dict[Path, bytes]:
    """Return {path: content} of the record and the scripts for these links."""
    ordered = sorted(set(links))
    marker = read_marker(root) or {}
    rows = [
        {
            "path": relative_to_home(link.path, home),
            "target": os.path.relpath(link.target, root.path).replace(os.sep, "/"),
        }
        for link in ordered
    ]
    record = {"schema": SCHEMA, "root": str(root.path), "links": rows}
    return {
        root.links: (json.dumps(record, indent=1) + "\n").encode("ascii"),
        root.relink: shell_script(root, home, str(marker.get("id")), ordered),
        root.relink.with_suffix(".ps1"): powershell_script(root, home, str(marker.get("id")), ordered),
    }


def forget(root: Root, home: Path, path: Path) -> None:
    """Remove one link from the record and the scripts."""
    links = recorded(root, home)
    if any(link.path == path for link in links):
        write(root, home, [link for link in links if link.path != path])


def shell_script(root: Root, home: Path, volume: str, links: Sequence[Link]) -> bytes:
    """Return relink.sh for these links.

    The script starts no process for a correct link, accepts any bytes in a path, and changes nothing that firstlight
    did not make. `volume` is the id in the marker.
    """
    calls = []
    for link in links:
        is_in_home = link.path.is_relative_to(home)
        path = (
            b'"$home"' + shell_quoted("/" + str(link.path.relative_to(home)))
            if is_in_home
            else shell_quoted(str(link.path))
        )
        target = os.path.relpath(link.target, root.path)
        recorded_target = shell_quoted(f"{root.path}/{target}")
        calls.append(b'link %s "$root"%s %s' % (path, shell_quoted("/" + target), recorded_target))
    return _SHELL % {
        b"root": shell_quoted(str(root.path)),
        b"id": shell_quoted(volume),
        b"home": shell_quoted(str(home)),
        b"links": b"\n".join(calls),
    }


def powershell_script(root: Root, home: Path, volume: str, links: Sequence[Link]) -> bytes:
    """Return relink.ps1 for these links; it makes junctions, which need no administrator rights on Windows."""
    calls = []
    for link in links:
        is_in_home = link.path.is_relative_to(home)
        path = (
            f"(Join-Path $HOME {powershell_quoted(str(link.path.relative_to(home)))})"
            if is_in_home
            else powershell_quoted(str(link.path))
        )
        calls.append(
            f"Restore-Link {path} (Join-Path $root {powershell_quoted(os.path.relpath(link.target, root.path))})"
        )
    text = _POWERSHELL % {
        "root": powershell_quoted(str(root.path)),
        "id": powershell_quoted(volume),
        "links": "\n".join(calls),
    }
    return text.encode("utf-8", "surrogateescape")


_SHELL = b"""#!/bin/sh
# Written by firstlight whenever its links change. Makes the links into this volume again after a wipe of the home.
#   sh relink.sh        prints changes and a summary         sh relink.sh -q     prints only changes and problems
# Exit code: 0 all links are right; 1 a link could not be made; 3 the path of a link is taken; 4 no volume.
root=%(root)s
id=%(id)s
home=${HOME:-%(home)s}
loud=yes
[ "${1-}" = -q ] && loud=
made=0 right=0 left=0 failed=0

marked() {
    [ -r "$1/.firstlight/volume.json" ] || return 1
    while IFS= read -r line; do
        case $line in *"\\"$id\\""*) return 0 ;; esac
    done <"$1/.firstlight/volume.json"
    return 1
}

say() { printf '%%s\\n' "$*"; }

# make PATH TARGET: make the link, its parent folder and its target.
make() {
    parent=${1%%/*}
    if { [ -d "$parent" ] || mkdir -p -- "$parent"; } &&
        { [ -d "$2" ] || mkdir -p -- "$2"; } &&
        ln -s -- "$2" "$1"; then
        made=$((made + 1))
        say "linked $1 -> $2"
    else
        failed=$((failed + 1))
    fi
}

# link PATH TARGET RECORDED: make the link unless it is right. RECORDED is TARGET at the earlier mount point.
link() {
    if [ -h "$1" ]; then
        if [ "$1" -ef "$2" ] 2>/dev/null; then
            right=$((right + 1))
            return
        fi
        current=$(readlink "$1"; printf x)
        current=${current%%??}
        case $current in
        "$2" | "$3")
            rm -f -- "$1"
            make "$1" "$2" ;;
        *)
            left=$((left + 1))
            say "left alone: $1 is a link to $current" ;;
        esac
    elif [ -d "$1" ] && ! rmdir -- "$1" 2>/dev/null; then
        left=$((left + 1))
        say "left alone: $1 is a folder that is not empty; 'provision repair' merges it"
    elif [ -e "$1" ]; then
        left=$((left + 1))
        say "left alone: $1 is a file"
    else
        make "$1" "$2"
    fi
}

if ! marked "$root"; then
    # The volume may be mounted elsewhere now. Its path follows from the path of this script, which is on the volume.
    case $0 in */*) here=${0%%/*} ;; *) here=. ;; esac
    cd -- "$here/.." && root=$PWD
    if ! marked "$root"; then
        say "relink: $root has no .firstlight marker: the volume is not mounted. Nothing was linked." >&2
        exit 4
    fi
fi

%(links)s

[ -z "$loud" ] || say "relink: $right right, $made made, $left left alone, $failed failed"
[ "$failed" = 0 ] || exit 1
[ "$left" = 0 ] || exit 3
"""

_POWERSHELL = """\
# Written by firstlight whenever its links change. Makes the links into this volume again after a wipe of the home.
$root = %(root)s
$id = %(id)s
function Test-Volume($folder) {
    $marker = Join-Path $folder '.firstlight/volume.json'
    (Test-Path -LiteralPath $marker) -and ((Get-Content -Raw -LiteralPath $marker).Contains('"' + $id + '"'))
}
if (-not (Test-Volume $root)) {
    $root = Split-Path -Parent $PSScriptRoot
    if (-not (Test-Volume $root)) {
        [Console]::Error.WriteLine("relink: $root has no .firstlight marker: the volume is not mounted.")
        exit 4
    }
}
$left = 0
function Restore-Link($path, $target) {
    $item = Get-Item -Force -LiteralPath $path -ErrorAction SilentlyContinue
    if ($item -and $item.LinkType) {
        if (@($item.Target)[0] -eq $target) { return }
        Write-Output "left alone: $path is a link to $($item.Target)"
        $script:left++
        return
    }
    if ($item -and (-not $item.PSIsContainer -or @(Get-ChildItem -Force -LiteralPath $path).Count)) {
        Write-Output "left alone: $path is a file or a folder that is not empty; 'provision repair' merges it"
        $script:left++
        return
    }
    if ($item) { Remove-Item -LiteralPath $path }
    New-Item -ItemType Directory -Force -Path (Split-Path -Parent $path), $target | Out-Null
    New-Item -ItemType Junction -Path $path -Target $target | Out-Null
    Write-Output "linked $path -> $target"
}
%(links)s
if ($left) { exit 3 }
"""
