"""Shows mirrors: the catalogue, and what was found of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from provision.core.redact import redact
from provision.mirrors.tools import all_tools

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.mirrors.catalogue import Catalogue
    from provision.mirrors.probe_mirror import ProbeResult
    from provision.mirrors.record import MirrorChoice, MirrorRecord

SCHEMA = 1


def catalogue_json(known: Catalogue, record: MirrorRecord) -> str:
    """`mirrors list` for programs."""
    tools = {
        tool: [{"name": name, **mirror.model_dump()} for name, mirror in known.of(tool).items()]
        for tool in all_tools.names()
    }
    chosen = {tool: _choice(choice) for tool, choice in record.choices.items()}
    return redact(json.dumps({"schema": SCHEMA, "tools": tools, "chosen": chosen}, indent=1))


def catalogue(known: Catalogue, record: MirrorRecord) -> str:
    """`mirrors list` for people: a line a mirror, the chosen one marked."""
    lines = []
    for tool in all_tools.names():
        choice = record.choices.get(tool)
        lines.append(f"{tool}: {_said(choice) if choice else 'not chosen yet'}")
        for name, mirror in known.of(tool).items():
            mark = "*" if choice and choice.sources and choice.first.name == name else " "
            notes = "; ".join(filter(None, [f"only inside {mirror.reach}" if mirror.reach else "", mirror.note]))
            lines.append(f" {mark} {name:<14} {redact(mirror.url)}{f'  ({notes})' if notes else ''}")
    return "\n".join(lines)


def probes_json(found: Sequence[ProbeResult], chosen: Mapping[str, MirrorChoice]) -> str:
    """`mirrors probe` for programs."""
    tools = {tool: [each.to_dict() for each in found if each.target.tool == tool] for tool in chosen}
    whole = {"schema": SCHEMA, "tools": tools, "chosen": {tool: _choice(each) for tool, each in chosen.items()}}
    return json.dumps(whole, ensure_ascii=False)


def print_probes(found: Sequence[ProbeResult], chosen: Mapping[str, MirrorChoice], *, color: bool) -> None:
    """`mirrors probe` for people: a table a tool, the best first, what cannot be used last with its reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from provision.mirrors.selection import rank

    console = Console(no_color=not color, highlight=False, soft_wrap=False)
    for tool, choice in chosen.items():
        mine = [each for each in found if each.target.tool == tool]
        best = rank(mine)
        if mine:
            table = Table(title=tool, title_justify="left")
            table.add_column("mirror", no_wrap=True)
            for name in ("holds", "MB/s"):
                table.add_column(name, justify="right", no_wrap=True)
            table.add_column("from", overflow="fold")
            table.add_column("what is amiss", overflow="fold")
            for each in [*best, *(other for other in mine if other not in best)]:
                rate = "" if each.megabytes_per_second is None else f"{each.megabytes_per_second:g}"
                amiss = escape(redact(each.error or "; ".join(each.missing)))
                held = f"{each.held}/{each.asked}" if each.error is None else ""
                table.add_row(each.target.name, held, rate, each.final_host or "", amiss)
            console.print(table)
        console.print(f"{tool}: {_said(choice)}", soft_wrap=True)


def _said(choice: MirrorChoice) -> str:
    return redact(f"{choice.first.name} ({choice.why})" if choice.sources else choice.why)


def _choice(choice: MirrorChoice) -> dict[str, object]:
    return {
        "asked": choice.asked,
        "name": choice.first.name if choice.sources else None,
        "why": redact(choice.why),
        "then": [source.name for source in choice.sources[1:]],
    }
