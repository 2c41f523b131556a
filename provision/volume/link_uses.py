"""Finds the links of all owners that lead to a folder on the volume, from the record of links and the journals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.fs import records
from provision.fs.open_dir import link_target
from provision.volume import journal_acts as acts
from provision.volume.journal import read_journal
from provision.volume.journal_paths import PathMap, earlier_root, roots_in
from provision.volume.owner import Owner

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from provision.core.layout import Root
    from provision.volume.journal import JournalFile
    from provision.volume.journal_acts import ReadAct


@dataclass(frozen=True)
class LinkUse:
    """Describe one link into the volume: its owner (None: unknown), its path on the owner's host, and its target."""

    owner: Owner | None
    path: Path
    target: Path

    def __str__(self) -> str:
        """Return "HOST:PATH", or "PATH (owner unknown)"."""
        return f"{self.owner.host}:{self.path}" if self.owner else f"{self.path} (owner unknown)"

    def leads_to(self, folder: Path) -> bool:
        """Return whether the link leads to the folder, to an entry inside it, or to a folder that contains it."""
        return self.target.is_relative_to(folder) or folder.is_relative_to(self.target)


def link_uses(root: Root, home: Path, journals: Mapping[str, JournalFile]) -> list[LinkUse]:
    """Return the links of all owners that lead into the root, each once.

    Args:
        root: the root at its present path.
        home: this home; it replaces `~` in rows of links.json that have no owner.
        journals: {name of a run: its journal} of the root.
    """
    return list(dict.fromkeys([*_recorded(root, home), *_journaled(root, journals)]))


def of_others(
    uses: Collection[LinkUse], folder: Path, own: Collection[Owner], paths: Collection[Path]
) -> list[LinkUse]:
    """Return the links to a folder that belong to other owners, sorted by host and path.

    A link of an unknown owner belongs to this home if its path is in `paths`, or if this home has the same link.

    Args:
        uses: the links of all owners.
        folder: the folder on the volume.
        own: the owners whose links are left out: this home's owner, and earlier names of it.
        paths: the paths of this home whose links the caller handles itself.
    """
    others = [
        use
        for use in uses
        if use.leads_to(folder)
        and (
            use.owner not in own
            if use.owner is not None
            else use.path not in paths and link_target(use.path) != str(use.target)
        )
    ]
    return sorted(others, key=str)


def read_journals(root: Root) -> dict[str, JournalFile]:
    """Return {name of a run: its journal} for all runs and undos on a root."""
    return {path.stem: read_journal(path) for path in sorted(root.journal.glob("*.jsonl"))}


def path_map(journal: JournalFile, root: Root, earlier_roots: Collection[Path]) -> PathMap:
    """Return the map from paths at the time of a journal's run to present paths, by the path of the root."""
    before = earlier_root(journal.header, [entry.act for entry in journal.entries], root, earlier_roots)
    # The pair (root, root) is needed if the root lies inside of an earlier home: its paths must stay the same.
    return PathMap((*([(before, root.path)] if before else []), (root.path, root.path)))


def earlier_roots(journals: Iterable[JournalFile], root: Root) -> list[Path]:
    """Return the earlier paths of the root, from its journals and links.json; the present path is left out."""
    named = []
    for journal in journals:
        named += [Path(journal.header.root)] if journal.header.root else []
        named += roots_in(entry.act for entry in journal.entries)
    content = _content(root)
    if isinstance(content.get("root"), str):
        named.append(Path(str(content["root"])))
    return [path for path in dict.fromkeys(named) if path != root.path]


def _journaled(root: Root, journals: Mapping[str, JournalFile]) -> Iterator[LinkUse]:
    before = earlier_roots(journals.values(), root)
    undone = {
        entry.act.run
        for journal in journals.values()
        for entry in journal.entries
        if isinstance(entry.act, acts.RunUndone)
    }
    for name, journal in journals.items():
        if journal.header.command == "undo" or name in undone:
            continue
        here = path_map(journal, root, before)
        for entry in journal.entries:
            for path, target in _links(here.act(entry.act)):
                if target.is_relative_to(root.path):
                    yield LinkUse(journal.header.owner, path, target)


def _links(act: ReadAct) -> Iterator[tuple[Path, Path]]:
    """Yield (path, target) of each link that an act made, or that a killed run would have made."""
    match act:
        case acts.MoveAct() | acts.TargetCreation():
            yield act.source, act.target
        case acts.MoveLink() | acts.EnvironmentLink() | acts.LinkRecord():
            yield act.path, act.target
        case acts.LinkBatch():
            yield from zip(act.paths, act.targets, strict=True)


def _recorded(root: Root, home: Path) -> Iterator[LinkUse]:
    """Yield the links in links.json; a row may have no owner, one owner, or several under the key `owners`."""
    rows = _content(root).get("links")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("path"), str) and isinstance(row.get("target"), str):
            several = row.get("owners")
            for owner in map(_owner, several if isinstance(several, list) and several else [row]):
                base = Path(owner.home) if owner else home
                path = base / row["path"][2:] if row["path"].startswith("~/") else Path(row["path"])
                yield LinkUse(owner, path, root.path / row["target"])


def _owner(row: object) -> Owner | None:
    """Return the owner from a text HOST:HOME, or from the keys `host` and `home` of a row or its `owner`; else None."""
    named = row["owner"] if isinstance(row, dict) and row.get("owner") else row
    if isinstance(named, str):
        texts = named.partition(":")[::2]
    elif isinstance(named, dict):
        texts = (str(named.get("host") or ""), str(named.get("home") or ""))
    else:
        return None
    return Owner(*texts) if all(texts) else None


def _content(root: Root) -> dict[str, object]:
    try:
        return records.read_state(root.links)
    except (OSError, ValueError):
        return {}
