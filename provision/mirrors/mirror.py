"""Defines one entry in the catalogue of mirrors, with the keys that are the same for all tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from provision.config import toml
from provision.core.errors import SpecError
from provision.mirrors.chosen_mirrors import MirrorSource
from provision.net.urls import check_address

if TYPE_CHECKING:
    from provision.mirrors.probe_needs import ProbeNeeds


def _address(url: str) -> str:
    try:
        check_address(url, "the address")
    except SpecError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return url


Address = Annotated[str, AfterValidator(_address)]


class Mirror(toml.Strict):
    """Describe a mirror from which one tool can download.

    `url`: the URL of the mirror.
    `redirects`: the mirror redirects downloads to other hosts, so this is no error.
    `reach`: the only network whose hosts can use the mirror, as text; None if every host can.
    `enabled`: false if the mirror is not used.
    `source`: the URL of the public list that contains the mirror. `note`: a remark for readers of the catalogue.
    """

    url: Address
    redirects: bool = False
    reach: str | None = None
    enabled: bool = True
    source: str = ""
    note: str = ""

    def source_for(self, name: str, needs: ProbeNeeds) -> MirrorSource:  # noqa: ARG002 (conda's and torch's need it)
        """Return this mirror as a source.

        Args:
            name: the name of the mirror in the catalogue.
            needs: the lock files and models of the host, by which a tool selects the variant or the channels.
        """
        return MirrorSource(name, self.url)
