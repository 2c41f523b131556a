"""Which build of torch a machine gets: by its system, its driver, and what its cards can run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.config import toml
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.config.torch import TorchSpec, Variant
    from provision.host.facts import HostFacts


@dataclass(frozen=True)
class TorchChoice:
    """The variant for a machine, then its stand-ins; why; and what its owner should know."""

    variants: list[Variant]
    reason: str
    warning: str | None = None


def choose(facts: HostFacts, torch: TorchSpec, wanted: str, locked: list[str]) -> TorchChoice:
    """The variant for this machine, then what stands in where its wheel cannot be had; and why.

    Args:
        facts: the machine.
        torch: the variants, best first.
        wanted: "auto", or a variant's name.
        locked: the variants that the environment has a lock for.

    Raises:
        SpecError: no such variant, or none fits.
    """
    known = {variant.name: variant for variant in torch.variant if variant.name in locked}
    warning = None
    if wanted != "auto":
        chosen = known[toml.choose(wanted, list(known), "variant")]
        reason = "chosen by you"
        if chosen.system != facts.system:
            raise SpecError(f"the variant {wanted} is for {chosen.system}, this machine is {facts.system}.")
    else:
        unfit = {name: why for name, variant in known.items() if (why := _unfit(facts, variant, torch.older_cards))}
        fitting = [variant for name, variant in known.items() if name not in unfit]
        if not fitting:
            have = ", ".join(f"{variant.name} ({variant.system})" for variant in known.values())
            raise SpecError(f"no lock fits this machine ({facts.system} {facts.machine}); there is: {have}.")
        chosen = fitting[0]
        better = list(known)[: list(known).index(chosen.name)]
        names: dict[str, list[str]] = {}
        for name in better:
            if known[name].system == facts.system:
                names.setdefault(unfit[name], []).append(name)
        reason = "; ".join(f"{', '.join(each)}: {why}" for why, each in names.items()) or "the first that fits"
        if facts.nvidia_driver and not chosen.architectures:
            cards = ", ".join(gpu.name for gpu in facts.gpus)
            here = f"{cards}, driver {facts.nvidia_driver}" if cards else f"driver {facts.nvidia_driver}, no card"
            warning = f"torch for the CPU, though this machine has {here}: {reason}"
    instead = [known[chosen.instead]] if chosen.instead in known else []
    return TorchChoice([chosen, *instead], reason, warning)


def is_older(version: str, than: str) -> bool:
    """Whether a driver's version lies before another."""
    return _numbers(version) < _numbers(than)


def _unfit(facts: HostFacts, variant: Variant, older_cards: Mapping[str, str]) -> str | None:
    """Why a variant does not fit, or None."""
    if variant.system != facts.system or variant.machine not in {None, facts.machine.lower()}:
        return f"is for {variant.system} {variant.machine or ''}".rstrip()
    if variant.driver is None:
        return None
    if facts.nvidia_driver is None or not facts.gpus:
        what = "card, and none is visible here" if facts.nvidia_driver else "driver, and none is here"
        return f"needs an NVIDIA {what}"
    for gpu in facts.gpus:
        capability = gpu.compute_capability or _capability(gpu.name, older_cards)
        if capability and not _runs(capability, variant.architectures):
            return f"has no code for {gpu.name} (compute capability {capability})"
    if is_older(facts.nvidia_driver, variant.driver):
        return f"needs driver {variant.driver} or newer, here is {facts.nvidia_driver}"
    return None


def _capability(name: str, older_cards: Mapping[str, str]) -> str | None:
    """The compute capability of a card by its name: the longest part of it that is known."""
    known = [part for part in older_cards if re.search(rf"\b{re.escape(part)}", name)]
    return older_cards[max(known, key=len)] if known else None


def _runs(capability: str, architectures: Sequence[str]) -> bool:
    """Machine code for X.Y runs on X.Z with Z >= Y (source: CUDA's programming guide, binary compatibility)."""
    card = _numbers(capability)
    return any(card[0] == _numbers(each)[0] and card >= _numbers(each) for each in architectures)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
