"""Which addresses are asked at all: https, or plain http where it stays near."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from provision.core.errors import SpecError

# Where a country sells names one level below these, two hosts that share three labels are of one owner.
_SHARED = {"edu", "com", "net", "org", "ac", "gov", "co"}


def check_address(url: str, what: str) -> str:
    """Return an address without its trailing slash.

    Args:
        url: the address.
        what: where it was named, for the message.

    Raises:
        SpecError: it is no URL, or plain http to an address that is neither loopback nor private; or it has an @ behind
            its host, which then is most likely a part of a password.
    """
    if is_taken(url) and not re.search(r"://[^/?#]*[/?#].*@", url):
        return url.rstrip("/")
    shown = url
    if "@" in url:  # whatever stands before it is not shown
        scheme = re.match(r"\w+://", url)
        shown = f"{scheme.group() if scheme else ''}…"
    raise SpecError(
        f"{what} {shown!r} is not taken: it must be https, or http to a loopback or private address, and have no @ "
        "behind its host (in a password, a slash is %2F)."
    )


def is_taken(url: str) -> bool:
    """Whether it is a URL of https, or of plain http to a loopback or private address."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_near(host)))


def is_near(host: str) -> bool:
    """Whether a host is this machine or lies in a private network, by its address alone: a name proves nothing."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_private


def host_of(url: str) -> str:
    """The host and port of an address, such as "mirror.example:8080"."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def same_site(one: str, other: str) -> bool:
    """Whether two hosts are of one owner by their names: the last two labels, or three below a shared suffix."""
    return _site(one) == _site(other)


def _site(host: str) -> str:
    name = host.partition(":")[0] if host.count(":") == 1 else host
    if is_near(name):
        return host
    labels = name.split(".")
    count = 3 if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _SHARED else 2
    return ".".join(labels[-count:])
