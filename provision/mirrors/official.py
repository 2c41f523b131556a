"""The official hub, as huggingface_hub names it."""

from __future__ import annotations


def official_endpoint() -> str:
    """The official hub, as the installed client has it."""
    from huggingface_hub import constants

    return constants._HF_DEFAULT_ENDPOINT  # noqa: SLF001 (ENDPOINT itself follows HF_ENDPOINT)
