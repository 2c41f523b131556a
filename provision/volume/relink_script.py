"""Builds the text of relink.sh and relink.ps1: a section of links for each owner, and the code that makes a link."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from provision.core.shell import powershell_quoted, shell_quoted

if TYPE_CHECKING:
    from provision.volume.links import LinkFile, LinkRow
    from provision.volume.owner import Owner


def shell_script(volume: str, content: LinkFile) -> bytes:
    """Return the content of relink.sh for all recorded links of a volume; `volume` is the id in the root's marker.

    The script runs the section of the host and home on which it is started. It starts no process for a correct link,
    accepts any bytes in a path, and changes nothing that firstlight did not make.
    """
    sections = [
        b"%s)\n%s\n    ;;" % (shell_quoted(str(owner)), b"\n".join(_shell_calls(b"link", content.of(owner))))
        for owner in _owners(content)
    ]
    commands = [
        b'    say "  provision repair --root $root --adopt "%s' % shell_quoted(shlex.quote(str(owner)))
        for owner in _owners(content)
    ]
    none = [b'    say "relink: no links of $host:$home are recorded. To take over those of another host:"', *commands]
    other = b"\n".join([*none, b"    left=$((left + 1))"] if commands else [b"    :"])
    return _SHELL % {
        b"id": shell_quoted(volume),
        b"root": shell_quoted(content.rows[0].root if content.rows else ""),
        b"sections": b"\n".join([*sections, b"*)\n%s\n    ;;" % other]),
        b"offers": b"\n".join(_shell_calls(b"offer", content.of(None))),
    }


def powershell_script(volume: str, content: LinkFile) -> bytes:
    """Return the content of relink.ps1 for all recorded links; it makes junctions, which need no special rights."""
    sections = [
        f"if ($owner -ceq {powershell_quoted(str(owner))}) {{\n    $known = $true\n"
        + "\n".join(_powershell_calls("Restore-Link", content.of(owner)))
        + "\n}"
        for owner in _owners(content)
    ]
    commands = [
        f'    Write-Output ("  provision repair --root $root --adopt " + {powershell_quoted(shlex.quote(str(owner)))})'
        for owner in _owners(content)
    ]
    text = _POWERSHELL % {
        "id": powershell_quoted(volume),
        "root": powershell_quoted(content.rows[0].root if content.rows else ""),
        "sections": "\n".join(sections),
        "owners": "\n".join(commands),
        "some": "$true" if commands else "$false",
        "offers": "\n".join(_powershell_calls("Restore-Missing", content.of(None))),
    }
    return text.encode("utf-8", "surrogateescape")


def _owners(content: LinkFile) -> list[Owner]:
    return sorted({row.owner for row in content.rows if row.owner is not None})


def _shell_calls(function: bytes, rows: list[LinkRow]) -> list[bytes]:
    calls, root = [], None
    for row in rows:
        if row.root != root:
            root = row.root
            calls.append(b"    volume %s" % shell_quoted(root))
        in_home = row.path.startswith("~/")
        path = b'"$home"' + shell_quoted(row.path[1:]) if in_home else shell_quoted(row.path)
        target = b'"$root"' if row.target == "." else b'"$root"' + shell_quoted(f"/{row.target}")
        calls.append(b"    %s %s %s %s" % (function, path, target, shell_quoted(row.recorded_target)))
    return calls


def _powershell_calls(function: str, rows: list[LinkRow]) -> list[str]:
    calls, root = [], None
    for row in rows:
        if row.root != root:
            root = row.root
            calls.append(f"    Use-Volume {powershell_quoted(root)}")
        in_home = row.path.startswith("~/")
        path = f"(Join-Path $HOME {powershell_quoted(row.path[2:])})" if in_home else powershell_quoted(row.path)
        calls.append(f"    {function} {path} (Join-Path $root {powershell_quoted(row.target)})")
    return calls


_SHELL = b"""#!/bin/sh
# Written by firstlight whenever its links change. Makes the links of this host and home into this volume again.
#   sh relink.sh        prints changes and a summary         sh relink.sh -q     prints only changes and problems
# Exit code: 0 all links are right; 1 a link could not be made; 3 the path of a link is taken, or no links of this host
# are recorded; 4 no volume.
id=%(id)s
loud=yes
[ "${1-}" = -q ] && loud=
made=0 right=0 left=0 failed=0
root= elsewhere=

say() { printf '%%s\\n' "$*"; }

