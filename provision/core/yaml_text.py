"""Reads YAML that a user or another program wrote."""

from __future__ import annotations

import re
from typing import Any

_BRACKET = re.compile(r"[\[\]{}]")
_MOST_DEPTH = 100


def load(text: str, *, round_trip: bool = False) -> Any:  # noqa: ANN401 (any value that YAML can hold)
    """Return the value of a YAML text.

    Args:
        text: the text.
        round_trip: keep the numbers of the lines (`lc`) in the value.

    Raises:
        ValueError: the text is not valid YAML, or is too deep.
    """
    from ruamel.yaml import YAML

    depth = 0
    for bracket in _BRACKET.finditer(text):  # ruamel needs ten seconds to find that 100,000 brackets are too deep
        depth += 1 if bracket[0] in "[{" else -1
        if depth > _MOST_DEPTH:
            raise ValueError("it is too deep")
    try:
        return YAML(typ="rt" if round_trip else "safe").load(text)
    except RecursionError:
        raise ValueError("it is too deep") from None
    except Exception as error:  # a wrong date, key or tag raises errors of many types
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
