"""Speaks to a Hugging Face hub: where it is, whether it answers, what it lists, and who gets the token."""

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

# How often what is busy or breaks off is asked again.
_TRIES = 3
_PATIENT_SECONDS = 5.0
_MOST_PAGES = 1000
_SHORT_WAIT_SECONDS = 5.0
# A listing of the largest repository is some megabytes; one that does not end is none.
_LONGEST_ANSWER = 64 << 20
_SLOWEST_ANSWER_SECONDS = 60.0
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TRUE = {"1", "ON", "YES", "TRUE"}


class HubError(FirstlightError):
    """The hub did not answer as a hub, or does not have it."""

    kind = "source"


class BusyError(HubError):
    """The hub asks to be asked again, `wait` seconds from now."""

    def __init__(self, message: str, wait: float) -> None:
        """Take what a person is told."""
        super().__init__(message)
        self.wait = wait


class AccessError(HubError):
    """The hub has it, and does not show it to this user."""


@dataclass(frozen=True)
class ListedFile:
    """One file as a hub lists it. `blob` is the name of its blob: sha256 for large files, git sha1 else."""

    path: str
    size: int
    blob: str

    @property
    def kind(self) -> str:
        """The kind of hash that `blob` is."""
        return "sha256" if len(self.blob) == 64 else "git_sha1"


class Hub:
    """One endpoint. It is asked at most once for a sign of life; silence is remembered."""

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        offline: bool = False,
        endpoint: str | None = None,
        name: str | None = None,
        token_hosts: Collection[str] = (),
    ) -> None:
        """Take the endpoint from `HF_ENDPOINT`, else the official one; `endpoint` goes before, and has a name.

        `token_hosts`: hosts that may see the user's token besides the official one, by the user's word.

        Raises:
            SpecError: the endpoint is no URL, or plain http to a public address.
        """
        self.official = official_endpoint()
        self.endpoint = check_address(endpoint or environ.get("HF_ENDPOINT") or self.official, "HF_ENDPOINT")
        # It is kept in files and shown to people: without what stands before its host.
        self.name = name or ("official" if self.is_official else redact(self.endpoint))
        self.offline = offline
        self.silence: str | None = "this run is offline" if offline else None
        self.is_named_for_token = any(is_host(each, self.endpoint) for each in token_hosts)
        implicit = environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() not in _TRUE
        self._may_see_token = self.is_named_for_token or (self.is_official and implicit)

    @property
    def is_official(self) -> bool:
        """Whether the endpoint is the official one, the only one whose word is taken for a hash."""
        return self.endpoint == self.official

    @property
    def token(self) -> str | None:
        """The user's token, for the official endpoint and those that the user named.

        Raises:
            FirstlightError: it is nothing that a request can carry.
        """
        if not self._may_see_token:
            return None
        from huggingface_hub import get_token

        token = get_token()
        if token is not None and not (token.isascii() and token.isprintable()):
            raise FirstlightError("your Hugging Face token holds characters that no token has. Set HF_TOKEN anew.")
        return token

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        token = self.token
        return {"User-Agent": "firstlight", **({"Authorization": f"Bearer {token}"} if token else {})}

    def _asking(self) -> dict[str, str]:
        return {**self.headers(), "Accept-Encoding": "identity"}  # it is read as it comes

    def file_url(self, repo: str, revision: str, path: str) -> str:
        """Where one file of a snapshot lies."""
        return f"{self.endpoint}/{repo}/resolve/{revision}/{quote(path)}"

    def listing(self, repo: str, revision: str, *, seconds: float = 10.0) -> dict[str, ListedFile]:
        """Every file of a snapshot.

        Args:
            repo: "owner/name".
            revision: a commit.
            seconds: how long the hub may take to connect, and again to answer.

        Raises:
            HubError: it did not answer, or not as a hub.
        """
        url = f"{self.endpoint}/api/models/{repo}/tree/{revision}?recursive=true&expand=false"
        found: dict[str, ListedFile] = {}
        for _ in range(_MOST_PAGES):
            told, links = self._get(url, repo, seconds)
            try:
                found |= {entry.path: entry for entry in map(_listed, told) if entry is not None}
                following = urlsplit(links.get("next", {}).get("url", ""))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._is_no_hub(repo) from None
            if not following.query:
                break
            # Its own next page, wherever the link leads: a mirror may pass the official one on, and a token goes along.
            url = f"{self.endpoint}/api/models/{repo}/tree/{revision}?{following.query}"
        return found

    def resolve(self, repo: str, revision: str) -> tuple[str, str]:
        """The commit that a branch or tag stands for, and the licence that the repository names ("" for none).

        Raises:
            HubError: it did not answer, or not as a hub.
        """
        url = f"{self.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}"
        told, _ = self._get(url, repo, 10.0)
        try:
            card = told.get("cardData") or {}
            return str(told["sha"]), str(card.get("license") or "")
        except (KeyError, TypeError, AttributeError):
            raise self._is_no_hub(repo) from None

    def _is_no_hub(self, repo: str) -> HubError:
        return HubError(f"{self.shown} does not answer as a hub for {repo}")

    @property
    def shown(self) -> str:
        """The endpoint, without what stands before its host."""
        return redact(self.endpoint)

    def _get(self, url: str, repo: str, seconds: float) -> tuple[Any, dict[str, dict[str, str]]]:
        """What an address answers, as JSON, and its links; asked again where it is busy or breaks off."""
        import requests
        import urllib3

        if self.silence is not None:
            raise HubError(self.silence)
        patience = _TRIES if seconds >= _PATIENT_SECONDS else 1
        with self.session() as session:
            for attempt in range(1, patience + 1):
                wait = 0.0
                try:
                    with session.get(
                        url, headers=self._asking(), timeout=(min(3.0, seconds), seconds), stream=True
                    ) as response:
                        if response.status_code < 400:
                            return self._read(response, repo, seconds), response.links
                        wait = retry_after(response.headers.get("Retry-After"), attempt - 1)
                        refusal = self.refusal(repo, response.status_code, response.headers.get("X-Error-Code", ""))
                        if response.status_code not in BUSY or attempt == patience:
                            raise refusal
                        if wait > _SHORT_WAIT_SECONDS:  # another hub may be asked meanwhile
                            raise BusyError(str(refusal), wait) if wait <= LONGEST_WAIT_SECONDS else refusal
                except (
                    requests.RequestException,
                    urllib3.exceptions.HTTPError,
                    body.ConnectionBrokenError,
                    body.StalledError,
                    ValueError,
                ) as error:
                    if attempt == patience or not _broke_off(error):
                        kind = "" if isinstance(error, requests.ConnectionError) else f" ({type(error).__name__})"
                        self.silence = f"{self.shown} does not answer{kind}"
                        raise HubError(self.silence) from None
                time.sleep(wait)
        raise AssertionError  # the last attempt has returned or raised

    def _read(self, response: requests.Response, repo: str, seconds: float) -> Any:  # noqa: ANN401 (JSON is any of six types)
        content = bytearray()
        ends = time.monotonic() + _SLOWEST_ANSWER_SECONDS
        for block in body.blocks(response.raw, seconds):
            content += block
            if len(content) > _LONGEST_ANSWER or time.monotonic() > ends:
                raise self._is_no_hub(repo)
        try:
            return json.loads(bytes(content))
        except (ValueError, RecursionError):
            raise self._is_no_hub(repo) from None

    def refusal(self, repo: str, status: int, code: str) -> HubError:
        """What a status means for a person (source: the hub's X-Error-Code)."""
        page = f"{self.shown}/{repo}"
        seen = self.is_official or self.is_named_for_token
        way = "and set HF_TOKEN (or `hf auth login`)"
        if not seen:  # a token that is set would not help
            way = (
                f"and pull it from the official hub, or show your token here: --send-token-to {host_of(self.endpoint)}"
            )
        if code == "GatedRepo" or status == 403:
            have = "the token that you gave does not have it" if self.token else "no token is sent to it"
            return AccessError(
                f"{repo} is gated, and {have}. Accept its terms at {page}, make a token that may read it, {way}"
            )
        if status == 401 or code == "RepoNotFound":
            how = "the token that you gave does not open it" if self.token else "no token is sent to it"
            return AccessError(
                f"{self.shown} shows no {repo}: its name is wrong, or it is private, and {how}. Look at {page}, {way} "
                "if it is yours"
            )
        if code == "RevisionNotFound":
            return HubError(f"{self.shown} does not have the pinned revision of {repo} any more")
        return HubError(f"{self.shown} answers {status} for {repo}")

    def session(self) -> requests.Session:
        """What it is asked with: proxies and CA settings are taken from the environment, no password of ~/.netrc is."""
        from provision.net import session as http_session

        return http_session.TokenSession()


