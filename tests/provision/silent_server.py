"""Lets a client's read time out exactly when the test server stops sending, whatever the speed of the machine."""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Any

from provision.net import body
from tests.clock import Standing

if TYPE_CHECKING:
    import pytest

# {port of a server: ports of the clients to which this server has stopped sending}.
SILENT: dict[int, set[int]] = {}
# The clock of `body.StallTimeout`, which `RawServer.drip` advances.
CLOCK = Standing()
_GUARD_SECONDS = 600.0  # ends a hanging test; no test asserts on this value


def replace_read_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the read timeout of sockets in this process.

    A read from a test server waits for data, however slow the machine is. After the server has stopped sending on the
    connection, and the client has read all its data, the next read times out at once.
    """
    receive = socket.socket.recv_into

    def received(self: socket.socket, *args: Any) -> int:
        if not self.gettimeout() or self.family != socket.AF_INET:
            return receive(self, *args)
        silent, own_port = SILENT.get(self.getpeername()[1], set()), self.getsockname()[1]
        deadline = time.monotonic() + _GUARD_SECONDS
        while not select.select([self], [], [], 0.01)[0] and time.monotonic() < deadline:
            if own_port in silent and not select.select([self], [], [], 0)[0]:
                raise TimeoutError("timed out")
        return receive(self, *args)

    monkeypatch.setattr(socket.socket, "recv_into", received, raising=False)
    monkeypatch.setattr(body, "time", CLOCK)
