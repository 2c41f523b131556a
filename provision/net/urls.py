"""Checks that a URL may be used (https, or http to a loopback or private address), and compares hosts."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from provision.core.errors import SpecError

# Second-level labels, such as `co` in `co.uk`, under which countries sell names. Two hosts under such a label have the
# same owner only if their last three labels are equal.
_SHARED = {"edu", "com", "net", "org", "ac", "gov", "co"}


def check_address(url: str, setting: str) -> str:
    """Return an allowed URL without its trailing slashes.

    Args:
        url: the URL.
        setting: the name of the setting that has this URL, for the message.

    Raises:
        SpecError: the text is not a URL, or is http to an address that is neither loopback nor private. Or it has an @
            after the first /, ? or #: the text before the @ is most likely a password with such a character.
    """
    if is_allowed(url) and not re.search(r"://[^/?#]*[/?#].*@", url):
        return url.rstrip("/")
    shown = url
    if "@" in url:  # the text before the @ may be a password
        scheme = re.match(r"\w+://", url)
        shown = f"{scheme.group() if scheme else ''}…"
    raise SpecError(
        f"{setting} {shown!r} is not allowed: it must be https, or http to a loopback or private address. An @ may "
        "not follow the first /, ? or #; if these are part of a password, write them as %2F, %3F and %23."
    )


def is_allowed(url: str) -> bool:
    """Return whether a text is an https URL, or an http URL to a loopback or private address."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_private(host)))


def is_address(url: str) -> bool:
    """Return whether a text is a URL that can be parsed: printable, with a scheme and a valid host and port."""
    try:
        parts = urlsplit(url)
        return bool(parts.scheme) and (parts.port or 0) >= 0 and url.isprintable() and " " not in url
    except ValueError:
        return False


def is_private(host: str) -> bool:
    """Return whether a host is `localhost`, or a loopback or private IP address.

    Any other host name is not private, whatever its address.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_private


def host_of(url: str) -> str:
    """Return the host and port of a URL in lower case, such as "mirror.example:8080", without a user and password."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def same_site(host: str, other: str) -> bool:
    """Return whether two host names belong to the same owner.

    Their last two labels must be equal, or their last three under a suffix such as `co.uk`.
    """
    return _site(host) == _site(other)


def _site(host: str) -> str:
    """Return the part of a host name that its owner has registered, or a private host with its port."""
    name = host.partition(":")[0] if host.count(":") == 1 else host
    if is_private(name):
        return host
    labels = name.split(".")
    count = 3 if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _SHARED else 2
    return ".".join(labels[-count:])
