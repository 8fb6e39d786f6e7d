"""Recorded trees, expanded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spac.doctor import Finding, Place, examine
from spac.host.system import System

TREES = Path(__file__).resolve().parent / "trees"
NAMES = sorted(path.stem for path in TREES.glob("*.txt"))

Entries = dict[str, tuple[str, str]]  # path: "->" or ":", target or text


def read_tree(name: str) -> Entries:
    """The entries of a tree: see trees/README.md."""
    found: Entries = {}
    path = ""
    for line in (TREES / f"{name}.txt").read_text().splitlines():
        if match := re.match(r"(/.*?)(?: (->) |(:)(?: |$))(.*)$", line) if not line.endswith(" |") else None:
            path = match[1]
            found[path] = ("->", match[4]) if match[2] else (":", match[4] + "\n")
        elif line.startswith("/"):
            path = line.removesuffix(" |")
            found[path] = (":", "")
        elif line.startswith("    ") or not line:
            found[path] = (":", found[path][1] + line[4:] + "\n")
        else:
            assert line.startswith("#"), line
    return found


def write_entry(root: Path, path: str, kind: str, text: str) -> None:
    """One file or link below a root."""
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "->":
        place.symlink_to(text)
    else:
        place.write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], System]:
    """A recorded machine by name."""

    def expand(name: str) -> System:
        for path, (kind, text) in read_tree(name).items():
            write_entry(tmp_path, path, kind, text)
        return System(tmp_path)

    return expand


def look(system: System, path: str) -> dict[str, list[Finding]]:
    """Findings by name."""
    found: dict[str, list[Finding]] = {}
    for finding in examine(system, Place(path)):
        found.setdefault(finding.name, []).append(finding)
    return found
