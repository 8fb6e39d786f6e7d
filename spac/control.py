"""The control channel: libspac's C ABI (spac/native/include/spac.h) in ctypes.

Importing this module loads llama_cpp and libspac.so, compares every struct's layout with the library's own and registers
the pager with the CPU backend. It knows no policy: budgets and plans come from `spac.governor` and `spac.plan`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

import spac
from spac.errors import (
    BudgetError,
    Cancelled,
    ExpertReadError,
    LibraryError,
    ModelChangedError,
    ModelFileError,
    OptionError,
    SpacError,
)
from spac.stats import LayerStats, ModelInfo, ModelStats, RoutedLayer, RoutingEvent, StoresProbe

ABI_VERSION: Final = 10
EVENT_MAX_EXPERTS: Final = 32
IO_THREADS: Final = 6  # default of `Options.n_io_threads`: spac/native/library.cpp

OK: Final = 0
E_ARGUMENT: Final = -1
E_BACKEND: Final = -2
E_BUDGET: Final = -3
E_IO: Final = -4
E_CHANGED: Final = -5
E_CANCELLED: Final = -6
E_MEMORY: Final = -7

STORES: Final = {"auto": 0, "direct": 1, "buffered": 2, "mmap": 3, "mock": 4}
PAGES: Final = ("pager", "huge", "small", "touched")  # SPAC_PAGES_*


# typedef struct spac_options { uint64_t struct_size; int32_t store, n_io_threads, repack, reserved; } spac_options;
class Options(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("store", ctypes.c_int32),
        ("n_io_threads", ctypes.c_int32),
        ("repack", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


# typedef struct spac_info { uint64_t struct_size, expert_bytes, expert_page_bytes, max_bundle_bytes, floor_bytes;
#                            int32_t n_layers, n_experts, n_tensors, n_repacked, store, n_bundles; } spac_info;
class Info(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("expert_bytes", ctypes.c_uint64),
        ("expert_page_bytes", ctypes.c_uint64),
        ("max_bundle_bytes", ctypes.c_uint64),
        ("floor_bytes", ctypes.c_uint64),
        ("n_layers", ctypes.c_int32),
        ("n_experts", ctypes.c_int32),
        ("n_tensors", ctypes.c_int32),
        ("n_repacked", ctypes.c_int32),
        ("store", ctypes.c_int32),
        ("n_bundles", ctypes.c_int32),
    )


# typedef struct spac_stats { uint64_t struct_size, budget_bytes, ... events; } spac_stats;
class Stats(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("budget_bytes", ctypes.c_uint64),
        ("used_bytes", ctypes.c_uint64),
        ("peak_bytes", ctypes.c_uint64),
        ("model_used_bytes", ctypes.c_uint64),
        ("hits", ctypes.c_uint64),
        ("misses", ctypes.c_uint64),
        ("reads", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("evictions", ctypes.c_uint64),
        ("rereads", ctypes.c_uint64),
        ("read_errors", ctypes.c_uint64),
        ("stall_ns", ctypes.c_uint64),
        ("read_ns", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("ubatches", ctypes.c_uint64),
        ("events", ctypes.c_uint64),
        ("ahead_reads", ctypes.c_uint64),
        ("ahead_bytes", ctypes.c_uint64),
        ("wasted_bytes", ctypes.c_uint64),
        ("granted_bytes", ctypes.c_uint64),
        ("shortages", ctypes.c_uint64),
    )


# typedef struct spac_event { uint64_t sequence, token, stall_ns; uint32_t hit_mask; uint16_t layer, n_experts;
#                             uint16_t experts[SPAC_EVENT_MAX_EXPERTS]; } spac_event;
class Event(ctypes.Structure):
    _fields_ = (
        ("sequence", ctypes.c_uint64),
        ("token", ctypes.c_uint64),
        ("stall_ns", ctypes.c_uint64),
        ("hit_mask", ctypes.c_uint32),
        ("layer", ctypes.c_uint16),
        ("n_experts", ctypes.c_uint16),
        ("experts", ctypes.c_uint16 * EVENT_MAX_EXPERTS),
    )


# typedef struct spac_error { uint64_t struct_size; int32_t code, os_error; uint64_t offset, length; char path[1024]; } spac_error;
class Error(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("code", ctypes.c_int32),
        ("os_error", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("path", ctypes.c_char * 1024),
    )


# typedef struct spac_memory { uint64_t struct_size, dense_bytes, expert_bytes, context_bytes, compute_bytes; } spac_memory;
class Memory(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("dense_bytes", ctypes.c_uint64),
        ("expert_bytes", ctypes.c_uint64),
        ("context_bytes", ctypes.c_uint64),
        ("compute_bytes", ctypes.c_uint64),
    )


# typedef struct spac_bundle { int32_t layer, expert, deadline; float utility; } spac_bundle;
class Bundle(ctypes.Structure):
    _fields_ = (
        ("layer", ctypes.c_int32),
        ("expert", ctypes.c_int32),
        ("deadline", ctypes.c_int32),
        ("utility", ctypes.c_float),
    )


# typedef struct spac_simulation { ... } spac_simulation;
class Simulation(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("ids", ctypes.c_void_p),
        ("ubatch", ctypes.c_void_p),
        ("bundle_bytes", ctypes.c_void_p),
        ("foresight", ctypes.c_void_p),
        ("layer_bundles", ctypes.c_void_p),
        ("n_tokens", ctypes.c_uint64),
        ("n_bundles", ctypes.c_uint64),
        ("n_layers", ctypes.c_int32),
        ("n_experts", ctypes.c_int32),
        ("n_used", ctypes.c_int32),
        ("policy", ctypes.c_int32),
        ("by_layer", ctypes.c_int32),
        ("ahead_layers", ctypes.c_int32),
        ("read_from", ctypes.c_double),
        ("idle_bytes", ctypes.c_double),
        ("idle_use_bytes", ctypes.c_double),
        ("visit_wait_bytes", ctypes.c_void_p),
        ("visit_ahead_bytes", ctypes.c_void_p),
        ("visit_wasted_bytes", ctypes.c_void_p),
        ("visit_uses", ctypes.c_void_p),
        ("visit_misses", ctypes.c_void_p),
        ("n_ubatches", ctypes.c_uint64),
        ("hits", ctypes.c_uint64),
        ("misses", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    )


# typedef struct spac_routing { uint64_t struct_size; int64_t n_tokens; int32_t layer, n_used; const int32_t * ids;
#                               const float * weights; double expert_s; } spac_routing;
class Routing(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("n_tokens", ctypes.c_int64),
        ("layer", ctypes.c_int32),
        ("n_used", ctypes.c_int32),
        ("ids", ctypes.POINTER(ctypes.c_int32)),
        ("weights", ctypes.POINTER(ctypes.c_float)),
        ("expert_s", ctypes.c_double),
    )


# typedef struct spac_reads { uint64_t struct_size; const char * path; const uint64_t * offsets, * lengths; int64_t n_reads;
#                             int32_t depth, store, pages, reserved; double seconds; } spac_reads;
class Reads(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("path", ctypes.c_char_p),
        ("offsets", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("n_reads", ctypes.c_int64),
        ("depth", ctypes.c_int32),
        ("store", ctypes.c_int32),
        ("pages", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("seconds", ctypes.c_double),
    )


# typedef struct spac_visits { uint64_t struct_size; const char * path; uint64_t slice_bytes; int32_t n_missing, n_visits, n_threads,
#                              n_io_threads, store, reserved; double * seconds; } spac_visits;
class Visits(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("path", ctypes.c_char_p),
        ("slice_bytes", ctypes.c_uint64),
        ("n_missing", ctypes.c_int32),
        ("n_visits", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("n_io_threads", ctypes.c_int32),
        ("store", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("seconds", ctypes.c_void_p),
    )


# typedef struct spac_products { uint64_t struct_size; int64_t n_columns, n_rows; int32_t type, n_experts, n_tokens, n_threads, n_ops,
#                                repack, repacked, reserved; double min_s, seconds, repack_s; const spac_reads * meanwhile;
#                                double contention_s; } spac_products;
class Products(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("n_columns", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("n_experts", ctypes.c_int32),
        ("n_tokens", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("n_ops", ctypes.c_int32),
        ("repack", ctypes.c_int32),
        ("repacked", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("min_s", ctypes.c_double),
        ("seconds", ctypes.c_double),
        ("repack_s", ctypes.c_double),
        ("meanwhile", ctypes.c_void_p),
        ("contention_s", ctypes.c_double),
    )


# typedef struct spac_gauge { uint64_t struct_size; const char * folder; uint64_t headroom_bytes; } spac_gauge;
class Gauge(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("folder", ctypes.c_char_p),
        ("headroom_bytes", ctypes.c_uint64),
    )


# typedef struct spac_probe { uint64_t struct_size, page_bytes, direct_align;
#                             int32_t direct_error, populates; } spac_probe;
class Probe(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("page_bytes", ctypes.c_uint64),
        ("direct_align", ctypes.c_uint64),
        ("direct_error", ctypes.c_int32),
        ("populates", ctypes.c_int32),
    )


# in the order of SPAC_STRUCT_*
STRUCTS: Final[tuple[type[ctypes.Structure], ...]] = (
    Options, Info, Stats, Event, Error, Memory, Bundle, Simulation, Routing, Reads, Products, Gauge, Probe,
)  # fmt: skip

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S", bound=ctypes.Structure)


def _load_library() -> ctypes.CDLL:
    folder = spac.library_folder
    if folder is None:
        raise LibraryError(spac.NO_LIBRARY)
    try:
        import llama_cpp.llama_cpp as upstream

        if Path(upstream._base_path).resolve() != folder:
            raise LibraryError(f"llama_cpp uses the libraries in {upstream._base_path}, not those in {folder}: import spac first")
        return ctypes.CDLL(str(folder / "libspac.so"))
    except (OSError, FileNotFoundError) as e:
        raise LibraryError(f"the libraries in {folder} cannot be loaded: {e}") from e


_lib = _load_library()


def _function(name: str, argtypes: list[Any], restype: Any) -> Callable[[_F], _F]:
    def decorator(stub: _F) -> _F:
        try:
            function = getattr(_lib, name)
        except AttributeError:
            raise LibraryError(f"libspac.so has no {name}(): it is older than this spac, build it again") from None
        function.argtypes = argtypes
        function.restype = restype
        functools.update_wrapper(function, stub)
        return cast(_F, function)

    return decorator


# -- library --


# int spac_abi_version(void);
@_function("spac_abi_version", [], ctypes.c_int)
def spac_abi_version() -> int: ...


# size_t spac_struct_size(int which);
@_function("spac_struct_size", [ctypes.c_int], ctypes.c_size_t)
def spac_struct_size(which: int, /) -> int: ...


# const char * spac_last_error(void);
@_function("spac_last_error", [], ctypes.c_char_p)
def spac_last_error() -> bytes: ...


# int spac_init(void);
@_function("spac_init", [], ctypes.c_int)
def spac_init() -> int: ...


# void * spac_buffer_type(void);
@_function("spac_buffer_type", [], ctypes.c_void_p)
def spac_buffer_type() -> int | None: ...


# void spac_halt(void);
@_function("spac_halt", [], None)
def spac_halt() -> None: ...


# -- budget of the process --


# int spac_budget_set(uint64_t bytes);
@_function("spac_budget_set", [ctypes.c_uint64], ctypes.c_int)
def spac_budget_set(n_bytes: int, /) -> int: ...


# int spac_pressure_watch(const spac_gauge * gauges, int n);
@_function("spac_pressure_watch", [ctypes.POINTER(Gauge), ctypes.c_int], ctypes.c_int)
def spac_pressure_watch(gauges: Any, n: int, /) -> int: ...


# -- models --


# int spac_load_begin(const spac_options * options);
@_function("spac_load_begin", [ctypes.POINTER(Options)], ctypes.c_int)
def spac_load_begin(options: Any, /) -> int: ...


# int spac_load_end(void);
@_function("spac_load_end", [], ctypes.c_int)
def spac_load_end() -> int: ...


# int spac_model_info(int model, spac_info * info);
@_function("spac_model_info", [ctypes.c_int, ctypes.POINTER(Info)], ctypes.c_int)
def spac_model_info(model: int, info: Any, /) -> int: ...


# int spac_model_stats(int model, spac_stats * stats);
@_function("spac_model_stats", [ctypes.c_int, ctypes.POINTER(Stats)], ctypes.c_int)
def spac_model_stats(model: int, stats: Any, /) -> int: ...


# int spac_model_stats_by_layer(int model, int32_t * layers, uint64_t * hits, uint64_t * misses, int n);
@_function(
    "spac_model_stats_by_layer",
    [ctypes.c_int, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64), ctypes.c_int],
    ctypes.c_int,
)
def spac_model_stats_by_layer(model: int, layers: Any, hits: Any, misses: Any, n: int, /) -> int: ...


# int spac_model_events(int model, uint64_t from, spac_event * events, int n);
@_function("spac_model_events", [ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(Event), ctypes.c_int], ctypes.c_int)
def spac_model_events(model: int, from_: int, events: Any, n: int, /) -> int: ...


# int spac_model_prefetch(int model, const spac_bundle * bundles, int n);
@_function("spac_model_prefetch", [ctypes.c_int, ctypes.POINTER(Bundle), ctypes.c_int], ctypes.c_int)
def spac_model_prefetch(model: int, bundles: Any, n: int, /) -> int: ...


# int spac_model_foresee(int model, const float * now, const float * later, const float * rest, int n, float read_from);
@_function(
    "spac_model_foresee",
    [ctypes.c_int, *[ctypes.POINTER(ctypes.c_float)] * 3, ctypes.c_int, ctypes.c_float],
    ctypes.c_int,
)
def spac_model_foresee(model: int, now: Any, later: Any, rest: Any, n: int, read_from: float, /) -> int: ...


# int spac_model_evict_all(int model);
@_function("spac_model_evict_all", [ctypes.c_int], ctypes.c_int)
def spac_model_evict_all(model: int, /) -> int: ...


# int spac_mock_fail_reads(int model, int after, int count, int os_error);
@_function("spac_mock_fail_reads", [ctypes.c_int] * 4, ctypes.c_int)
def spac_mock_fail_reads(model: int, after: int, count: int, os_error: int, /) -> int: ...


# -- contexts --


# spac_context * spac_context_new(bool (*user_callback)(void *), void * user_data);
@_function("spac_context_new", [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p)
def spac_context_new(user_callback: int | None, user_data: int | None, /) -> int | None: ...


# void spac_context_free(spac_context * context);
@_function("spac_context_free", [ctypes.c_void_p], None)
def spac_context_free(context: int, /) -> None: ...


# void spac_cancel(spac_context * context);
@_function("spac_cancel", [ctypes.c_void_p], None)
def spac_cancel(context: int, /) -> None: ...


# bool spac_context_trim(spac_context * context);
@_function("spac_context_trim", [ctypes.c_void_p], ctypes.c_bool)
def spac_context_trim(context: int, /) -> bool: ...


# int spac_context_take_error(spac_context * context, spac_error * error);
@_function("spac_context_take_error", [ctypes.c_void_p, ctypes.POINTER(Error)], ctypes.c_int)
def spac_context_take_error(context: int, error: Any, /) -> int: ...


# -- sizes --


# int spac_memory_measure(const char * path, const void * model_params, const void * context_params, spac_memory * memory);
@_function("spac_memory_measure", [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(Memory)], ctypes.c_int)
def spac_memory_measure(path: bytes, model_params: Any, context_params: Any, memory: Any, /) -> int: ...


# -- what the device gives --


# int spac_stores_probe(const char * path, spac_probe * probe);
@_function("spac_stores_probe", [ctypes.c_char_p, ctypes.POINTER(Probe)], ctypes.c_int)
def spac_stores_probe(path: bytes, probe: Any, /) -> int: ...


# int spac_reads_measure(spac_reads * test);
@_function("spac_reads_measure", [ctypes.POINTER(Reads)], ctypes.c_int)
def spac_reads_measure(test: Any, /) -> int: ...


# int spac_visits_measure(spac_visits * test);
@_function("spac_visits_measure", [ctypes.POINTER(Visits)], ctypes.c_int)
def spac_visits_measure(test: Any, /) -> int: ...


# int spac_products_measure(spac_products * test);
@_function("spac_products_measure", [ctypes.POINTER(Products)], ctypes.c_int)
def spac_products_measure(test: Any, /) -> int: ...


# int spac_wakeup_measure(int n, double * seconds);
@_function("spac_wakeup_measure", [ctypes.c_int, ctypes.POINTER(ctypes.c_double)], ctypes.c_int)
def spac_wakeup_measure(n: int, seconds: Any, /) -> int: ...


# int spac_bandwidth_measure(uint64_t n_bytes, int n_threads, double * bytes_per_s);
@_function("spac_bandwidth_measure", [ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(ctypes.c_double)], ctypes.c_int)
def spac_bandwidth_measure(n_bytes: int, n_threads: int, bytes_per_s: Any, /) -> int: ...


# -- recording and simulation --


# spac_recorder * spac_recorder_new(void);
@_function("spac_recorder_new", [], ctypes.c_void_p)
def spac_recorder_new() -> int | None: ...


# void spac_recorder_free(spac_recorder * recorder);
@_function("spac_recorder_free", [ctypes.c_void_p], None)
def spac_recorder_free(recorder: int, /) -> None: ...


# int spac_recorder_next(spac_recorder * recorder, spac_routing * routing);
@_function("spac_recorder_next", [ctypes.c_void_p, ctypes.POINTER(Routing)], ctypes.c_int)
def spac_recorder_next(recorder: int, routing: Any, /) -> int: ...


# int spac_routing_count(const void * ids, int id_bytes, int n_layers, int n_used, int n_experts, const int64_t * observations,
#                        const int64_t * owners, const double * weights, int64_t n, float * counts);
@_function(
    "spac_routing_count", [ctypes.c_void_p, *[ctypes.c_int] * 4, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p], ctypes.c_int
)
def spac_routing_count(
    ids: int, id_bytes: int, n_layers: int, n_used: int, n_experts: int, observations: int, owners: int, weights: int, n: int,
    counts: int, /
) -> int: ...  # fmt: skip


# int spac_simulate(spac_simulation * simulation);
@_function("spac_simulate", [ctypes.POINTER(Simulation)], ctypes.c_int)
def spac_simulate(simulation: Any, /) -> int: ...


# -- typed wrappers --

_ERRORS: Final[dict[int, type[SpacError]]] = {
    E_ARGUMENT: OptionError,
    E_BACKEND: LibraryError,
    E_BUDGET: BudgetError,
    E_IO: ModelFileError,
    E_CHANGED: ModelFileError,
    E_MEMORY: BudgetError,
}


def check(code: int) -> int:
    """Return a non-negative code as it is; raise the error that a negative one stands for, with libspac's own words."""
    if code >= 0:
        return code
    message = (spac_last_error() or b"").decode(errors="replace") or f"libspac failed with code {code}"
    if code == E_CANCELLED:
        raise Cancelled(message)
    raise _ERRORS.get(code, SpacError)(message)


