"""One thing that was found, how bad it is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How much a finding matters."""

    ok = "ok"
    note = "note"  # could be better, or worth knowing
    warning = "warning"  # costs much speed, or may go wrong


@dataclass(frozen=True)
class Finding:
    """Attributes:
    topic: what it belongs to, one word.
    name: what was looked at; a topic may have several of a name.
    level: how much it matters.
    text: for people.
    advice: what to do; "" if nothing.
    facts: the same in figures, for programs.
    """

    topic: str
    name: str
    level: Level
    text: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
