"""One entry of the mirror catalogue, with the keys that all tools share."""

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

    `redirects` is true where the mirror sends downloads to other hosts by design.
    `reach` is the only network from which the mirror answers; None if it answers from everywhere.
    `source` is the public list that names the mirror.
    """

    url: Address
    redirects: bool = False
    reach: str | None = None
    enabled: bool = True
    source: str = ""
    note: str = ""

    def source_for(self, name: str, needs: ProbeNeeds) -> MirrorSource:  # noqa: ARG002 (conda's and torch's need it)
        """Return this mirror under the name `name`, as a source of the files that `needs` locks."""
        return MirrorSource(name, self.url)