def _sized(struct: type[_S]) -> _S:
    return struct(struct_size=ctypes.sizeof(struct))


def check_library() -> None:
    """Compare the ABI version and every struct's size with the library's, then register the pager with the CPU backend."""
    if spac_abi_version() != ABI_VERSION:
        raise LibraryError(f"libspac.so has ABI version {spac_abi_version()}, this spac needs {ABI_VERSION}: build it again")
    for which, struct in enumerate(STRUCTS):
        if spac_struct_size(which) != ctypes.sizeof(struct):
            raise LibraryError(
                f"libspac.so: struct {struct.__name__} has {spac_struct_size(which)} bytes, expected {ctypes.sizeof(struct)}:"
                " build it again"
            )
    check(spac_init())


def abort_callback_address() -> int:
    """Address of the native `spac_abort_callback`, for `llama_context_params.abort_callback`."""
    address = ctypes.cast(_lib.spac_abort_callback, ctypes.c_void_p).value
    assert address is not None
    return address


def recorder_callback_address() -> int:
    """Address of the native `spac_recorder_callback`, for `llama_context_params.cb_eval`."""
    address = ctypes.cast(_lib.spac_recorder_callback, ctypes.c_void_p).value
    assert address is not None
    return address


def take_routing(recorder: int) -> list[RoutedLayer]:
    """What was routed since the last call, in the order of computing."""
    records = []
    raw = _sized(Routing)
    while check(spac_recorder_next(recorder, ctypes.byref(raw))):
        shape = (raw.n_tokens, raw.n_used)
        if raw.n_tokens == 0:  # a last layer without a wanted output; its pointers are null
            ids, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        else:
            ids, weights = (np.ctypeslib.as_array(pointer, shape).copy() for pointer in (raw.ids, raw.weights))
        records.append(RoutedLayer(raw.layer, ids, weights, raw.expert_s))
    return records


