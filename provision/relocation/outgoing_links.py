"""Finds the relative links that lead out of a folder, and makes them absolute, so that the folder can be moved."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.fs import tree
from provision.fs.kept_metadata import ALL_KEPT
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import preflight
from provision.volume.journal_acts import LinkTexts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from provision.fs.kept_metadata import KeptMetadata
    from provision.volume.journal import Journal

_MOST_LINKS = 40  # the limit of the Linux kernel (source: include/linux/namei.h, MAXSYMLINKS)


@dataclass(frozen=True)
class OutgoingLink:
    """Describe one relative link that leads out of a folder.

    `path` is relative to the folder. `was` is the link's present text, `text` an absolute path to the same file.
    """

    path: str
    was: str
    text: str


def make_absolute(moves: Mapping[Path, Path], journal: Journal) -> list[str]:
    """Make relative links absolute if they lead out of folders that will be moved, and return the links' paths.

    The links are changed before the move, so that each of them leads to the same file at every time, also after a
    crash.

    Args:
        moves: {path of a folder: its new path}. A path that is a link, or no folder, is skipped.
        journal: records the links before they are changed.

    Raises:
        BlockedError: a folder cannot be moved now.
        OSError: a link cannot be replaced by an absolute one.
    """
    folders = {
        source.parent.resolve() / source.name: target
        for source, target in moves.items()
        if source.is_dir() and link_target(source) is None
    }
    rewritten: list[str] = []
    for path in folders:
        with OpenDir.at(path) as folder:
            links = outgoing_links(folder, folders)
            if not links:
                continue
            preflight.require_no_mount(path)
            preflight.require_unused([path])
            preflight.require_movable(tree.measure(folder))
            paths = tuple(path / link.path for link in links)
            journal.record(LinkTexts(paths, tuple(link.was for link in links), tuple(link.text for link in links)))
            set_texts(folder, {link.path: link.text for link in links})
            rewritten += map(str, paths)
    return rewritten


def outgoing_links(folder: OpenDir, moves: Mapping[Path, Path]) -> list[OutgoingLink]:
    """Return the relative links of a folder that would lead to another path after the moves.

    A dangling link is left out. So is a link that leads to the same file before and after the moves, such as a link
    between two folders that move together.

    Args:
        folder: the folder, which is one of the moved ones.
        moves: {path of a moved folder: its new path}; no parent folder of a path is a link.
    """
    return list(_below(folder, folder, (), moves))


def set_text(folder: OpenDir, name: str, text: str, kept: KeptMetadata = ALL_KEPT) -> None:
    """Replace the text of a link atomically; the owner and times of the link, and the times of the folder, stay.

    `kept` is the metadata that the file system keeps.

    Raises:
        OSError: the link does not exist, or the folder cannot be written.
    """
    status = folder.lstat(name)
    if status is None:
        raise FileNotFoundError(f"{folder.path / name} does not exist")
    before = None if folder.descriptor is None else os.fstat(folder.descriptor)
    remove_prepared(folder, name)
    temporary = prepared(Path(name)).name
    folder.symlink(temporary, text)
    folder.copy_owner_and_times(temporary, status, kept)
    folder.rename(temporary, folder, name)
    if before is not None and folder.descriptor is not None:
        os.utime(folder.descriptor, ns=(before.st_atime_ns, before.st_mtime_ns))
    folder.sync()


def set_texts(folder: OpenDir, texts: Mapping[str, str], kept: KeptMetadata = ALL_KEPT) -> None:
    """Replace the texts of links below a folder; `texts` is {relative path: new text}, and `kept` as in `set_text`."""
    for path, text in texts.items():
        *parents, name = path.split("/")
        with ExitStack() as stack:
            here = folder
            for parent in parents:
                here = stack.enter_context(here.enter(parent))
            set_text(here, name, text, kept)


def remove_prepared(folder: OpenDir, name: str) -> None:
    """Remove the temporary link for the link `name`, which a killed run may have left."""
    if folder.readlink(prepared(Path(name)).name) is not None:
        folder.unlink(prepared(Path(name)).name)


def prepared(link: Path) -> Path:
    """Return the path of the temporary link that is renamed to `link`, in order to replace it atomically."""
    return link.with_name(f".{hashlib.sha256(os.fsencode(link.name)).hexdigest()[:16]}.firstlight-link")


def _below(top: OpenDir, here: OpenDir, parts: tuple[str, ...], moves: Mapping[Path, Path]) -> Iterator[OutgoingLink]:
    for entry in sorted(here.scan(), key=lambda item: item.name):
        if entry.is_dir(follow_symlinks=False):
            with here.enter(entry.name) as inner:
                yield from _below(top, inner, (*parts, entry.name), moves)
            continue
        text = here.readlink(entry.name) if entry.is_symlink() else None
        if text is None or Path(text).is_absolute():
            continue
        outside = _place_outside(top.path, parts, text)
        if outside is None or not _exists(here.path / entry.name) or _stays_valid(outside, text, moves, parts, top):
            continue
        yield OutgoingLink("/".join((*parts, entry.name)), text, str(outside))


def _place_outside(top: Path, parts: tuple[str, ...], text: str) -> Path | None:
    """Return the absolute path to which a link leads if the `..` of its own text lead out of the folder `top`.

    The components of the text are followed as the kernel follows them. If another link on the path is absolute, or
    leads out of `top` itself, the result is None, because that link is examined on its own.

    Args:
        top: the folder.
        parts: the path of the link's parent folder, relative to `top`.
        text: the text of the link.
    """
    here, links = list(parts), 0
    todo = [(part, True) for part in _components(text)]  # (component, whether it comes from the text of the link)
    while todo:
        part, is_own = todo.pop(0)
        if part == os.pardir and here:
            here.pop()
        elif part == os.pardir:
            return _below_real(top.parent, [part for part, _ in todo]) if is_own else None
        else:
            target = link_target(top.joinpath(*here, part))
            links += target is not None
            if target is None:
                here.append(part)
            elif Path(target).is_absolute() or links > _MOST_LINKS:
                return None
            else:
                todo = [(part, False) for part in _components(target)] + todo
    return None


def _below_real(folder: Path, parts: list[str]) -> Path:
    """Return the path of `parts` below a folder whose path contains no link; each `..` at the start goes up once."""
    while parts and parts[0] == os.pardir:
        folder, parts = folder.parent, parts[1:]
    return folder.joinpath(*parts)


def _stays_valid(outside: Path, text: str, moves: Mapping[Path, Path], parts: Sequence[str], top: OpenDir) -> bool:
    """Return whether the unchanged text of a link leads to the same file after the moves.

    Args:
        outside: the absolute path to which the link leads before the moves.
        text: the text of the link.
        moves: {path of a moved folder: its new path}.
        parts: the path of the link's parent folder, relative to `top`.
        top: the moved folder in which the link lies.
    """
    place = Path(os.path.normpath(outside))
    new_top = moves.get(top.path)
    for source, target in moves.items():
        if new_top is not None and place.is_relative_to(source):
            return Path(os.path.normpath(new_top.joinpath(*parts, text))) == target / place.relative_to(source)
    return False


def _exists(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False


def _components(text: str) -> list[str]:
    return [part for part in text.split("/") if part not in {"", os.curdir}]