case ${HOME-} in
/*) home=$HOME ;;
*)
    say "relink: HOME is not set, so the links of this home are unknown. Nothing was linked." >&2
    exit 4 ;;
esac
while [ "$home" != / ] && [ "$home" != "${home%%/}" ]; do home=${home%%/}; done
{ IFS= read -r host </proc/sys/kernel/hostname; } 2>/dev/null || host=$(uname -n)

marked() {
    [ -r "$1/.firstlight/volume.json" ] || return 1
    while IFS= read -r line; do
        case $line in *"\\"$id\\""*) return 0 ;; esac
    done <"$1/.firstlight/volume.json"
    return 1
}

# volume ROOT: set $root to the volume, which is at ROOT, or where this script is.
volume() {
    [ "$root" = "$1" ] && return
    root=$1
    marked "$root" && return
    if [ -z "$elsewhere" ]; then
        case $0 in */*) here=${0%%/*} ;; *) here=. ;; esac
        cd -- "$here/.." && elsewhere=$PWD
    fi
    root=$elsewhere
    marked "$root" && return
    say "relink: $root has no .firstlight marker: the volume is not mounted. Nothing was linked." >&2
    exit 4
}

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

# link PATH TARGET RECORDED: make the link unless it is right. RECORDED is TARGET at the recorded mount point.
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
    elif [ "$1" -ef "$2" ] 2>/dev/null; then
        right=$((right + 1))
    elif [ -d "$1" ] && ! rmdir -- "$1" 2>/dev/null; then
        left=$((left + 1))
        say "left alone: $1 is a folder that is not empty; 'provision repair' merges it or names the command"
    elif [ -e "$1" ]; then
        left=$((left + 1))
        say "left alone: $1 is a file"
    else
        make "$1" "$2"
    fi
}

# offer PATH TARGET: make a link whose owner is unknown, only where nothing is.
offer() {
    if [ -h "$1" ] || [ -e "$1" ]; then
        if [ "$1" -ef "$2" ] 2>/dev/null; then right=$((right + 1)); fi
    else
        make "$1" "$2"
    fi
}

volume %(root)s
case $host:$home in
%(sections)s
esac

%(offers)s

[ -z "$loud" ] || say "relink: $right right, $made made, $left left alone, $failed failed"
[ "$failed" = 0 ] || exit 1
[ "$left" = 0 ] || exit 3
"""

_POWERSHELL = """\
# Written by firstlight whenever its links change. Makes the links of this host and home into this volume again.
$id = %(id)s
$owner = "$([System.Net.Dns]::GetHostName()):$HOME"
function Test-Volume($folder) {
    $marker = Join-Path $folder '.firstlight/volume.json'
    (Test-Path -LiteralPath $marker) -and ((Get-Content -Raw -LiteralPath $marker).Contains('"' + $id + '"'))
}
function Use-Volume($folder) {
    if ($folder -and (Test-Volume $folder)) { $script:root = $folder; return }
    $script:root = Split-Path -Parent $PSScriptRoot
    if (-not (Test-Volume $script:root)) {
        [Console]::Error.WriteLine("relink: $script:root has no .firstlight marker: the volume is not mounted.")
        exit 4
    }
}
$left = 0
$known = $false
function Add-Link($path, $target) {
    New-Item -ItemType Directory -Force -Path (Split-Path -Parent $path), $target | Out-Null
    New-Item -ItemType Junction -Path $path -Target $target | Out-Null
    Write-Output "linked $path -> $target"
}
function Restore-Link($path, $target) {
    $item = Get-Item -Force -LiteralPath $path -ErrorAction SilentlyContinue
    if ($item -and $item.LinkType) {
        if (@($item.Target)[0] -eq $target) { return }
        Write-Output "left alone: $path is a link to $($item.Target)"
        $script:left++
        return
    }
    if ($item -and (-not $item.PSIsContainer -or @(Get-ChildItem -Force -LiteralPath $path).Count)) {
        Write-Output "left alone: $path is a file or a filled folder; 'provision repair' merges it or names the command"
        $script:left++
        return
    }
    if ($item) { Remove-Item -LiteralPath $path }
    Add-Link $path $target
}
function Restore-Missing($path, $target) {
    if (-not (Get-Item -Force -LiteralPath $path -ErrorAction SilentlyContinue)) { Add-Link $path $target }
}
Use-Volume %(root)s
%(sections)s
if (%(some)s -and -not $known) {
    Write-Output "relink: no links of $owner are recorded. To take over those of another host:"
%(owners)s
    $left++
}
%(offers)s
if ($left) { exit 3 }
"""
