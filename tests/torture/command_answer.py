"""Holds the answers of commands in a history of two hosts, and counts them."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figures:
    """Count what the rounds have done."""

    rounds: int = 0
    commands: int = 0
    killed: int = 0
    together: int = 0
    exits: Counter[str] = field(default_factory=Counter)
    blocked_at_end: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Answer:
    """Hold the result of one command: its arguments, exit code, JSON object (None if it printed none) and messages."""

    words: list[str]
    code: int
    result: dict[str, Any] | None
    text: str
    killed: bool

    @classmethod
    def of(cls, words: list[str], answer: dict[str, Any]) -> Answer:
        result = None
        with contextlib.suppress(ValueError):
            result = json.loads(answer["out"])
        text = answer["out"] + answer["err"]
        return cls(words, answer["code"], result, text, answer["killed"])

    @property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        return {row["step"]: row for row in (self.result or {}).get("outcomes", [])}

    @property
    def changed(self) -> set[str]:
        return {name for name, row in self.outcomes.items() if row["changed"]}

    def __str__(self) -> str:
        return f"{' '.join(self.words)} -> exit {self.code}\n{self.text[-1500:]}"
