"""Where spac keeps what it measured and learned: one folder below the user's cache directory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from spac.errors import OptionError


def folder() -> Path:
    """$XDG_CACHE_HOME/spac, or ~/.cache/spac; it need not exist.

    Raises:
        OptionError: there is no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "spac"
    except RuntimeError:
        raise OptionError("there is no home directory: set XDG_CACHE_HOME to a folder for what spac keeps") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` at the end; of an error nothing is left, and `path` is as it was.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