def watch_pressure(headrooms: Mapping[Path, int]) -> None:
    """Let the budget shrink at once where one of these places leaves too little memory, and grow back slowly.

    Args:
        headrooms: bytes that must stay free, by folder: of a control group, or the one with `meminfo`. Empty: no longer.
    """
    gauges = [Gauge(ctypes.sizeof(Gauge), os.fsencode(folder), n_bytes) for folder, n_bytes in headrooms.items()]
    check(spac_pressure_watch((Gauge * len(gauges))(*gauges), len(gauges)))


def begin_load(store: str, n_io_threads: int = 0, repack: bool = False) -> None:
    """Page the expert tensors of the model that this thread loads next; `store` is a key of `STORES`.

    `repack`: rearrange weights, as they are read, for the CPU's faster kernels; not with the store "mmap".
    """
    if store not in STORES:
        raise OptionError(f"store {store!r} does not exist: use one of {', '.join(name for name in STORES if name != 'mock')}")
    check(spac_load_begin(ctypes.byref(Options(ctypes.sizeof(Options), STORES[store], n_io_threads, repack))))


def model_info(model: int) -> ModelInfo:
    raw = _sized(Info)
    check(spac_model_info(model, ctypes.byref(raw)))
    names = {number: name for name, number in STORES.items()}
    fields = {name: getattr(raw, name) for name, *_ in Info._fields_[1:] if name != "store"}
    return ModelInfo(**fields, store=names.get(raw.store, str(raw.store)))


