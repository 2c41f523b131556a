"""The text for a provider: which card, what was measured against what, how to see it again; no name of the user's."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from bench.core.validation_records import VerdictState
from bench.validate.expectations import shown
from provision.core.errors import SpecError
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.core.result import Run
    from bench.core.validation_records import DeviceFacts, GpuLoadStats, Judgement, Validation

# A path from the top or from a home; those of the kernel are every machine's.
_PATH = re.compile(r"(?<![\w./\\])(?!//)(?:~|[A-Za-z]:)?[/\\](?!dev/|proc/|sys/)[^\s'\",;)\]]+")
_COMPLAINTS = (VerdictState.FAIL, VerdictState.WARN)
_TITLES = {  # the worst first; what could not be judged is no complaint
    VerdictState.FAIL: "What is wrong:",
    VerdictState.WARN: "What is not as it should be:",
    VerdictState.NOT_JUDGED: "What could not be judged:",
}
_WORDS = {True: "yes", False: "no", None: "not told"}
_LEAST_NAME = 3


def text(run: Run) -> str:
    """What a user can send to whoever owns the host, as it is: plain text, times in UTC.

    One sentence where no rule speaks against the host: then there is nothing to send.

    Raises:
        SpecError: the run is no validation.
    """
    if run.validation is None:
        raise SpecError(f"{run.id} is no validation: there is a ticket for one alone. Run `bench validate` first.")
    bad = {each.device for each in run.validation.judgements if each.state in _COMPLAINTS}
    if not bad:
        return f"There is nothing to report: no rule speaks against this host ({run.id}: {run.verdict.state.value}).\n"
    return _impersonal("\n".join(_lines(run, run.validation, bad)), run) + "\n"


def _lines(run: Run, validation: Validation, bad: set[str]) -> Iterator[str]:
    cards = [card for card in validation.cards if card.device in bad]
    names = ", ".join(dict.fromkeys(card.name for card in cards)) or "a device that cannot be used"
    is_faulty = run.verdict.state is VerdictState.FAIL
    yield f"Subject: {names}: {'faulty' if is_faulty else 'not as it should be'}"
    yield ""
    took = f"{_utc(run.started)} in {run.seconds:.0f} s"
    yield f"Validated {took} by firstlight, run {run.id}: {run.verdict.state.value}."
    yield ""
    for state, title in _TITLES.items():
        yield from _said(validation, state, title)
    for device in [*[card.device for card in cards], *sorted(bad - {card.device for card in cards})]:
        card = next((each for each in validation.cards if each.device == device), None)
        yield ""
        yield f"{device}: {card.name if card is not None else 'could not be used'}"
        if card is not None:
            yield from _facts(card, validation)
    yield ""
    yield "How to see it again:"
    yield f"  {_command(run)}"
    yield from _commands(cards)
    software = ", ".join(f"{name} {version}" for name, version in validation.software.items())
    if software:
        yield f"  with {software}"


def _said(validation: Validation, state: VerdictState, title: str) -> Iterator[str]:
    found = [each for each in validation.judgements if each.state is state]
    if found:
        yield title
        yield from (f"  - {each.device}: {each.said}." for each in found)


def _facts(card: DeviceFacts, validation: Validation) -> Iterator[str]:
    """What the card says of itself, and every figure that was held against another."""
    if card.uuid is not None:
        yield f"  uuid: {card.uuid}"
    if card.driver is not None:
        yield f"  driver: {card.driver}"
    if card.driver_sees:
        before = next((each for each in validation.before if each.device == card.device), card)
        yield f"  memory errors, corrected: {_change(before.ecc_corrected, card.ecc_corrected)}"
        yield f"  memory errors, uncorrectable: {_change(before.ecc_uncorrected, card.ecc_uncorrected)}"
        yield f"  bad memory that waits for a reset: {_WORDS[card.rows_pending]}"
        yield f"  bad memory that could not be replaced: {_WORDS[card.rows_failed]}"
        yield f"  XIDs while it was validated: {', '.join(map(str, card.xids)) or 'none seen'}"
        yield f"  PCIe under load: {_link(card.pcie_generation, card.pcie_width)}"
        yield f"  PCIe at most: {_link(card.pcie_generation_most, card.pcie_width_most)}"
    if card.device in validation.watched:
        yield f"  under load: {_load(validation.watched[card.device])}"
    yield from (f"  {line}" for line in _figures(card, validation.judgements))


def _figures(card: DeviceFacts, judgements: tuple[Judgement, ...]) -> Iterator[str]:
    for each in judgements:
        if each.device == card.device and each.source and each.value is not None and each.expected is not None:
            name = each.said.partition(": ")[0]
            yield f"{name}: {shown(each.value, each.unit)}, expected {shown(each.expected, each.unit)} ({each.source})"


def _load(seen: GpuLoadStats) -> str:
    parts = [
        f"{seen.clock_mhz_median:.0f} MHz (least {seen.clock_mhz_minimum or seen.clock_mhz_median:.0f})"
        if seen.clock_mhz_median is not None
        else "",
        f"{seen.temperature_maximum:.0f} °C at most" if seen.temperature_maximum is not None else "",
        f"{seen.power_watts_mean:.0f} W" if seen.power_watts_mean is not None else "",
        f"limit {seen.power_limit_watts:.0f} W" if seen.power_limit_watts is not None else "",
        *(f"{name} {share:.0%} of the time" for name, share in seen.throttled.items()),
        f"{seen.others} other processes" if seen.others else "",
    ]
    return ", ".join(filter(None, parts)) or "nothing told"


def _command(run: Run) -> str:
    """What repeats the run, without the places of this user's files."""
    kept: list[str] = []
    for word in (run.command or "bench validate").split():
        if _PATH.fullmatch(word.partition("=")[2] or word):
            if kept and kept[-1].startswith("-"):
                kept.pop()  # the flag that it belongs to
            continue
        kept.append(word)
    return " ".join(kept)


def _commands(cards: list[DeviceFacts]) -> Iterator[str]:
    uuids = [card.uuid for card in cards if card.uuid is not None and card.device.startswith("cuda")]
    for uuid in uuids:
        yield f"  nvidia-smi -q -i {uuid}"
    if uuids:
        yield "  sudo dmesg | grep -i xid"


def _change(before: int | None, after: int | None) -> str:
    return f"{_count(before)} before, {_count(after)} after"


def _count(value: int | None) -> str:
    return "not told" if value is None else str(value)


def _link(generation: int | None, width: int | None) -> str:
    return f"generation {_count(generation)}, lanes {_count(width)}"


def _utc(started: str) -> str:
    try:
        at = datetime.fromisoformat(started).astimezone(timezone.utc)
    except ValueError:
        return started
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _impersonal(lines: str, run: Run) -> str:
    """Without secrets, paths and the host's name."""
    lines = _PATH.sub("…", redact(lines))
    host = str(run.machine.get("hostname", ""))
    return re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "…", lines) if len(host) >= _LEAST_NAME else lines
