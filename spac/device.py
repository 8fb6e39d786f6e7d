"""What this machine gives: reads by size and depth, products by type and batch, waking a thread, memory bandwidth.

`measure` takes half a minute to a minute (`spac tune`), `probe` about a second and measures what one model needs. A measured device is
kept as JSON in the user's cache, by processor and disk, and says which build measured it. A file is never trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import spac
from spac import cache
from spac.errors import ModelFileError, OptionError, SpacError
from spac.gguf.reader import TENSOR_TYPES
from spac.host.cores import allowed_cores
from spac.host.memory import KIB, MIB, format_bytes
from spac.host.system import System, cpu_model, mount_of

if TYPE_CHECKING:
    from spac.trace.timing import Reads

FORMAT: Final = "spac-device"
VERSION: Final = 1
MAX_FILE_BYTES: Final = 1 * MIB

SIZES: Final = (64 * KIB, 256 * KIB, 1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB)
DEPTHS: Final = (1, 2, 4, 6, 8, 16, 32)
STORES: Final = ("direct", "buffered")
TYPES: Final = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "MXFP4", "IQ4_XS", "Q3_K", "Q2_K", "IQ2_XXS", "F16", "BF16", "F32")
BATCHES: Final = (1, 4, 16, 64)
SCRATCH_BYTES: Final = 256 * MIB
PROBE_SCRATCH_BYTES: Final = 64 * MIB
CELL_S: Final = 0.1  # for one size and depth
VISITS_S: Final = 2.0  # for visits of layers
CONTENTION_S: Final = 2.0  # for computing while reading
CONTENTION_TYPE: Final = "Q4_0"
NOW_S: Final = 0.3  # in each round before a plan, for reads, for visits, and for computing
SLOW: Final = 30  # times as long as was meant: no more batches
ROUNDS: Final = 3  # in which reads are measured, with other things between them: disks are not equally fast from second to second
VISIT_SLICE: Final = 1 * MIB  # of an expert, in a visit of a layer that misses VISIT_MISSING of them
VISIT_MISSING: Final = 2
PRODUCT_SHAPE: Final = (2048, 768)  # columns and rows of an expert's matrix, as in models of 30 billion parameters
PRODUCT_BYTES: Final = 64 * MIB  # more than caches hold
SIGNAL_SHAPES: Final = ((10, 64), (48, 128))  # layers and experts; the time grows about linearly between them


@dataclass(frozen=True)
class ReadRow:
    """Reads asked for at once, from none, as the pager makes them into memory that stays, cold: a long one in pieces.

    Attributes:
        store: "direct" or "buffered".
        size_bytes: of each.
        depth: how many, by as many threads.
        seconds: until the last one is there: mean, without the fastest and the slowest tenth of the batches; `fast_s`, `slow_s`: of the
            batches that are left, the fastest and the slowest one.
    """

    store: str
    size_bytes: int
    depth: int
    seconds: float
    fast_s: float
    slow_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.size_bytes * self.depth / self.seconds


@dataclass(frozen=True)
class ProductRow:
    """Products of weights of a type with a batch of tokens, all threads: weights times tokens a second."""

    type: str
    n_tokens: int
    weights_per_s: float


@dataclass(frozen=True)
class Device:
    """What was measured.

    Attributes:
        cpu, cores, disk: what it was measured on; `build`: with which libraries.
        threads: compute threads of `products` and `op_s`.
        repack: weights by second that one thread rearranges for faster kernels, by type; absent: the type stays as it is.
        op_s: of an op of the graph that computes next to nothing.
        wakeup_s: until a sleeping thread goes on.
        visit_s: what a layer that misses experts waits besides its reads and one such wake-up: reading threads begin one after another,
            take room from what is evicted, and share the processors with the compute threads.
        contention_s: what computing on all threads loses for each byte that is read meanwhile: reads take processors, of the host
            too where the disk is a virtual one, and memory bandwidth.
        signals_s: what predicting and learning a decoded token's experts takes, by one thread while no other computes;
            `signals_expert_s`: and for each expert of all layers.
        memory_bytes_per_s: reading memory, all threads.
        quick: by `probe`.
        measured: when, local time.
        took_s: how long measuring took.
    """

    cpu: str
    cores: int
    disk: str
    build: str
    threads: int
    reads: tuple[ReadRow, ...]
    products: tuple[ProductRow, ...]
    repack: dict[str, float]
    op_s: float
    wakeup_s: float
    memory_bytes_per_s: float
    quick: bool = False
    measured: str = ""
    took_s: float = field(default=0.0, compare=False)
    visit_s: float = 0.0
    contention_s: float = 0.0
    signals_s: float = 0.0
    signals_expert_s: float = 0.0

    @property
    def store(self) -> str:
        """The store that is used by default: direct, where this disk's file system allows it."""
        return "direct" if any(row.store == "direct" for row in self.reads) else "buffered"

    def read_table(self, which: str = "seconds") -> Reads:
        """Bandwidth by size and depth, for the time model; `which`: "seconds", "fast_s" or "slow_s"."""
        from spac.trace.timing import Reads

        rows = [row for row in self.reads if row.store == self.store]
        rates = {(row.size_bytes, row.depth): row.size_bytes * row.depth / getattr(row, which) for row in rows}
        return Reads(rates, contention_s=self.contention_s, visit_s=self.visit_s)

    def weights_per_s(self, type_name: str, n_tokens: float) -> float:
        """Weights times tokens a second, interpolated between measured batches.

        A type that was not measured is taken for the one with the nearest number of bits; one token is bound by memory, so there
        its bits count.
        """
        nearest = self._nearest(type_name)
        rows = sorted((row.n_tokens, row.weights_per_s) for row in self.products if row.type == nearest)
        if nearest != type_name:
            rows = [(n, rate * bits(nearest) / bits(type_name) if n == 1 else rate) for n, rate in rows]
        import numpy as np

        return float(np.exp(np.interp(math.log(max(n_tokens, 1)), [math.log(n) for n, _ in rows], [math.log(rate) for _, rate in rows])))

    def rearranged_per_s(self, type_name: str) -> float | None:
        """Weights that one thread rearranges in a second; None: the type, or the nearest one that was measured, stays as it is."""
        return self.repack.get(self._nearest(type_name))

    def _nearest(self, type_name: str) -> str:
        measured = {row.type for row in self.products}
        return min(measured, key=lambda name: (name != type_name, abs(math.log(bits(name) / bits(type_name)))))