def foresee(model: int, foresight: NDArray[np.float32], read_from: float) -> int:
    """Say which experts coming tokens will use: see spac_model_foresee() in spac.h.

    Args:
        foresight: float32 [3, layers, experts]: now, later, rest; layers with experts, in the order of computing.
        read_from: absent experts with at least this probability now are read ahead, while no demand is being read.

    Returns:
        How many reads were queued.
    """
    now, later, rest = (part.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for part in foresight)
    return check(spac_model_foresee(model, now, later, rest, foresight[0].size, read_from))


def model_stats(model: int) -> ModelStats:
    raw = _sized(Stats)
    check(spac_model_stats(model, ctypes.byref(raw)))
    fields = {name: getattr(raw, name) for name, *_ in Stats._fields_[1:] if not name.endswith("_ns")}
    return ModelStats(**fields, stall_s=raw.stall_ns / 1e9, read_s=raw.read_ns / 1e9)


def model_stats_by_layer(model: int) -> list[LayerStats]:
    n = model_info(model).n_layers
    layers, hits, misses = (ctypes.c_int32 * n)(), (ctypes.c_uint64 * n)(), (ctypes.c_uint64 * n)()
    check(spac_model_stats_by_layer(model, layers, hits, misses, n))
    return [LayerStats(*row) for row in zip(layers, hits, misses, strict=True)]


