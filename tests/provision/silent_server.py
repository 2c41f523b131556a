"""Silence as a played server means it: a client's patience ends when the server says nothing more, and never before."""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Any

from provision.net import body
from tests.clock import Standing

if TYPE_CHECKING:
    import pytest

# {a server's port: the ports of the clients to which it says nothing more}
SILENT: dict[int, set[int]] = {}
# The clock of `body.StallTimeout`, which a server that drips moves on.
CLOCK = Standing()
_GUARD_SECONDS = 600.0  # ends a test that hangs; nothing is asserted of it


def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients in this process time out by what the played servers do, not by the clock.

    A read from a played server waits until there is something to read, however slow the machine is. When the server
    has fallen silent on this connection, and all that it sent was read, the read times out at once.
    """
    receive = socket.socket.recv_into

    def received(self: socket.socket, *args: Any) -> int:
        if not self.gettimeout() or self.family != socket.AF_INET:
            return receive(self, *args)
        silent, own_port = SILENT.get(self.getpeername()[1], set()), self.getsockname()[1]
        ends = time.monotonic() + _GUARD_SECONDS
        while not select.select([self], [], [], 0.01)[0] and time.monotonic() < ends:
            if own_port in silent and not select.select([self], [], [], 0)[0]:
                raise TimeoutError("timed out")
        return receive(self, *args)

    monkeypatch.setattr(socket.socket, "recv_into", received, raising=False)
    monkeypatch.setattr(body, "time", CLOCK)