def bits(type_name: str) -> float:
    """Bits for each weight of a ggml type."""
    _, block, block_bytes = _TYPES[type_name]
    return 8 * block_bytes / block


_TYPES: Final = {name: (number, block, n_bytes) for number, (name, block, n_bytes) in TENSOR_TYPES.items()}


# -- measuring --


def measure(path: Path, *, n_threads: int, progress: Callable[[str], None] | None = None) -> Device:
    """Measure everything; reads from `path`, a file of 64 MiB or more, or within a folder, where a file is written and removed.

    Raises:
        SpacError: nothing can be read or written there.
    """
    from spac import control

    say = progress or (lambda _: None)
    begin = time.perf_counter()
    stores = list(STORES)
    products: list[ProductRow] = []
    repack: dict[str, float] = {}
    wakeup_s = control.wakeup_measure(200)
    with readable(path, SCRATCH_BYTES) as file:
        reads = {store: ReadTimes(file, store, SIZES, DEPTHS) for store in STORES}
        for i in range(ROUNDS):
            for store in tuple(stores):
                try:
                    for size, depth in reads[store].cells:
                        say(f"{store} reads, {size // KIB} KiB, {depth} at once")
                        reads[store].add(size, depth, CELL_S / ROUNDS)
                except ModelFileError:
                    if store == STORES[-1]:  # this file system refuses O_DIRECT: the other store serves
                        raise
                    stores.remove(store)
            for name in TYPES[len(TYPES) * i // ROUNDS : len(TYPES) * (i + 1) // ROUNDS]:
                say(f"products of {name}")
                measure_type(name, BATCHES, n_threads, products, repack)
        say("visits of layers")
        visit_s = measure_visit(file, stores[0], n_threads, wakeup_s, VISITS_S) or 0.0
        say("computing while reading")
        beside = beside_reads(file, stores[0], CONTENTION_TYPE, n_threads, CONTENTION_S)
    say("memory and threads")
    signals_s, signals_expert_s = measure_signals(9)
    return Device(
        **identity(path), threads=n_threads, reads=tuple(row for store in stores for row in reads[store].rows()),
        products=tuple(products), repack=repack, op_s=measure_op(n_threads), wakeup_s=wakeup_s, visit_s=visit_s,
        contention_s=beside.contention_s if beside else 0.0, memory_bytes_per_s=control.bandwidth_measure(128 * MIB, n_threads),
        signals_s=signals_s, signals_expert_s=signals_expert_s,
        measured=time.strftime("%Y-%m-%d %H:%M:%S"), took_s=time.perf_counter() - begin,
    )  # fmt: skip


def probe(path: Path, *, types: Sequence[str], read_bytes: int, n_threads: int) -> Device:
    """Measure, in about a second, what a model needs that has weights of these types and reads so many bytes at a time.

    Args:
        types: the commonest first; contention is measured with that.

    Raises:
        SpacError: nothing can be read or written at `path`.
    """
    from spac import control

    begin = time.perf_counter()
    wakeup_s = control.wakeup_measure(20)
    size = min(max(read_bytes // (4 * KIB) * 4 * KIB, SIZES[0]), SIZES[-1])
    with readable(path, PROBE_SCRATCH_BYTES) as file:
        for store in STORES:
            try:
                reads = read_rows(file, store, [size], (1, 3, 6), CELL_S / 3)
                visit_s = measure_visit(file, store, n_threads, wakeup_s, CELL_S / 2) or 0.0
                beside = beside_reads(file, store, types[0], n_threads, CELL_S / 2)
                break
            except ModelFileError:
                if store == STORES[-1]:
                    raise
    products = [ProductRow(types[0], 1, 1 / beside.weight_s)] if beside else []
    repack = {types[0]: 1 / beside.repack_s} if beside and beside.repack_s else {}
    for name in dict.fromkeys(types):
        measure_type(name, (32,) if beside and name == types[0] else (1, 32), n_threads, products, repack, CELL_S / 4)
    signals_s, signals_expert_s = measure_signals(3)
    return Device(
        **identity(path), threads=n_threads, reads=tuple(reads), products=tuple(products), repack=repack, op_s=measure_op(n_threads),
        wakeup_s=wakeup_s, visit_s=visit_s, contention_s=beside.contention_s if beside else 0.0,
        memory_bytes_per_s=control.bandwidth_measure(64 * MIB, n_threads), quick=True,
        signals_s=signals_s, signals_expert_s=signals_expert_s,
        measured=time.strftime("%Y-%m-%d %H:%M:%S"), took_s=time.perf_counter() - begin,
    )  # fmt: skip


def as_it_is_now(found: Device, file: Path, read_bytes: int, type_name: str) -> Device:
    """The same device, as fast as it is now: disks, virtual ones above all, and shared processors are not equally fast from hour to hour.

    Reads of about so many bytes, visits, and products of this type are measured for a moment, in turn and in some rounds of which
    the median counts: a disk that stands still for half a second is not slow. All reads of that store, and all products, are
    taken to have changed by as much; the reads' interval holds what was measured before, too.

    Raises:
        ModelFileError: the file cannot be read.
    """
    from spac.trace.timing import READS_IN_FLIGHT

    mine = [row for row in found.reads if row.store == found.store]
    row = min(mine, key=lambda row: (abs(math.log(row.size_bytes / read_bytes)), abs(math.log(row.depth / READS_IN_FLIGHT))))
    factors: list[float] = []
    visits: list[float] = []
    besides: list[Beside] = []
    for _ in range(ROUNDS):
        factors += [now.seconds / row.seconds for now in read_rows(file, row.store, [row.size_bytes], [row.depth], NOW_S)]
        visit_s = measure_visit(file, row.store, found.threads, found.wakeup_s, NOW_S)
        visits += [] if visit_s is None else [visit_s]
        beside = beside_reads(file, row.store, type_name, found.threads, NOW_S)
        besides += [] if beside is None else [beside]
    factor = statistics.median(factors) if factors else 1.0

    def changed(row: ReadRow) -> ReadRow:
        fast, slow = min(row.fast_s, row.fast_s * factor), max(row.slow_s, row.slow_s * factor)
        return dataclasses.replace(row, seconds=row.seconds * factor, fast_s=fast, slow_s=slow) if row.store == found.store else row

    found = dataclasses.replace(
        found, reads=tuple(changed(row) for row in found.reads), visit_s=statistics.median(visits) if visits else found.visit_s
    )
    if not besides:
        return found
    weight_s, repack_s, contention_s = (statistics.median(values) for values in zip(*besides, strict=True))
    faster = 1 / weight_s / found.weights_per_s(type_name, 1)
    products = tuple(dataclasses.replace(row, weights_per_s=row.weights_per_s * faster) for row in found.products)
    rearranging = 1 / repack_s / found.repack[type_name] if repack_s and type_name in found.repack else 1.0
    repack = {name: rate * rearranging for name, rate in found.repack.items()}
    return dataclasses.replace(found, products=products, repack=repack, contention_s=contention_s)


def read_rows(file: Path, store: str, sizes: Sequence[int], depths: Sequence[int], cell_s: float) -> list[ReadRow]:
    """Measure all of these in one go, for about so long each.

    Raises:
        ModelFileError: the file cannot be read, or not with this store.
    """
    reads = ReadTimes(file, store, sizes, depths)
    for size, depth in reads.cells:
        reads.add(size, depth, cell_s)
    return reads.rows()


class ReadTimes:
    """Batches of reads from random places of a file, timed; a place is read again only when all have been.

    Attributes:
        cells: size and depth of what is measured: not what file or memory are too small for.
    """

    def __init__(self, file: Path, store: str, sizes: Sequence[int], depths: Sequence[int]) -> None:
        import psutil

        self._file, self._store = str(file), store
        total, free = file.stat().st_size, psutil.virtual_memory().available
        self.cells = [cell for cell in itertools.product(sizes, depths) if math.prod(cell) <= min(total, free // 4)]
        self._times: dict[tuple[int, int], list[float]] = {cell: [] for cell in self.cells}
        self._places = {}
        for size, depth in self.cells:
            places = [i * size for i in range(total // size)]
            random.Random(size * depth).shuffle(places)
            self._places[size, depth] = itertools.cycle(places)

    def add(self, size: int, depth: int, seconds: float) -> None:
        """Batches for about so long, one at least; on a slow disk, none after those that there are.

        Raises:
            ModelFileError: the file cannot be read, or not with this store.
        """
        end, times = time.perf_counter() + seconds, self._times[size, depth]
        while sum(times) < SLOW * seconds:
            times.append(self.once(size, depth))
            if time.perf_counter() >= end:
                break

    def once(self, size: int, depth: int) -> float:
        """Seconds of one batch, which counts for no row.

        Raises:
            ModelFileError: the file cannot be read, or not with this store.
        """
        from spac import control
        from spac.trace.timing import pieces_of

        slices = itertools.islice(self._places[size, depth], depth)
        offsets, lengths = zip(*(piece for place in slices for piece in pieces_of(place, size)), strict=True)
        return control.reads_measure(self._file, offsets, lengths, depth=depth, store=self._store)

    def rows(self) -> list[ReadRow]:
        """What came out."""
        return [self._row(size, depth, sorted(self._times[size, depth])) for size, depth in self.cells]

    def _row(self, size: int, depth: int, times: list[float]) -> ReadRow:
        tenth = len(times) // 10
        usual = times[tenth : len(times) - tenth]
        return ReadRow(self._store, size, depth, sum(usual) / len(usual), usual[0], usual[-1])


def measure_visit(file: Path, store: str, n_threads: int, wakeup_s: float, seconds: float) -> float | None:
    """`Device.visit_s`: visits and the same bytes as bare reads in turn, for about so long, once at least; the median difference.

    None if the file is too small to visit, or there is no memory for it.

    A pager's first visit finds room without evicting, and does not count.

    Raises:
        ModelFileError: the file cannot be read, or not with this store.
    """
    from spac import control
    from spac.trace.timing import PARTS, READS_IN_FLIGHT

    size = VISIT_SLICE * PARTS * VISIT_MISSING // READS_IN_FLIGHT
    bare = ReadTimes(file, store, [size], [READS_IN_FLIGHT])
    if file.stat().st_size < 3 * VISIT_SLICE * PARTS * VISIT_MISSING or not bare.cells:
        return None
    end = time.perf_counter() + seconds
    found: list[float] = []
    while not found or time.perf_counter() < end:
        _, *visits = control.visits_measure(str(file), VISIT_SLICE, n_missing=VISIT_MISSING, n_visits=4, n_threads=n_threads, store=store)
        found.append(statistics.mean(visits) - statistics.mean(bare.once(size, READS_IN_FLIGHT) for _ in visits))
    return max(0.0, statistics.median(found) - wakeup_s)


class Beside(NamedTuple):
    """Seconds for each weight of products with one token, and of rearranging it on one thread (0: it stays); `Device.contention_s`."""

    weight_s: float
    repack_s: float
    contention_s: float


def beside_reads(file: Path, store: str, type_name: str, n_threads: int, seconds: float) -> Beside | None:
    """Experts' products for so long, then in turn with and without reads of pieces for as long again.

    None if the file is too small, or this build does not multiply the type.

    Raises:
        ModelFileError: the file cannot be read, or not with this store.
    """
    from spac import control
    from spac.trace.timing import PIECE_BYTES, READS_IN_FLIGHT

    places = list(range(0, file.stat().st_size - PIECE_BYTES, PIECE_BYTES))
    random.Random(0).shuffle(places)
    if not places:
        return None
    kind, shape = expert_shape(type_name, 1)
    try:
        product_s, repack_s, contention_s = control.contention_measure(
            kind, shape, str(file), places, PIECE_BYTES, depth=READS_IN_FLIGHT, store=store, n_threads=n_threads, min_s=seconds
        )
    except OptionError:
        return None
    return Beside(product_s / math.prod(shape), repack_s / math.prod(shape), contention_s)


def measure_type(
    name: str, batches: Sequence[int], n_threads: int, products: list[ProductRow], repack: dict[str, float], min_s: float = CELL_S / 2
) -> None:
    """Add a type's rows; a type that this build does not multiply is left out."""
    from spac import control

    for n_tokens in batches:
        kind, shape = expert_shape(name, n_tokens)
        try:
            seconds, repack_s = control.products_measure(kind, shape, n_tokens=n_tokens, n_threads=n_threads, min_s=min_s)
        except OptionError:
            return
        products.append(ProductRow(name, n_tokens, math.prod(shape) * n_tokens / seconds))
        if repack_s > 0 and n_tokens == 1:
            repack[name] = math.prod(shape) / repack_s


def expert_shape(name: str, n_tokens: int) -> tuple[int, tuple[int, int, int]]:
    """ggml's number of a type, and columns, rows and experts to multiply so many tokens with."""
    kind, _, _ = _TYPES[name]
    columns, rows = PRODUCT_SHAPE
    return kind, (columns, rows, max(4, int(PRODUCT_BYTES * 8 / (columns * rows * bits(name)))) if n_tokens == 1 else 4)


def measure_op(n_threads: int) -> float:
    """Seconds of an op of the graph that computes next to nothing."""
    from spac import control

    number, _, _ = _TYPES["Q4_0"]
    return control.products_measure(number, (256, 32, 2), n_tokens=1, n_threads=n_threads, n_ops=200, min_s=CELL_S / 4)[0]


def measure_signals(n_tokens: int) -> tuple[float, float]:
    """`Device.signals_s` and `signals_expert_s`: as between two decodes, when caches hold weights."""
    import numpy as np

    from spac.estimator.tokens import TokenEstimator

    weights = np.ones(PRODUCT_BYTES // 8)
    taken = []
    for n_layers, n_experts in SIGNAL_SHAPES:
        estimator = TokenEstimator(n_layers, n_experts, 8)
        times = []
        for i in range(n_tokens):
            chosen = (np.arange(8) + 8 * i) % n_experts
            weights.sum()
            begin = time.perf_counter()
            estimator.of_candidates([[(i, 1.0)]])
            estimator.learn([i], np.tile(chosen, (1, n_layers, 1)))
            times.append(time.perf_counter() - begin)
        taken.append(statistics.median(times))
    small, large = (n_layers * n_experts for n_layers, n_experts in SIGNAL_SHAPES)
    expert_s = max(0.0, (taken[1] - taken[0]) / (large - small))
    return max(0.0, taken[0] - small * expert_s), expert_s


@contextlib.contextmanager
def readable(path: Path, n_bytes: int) -> Iterator[Path]:
    """A file to read from: `path`, or one of so many bytes in that folder, which goes at the end.

    Raises:
        SpacError: there is none, and none can be made.
    """
    if path.is_file():
        if path.stat().st_size < SIZES[-1]:
            raise SpacError(f"{path}: too small to measure reads with; give a folder, or a file of {format_bytes(SIZES[-1])} or more")
        yield path
        return
    if not path.is_dir():
        raise SpacError(f"{path}: no such file or folder; give the folder in which models are, or a model")
    try:
        handle, name = tempfile.mkstemp(prefix=".spac-tune-", dir=path)
    except OSError as e:
        raise SpacError(f"{path}: no file can be written there: {e.strerror}; give a model instead, or another folder") from None
    try:
        with os.fdopen(handle, "wb") as file:
            for _ in range(n_bytes // (4 * MIB)):
                file.write(os.urandom(4 * MIB))  # what is compressed or empty would be read faster
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    except OSError as e:
        raise SpacError(f"{path}: no file of {format_bytes(n_bytes)} can be written there: {e.strerror}; give another folder") from None
    finally:
        Path(name).unlink(missing_ok=True)


# -- what it is measured on --


def identity(path: Path) -> dict[str, Any]:
    """Processor, cores, disk and build, as `Device` has them."""
    return {"cpu": _cpu(), "cores": allowed_cores(), "disk": _disk(path), "build": _build()}


def _cpu() -> str:
    """The board where a device tree names one, else the processor."""
    here = System()
    return here.text("/proc/device-tree/model").split("\0")[0] or cpu_model(here) or platform.processor() or platform.machine()


def _disk(path: Path) -> str:
    mount = mount_of(str(path.resolve()), System())
    return f"{mount.kind} on {mount.source}" if mount else "unknown file system"


def _build() -> str:
    """This version, and a digest of the library that measures."""
    library = spac.library_folder / "libspac.so" if spac.library_folder is not None else None
    digest = hashlib.sha256(library.read_bytes()).hexdigest()[:12] if library is not None else "none"
    return f"{spac.__version__} {digest}"


# -- keeping --


def path_of(place: Path) -> Path:
    """Where what was measured for this machine and the disk of `place` is kept."""
    found = identity(place)
    name = hashlib.sha256(f"{found['cpu']}\n{found['cores']}\n{found['disk']}".encode()).hexdigest()[:16]
    return cache.folder() / f"device-{name}.json"


def check_writable(path: Path) -> None:
    """Before a minute of measuring.

    Raises:
        SpacError: the file could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise SpacError(f"{path.parent}: cannot be written: {e.strerror}; set XDG_CACHE_HOME to a folder that can") from None


def save(device: Device, path: Path) -> None:
    """Write it; a file that is there is replaced whole or not at all.

    Raises:
        SpacError: it cannot be written.
    """
    check_writable(path)
    text = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(device)}, indent=1)
    try:
        with cache.replacing(path) as file:
            file.write(text.encode() + b"\n")
    except OSError as e:
        raise SpacError(f"{path}: cannot be written: {e.strerror}") from None


class UnusableProfile(SpacError):
    """A kept profile is damaged, or of another build; the reason is for a line that says so."""


def load(path: Path, build: str | None = None) -> Device | None:
    """What is kept; None if there is none.

    Args:
        build: what must have measured it; None: this build.

    Raises:
        UnusableProfile: it cannot be used.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise UnusableProfile(f"{path}: cannot be read ({e.strerror})") from None
    try:
        device = parse(text)
    except ValueError:
        raise UnusableProfile(f"{path}: damaged") from None
    if device.build != (build or _build()):
        raise UnusableProfile(f"{path}: measured by another build of spac")
    return device


def parse(text: str | bytes) -> Device:
    """What `save` wrote, of any build.

    Raises:
        ValueError: something is not as it should be.
    """
    try:
        return _parse(json.loads(text))
    except (TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(str(e)) from None


def _parse(values: dict[str, Any]) -> Device:
    values = dict(values)
    if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
        raise ValueError("format")
    reads = tuple(ReadRow(**row) for row in values.pop("reads"))
    products = tuple(ProductRow(**row) for row in values.pop("products"))
    device = Device(**values, reads=reads, products=products)
    numbers = [device.cores, device.threads, device.op_s, device.wakeup_s, device.memory_bytes_per_s, *device.repack.values()]
    numbers += [n for row in reads for n in (row.size_bytes, row.depth, row.seconds, row.fast_s, row.slow_s)]
    numbers += [n for product in products for n in (product.n_tokens, product.weights_per_s)]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers):
        raise ValueError("numbers")
    for n in (device.visit_s, device.contention_s, device.signals_s, device.signals_expert_s):
        if not isinstance(n, int | float) or isinstance(n, bool) or not 0 <= n < math.inf:
            raise ValueError("visits, contention or signals")
    texts = [device.cpu, device.disk, device.build, device.measured, *(row.store for row in reads)]
    if not all(isinstance(text, str) for text in texts) or not {row.type for row in products} <= set(_TYPES):
        raise ValueError("texts")
    if not products or not any(row.store in STORES for row in reads):
        raise ValueError("rows")
    return device