def model_events(model: int, from_: int = 0, limit: int = 8192) -> list[RoutingEvent]:
    """Routing events from sequence number `from_` on, at most `limit`; the oldest may have been overwritten."""
    raw = (Event * limit)()
    n = check(spac_model_events(model, from_, raw, limit))
    return [
        RoutingEvent(
            sequence=event.sequence,
            token=event.token,
            layer=event.layer,
            experts=tuple(event.experts[: min(event.n_experts, EVENT_MAX_EXPERTS)]),
            hits=tuple(bool(event.hit_mask >> i & 1) for i in range(min(event.n_experts, EVENT_MAX_EXPERTS))),
            stall_s=event.stall_ns / 1e9,
        )
        for event in raw[:n]
    ]


def routing(model: int, from_: int, n: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16] | None]:
    """As `model_events`, without objects: block numbers [events], and experts [events, k], None if their number varies."""
    raw = (Event * n)()
    n = check(spac_model_events(model, from_, raw, n))
    events: NDArray[np.void] = np.frombuffer(memoryview(raw).cast("B"), np.dtype(Event), n)
    k = events["n_experts"][0] if n else 0
    varies = n == 0 or k > EVENT_MAX_EXPERTS or (events["n_experts"] != k).any()
    return events["layer"], None if varies else events["experts"][:, :k]


