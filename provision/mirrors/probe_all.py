"""Probes all mirrors at the same time: downloads a few MB in less than ten seconds to check locked files and speed."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from provision.mirrors.probe_mirror import Prober, ProbeRun
from provision.mirrors.tools import all_tools

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import requests

    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_mirror import ProbeResult, ProbeTarget

# If no mirror has sent a response status after this time, the host has no network, and the probe ends.
_FIRST_RESPONSE_SECONDS = 2.5
_TOTAL_SECONDS = 9.0


def probe(
    targets: Sequence[ProbeTarget],
    probe_files: Mapping[str, Sequence[ProbeFile]],
    session: Callable[[], requests.Session],
) -> list[ProbeResult]:
    """Probe all targets at the same time, each over one connection, and return within ten seconds in any case.

    Args:
        targets: the mirrors and official sources.
        probe_files: {name of the tool: the locked files that its mirrors must have}.
        session: a function that returns a new HTTP session for each target. The session must not send a token.

    Returns:
        One result for each target, in the order of `targets`.
    """
    probers = [Prober(target, probe_files.get(target.tool, ()), session()) for target in targets]
    started = time.monotonic()
    shared = ProbeRun(started + _TOTAL_SECONDS)
    for prober in probers:
        prober.shared = shared
        tool_probe = all_tools.by_name(prober.target.tool).probe
        # A name lookup may block its thread longer than ten seconds. A daemon thread does not delay the exit.
        threading.Thread(target=prober.run, args=(tool_probe,), daemon=True).start()
    with shared.changed:
        shared.changed.wait_for(lambda: shared.ended == len(probers) or shared.has_response, _FIRST_RESPONSE_SECONDS)
        if shared.has_response:
            shared.changed.wait_for(lambda: shared.ended == len(probers), started + _TOTAL_SECONDS - time.monotonic())
    seconds = time.monotonic() - started
    return [prober.result or prober.unfinished(seconds) for prober in probers]
