"""Formats the catalogue of mirrors and the results of a probe, as text and as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from provision.core.redact import redact
from provision.mirrors.tools import all_tools

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.mirrors.catalogue import Catalogue
    from provision.mirrors.chosen_mirrors import MirrorChoice, MirrorRecord
    from provision.mirrors.probe_mirror import ProbeResult

SCHEMA = 1


def catalogue_json(mirrors: Catalogue, record: MirrorRecord) -> str:
    """Return the output of `mirrors list --json`."""
    tools = {
        tool: [{"name": name, **mirror.model_dump()} for name, mirror in mirrors.of(tool).items()]
        for tool in all_tools.names()
    }
    chosen = {tool: _choice_row(choice) for tool, choice in record.choices.items()}
    return redact(json.dumps({"schema": SCHEMA, "tools": tools, "chosen": chosen}, indent=1))


def catalogue(mirrors: Catalogue, record: MirrorRecord) -> str:
    """Return the text of `mirrors list`: one line for each mirror, with a star before the selected one."""
    lines = []
    for tool in all_tools.names():
        choice = record.choices.get(tool)
        lines.append(f"{tool}: {_choice_text(choice) if choice else 'not selected yet'}")
        for name, mirror in mirrors.of(tool).items():
            mark = "*" if choice and choice.sources and choice.first.name == name else " "
            notes = "; ".join(
                filter(None, [f"reachable only inside {mirror.reach}" if mirror.reach else "", mirror.note])
            )
            lines.append(f" {mark} {name:<14} {redact(mirror.url)}{f'  ({notes})' if notes else ''}")
    return "\n".join(lines)


def probes_json(results: Sequence[ProbeResult], choices: Mapping[str, MirrorChoice]) -> str:
    """Return the output of `mirrors probe --json`."""
    tools = {tool: [result.to_dict() for result in results if result.target.tool == tool] for tool in choices}
    chosen = {tool: _choice_row(choice) for tool, choice in choices.items()}
    return json.dumps({"schema": SCHEMA, "tools": tools, "chosen": chosen}, ensure_ascii=False)


def print_probes(results: Sequence[ProbeResult], choices: Mapping[str, MirrorChoice], *, color: bool) -> None:
    """Print a table for each tool: the usable mirrors, the best first, then the other mirrors with their problem."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from provision.mirrors.selection import rank

    console = Console(no_color=not color, highlight=False, soft_wrap=False)
    for tool, choice in choices.items():
        of_tool = [result for result in results if result.target.tool == tool]
        usable = rank(of_tool)
        if of_tool:
            table = Table(title=tool, title_justify="left")
            table.add_column("mirror", no_wrap=True)
            for name in ("locked files", "MB/s"):
                table.add_column(name, justify="right", no_wrap=True)
            table.add_column("served by", overflow="fold")
            table.add_column("problem", overflow="fold")
            for result in [*usable, *(other for other in of_tool if other not in usable)]:
                rate = "" if result.megabytes_per_second is None else f"{result.megabytes_per_second:g}"
                problem = escape(redact(result.error or "; ".join(result.missing)))
                held = f"{result.held}/{result.asked}" if result.error is None else ""
                table.add_row(result.target.name, held, rate, result.final_host or "", problem)
            console.print(table)
        console.print(f"{tool}: {_choice_text(choice)}", soft_wrap=True)


def _choice_text(choice: MirrorChoice) -> str:
    return redact(f"{choice.first.name} ({choice.why})" if choice.sources else choice.why)


def _choice_row(choice: MirrorChoice) -> dict[str, object]:
    return {
        "asked": choice.asked,
        "name": choice.first.name if choice.sources else None,
        "why": redact(choice.why),
        "then": [source.name for source in choice.sources[1:]],
    }