def count_routing(
    ids: NDArray[np.unsignedinteger], observations: NDArray[np.int64], owners: NDArray[np.int64], weights: NDArray[np.float64],
    counts: NDArray[np.float32],
) -> None:
    """Add each observation's weight to the experts that it chose: what `np.add.at` would do, many times as fast.

    Args:
        ids: uint8 or uint16 [.., layers × k], an observation each.
        observations: int64 [n], rows of `ids`.
        owners: int64 [n], of each the row of `counts`.
        weights: float64 [n].
        counts: float32 [.., layers, experts].
    """
    assert all(array.flags.c_contiguous for array in (ids, observations, owners, weights, counts))
    _, n_layers, n_experts = counts.shape
    check(
        spac_routing_count(
            ids.ctypes.data, ids.itemsize, n_layers, ids.shape[1] // n_layers, n_experts, observations.ctypes.data, owners.ctypes.data,
            weights.ctypes.data, len(observations), counts.ctypes.data,
        )
    )  # fmt: skip


def memory_measure(path: str, model_params: ctypes.Structure, context_params: ctypes.Structure) -> Memory:
    """What the model and a context would take by upstream's own account; nothing is allocated but the vocabulary."""
    raw = _sized(Memory)
    check(spac_memory_measure(path.encode(), ctypes.byref(model_params), ctypes.byref(context_params), ctypes.byref(raw)))
    return raw