def is_host(named: str, endpoint: str) -> bool:
    """Whether a person's word names the host of an endpoint: as a URL, with its port, or without one.

    Args:
        named: "HOST", "HOST:PORT" or a URL.
        endpoint: the URL of a hub.
    """
    found = urlsplit(endpoint)
    try:
        asked = urlsplit(named if "://" in named else f"//{named}")
        port = asked.port
    except ValueError:  # it names nothing
        return False
    if asked.scheme:  # a token that may go there by https does not go there by http
        is_it = (asked.scheme, _port(asked)) == (found.scheme, _port(found))
    else:
        is_it = port in {None, _port(found)}
    return is_it and asked.hostname == found.hostname


def _port(url: SplitResult) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)


def _broke_off(error: Exception) -> bool:
    """Whether somebody answered, and then no more: asked again, it may go well."""
    import requests
    import urllib3

    if isinstance(
        error, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.ProtocolError | body.ConnectionBrokenError
    ):
        return True
    reasons = [each for each in error.args if isinstance(each, Exception)]
    return isinstance(error, requests.ConnectionError) and any(
        isinstance(each, urllib3.exceptions.ProtocolError) for each in reasons
    )


def _listed(entry: dict[str, object]) -> ListedFile | None:
    if entry["type"] != "file":
        return None
    lfs = entry.get("lfs")
    blob = lfs["oid"] if isinstance(lfs, dict) else entry["oid"]
    size = lfs["size"] if isinstance(lfs, dict) else entry["size"]
    # A blob's hash becomes the name of a file.
    if not (isinstance(blob, str) and _BLOB.fullmatch(blob) and type(size) is int and size >= 0):
        raise ValueError("not a listing")
    return ListedFile(str(entry["path"]), size, blob)
