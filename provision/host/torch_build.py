"""Selects the variant of PyTorch for a machine, by its system, its driver and its GPUs."""

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
    """Hold the variants of PyTorch to install on a machine: the chosen variant, then its fallback if it has one.

    `reason` is a clause that explains the choice. `warning` is a text for the user, or None.
    """

    variants: list[Variant]
    reason: str
    warning: str | None = None


def choose(facts: HostFacts, torch: TorchSpec, requested: str, locked: list[str]) -> TorchChoice:
    """Return the variant for this machine, and its fallback, which is installed if no source has the variant's wheel.

    Args:
        facts: the facts of the machine.
        torch: the content of torch.toml, with the best variant first.
        requested: "auto", or the name of a variant.
        locked: the names of the variants that have a lock file.

    Raises:
        SpecError: the requested variant is unknown or is for another system, or no variant fits the machine.
    """
    variants = {variant.name: variant for variant in torch.variant if variant.name in locked}
    warning = None
    if requested != "auto":
        chosen = variants[toml.choose(requested, list(variants), "variant")]
        reason = "chosen by you"
        if chosen.system != facts.system:
            raise SpecError(f"the variant {requested} is for {chosen.system}, but this machine runs {facts.system}.")
    else:
        misfits = {
            name: text for name, variant in variants.items() if (text := _misfit(facts, variant, torch.older_cards))
        }
        fitting = [variant for name, variant in variants.items() if name not in misfits]
        if not fitting:
            have = ", ".join(f"{variant.name} ({variant.system})" for variant in variants.values())
            raise SpecError(f"no lock file fits this machine ({facts.system} {facts.machine}); available: {have}.")
        chosen = fitting[0]
        better = list(variants)[: list(variants).index(chosen.name)]
        by_reason: dict[str, list[str]] = {}
        for name in better:
            if variants[name].system == facts.system:
                by_reason.setdefault(misfits[name], []).append(name)
        reason = "; ".join(f"{', '.join(names)}: {text}" for text, names in by_reason.items()) or "the first that fits"
        if facts.nvidia_driver and not chosen.architectures:
            cards = ", ".join(gpu.name for gpu in facts.gpus)
            here = f"{cards}, driver {facts.nvidia_driver}" if cards else f"driver {facts.nvidia_driver}, no card"
            warning = f"the CPU variant of torch is chosen, although this machine has {here}: {reason}"
    fallbacks = [variants[chosen.instead]] if chosen.instead in variants else []
    return TorchChoice([chosen, *fallbacks], reason, warning)


def is_older(version: str, than: str) -> bool:
    """Return whether the driver version `version` is older than the version `than`."""
    return _numbers(version) < _numbers(than)


def _misfit(facts: HostFacts, variant: Variant, older_cards: Mapping[str, str]) -> str | None:
    """Return the reason why a variant does not fit the machine, or None if it fits."""
    if variant.system != facts.system or variant.machine not in {None, facts.machine.lower()}:
        return f"is for {variant.system} {variant.machine or ''}".rstrip()
    if variant.driver is None:
        return None
    if facts.nvidia_driver is None or not facts.gpus:
        missing = "card, and none is visible here" if facts.nvidia_driver else "driver, and none is here"
        return f"needs an NVIDIA {missing}"
    for gpu in facts.gpus:
        capability = gpu.compute_capability or _capability(gpu.name, older_cards)
        if capability and not _runs(capability, variant.architectures):
            return f"has no code for {gpu.name} (compute capability {capability})"
    if is_older(facts.nvidia_driver, variant.driver):
        return f"needs driver {variant.driver} or newer, here is {facts.nvidia_driver}"
    return None


def _capability(name: str, older_cards: Mapping[str, str]) -> str | None:
    """Return the compute capability of a GPU by its name, or None if the table has no part of the name.

    Args:
        name: the name of the GPU.
        older_cards: {part of a GPU's name: compute capability}; the longest matching part counts.
    """
    parts = [part for part in older_cards if re.search(rf"\b{re.escape(part)}", name)]
    return older_cards[max(parts, key=len)] if parts else None


def _runs(capability: str, architectures: Sequence[str]) -> bool:
    """Return whether a GPU of a compute capability can run machine code for one of the architectures.

    Code for X.Y runs on X.Z with Z >= Y (source: CUDA's programming guide, binary compatibility).
    """
    gpu = _numbers(capability)
    return any(gpu[0] == _numbers(code)[0] and gpu >= _numbers(code) for code in architectures)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