def stores_probe(path: str) -> StoresProbe:
    """What of the kernel's means the stores find for this file, which must not be empty.

    Raises:
        ModelFileError: it cannot be read.
    """
    raw = _sized(Probe)
    check(spac_stores_probe(os.fsencode(path), ctypes.byref(raw)))
    return StoresProbe(raw.page_bytes, raw.direct_align, raw.direct_error, bool(raw.populates))


def reads_measure(
    path: str, offsets: Sequence[int], lengths: Sequence[int], *, depth: int, store: str = "auto", pages: str = "pager"
) -> float:
    """Seconds that these reads of a file take, `depth` in flight: see spac_reads in spac.h.

    Args:
        store: "auto", "direct" or "buffered".
        pages: that are read into: "pager" as the pager does, by way of a huge page where there are some; "huge" and "small": bare reads
            into huge pages, and into small ones from all over memory; "touched": into huge ones, and every line is touched then.

    Raises:
        ModelFileError: the file cannot be read, or not with this store.
        OptionError: a read lies outside the file.
    """
    raw, _arrays = _reads(path, offsets, lengths, depth, store, pages)
    check(spac_reads_measure(ctypes.byref(raw)))
    return float(raw.seconds)


def _reads(path: str, offsets: Sequence[int], lengths: Sequence[int], depth: int, store: str, pages: str = "pager") -> tuple[Reads, Any]:
    """spac_reads, and what it points to: keep it."""
    at, sizes = np.array(offsets, np.uint64), np.array(lengths, np.uint64)
    into = PAGES.index(pages)
    raw = Reads(ctypes.sizeof(Reads), os.fsencode(path), at.ctypes.data, sizes.ctypes.data, len(at), depth, STORES[store], into)
    return raw, (at, sizes)


