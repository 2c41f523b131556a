"""Lists the files of a repository on a Hugging Face hub, and decides which hub gets the user's token."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, urlsplit

from provision.core.errors import FirstlightError
from provision.core.redact import redact
from provision.mirrors.official import official_endpoint
from provision.net import body
from provision.net.retry import BUSY, LONGEST_WAIT_SECONDS, retry_after
from provision.net.urls import check_address, host_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import requests

_TRIES = 3  # the largest number of requests for one page, if the hub is busy or the connection breaks
_RETRY_TIMEOUT_SECONDS = 5.0  # a request with a shorter timeout is not retried
_MAX_PAGES = 1000  # of one listing
_SHORT_WAIT_SECONDS = 5.0  # a longer Retry-After raises BusyError, so that the caller can try another hub first
# The listing of the largest repository has some megabytes; a larger response is not a listing.
_MAX_RESPONSE_BYTES = 64 << 20
_MAX_RESPONSE_SECONDS = 60.0
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TRUE = {"1", "ON", "YES", "TRUE"}


class HubError(FirstlightError):
    """Report that a hub is unavailable, is not a hub, or does not have the repository, revision or file."""

    kind = "source"


class BusyError(HubError):
    """Report that a hub is busy, and that the request can be repeated after `wait` seconds."""

    def __init__(self, message: str, wait: float) -> None:
        """Store the message and the wait in seconds."""
        super().__init__(message)
        self.wait = wait


class AccessError(HubError):
    """Report that a hub has denied access to a repository (401 or 403), or does not show the repository."""


@dataclass(frozen=True)
class ListedFile:
    """Describe one file in the listing of a hub.

    `path`: its path in the repository. `size`: in bytes.
    `blob`: its hash, which is also the name of its blob: the sha256 of a large file (LFS), git's sha1 of a small file.
    """

    path: str
    size: int
    blob: str

    @property
    def kind(self) -> str:
        """Return the kind of the hash in `blob`: "sha256" or "git_sha1"."""
        return "sha256" if len(self.blob) == 64 else "git_sha1"


class Hub:
    """Requests listings from one hub. After a connection failure no further request is made to the hub."""

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        offline: bool = False,
        endpoint: str | None = None,
        name: str | None = None,
        token_hosts: Collection[str] = (),
    ) -> None:
        """Store the settings of the hub.

        Args:
            environ: the environment variables.
            offline: make no request; every method that needs one raises HubError.
            endpoint: the URL of the hub; None: the value of HF_ENDPOINT in `environ`, else the official hub.
            name: the hub's name in messages and records; None: "official", or the URL without user and password.
            token_hosts: the hosts besides the official hub to which the user has allowed the token to be sent.

        Raises:
            SpecError: the endpoint is not a URL, or is plain http to a public address.
        """
        self.official = official_endpoint()
        self.endpoint = check_address(endpoint or environ.get("HF_ENDPOINT") or self.official, "HF_ENDPOINT")
        # The name is stored in files and shown to the user, so it must not contain a password.
        self.name = name or ("official" if self.is_official else redact(self.endpoint))
        self.offline = offline
        self.unavailable: str | None = "this run is offline" if offline else None
        self.is_token_host = any(is_host(host, self.endpoint) for host in token_hosts)
        is_implicit_allowed = environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() not in _TRUE
        self._may_see_token = self.is_token_host or (self.is_official and is_implicit_allowed)

    @property
    def is_official(self) -> bool:
        """Return whether this is the official hub, the only hub whose hashes are trusted by default."""
        return self.endpoint == self.official

    @property
    def token(self) -> str | None:
        """Return the user's token if it may be sent to this hub, else None.

        It may be sent to the hosts that the user has named, and to the official hub unless
        HF_HUB_DISABLE_IMPLICIT_TOKEN is set. None too if the user has no token.

        Raises:
            FirstlightError: the token has characters that are not allowed in an HTTP header.
        """
        if not self._may_see_token:
            return None
        from huggingface_hub import get_token

        token = get_token()
        if token is not None and not (token.isascii() and token.isprintable()):
            raise FirstlightError("The Hugging Face token contains invalid characters. Set HF_TOKEN to a valid token.")
        return token

    def headers(self) -> dict[str, str]:
        """Return the headers of every request, with the token if it may be sent to this hub."""
        token = self.token
        return {"User-Agent": "firstlight", **({"Authorization": f"Bearer {token}"} if token else {})}

    def _request_headers(self) -> dict[str, str]:
        return {**self.headers(), "Accept-Encoding": "identity"}  # the body is read without being decompressed

    def file_url(self, repo: str, revision: str, path: str) -> str:
        """Return the URL of one file of a snapshot."""
        return f"{self.endpoint}/{repo}/resolve/{revision}/{quote(path)}"

    def listing(self, repo: str, revision: str, *, seconds: float = 10.0) -> dict[str, ListedFile]:
        """Return {path: file} of all files of a repository at one commit.

        Args:
            repo: "owner/name".
            revision: the commit.
            seconds: the timeout of a read; also of the connection, up to 3 s. Below 5 s no request is retried.

        Raises:
            BusyError: the hub is busy, with a Retry-After of 5 s to 600 s.
            AccessError: this user has no access to the repository.
            HubError: the hub is unavailable, does not have the revision, or its response is not a listing.
        """
        url = f"{self.endpoint}/api/models/{repo}/tree/{revision}?recursive=true&expand=false"
        files: dict[str, ListedFile] = {}
        for _ in range(_MAX_PAGES):
            rows, links = self._get(url, repo, seconds)
            try:
                files |= {entry.path: entry for entry in map(_listed, rows) if entry is not None}
                next_url = urlsplit(links.get("next", {}).get("url", ""))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._invalid_response(repo) from None
            if not next_url.query:
                break
            # Only the query of the link to the next page is used, with this hub's URL. A mirror may copy the link from
            # the official hub; a request to another host would leak the token.
            url = f"{self.endpoint}/api/models/{repo}/tree/{revision}?{next_url.query}"
        return files

    def resolve(self, repo: str, revision: str) -> tuple[str, str]:
        """Return the commit of a branch or tag, and the licence of the repository.

        Args:
            repo: "owner/name".
            revision: the name of the branch or tag.

        Returns:
            (commit, licence, or "" if the repository has no licence in its metadata).

        Raises:
            BusyError, AccessError, HubError: as for `listing`.
        """
        url = f"{self.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}"
        info, _ = self._get(url, repo, 10.0)
        try:
            card = info.get("cardData") or {}
            return str(info["sha"]), str(card.get("license") or "")
        except (KeyError, TypeError, AttributeError):
            raise self._invalid_response(repo) from None

    def _invalid_response(self, repo: str) -> HubError:
        return HubError(f"{self.shown} sent an invalid response to a request for {repo}")

    @property
    def shown(self) -> str:
        """Return the endpoint for messages, without a user name and password."""
        return redact(self.endpoint)

    def _get(self, url: str, repo: str, seconds: float) -> tuple[Any, dict[str, dict[str, str]]]:
        """Request a URL; retry if the hub is busy for at most 5 s, or if the connection breaks.

        Args:
            url: the URL.
            repo: the repository, for messages.
            seconds: the timeout, as for `listing`.

        Returns:
            (the parsed JSON of the response, the links in its header Link as requests parses them).

        Raises:
            BusyError, AccessError, HubError: as for `listing`.
        """
        import requests
        import urllib3

        if self.unavailable is not None:
            raise HubError(self.unavailable)
        attempts = _TRIES if seconds >= _RETRY_TIMEOUT_SECONDS else 1
        with self.session() as session:
            for attempt in range(1, attempts + 1):
                wait = 0.0
                try:
                    with session.get(
                        url, headers=self._request_headers(), timeout=(min(3.0, seconds), seconds), stream=True
                    ) as response:
                        if response.status_code < 400:
                            return self._read(response, repo, seconds), response.links
                        wait = retry_after(response.headers.get("Retry-After"), attempt - 1)
                        refusal = self.refusal(repo, response.status_code, response.headers.get("X-Error-Code", ""))
                        if response.status_code not in BUSY or attempt == attempts:
                            raise refusal
                        if wait > _SHORT_WAIT_SECONDS:  # the caller can try another hub meanwhile
                            raise BusyError(str(refusal), wait) if wait <= LONGEST_WAIT_SECONDS else refusal
                except (
                    requests.RequestException,
                    urllib3.exceptions.HTTPError,
                    body.ConnectionBrokenError,
                    body.StalledError,
                    ValueError,
                ) as error:
                    if attempt == attempts or not _is_broken_connection(error):
                        kind = "" if isinstance(error, requests.ConnectionError) else f" ({type(error).__name__})"
                        self.unavailable = f"{self.shown} does not answer{kind}"
                        raise HubError(self.unavailable) from None
                time.sleep(wait)
        raise AssertionError  # not reached: the last attempt returns or raises

    def _read(self, response: requests.Response, repo: str, seconds: float) -> Any:  # noqa: ANN401 (JSON is any of six types)
        content = bytearray()
        deadline = time.monotonic() + _MAX_RESPONSE_SECONDS
        for block in body.blocks(response.raw, seconds):
            content += block
            if len(content) > _MAX_RESPONSE_BYTES or time.monotonic() > deadline:
                raise self._invalid_response(repo)
        try:
            return json.loads(bytes(content))
        except (ValueError, RecursionError):
            raise self._invalid_response(repo) from None

    def refusal(self, repo: str, status: int, code: str) -> HubError:
        """Return the error for an HTTP error status of this hub; its message has the user's next step.

        Args:
            repo: the requested repository.
            status: the HTTP status.
            code: the value of the response's header X-Error-Code, such as "GatedRepo"; "" without the header.
        """
        page = f"{self.shown}/{repo}"
        gets_token = self.is_official or self.is_token_host
        remedy = "set HF_TOKEN (or run `hf auth login`)"
        if not gets_token:  # HF_TOKEN alone would not help, since the token is not sent to this hub
            remedy = (
                "pull it from the official hub, or allow the token for this hub: "
                f"--send-token-to {host_of(self.endpoint)}"
            )
        if code == "GatedRepo" or status == 403:
            reason = "the token has no access to it" if self.token else "no token was sent"
            return AccessError(
                f"{repo} is gated, and {reason}. Accept the terms at {page}, create a token that can read {repo}, "
                f"and {remedy}"
            )
        if status == 401 or code == "RepoNotFound":
            reason = "the token has no access to it" if self.token else "no token was sent"
            return AccessError(
                f"{self.shown} does not show {repo}: the name is wrong, or the repository is private and {reason}. "
                f"Check {page}. If the repository is private, {remedy}"
            )
        if code == "RevisionNotFound":
            return HubError(f"{self.shown} does not have the pinned revision of {repo} any more")
        return HubError(f"{self.shown} answers {status} to a request for {repo}")

    def session(self) -> requests.Session:
        """Return a session that uses the proxy and CA environment variables, and no password of ~/.netrc."""
        from provision.net import session as http_session

        return http_session.TokenSession()


def is_host(named: str, endpoint: str) -> bool:
    """Return whether `named` is the host of an endpoint.

    Args:
        named: "HOST", "HOST:PORT" or a URL. "HOST" matches any port. A URL must also have the endpoint's scheme.
        endpoint: the URL of a hub.
    """
    url = urlsplit(endpoint)
    try:
        named_url = urlsplit(named if "://" in named else f"//{named}")
        port = named_url.port
    except ValueError:  # not a host
        return False
    if named_url.scheme:  # a token that is allowed over https must not be sent over http
        is_match = (named_url.scheme, _port(named_url)) == (url.scheme, _port(url))
    else:
        is_match = port in {None, _port(url)}
    return is_match and named_url.hostname == url.hostname


def _port(url: SplitResult) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)


def _is_broken_connection(error: Exception) -> bool:
    """Return whether an error of a request is a connection that broke after it was made, so that a retry may help."""
    import requests
    import urllib3

    if isinstance(
        error, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.ProtocolError | body.ConnectionBrokenError
    ):
        return True
    causes = [cause for cause in error.args if isinstance(cause, Exception)]
    return isinstance(error, requests.ConnectionError) and any(
        isinstance(cause, urllib3.exceptions.ProtocolError) for cause in causes
    )


def _listed(entry: dict[str, object]) -> ListedFile | None:
    """Return the file that one row of a hub's listing describes; None if the row describes a folder.

    Raises:
        ValueError, KeyError, TypeError: the row is invalid.
    """
    if entry["type"] != "file":
        return None
    lfs = entry.get("lfs")
    blob = lfs["oid"] if isinstance(lfs, dict) else entry["oid"]
    size = lfs["size"] if isinstance(lfs, dict) else entry["size"]
    # The hash becomes the name of a file, so it must not be a path.
    if not (isinstance(blob, str) and _BLOB.fullmatch(blob) and type(size) is int and size >= 0):
        raise ValueError("not a listing")
    return ListedFile(str(entry["path"]), size, blob)
