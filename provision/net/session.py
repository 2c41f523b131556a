"""Provides HTTP sessions that a slow server cannot block.

The body of a redirect is read for at most 3 s, and all headers of a response together have a timeout.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from provision.net import body

if TYPE_CHECKING:
    from collections.abc import Iterator

_POOL = 16  # connections
_MOST_REDIRECTS = 5
# The body of a redirect is short. If it has more bytes than this, or needs more seconds, the connection is closed.
_SHORT_BYTES, _SHORT_SECONDS = 4096, 3.0


class Session(requests.Session):
    """Reuses connections, and takes proxies and CA settings from the environment variables."""

    def __init__(self) -> None:
        """Set the limit of 5 redirects, and connection pools of 16, more than there are parallel downloads."""
        super().__init__()
        self.max_redirects = _MOST_REDIRECTS
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Adapter(pool_maxsize=_POOL))

    def resolve_redirects(self, resp: requests.Response, *rest: Any, **named: Any) -> Iterator[requests.Response]:  # noqa: ANN401 (as requests has it)
        """Follow redirects as requests does, but read at most 4096 bytes of each redirect's body."""
        if self.get_redirect_target(resp):
            _release(resp)
        yield from super().resolve_redirects(resp, *rest, **named)


class TokenSession(Session):
    """Sends the token of the request's headers, and never a password of ~/.netrc.

    requests itself would replace the token by such a password, and would send one after a redirect.
    """

    def __init__(self) -> None:
        """Set an authentication function that changes nothing, because requests reads ~/.netrc without a function."""
        super().__init__()
        self.auth = _unchanged

    def rebuild_auth(self, prepared_request: Any, response: Any) -> None:  # noqa: ANN401 (as requests has it)
        """Remove the token from a request that a redirect sends to another host."""
        if self.should_strip_auth(response.request.url, prepared_request.url):  # type: ignore[no-untyped-call]  # requests has no types
            prepared_request.headers.pop("Authorization", None)


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _release(redirect: requests.Response) -> None:
    """End a redirect response, so that requests does not read its body.

    If the body has ended within 4096 bytes and 3 s, the connection is reused. Otherwise it is closed.
    """
    with (
        suppress(body.StalledError, urllib3.exceptions.HTTPError),
        body.StallTimeout(_SHORT_SECONDS, redirect.raw.shutdown),
    ):
        redirect.raw.read(_SHORT_BYTES)
    redirect.close()
    redirect._content = b""  # noqa: SLF001 (the body that requests would read; it has no public name)


class _HeaderTimeout:
    """Adds a timeout for all headers of a response together to a connection; it is as long as the read timeout."""

    sock: socket.socket
    timeout: object

    def getresponse(self) -> urllib3.HTTPResponse:
        """Return the response after its headers were read.

        The socket's own timeout is not sufficient, since it restarts with every byte and every "100 Continue".

        Raises:
            StalledError: the headers are not complete within the timeout.
        """
        shutdown = getattr(self.sock, "shutdown", None)  # urllib3's socket for TLS within TLS has no shutdown
        if shutdown is None or not isinstance(self.timeout, int | float):
            return super().getresponse()  # type: ignore[misc, no-any-return]  # the method of the other base class
        with body.StallTimeout(float(self.timeout), partial(shutdown, socket.SHUT_RD)):
            return super().getresponse()  # type: ignore[misc, no-any-return]  # the method of the other base class


class _Connection(_HeaderTimeout, HTTPConnection):  # type: ignore[misc]  # both base classes define getresponse
    """Adds the header timeout to a connection without TLS."""


class _SecureConnection(_HeaderTimeout, HTTPSConnection):  # type: ignore[misc]  # both base classes define getresponse
    """Adds the header timeout to a connection with TLS."""


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection  # type: ignore[assignment]  # urllib3 declares its own class


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection  # type: ignore[assignment]  # urllib3 declares its own class


class _Adapter(requests.adapters.HTTPAdapter):
    """Makes connections with the header timeout, directly or through an HTTP proxy.

    Connections through a SOCKS proxy have no header timeout, since they use other classes.
    """

    def init_poolmanager(self, *args: Any, **named: Any) -> None:  # noqa: ANN401 (as requests has it)
        super().init_poolmanager(*args, **named)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def proxy_manager_for(self, proxy: str, **named: Any) -> Any:  # noqa: ANN401 (as requests has it)
        manager = super().proxy_manager_for(proxy, **named)
        if isinstance(manager, urllib3.ProxyManager):
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        return manager
