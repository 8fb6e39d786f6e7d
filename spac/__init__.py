"""spac runs mixture-of-experts language models that are larger than memory.

`spac.Llama` is `llama_cpp.Llama` with three more arguments. Importing this package loads nothing heavy: it only tells
llama-cpp-python where the patched libraries are, so import it before `llama_cpp`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spac.errors import (
        BudgetError,
        Cancelled,
        DecodeError,
        ExpertReadError,
        LibraryError,
        ModelChangedError,
        ModelFileError,
        OptionError,
        SpacError,
    )
    from spac.llama import Llama
    from spac.plan import Plan
    from spac.stats import ModelInfo, ModelStats, RoutingEvent

__version__ = "0.1.0"

_HOME = {
    "Llama": "spac.llama",
    "Plan": "spac.plan",
    "ModelInfo": "spac.stats",
    "ModelStats": "spac.stats",
    "RoutingEvent": "spac.stats",
    "SpacError": "spac.errors",
    "ModelFileError": "spac.errors",
    "BudgetError": "spac.errors",
    "OptionError": "spac.errors",
    "LibraryError": "spac.errors",
    "DecodeError": "spac.errors",
    "ExpertReadError": "spac.errors",
    "ModelChangedError": "spac.errors",
    "Cancelled": "spac.errors",
}

__all__ = [
    "BudgetError",
    "Cancelled",
    "DecodeError",
    "ExpertReadError",
    "LibraryError",
    "Llama",
    "ModelChangedError",
    "ModelFileError",
    "ModelInfo",
    "ModelStats",
    "OptionError",
    "Plan",
    "RoutingEvent",
    "SpacError",
]


def _find_library_folder() -> Path | None:
    """The folder that holds libspac.so: what LLAMA_CPP_LIB_PATH names if it does, else `lib` in the package."""
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")
    folders = [Path(chosen)] if chosen else [Path(entry) / "lib" for entry in __path__]
    return next((folder.resolve() for folder in folders if (folder / "libspac.so").is_file()), None)


def _prepare(folder: Path | None) -> None:
    """Point llama-cpp-python at our libraries; refuse a process in which it already loaded others."""
    if folder is None:
        return  # said when a library is needed: `spac --help` and `spac inspect` need none
    loaded = getattr(sys.modules.get("llama_cpp.llama_cpp"), "_base_path", None)
    if loaded is not None and Path(loaded).resolve() != folder:
        from spac.errors import LibraryError

        raise LibraryError(f"llama_cpp was already imported with the libraries in {loaded}: import spac before llama_cpp")
    os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(folder))
    os.environ.setdefault("MTMD_CPP_LIB", str(folder))


library_folder = _find_library_folder()
_prepare(library_folder)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'spac' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
