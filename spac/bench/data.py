"""Data files that come with spac, or that a user wrote: TOML, by name within a folder or by path."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from spac.errors import OptionError


def names(folder: Path) -> list[str]:
    """Of the files that come with spac."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def read(folder: Path, kind: str, name: str) -> tuple[Path, dict[str, Any]]:
    """A file of a folder by its name, or any `.toml` file: where it is and what it holds.

    Args:
        kind: what such a file is called, for messages.

    Raises:
        OptionError: there is none, or it cannot be read.
    """
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        raise OptionError(f"{kind} {name!r} does not exist: use {', '.join(names(folder))}, or a .toml file")
    try:
        return path, tomllib.loads(path.read_text())
    except OSError as e:
        raise OptionError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise OptionError(f"{path}: not a TOML file: {e}") from None
