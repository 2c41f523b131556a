"""Defines the flag --adopt, and the question whether this home adopts the links of another owner."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from provision.cli.common import OutputOptions
    from provision.setup.host_plan import HostPlan

AdoptFlag = Annotated[
    str | None,
    typer.Option(
        "--adopt",
        help="Take over the links of a host that was rented again under another name: HOST:HOME, HOST or :HOME.",
        metavar="OWNER",
    ),
]


def with_adoption(plan: HostPlan, flag: str | None, options: OutputOptions) -> HostPlan:
    """Return the plan with the owner whose links this home adopts: the value of --adopt, or the user's answer.

    The user is asked only at a terminal, and only if this home has no recorded links and exactly one other owner has
    the same home path. Without a flag and a question, the plan stays as it is.

    Raises:
        BlockedError: the record of links cannot be read.
    """
    from provision.volume import adoption, links
    from provision.volume.owner import current

    if flag is not None or options.json or options.quiet or not sys.stdin.isatty():
        return plan.with_adopted(flag)
    owner = current(plan.home)
    candidates = adoption.candidates(plan.root, owner)
    if len(candidates) != 1:
        return plan
    other = candidates[0]
    print(f"{plan.root.path} has links of {other}:")
    for link in links.recorded(plan.root, other):
        print(f"  {link.path} -> {link.target}")
    try:
        accepted = typer.confirm(f"Is {owner} the same host under another name? Then these links are adopted.")
    except typer.Abort:  # Ctrl-C or Ctrl-D
        raise KeyboardInterrupt from None
    return plan.with_adopted(str(other)) if accepted else plan
