"""The rules of a verdict on a device: kept as data, read strictly, each with its reason."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from provision.config import toml

if TYPE_CHECKING:
    from bench.core.validation_records import Reading

TABLE = Path(__file__).parent / "rules.toml"
# The name that every text may hold: the command that sets a host up, as a checkout or a wheel has it.
SETUP = "setup"

Kind = Literal[
    "fault",
    "limit",
    "once",
    "missing",
    "ended",
    "untested",
    "unusable",
    "present",
    "growth",
    "off",
    "xids",
    "under",
    "throttled",
    "rate",
    "fade",
    "drift",
    "slowest",
    "least",
    "crowd",
    "quota",
    "steal",
    "disturbed",
    "unknown",
    "hidden",
    "slice",
    "unmeasured",
]
Whose = Literal["own", "measured", "sheet"]
Share = Annotated[float, Field(gt=0, le=1)]

_ALWAYS = {"kind", "state", "reason", "says", "advice", "again"}
_RATIO = {"value", "expected", "share"}
_CAPPED = {"capped_by", "capped_above", "capped_as_sold", "sold_from", "sold_below"}
# {kind: (the keys that it needs, those that it may have, the names that its texts may hold)}.
KINDS: dict[str, tuple[set[str], set[str], set[str]]] = {
    "fault": (set(), set(), {"name", "fault"}),
    "limit": (set(), set(), {"name", "value", "limit"}),
    "once": (set(), set(), {"name"}),
    "missing": ({"probes"}, {"only", "on"}, {"names", "why"}),
    "ended": (set(), set(), {"why"}),
    "untested": ({"probes", "below", "fewest"}, {"on"}, {"name", "share", "patterns", "fewest"}),
    "unusable": (set(), set(), {"why"}),
    "present": ({"field"}, set(), {"count"}),
    "growth": ({"field"}, set(), {"count"}),
    "off": ({"field"}, set(), set()),
    "xids": ({"xids", "listed"}, set(), {"xids"}),
    "under": ({"field", "most", "below"}, set(), {"value", "expected"}),
    "throttled": ({"reasons", "above"}, set(), {"name", "share"}),
    "rate": (
        {"probes", "references", "warn_below"},
        {"fail_below", "reach", "reach_of", "key", "only", *_CAPPED},
        {"name", "source", "why", *_RATIO},
    ),
    "fade": ({"probes", "below"}, _CAPPED, {"name", *_RATIO}),
    "drift": ({"probes", "below"}, _CAPPED, {"name", *_RATIO}),
    "slowest": ({"probes", "below"}, {"only"}, {"name", "count", *_RATIO}),
    "least": ({"probes", "below"}, set(), {"name", "share"}),
    "crowd": ({"probes", "below"}, {"only"}, {"name", *_RATIO}),
    "quota": ({"below"}, set(), {"value", "expected", "whole"}),
    "steal": ({"above"}, set(), {"share"}),
    "disturbed": (set(), set(), {"why"}),
    "unknown": (set(), set(), {"name"}),
    "hidden": (set(), set(), set()),
    "slice": (set(), set(), {"name"}),
    "unmeasured": (set(), set(), {"why"}),
}


class Rule(toml.Strict):
    """One rule. `state`: what it says at worst; `again`: what it speaks against is asked for once more.

    Shares are parts of one. `warn_below` and `fail_below`: of what is expected. `reach`: the part of a sheet's figure
    that a healthy card is expected to reach, `reach_of` that of cards by their name in the table. `capped_by`: throttle
    reasons that excuse a low figure, from `capped_above` of the time on; `capped_as_sold`: cards for which a software
    power cap is no fault, where it holds from `sold_from` of the time on, and the figure is not under `sold_below` of
    what is expected. `field` and `most` are of a `Card`. `key`: a device without such a figure is not judged.
    `only`: parts of the names of the readings that it is about, one of which has to be there. `on`: the devices that it
    is about, where it is not about all. `fewest`: patterns that each byte of memory was to hold.
    """

    kind: Kind
    state: Literal["pass", "warn", "fail", "could not judge"]
    reason: Annotated[str, Field(min_length=1)]
    says: Annotated[str, Field(min_length=1)]
    advice: str
    again: bool = False
    key: bool = False
    probes: list[str] = Field(default_factory=list)
    only: list[str] = Field(default_factory=list)
    on: Literal["card", "cpu"] | None = None
    references: list[Whose] = Field(default_factory=list)
    reach: Share | None = None
    reach_of: dict[str, Share] = Field(default_factory=dict)
    warn_below: Share | None = None
    fail_below: Share | None = None
    below: Share | None = None
    above: Annotated[float, Field(ge=0, lt=1)] | None = None
    capped_by: list[str] = Field(default_factory=list)
    capped_above: Share | None = None
    capped_as_sold: list[str] = Field(default_factory=list)
    sold_from: Share | None = None
    sold_below: Share | None = None
    fewest: Annotated[int, Field(gt=0)] | None = None
    field: str | None = None
    most: str | None = None
    reasons: list[str] = Field(default_factory=list)
    xids: list[int] = Field(default_factory=list)
    listed: bool | None = None

    def is_about(self, reading: Reading) -> bool:
        """Whether it is about such a question, to such a device."""
        is_meant = not self.probes or reading.probe in self.probes
        is_named = not self.only or any(part in reading.name for part in self.only)
        return is_meant and is_named and self.on in {None, "cpu" if reading.device == "cpu" else "card"}

    @model_validator(mode="after")
    def _whole(self) -> Rule:
        needed, possible, names = KINDS[self.kind]
        given = self.model_fields_set - _ALWAYS
        if missing := needed - given:
            raise ValueError(f"a rule of the kind {self.kind} needs {', '.join(sorted(missing))}")
        if idle := given - needed - possible:
            raise ValueError(f"{', '.join(sorted(idle))} means nothing to the kind {self.kind}")
        held = {name for text in (self.says, self.advice) for _, name, _, _ in string.Formatter().parse(text) if name}
        if strange := held - names - {SETUP}:
            raise ValueError(f"{{{'}, {'.join(sorted(strange))}}} is nothing that the kind {self.kind} tells")
        if bool(self.capped_by) != (self.capped_above is not None) or (self.capped_as_sold and not self.capped_by):
            raise ValueError("capped_by and capped_above go together, and capped_as_sold needs both")
        if {bool(self.capped_as_sold)} != {self.sold_from is not None, self.sold_below is not None}:
            raise ValueError("capped_as_sold, sold_from and sold_below go together")
        if ("sheet" in self.references) != (self.reach is not None):
            raise ValueError("reach is needed where a sheet is a reference, and nowhere else")
        if (self.state == "fail") != (self.fail_below is not None) and self.kind == "rate":
            raise ValueError("a rate that can fail has a fail_below, and no other one")
        if self.fail_below is not None and self.warn_below is not None and self.fail_below >= self.warn_below:
            raise ValueError("fail_below lies under warn_below")
        return self


@cache
def table() -> dict[str, Rule]:
    """Every rule by its name, in the file's order.

    Raises:
        SpecError: the file is no table of rules; with line and key.
    """
    return toml.load_tables(TABLE, Rule)
