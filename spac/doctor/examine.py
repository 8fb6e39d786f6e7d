"""Asks every part in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import spac
from spac.doctor import board, kernel, model_file, process, storage
from spac.doctor.finding import Finding, Level
from spac.errors import LibraryError, SpacError
from spac.host.system import System
from spac.stats import StoresProbe


@dataclass(frozen=True)
class Place:
    """Where models are.

    Attributes:
        path: absolute, as the examined system names it.
        model: a model there that can be opened; None for a folder, or a recorded tree.
    """

    path: str
    model: Path | None = None


def examine(system: System, place: Place) -> list[Finding]:
    """All findings. What only a running system can tell is asked of it where `system` is the one that we run on."""
    return list(_examine(system, place))


def _examine(system: System, place: Place) -> Iterator[Finding]:
    here = system.root == Path("/")
    probe, problem = _probe(place.model) if here else (None, "")
    yield from board.check(system)
    yield from kernel.check(system, probe)
    yield from kernel.check_memory(system)
    yield from storage.check_swap(system)
    yield from storage.check(place.path, system)
    if place.model is not None:
        yield from model_file.check(place.model, probe)
    yield from process.check(system)
    if here:
        yield from process.check_versions()
    if problem:
        yield Finding("software", "libspac", Level.warning, problem, "`make build`, or the wheel for this machine")


def _probe(model: Path | None) -> tuple[StoresProbe | None, str]:
    """What stores find here, and why that cannot be told. Without a model they try the library's own file."""
    if spac.library_folder is None:
        return None, "libspac.so is not built"
    try:
        from spac import control

        return control.stores_probe(str(model or spac.library_folder / "libspac.so")), ""
    except LibraryError as e:
        return None, str(e)
    except SpacError:  # the model's own findings say what is wrong with it
        return None, ""
