"""Speaks to a Hugging Face hub: where it is, whether it answers, what it lists, and who gets the token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from provision.addresses import check_address, host_of
from provision.download import retry_after
from provision.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import requests


# What says "not now" rather than "no", and how often it is asked again.
_BUSY = {429, 500, 502, 503, 504}
_TRIES = 3
_PATIENT_SECONDS = 5.0
_MOST_PAGES = 1000
_POOL = 16


class HubError(FirstlightError):
    """The hub did not answer as a hub, or does not have it."""


class AccessError(HubError):
    """The hub has it, and does not show it to this user."""


@dataclass(frozen=True)
class Listed:
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
        self.name = name or ("official" if self.is_official else self.endpoint)
        self.offline = offline
        self.silence: str | None = "this run is offline" if offline else None
        self._may_see_token = self.is_official or host_of(self.endpoint) in token_hosts

    @property
    def is_official(self) -> bool:
        """Whether the endpoint is the official one, the only one whose word is taken for a hash."""
        return self.endpoint == self.official

    @property
    def token(self) -> str | None:
        """The user's token, for the official endpoint and those that the user named."""
        if not self._may_see_token:
            return None
        from huggingface_hub import get_token

        return get_token()

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        token = self.token
        return {"User-Agent": "firstlight", **({"Authorization": f"Bearer {token}"} if token else {})}

    def file_url(self, repo: str, revision: str, path: str) -> str:
        """Where one file of a snapshot lies."""
        return f"{self.endpoint}/{repo}/resolve/{revision}/{quote(path)}"

    def listing(self, repo: str, revision: str, *, seconds: float = 10.0) -> dict[str, Listed]:
        """Every file of a snapshot.

        Args:
            repo: "owner/name".
            revision: a commit.
            seconds: how long the hub may take to connect, and again to answer.

        Raises:
            HubError: it did not answer, or not as a hub.
        """
        url = f"{self.endpoint}/api/models/{repo}/tree/{revision}?recursive=true&expand=false"
        found: dict[str, Listed] = {}
        for _ in range(_MOST_PAGES):
            response = self._get(url, repo, seconds)
            try:
                found |= {entry.path: entry for entry in map(_listed, response.json()) if entry is not None}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise HubError(f"{self.endpoint} does not answer as a hub for {repo}") from None
            following = urlsplit(response.links.get("next", {}).get("url", ""))
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
        found = self._get(f"{self.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}", repo, 10.0)
        try:
            told = found.json()
            card = told.get("cardData") or {}
            return str(told["sha"]), str(card.get("license") or "")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HubError(f"{self.endpoint} does not answer as a hub for {repo}") from None

    def _get(self, url: str, repo: str, seconds: float) -> requests.Response:
        import requests

        if self.silence is not None:
            raise HubError(self.silence)
        patience = _TRIES if seconds >= _PATIENT_SECONDS else 1
        try:
            with self.session() as session:
                for attempt in range(patience):
                    response = session.get(url, headers=self.headers(), timeout=(min(3.0, seconds), seconds))
                    if response.status_code not in _BUSY or attempt == patience - 1:
                        break
                    time.sleep(retry_after(response.headers.get("Retry-After"), attempt))
        except requests.ConnectionError:
            self.silence = f"{self.endpoint} does not answer"
            raise HubError(self.silence) from None
        except requests.RequestException as error:
            self.silence = f"{self.endpoint} does not answer ({type(error).__name__})"
            raise HubError(self.silence) from None
        if response.status_code >= 400:
            raise self.refusal(repo, response.status_code, response.headers.get("X-Error-Code", ""))
        return response

    def refusal(self, repo: str, status: int, code: str) -> HubError:
        """What a status means for a person (source: the hub's X-Error-Code)."""
        page = f"{self.endpoint}/{repo}"
        if code == "GatedRepo" or status == 403:
            have = "the token that you gave does not have it" if self.token else "no token is sent to it"
            return AccessError(
                f"{repo} is gated, and {have}. Accept its terms at {page}, make a token that may read it, and set "
                "HF_TOKEN (or `hf auth login`)"
            )
        if status == 401 or code == "RepoNotFound":
            how = "the token that you gave does not open it" if self.token else "no token is sent to it"
            return AccessError(
                f"{self.endpoint} shows no {repo}: its name is wrong, or it is private, and {how}. "
                f"Look at {page}, and set HF_TOKEN (or `hf auth login`) if it is yours"
            )
        if code == "RevisionNotFound":
            return HubError(f"{self.endpoint} does not have the pinned revision of {repo} any more")
        return HubError(f"{self.endpoint} answers {status} for {repo}")

    def session(self) -> requests.Session:
        """A pooled session that takes proxies and CA settings from the environment."""
        import requests

        session = requests.Session()
        session.max_redirects = 5
        session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=_POOL))
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=_POOL))
        # With no auth of its own a session would take a password from ~/.netrc, and put it in the token's place.
        session.auth = _as_it_is
        return session


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def official_endpoint() -> str:
    """The official hub, as the installed client has it."""
    from huggingface_hub import constants

    return constants._HF_DEFAULT_ENDPOINT  # noqa: SLF001 (ENDPOINT itself follows HF_ENDPOINT)


def _listed(entry: dict[str, object]) -> Listed | None:
    if entry["type"] != "file":
        return None
    lfs = entry.get("lfs")
    blob = lfs["oid"] if isinstance(lfs, dict) else entry["oid"]
    size = lfs["size"] if isinstance(lfs, dict) else entry["size"]
    if not (isinstance(blob, str) and isinstance(size, int) and len(blob) in {40, 64}):
        raise ValueError("not a listing")
    return Listed(str(entry["path"]), size, blob)
