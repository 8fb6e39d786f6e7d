"""spac runs mixture-of-experts language models that are larger than memory.

`spac.Llama` is `llama_cpp.Llama` with three more arguments. Importing this package loads nothing heavy: it only tells
llama-cpp-python where the patched libraries are, so import it before `llama_cpp`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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


NO_LIBRARY: Final = (
    "libspac.so was not found: install spac from its wheel, or run `make build` in its source folder"
    " (LLAMA_CPP_LIB_PATH, if it is set, must name a folder that holds libspac.so)"
)


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
    # A compute thread that waits for another spins for a while before it sleeps: by libgomp's default for milliseconds, since it knows
    # nothing of the reading threads that want the core. What follows is tens of microseconds on x86, where a pause takes that long.
    spins = 5_000 if os.uname().machine == "x86_64" else 50_000
    # numpy's OpenBLAS does the same after each product that it shares out, for a tenth of a second, beside llama.cpp's threads; the
    # estimator's products are small. It has no effect where numpy was imported before.
    ours = {"LLAMA_CPP_LIB_PATH": str(folder), "MTMD_CPP_LIB": str(folder), "OPENBLAS_NUM_THREADS": "1"}
    if "OMP_WAIT_POLICY" not in os.environ:
        ours["GOMP_SPINCOUNT"] = str(spins)
    for name, value in ours.items():
        if name not in os.environ:
            os.environ[name] = value
            variables_set.add(name)


class _LibraryCheck:
    """Sees `llama_cpp` being imported: what is wrong with the libraries that it is about to load is said here, in one line."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name != "llama_cpp":
            return
        from spac.errors import LibraryError
        from spac.host import build

        if library_folder is not None:
            build.check(library_folder)
        elif not (Path(os.environ.get("LLAMA_CPP_LIB_PATH", "")) / "libllama.so").is_file():  # else: another llama.cpp, wanted as it is
            raise LibraryError(NO_LIBRARY)


library_folder = _find_library_folder()
variables_set: set[str] = set()  # environment variables that this import gave a value: not for other programs that we start
_prepare(library_folder)
sys.meta_path.insert(0, _LibraryCheck)  # a finder that finds nothing


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'spac' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
