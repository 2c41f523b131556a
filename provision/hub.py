"""Speaks to a Hugging Face hub: where it is, whether it answers, what it lists, and who gets the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from provision.addresses import check_address
from provision.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests


class HubError(FirstlightError):
    """The hub did not answer as a hub; random weights stand in."""


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
        self, environ: Mapping[str, str], *, offline: bool = False, endpoint: str | None = None, name: str | None = None
    ) -> None:
        """Take the endpoint from `HF_ENDPOINT`, else the official one; `endpoint` goes before, and has a name.

        Raises:
            SpecError: the endpoint is no URL, or plain http to a public address.
        """
        self.official = official_endpoint()
        self.endpoint = check_address(endpoint or environ.get("HF_ENDPOINT") or self.official, "HF_ENDPOINT")
        self.name = name or ("official" if self.is_official else self.endpoint)
        self.offline = offline
        self.silence: str | None = "this run is offline" if offline else None

    @property
    def is_official(self) -> bool:
        """Whether the endpoint is the official one, the only one that may see a token or name a hash."""
        return self.endpoint == self.official

    @property
    def token(self) -> str | None:
        """The user's token, for the official endpoint alone."""
        if not self.is_official:
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
        import requests

        if self.silence is not None:
            raise HubError(self.silence)
        url = f"{self.endpoint}/api/models/{repo}/tree/{revision}?recursive=true&expand=false"
        connect = min(3.0, seconds)
        try:
            with self.session() as session:
                response = session.get(url, headers=self.headers(), timeout=(connect, seconds))
        except requests.ConnectionError:
            self.silence = f"{self.endpoint} does not answer"
            raise HubError(self.silence) from None
        except requests.RequestException as error:
            self.silence = f"{self.endpoint} does not answer ({type(error).__name__})"
            raise HubError(self.silence) from None
        if response.status_code >= 400:
            raise HubError(f"{self.endpoint} answers {response.status_code} for {repo}")
        try:
            return {entry.path: entry for entry in map(_listed, response.json()) if entry is not None}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HubError(f"{self.endpoint} does not answer as a hub for {repo}") from None

    def session(self) -> requests.Session:
        """A pooled session that takes proxies and CA settings from the environment."""
        import requests

        session = requests.Session()
        session.max_redirects = 5
        return session


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
