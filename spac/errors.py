"""What can go wrong, in words for people: every message names the file or value and says what to do."""

from __future__ import annotations

import os


class SpacError(RuntimeError):
    """Base of all errors of spac. A RuntimeError, since that is what llama-cpp-python raises when decoding fails."""


class ModelFileError(SpacError, ValueError):
    """A model file is missing, damaged, incomplete or not supported. A ValueError, as llama-cpp-python raises."""


class BudgetError(SpacError):
    """The memory limit is too small for the model with this context."""


class OptionError(SpacError, ValueError):
    """An argument has no meaning: a memory size that cannot be read, a store that does not exist."""


class LibraryError(SpacError):
    """The native libraries are missing, or another llama.cpp is loaded in this process."""


class DecodeError(SpacError):
    """llama.cpp could not decode a batch, for a reason other than paging."""


class ExpertReadError(SpacError):
    """Expert weights could not be read while decoding. Nothing was computed from what was not there.

    Attributes:
        path: the model file.
        offset: of the failed read in the file, bytes.
        length: of the failed read, bytes.
        errno: the operating system's error number, 0 if there is none.
    """

    def __init__(self, path: str, offset: int, length: int, errno: int) -> None:
        self.path = path
        self.offset = offset
        self.length = length
        self.errno = errno
        reason = os.strerror(errno) if errno else "unknown error"
        super().__init__(
            f"{path}: reading {length} bytes of expert weights at offset {offset} failed: {reason} (errno {errno}); "
            "check the disk, then try again"
        )


class ModelChangedError(SpacError):
    """A model file was replaced, truncated or written to while it was in use.

    Attributes:
        path: the model file; empty if it is not known.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path or 'a model file'}: the file changed while in use; load the model again")


class Cancelled(SpacError):
    """The decode was stopped by `cancel()`."""

    def __init__(self, message: str = "cancelled") -> None:
        super().__init__(message)
