"""Write the text for a provider's support: the faulty devices, their figures with sources, and commands.

It does not contain the user's name, paths or the name of the host.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from bench.core.verdict import VerdictState
from bench.validate.expectations import shown
from provision.core.errors import SpecError
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.core.result import Run
    from bench.core.validation_records import DeviceFacts, GpuLoadStats, Validation
    from bench.core.verdict import Judgement

# An absolute path or one below a home folder. /dev, /proc and /sys are no private data, so they are not matched.
_PATH = re.compile(r"(?<![\w./\\])(?!//)(?:~|[A-Za-z]:)?[/\\](?!dev/|proc/|sys/)[^\s'\",;)\]]+")
_COMPLAINTS = (VerdictState.FAIL, VerdictState.WARN)
_TITLES = {  # worst first
    VerdictState.FAIL: "Faults:",
    VerdictState.WARN: "Warnings:",
    VerdictState.NOT_JUDGED: "Could not be judged:",
}
_WORDS = {True: "yes", False: "no", None: "unknown"}
_LEAST_NAME = 3


def text(run: Run) -> str:
    """Return the text that a user can send to the provider's support: plain text, with times in UTC.

    If no rule found a fault or a warning, return one sentence that there is nothing to send.

    Raises:
        SpecError: the run is not a validation.
    """
    if run.validation is None:
        raise SpecError(
            f"{run.id} is not a validation, and only a validation has a ticket. Run `bench validate` first."
        )
    faulty = {judgement.device for judgement in run.validation.judgements if judgement.state in _COMPLAINTS}
    if not faulty:
        return (
            f"There is nothing to report: no fault and no warning on this host ({run.id}: {run.verdict.state.value}).\n"
        )
    return _impersonal("\n".join(_lines(run, run.validation, faulty)), run) + "\n"


def _lines(run: Run, validation: Validation, faulty: set[str]) -> Iterator[str]:
    cards = [card for card in validation.cards if card.device in faulty]
    names = ", ".join(dict.fromkeys(card.name for card in cards)) or "a device that cannot be used"
    is_faulty = run.verdict.state is VerdictState.FAIL
    yield f"Subject: {names}: {'faulty' if is_faulty else 'warnings'}"
    yield ""
    took = f"{_utc(run.started)} in {run.seconds:.0f} s"
    yield f"Validated {took} by firstlight, run {run.id}: {run.verdict.state.value}."
    yield ""
    for state, title in _TITLES.items():
        yield from _judgements(validation, state, title)
    for device in [*[card.device for card in cards], *sorted(faulty - {card.device for card in cards})]:
        card = next((facts for facts in validation.cards if facts.device == device), None)
        yield ""
        yield f"{device}: {card.name if card is not None else 'could not be used'}"
        if card is not None:
            yield from _facts(card, validation)
    yield ""
    yield "How to reproduce it:"
    yield f"  {_command(run)}"
    yield from _commands(cards)
    software = ", ".join(f"{name} {version}" for name, version in validation.software.items())
    if software:
        yield f"  with {software}"


def _judgements(validation: Validation, state: VerdictState, title: str) -> Iterator[str]:
    judgements = [judgement for judgement in validation.judgements if judgement.state is state]
    if judgements:
        yield title
        yield from (f"  - {judgement.device}: {judgement.said}." for judgement in judgements)


def _facts(card: DeviceFacts, validation: Validation) -> Iterator[str]:
    """Yield a line for each fact that the driver reports about a device, and for each value with an expected value."""
    if card.uuid is not None:
        yield f"  uuid: {card.uuid}"
    if card.driver is not None:
        yield f"  driver: {card.driver}"
    if card.driver_sees:
        before = next((facts for facts in validation.before if facts.device == card.device), card)
        yield f"  memory errors, corrected: {_change(before.ecc_corrected, card.ecc_corrected)}"
        yield f"  memory errors, uncorrectable: {_change(before.ecc_uncorrected, card.ecc_uncorrected)}"
        yield f"  faulty memory to be replaced at the next reset: {_WORDS[card.rows_pending]}"
        yield f"  faulty memory that could not be replaced: {_WORDS[card.rows_failed]}"
        yield f"  XIDs during the validation: {', '.join(map(str, card.xids)) or 'none'}"
        yield f"  PCIe under load: {_link(card.pcie_generation, card.pcie_width)}"
        yield f"  maximum of PCIe: {_link(card.pcie_generation_most, card.pcie_width_most)}"
    if card.device in validation.watched:
        yield f"  under load: {_load(validation.watched[card.device])}"
    yield from (f"  {line}" for line in _figures(card, validation.judgements))


def _figures(card: DeviceFacts, judgements: tuple[Judgement, ...]) -> Iterator[str]:
    for judgement in judgements:
        if (
            judgement.device == card.device
            and judgement.source
            and judgement.value is not None
            and judgement.expected is not None
        ):
            name = judgement.said.partition(": ")[0]
            value, expected = (shown(figure, judgement.unit) for figure in (judgement.value, judgement.expected))
            yield f"{name}: {value}, expected {expected} ({judgement.source})"


def _load(load: GpuLoadStats) -> str:
    parts = [
        f"{load.clock_mhz_median:.0f} MHz (lowest {load.clock_mhz_minimum or load.clock_mhz_median:.0f})"
        if load.clock_mhz_median is not None
        else "",
        f"highest {load.temperature_maximum:.0f} °C" if load.temperature_maximum is not None else "",
        f"{load.power_watts_mean:.0f} W" if load.power_watts_mean is not None else "",
        f"limit {load.power_limit_watts:.0f} W" if load.power_limit_watts is not None else "",
        *(f"{name} {share:.0%} of the time" for name, share in load.throttled.items()),
        f"{load.others} other processes" if load.others else "",
    ]
    return ", ".join(filter(None, parts)) or "no data"


def _command(run: Run) -> str:
    """Return the command that repeats the run, without the flags whose values are paths."""
    words: list[str] = []
    for word in (run.command or "bench validate").split():
        if _PATH.fullmatch(word.partition("=")[2] or word):
            if words and words[-1].startswith("-"):
                words.pop()  # the flag whose value is this path
            continue
        words.append(word)
    return " ".join(words)


def _commands(cards: list[DeviceFacts]) -> Iterator[str]:
    uuids = [card.uuid for card in cards if card.uuid is not None and card.device.startswith("cuda")]
    for uuid in uuids:
        yield f"  nvidia-smi -q -i {uuid}"
    if uuids:
        yield "  sudo dmesg | grep -i xid"


def _change(before: int | None, after: int | None) -> str:
    return f"{_count(before)} before, {_count(after)} after"


def _count(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _link(generation: int | None, width: int | None) -> str:
    return f"generation {_count(generation)}, lanes {_count(width)}"


def _utc(started: str) -> str:
    try:
        at = datetime.fromisoformat(started).astimezone(timezone.utc)
    except ValueError:
        return started
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _impersonal(lines: str, run: Run) -> str:
    """Return the text without secrets, and with "…" for paths and for the host's name."""
    lines = _PATH.sub("…", redact(lines))
    host = str(run.machine.get("hostname", ""))
    return re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "…", lines) if len(host) >= _LEAST_NAME else lines
