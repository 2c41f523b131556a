"""Returns the URL of the official hub."""

from __future__ import annotations


def official_endpoint() -> str:
    """Return the URL of the official hub, which is the default of the installed huggingface_hub."""
    from huggingface_hub import constants

    return constants._HF_DEFAULT_ENDPOINT  # noqa: SLF001 (the public ENDPOINT changes with HF_ENDPOINT)
