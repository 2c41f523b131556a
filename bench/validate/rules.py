"""Defines the rules for the verdict on a device, and reads them from rules.toml."""

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
# The name that every text of a rule may contain: it is replaced by the command that sets a host up.
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
# {kind: (required keys, optional keys, names in braces that its texts may contain)}.
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
        {"fail_below", "own_below", "reach", "reach_of", "key", "only", *_CAPPED},
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
    """Hold one rule of rules.toml. A share is a fraction from 0 to 1.

    `kind`: a key of KINDS. `state`: the worst judgement that the rule gives. `reason`: the purpose of the rule and the
    source of its limits. `says`, `advice`: texts for the user. `again`: a reading that violates the rule is measured
    once more before it counts. `key`: a device counts as judged only if a rule with `key` has judged it. `probes`: the
    phases whose readings it is about; empty: all. `only`: it is about readings whose name contains one of these
    strings; empty: all. `on`: the kind of device that it is about; None: both.

    `references`: the expected values that may be used. `warn_below`, `fail_below`: the limits of the value, as shares
    of the expected value. `own_below`: the warning limit if the expected value is the GPU's own earlier one. `reach`:
    the share of the data sheet's figure that a healthy GPU reaches. `reach_of`: the same for a GPU by its name in
    specs.toml, for an architecture and dtype ("Ada fp32"), or for an architecture. `below`, `above`: the limit of a
    share for other kinds. `field`: the field of `DeviceFacts` that is judged. `most`: the field with the maximum of
    that value. `fewest`: the least number of patterns that a memory test must write to each byte.

    `capped_by`: the throttle reasons that excuse a low value. A reason counts if it is active for at least the share
    `capped_above` of the time. `capped_as_sold`: the GPUs, by their name in specs.toml, that are sold with a power
    limit below what their chip needs. A low value of such a GPU passes if a software power cap is active for at least
    the share `sold_from` of the time, and the value is at least the share `sold_below` of the expected one.
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
    own_below: Share | None = None
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
        """Return whether the rule is about this reading, by its phase, name and device."""
        has_phase = not self.probes or reading.probe in self.probes
        has_name = not self.only or any(part in reading.name for part in self.only)
        return has_phase and has_name and self.on in {None, "cpu" if reading.device == "cpu" else "card"}

    @model_validator(mode="after")
    def _check_keys(self) -> Rule:
        needed, possible, names = KINDS[self.kind]
        given = self.model_fields_set - _ALWAYS
        if missing := needed - given:
            raise ValueError(f"a rule of the kind {self.kind} needs {', '.join(sorted(missing))}")
        if useless := given - needed - possible:
            raise ValueError(f"{', '.join(sorted(useless))} is not a key of the kind {self.kind}")
        used = {name for text in (self.says, self.advice) for _, name, _, _ in string.Formatter().parse(text) if name}
        if unknown := used - names - {SETUP}:
            raise ValueError(f"{{{'}, {'.join(sorted(unknown))}}} is not a value of the kind {self.kind}")
        if bool(self.capped_by) != (self.capped_above is not None) or (self.capped_as_sold and not self.capped_by):
            raise ValueError("capped_by and capped_above need each other, and capped_as_sold needs both")
        if {bool(self.capped_as_sold)} != {self.sold_from is not None, self.sold_below is not None}:
            raise ValueError("capped_as_sold, sold_from and sold_below need each other")
        if ("sheet" in self.references) != (self.reach is not None):
            raise ValueError("reach is required if the sheet is a reference, and forbidden otherwise")
        if (self.state == "fail") != (self.fail_below is not None) and self.kind == "rate":
            raise ValueError("a rate has a fail_below if, and only if, its state is fail")
        if self.fail_below is not None and self.warn_below is not None and self.fail_below >= self.warn_below:
            raise ValueError("fail_below must be less than warn_below")
        return self


@cache
def table() -> dict[str, Rule]:
    """Return {name: rule} of all rules, in the order of the file.

    Raises:
        SpecError: the file is invalid; the message has line and key.
    """
    return toml.load_tables(TABLE, Rule)
