"""llama.cpp's log: shown only when asked for, but its first error line is kept to explain a failure: those that follow only say
what failed with it."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp.llama_cpp as upstream
from llama_cpp import _logger

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml/include/ggml.h; llama-cpp-python has an older one
_first_error = ""
_quiet = 0


@upstream.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes | None, _: object) -> None:
    global _first_error
    line = (text or b"").decode(errors="replace")
    if level == _ERROR_LEVEL and not _first_error:
        _first_error = line.strip()
    if _logger.logger.level == logging.DEBUG and not _quiet and sys.stderr is not None:
        print(line, end="", flush=True, file=sys.stderr)


def install() -> None:
    """Take llama.cpp's log over from llama-cpp-python; its `verbose` still decides whether it is shown."""
    upstream.llama_log_set(_on_log, ctypes.c_void_p(0))


def forget_error() -> None:
    global _first_error
    _first_error = ""


def first_error() -> str:
    """The first error line since `forget_error()`, without the name of the function that logged it; "" if there was none."""
    name, colon, rest = _first_error.partition(": ")
    return rest if colon and " " not in name else _first_error


@contextmanager
def quiet() -> Iterator[None]:
    """Show nothing meanwhile: a load that only measures would log everything twice."""
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


install()
