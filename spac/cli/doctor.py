"""`spac doctor`: what of this machine slows paging down or breaks it, and what to do about it. Changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spac.cli import options as opt
from spac.errors import SpacError

if TYPE_CHECKING:
    from spac.doctor import Finding, Place


def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL|FOLDER]", help="A GGUF file to look at, or where models are; else this folder.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Look at board, kernel, memory and disk, and say what to do for speed. Changes nothing."""
    from spac.doctor import examine
    from spac.host.system import System

    findings = examine(System(), place_of(model or Path()))
    if as_json:
        print(json.dumps({"findings": [dataclasses.asdict(finding) for finding in findings]}, ensure_ascii=False))
    else:
        show(findings)
    return 0


def place_of(path: Path) -> Place:
    """What the user named.

    Raises:
        SpacError: it is not there, or may not be read.
    """
    from spac.doctor import Place

    try:
        if path.is_dir():
            return Place(str(path.resolve()))
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise ValueError("neither a file nor a folder")
        with path.open("rb"):
            return Place(str(path.resolve()), path)
    except (OSError, ValueError, RuntimeError) as e:
        raise SpacError(f"{path}: {getattr(e, 'strerror', None) or e}; give a model, or the folder in which models are") from None


def show(findings: list[Finding]) -> None:
    """By topic; advice below what it is about. Levels are coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from spac.doctor import Level

    colour = {Level.ok: "green", Level.note: "yellow", Level.warning: "bold red"}
    width = max(len(finding.name) for finding in findings)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for topic, group in itertools.groupby(findings, key=lambda finding: finding.topic):
        console.print(topic, style="bold", markup=False)
        for finding in group:
            text = f"{finding.name:<{width}}  {printable(finding.text)}"
            console.print(Text.assemble("  ", (f"{finding.level:<9}", colour[finding.level]), text))
            if finding.advice:
                console.print(Text(f"{'':{width + 13}}→ {printable(finding.advice)}"))
    counts = {level: sum(finding.level == level for finding in findings) for level in Level}
    console.print(f"{counts[Level.warning]} warnings, {counts[Level.note]} notes", markup=False)


def printable(text: str) -> str:
    """Names of devices come from the devices."""
    return "".join(c if c.isprintable() else "?" for c in text)
