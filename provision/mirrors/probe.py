"""Asks every mirror at once whether it answers, whether it holds the locked files, and how fast: a few MB, seconds."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from provision.mirrors.prober import Prober, ProbeRun
from provision.mirrors.tools import all_tools

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.prober import ProbeResult, ProbeTarget

# Seconds. When nobody has sent a status by then, there is no way out; and when all of it ends.
_FIRST_WORD, _ALL = 2.5, 9.0


def ranked(found: Sequence[ProbeResult]) -> list[ProbeResult]:
    """Those that can be used, the best first: by completeness, then by rate; equals in the order of the catalogue."""
    usable = [each for each in found if each.error is None and each.held]
    return sorted(usable, key=lambda each: (-each.held / each.asked, -(each.megabytes_per_second or 0.0)))


def probe(
    every: Sequence[ProbeTarget],
    probe_files: Mapping[str, Sequence[ProbeFile]],
    session: Callable[[], requests.Session],
) -> list[ProbeResult]:
    """Ask all of them at once, each on one connection; it ends within ten seconds, whatever they do.

    Args:
        every: whom to ask; the answers come in this order.
        probe_files: {tool: the locked files by which its mirrors are judged}.
        session: makes one for each; no token is sent with it.
    """
    probers = [Prober(target, probe_files.get(target.tool, ()), session()) for target in every]
    started = time.monotonic()
    shared = ProbeRun(started + _ALL)
    for prober in probers:
        prober.shared = shared
        look = all_tools.by_name(prober.target.tool).probe
        # A name that does not resolve holds its thread longer than we wait: as a daemon it ends with us.
        threading.Thread(target=prober.run, args=(look,), daemon=True).start()
    with shared.changed:
        shared.changed.wait_for(lambda: shared.ended == len(probers) or shared.first_word, _FIRST_WORD)
        if shared.first_word:
            shared.changed.wait_for(lambda: shared.ended == len(probers), started + _ALL - time.monotonic())
    seconds = time.monotonic() - started
    return [prober.result or prober.unfinished(seconds) for prober in probers]
