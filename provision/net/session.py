"""Sessions that no server can hold: a redirect's body is not read, and an answer whose head drips ends in time."""

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

_POOL = 16
_MOST_REDIRECTS = 5
# A redirect's body is a line or two. One that is longer, or does not come, costs its connection.
_SHORT_BYTES, _SHORT_SECONDS = 4096, 3.0


class Session(requests.Session):
    """A pooled session that takes proxies and CA settings from the environment."""

    def __init__(self) -> None:
        """Have room for as many connections as files are fetched at once."""
        super().__init__()
        self.max_redirects = _MOST_REDIRECTS
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Adapter(pool_maxsize=_POOL))

    def resolve_redirects(self, resp: requests.Response, *rest: Any, **named: Any) -> Iterator[requests.Response]:  # noqa: ANN401 (as requests has it)
        """As in requests, which would read the body of a redirect to its end before it follows it."""
        if self.get_redirect_target(resp):
            _let_go(resp)
        yield from super().resolve_redirects(resp, *rest, **named)


class TokenSession(Session):
    """One that shows no password of ~/.netrc: neither in a token's place, nor where a redirect leads."""

    def __init__(self) -> None:
        """Have a way of its own to show who we are: without one, requests looks into ~/.netrc."""
        super().__init__()
        self.auth = _as_it_is

    def rebuild_auth(self, prepared_request: Any, response: Any) -> None:  # noqa: ANN401 (as requests has it)
        """Let the token go to no other host."""
        if self.should_strip_auth(response.request.url, prepared_request.url):  # type: ignore[no-untyped-call]  # requests tells no types
            prepared_request.headers.pop("Authorization", None)


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _let_go(redirect: requests.Response) -> None:
    """Have done with a redirect: its connection is used again where its body is short, and closed else."""
    with (
        suppress(body.StalledError, urllib3.exceptions.HTTPError),
        body.StallTimeout(_SHORT_SECONDS, redirect.raw.shutdown),
    ):
        redirect.raw.read(_SHORT_BYTES)
    redirect.close()
    redirect._content = b""  # noqa: SLF001 (it has no public name; it is what requests would read)


class _Watched:
    """A connection whose answer must have its whole head within the time that its server may be silent."""

    sock: socket.socket
    timeout: object

    def getresponse(self) -> urllib3.HTTPResponse:
        """The answer.

        Raises:
            StalledError: its head does not end; every byte of it, and every "100 Continue", would be waited for anew.
        """
        end = getattr(self.sock, "shutdown", None)  # TLS within TLS has none
        if end is None or not isinstance(self.timeout, int | float):
            return super().getresponse()  # type: ignore[misc, no-any-return]  # of the class beside it
        with body.StallTimeout(float(self.timeout), partial(end, socket.SHUT_RD)):
            return super().getresponse()  # type: ignore[misc, no-any-return]  # of the class beside it


class _Connection(_Watched, HTTPConnection):  # type: ignore[misc]  # two say what getresponse is
    """Without TLS."""


class _SecureConnection(_Watched, HTTPSConnection):  # type: ignore[misc]  # two say what getresponse is
    """With TLS."""


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection  # type: ignore[assignment]  # urllib3 names its own


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection  # type: ignore[assignment]  # urllib3 names its own


class _Adapter(requests.adapters.HTTPAdapter):
    """Makes watched connections, also through a proxy; one of SOCKS makes its own."""

    def init_poolmanager(self, *args: Any, **named: Any) -> None:  # noqa: ANN401 (as requests has it)
        super().init_poolmanager(*args, **named)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def proxy_manager_for(self, proxy: str, **named: Any) -> Any:  # noqa: ANN401 (as requests has it)
        manager = super().proxy_manager_for(proxy, **named)
        if isinstance(manager, urllib3.ProxyManager):
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        return manager