def visits_measure(path: str, slice_bytes: int, *, n_missing: int, n_visits: int, n_threads: int, store: str = "auto") -> list[float]:
    """Seconds of each of some visits of a layer by the pager, all of whose experts are missing: see spac_visits in spac.h.

    Raises:
        ModelFileError: the file cannot be read, or not with this store.
        OptionError: the file is smaller than three such visits.
    """
    seconds = np.zeros(n_visits)
    counts = (n_missing, n_visits, n_threads, IO_THREADS)
    raw = Visits(ctypes.sizeof(Visits), os.fsencode(path), slice_bytes, *counts, STORES[store], 0, seconds.ctypes.data)
    check(spac_visits_measure(ctypes.byref(raw)))
    return [float(s) for s in seconds]


def products_measure(
    kind: int, shape: tuple[int, int, int], *, n_tokens: int, n_threads: int, n_ops: int = 1, repack: bool = True, min_s: float = 0.05
) -> tuple[float, float]:
    """Seconds of a product of tokens with every expert, and of rearranging their weights on one thread (0: they stay as they are).

    Args:
        kind: ggml's number of the weights' type.
        shape: of the weights: columns, rows, experts.
        n_tokens: by each expert.
        n_ops: products in a graph.

    Raises:
        OptionError: there is no such type, or it cannot have this shape.
    """
    raw = _products(kind, shape, n_tokens, n_threads, n_ops, repack, min_s)
    check(spac_products_measure(ctypes.byref(raw)))
    return float(raw.seconds), float(raw.repack_s)


def contention_measure(
    kind: int,
    shape: tuple[int, int, int],
    path: str,
    offsets: Sequence[int],
    length: int,
    *,
    depth: int,
    store: str,
    n_threads: int,
    min_s: float,
) -> tuple[float, float, float]:
    """What `products_measure` finds for one token, and, beside reads, the seconds of computing lost for each byte of those.

    Args:
        offsets, length: of the reads of the file, which are made again and again.
        min_s: twice so long is measured.

    Raises:
        ModelFileError: the file cannot be read, or not with this store.
        OptionError: a read lies outside the file.
    """
    raw = _products(kind, shape, 1, n_threads, 1, True, min_s)
    reads, _arrays = _reads(path, offsets, [length] * len(offsets), depth, store)
    raw.meanwhile = ctypes.addressof(reads)
    check(spac_products_measure(ctypes.byref(raw)))
    return float(raw.seconds), float(raw.repack_s), float(raw.contention_s)


def _products(kind: int, shape: tuple[int, int, int], n_tokens: int, n_threads: int, n_ops: int, repack: bool, min_s: float) -> Products:
    columns, rows, experts = shape
    raw = _sized(Products)
    raw.n_columns, raw.n_rows, raw.n_experts, raw.type = columns, rows, experts, kind
    raw.n_tokens, raw.n_threads, raw.n_ops, raw.repack, raw.min_s = n_tokens, n_threads, n_ops, repack, min_s
    return raw


def wakeup_measure(n: int) -> float:
    """Seconds from a notification until a sleeping thread goes on: median of n."""
    seconds = ctypes.c_double()
    check(spac_wakeup_measure(n, ctypes.byref(seconds)))
    return seconds.value


def bandwidth_measure(n_bytes: int, n_threads: int) -> float:
    """Bytes a second that threads read from so much memory."""
    rate = ctypes.c_double()
    check(spac_bandwidth_measure(n_bytes, n_threads, ctypes.byref(rate)))
    return rate.value


def take_error(context: int) -> SpacError | None:
    """Why the last decode of this context stopped, and forget it; None if nothing of ours stopped it."""
    raw = _sized(Error)
    code = spac_context_take_error(context, ctypes.byref(raw))
    if code == OK:
        return None
    path = raw.path.decode(errors="replace")
    if code == E_IO:
        return ExpertReadError(path, raw.offset, raw.length, raw.os_error)
    if code == E_CHANGED:
        return ModelChangedError(path)
    if code == E_CANCELLED:
        return Cancelled()
    return _ERRORS.get(code, SpacError)(f"decoding stopped with code {code}")


check_library()
