"""From a replay to seconds: predicted tokens/s, and the bound that no order of reads and products can pass.

All inputs are measured: reads by size and number (spac tune), compute from a trace recorded with all
experts in memory, or from a run like that. Nothing is fitted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from spac.errors import OptionError
from spac.trace.format import PHASES, Array, Trace
from spac.trace.simulation import Replay

READS_IN_FLIGHT: Final = 6  # control.IO_THREADS
PARTS: Final = 3  # slices that a bundle is read in: gate, up, down
PIECE_BYTES: Final = 960 << 10  # at most, of what one thread reads of a slice at a time: spac/native/pager.cpp


@dataclass(frozen=True)
class Reads:
    """Bandwidth of a bare reader, bytes/s, by size of a read in bytes and reads in flight (asked for at once, from none).

    `contention_s` and `visit_s` are `Compute`'s, where `spac tune` measured them.
    """

    by_size_and_depth: dict[tuple[int, int], float]
    limit_bytes_per_s: float | None = None  # of a control group: see `limited`
    contention_s: float = 0.0
    visit_s: float = 0.0

    @classmethod
    def load(cls, path: str) -> Reads:
        """From what `spac tune` keeps, or from text: rows of KiB, depth, MB/s.

        Raises:
            OptionError: there are no measured reads in the file.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise OptionError(f"{path}: cannot read measured reads: {e}") from None
        if text.startswith("{"):
            from spac import device

            try:
                return device.parse(text).read_table()
            except ValueError:
                raise OptionError(f"{path}: damaged; run spac tune") from None
        rows = re.findall(r"^\s*(\d+)\s+(\d+)\s+(\d+(?:\.\d+)?)", text, re.MULTILINE)
        table = {(int(kib) * 1024, int(depth)): float(rate) * 1e6 for kib, depth, rate in rows if float(rate) > 0 and int(depth) > 0}
        if not table:
            raise OptionError(f"{path}: no rows of KiB, reads in flight and MB/s: give what spac tune keeps")
        return cls(table)

    def bytes_per_s(self, size: float, depth: float) -> float:
        """Interpolated between the measured sizes and depths, by their logarithms; at the ends the nearest measured one."""
        sizes = sorted({s for s, _ in self.by_size_and_depth})
        by_size = []
        for s in sizes:
            rates = sorted((d, rate) for (other, d), rate in self.by_size_and_depth.items() if other == s)
            by_size.append(np.interp(np.log(depth), np.log([d for d, _ in rates]), [rate for _, rate in rates]))
        return float(np.interp(np.log(size), np.log(sizes), by_size))


@dataclass(frozen=True)
class Compute:
    """Seconds of a decoded token with all experts in memory: in all, and of that in one expert-token's three products.

    `slice_s` is what a slice costs besides its bytes, once it has been read: being rearranged, and waking who waits for it.
    `contention_s` is what computing loses, on all threads, for each byte that is read and rearranged meanwhile; `visit_s` what a layer
    that misses experts waits besides its reads.
    """

    token_s: float
    expert_token_s: float
    slice_s: float = 0.0
    contention_s: float = 0.0
    visit_s: float = 0.0

    @classmethod
    def measured(cls, trace: Trace, token_s: float | None = None) -> Compute:
        """Medians of the decoded tokens of a trace that was recorded with all experts in memory.

        Args:
            token_s: seconds a token took in a run without `--trace` (which costs a little), if that was measured.

        Raises:
            OptionError: the trace has no times of decoded tokens.
        """
        decoded = decode_ubatches(trace)
        if len(trace.ubatch_s) != len(decoded) or not decoded.any() or not trace.expert_s.any():
            raise OptionError("the trace has no times: record it with `spac run --trace`, all experts in memory, and do not cut it")
        experts = float(np.median(trace.expert_s[decoded].sum(axis=1)))
        total = token_s if token_s is not None else float(np.median(trace.ubatch_s[decoded]))
        return cls(total, experts / (trace.n_layers * trace.n_used))


@dataclass(frozen=True)
class Prediction:
    """Of the decoded tokens of a replay.

    Attributes:
        tokens_per_s: predicted.
        bound_tokens_per_s: tokens by max(resident compute time, missed bytes / bandwidth of a bare reader).
    """

    tokens_per_s: float
    bound_tokens_per_s: float


def decode_ubatches(trace: Trace) -> Array:
    """bool [ubatches]: those of one decoded token."""
    _, first, counts = np.unique(trace.ubatch, return_index=True, return_counts=True)
    return np.asarray((counts == 1) & (trace.phase[first] == PHASES.index("decode")))


def predict(trace: Trace, replayed: Replay, compute: Compute, reads: Reads, skip_tokens: int = 0) -> Prediction:
    """Time of a replay's decoded tokens, the first `skip_tokens` left out.

    A layer's missing slices are read in the order of its products, in pieces, READS_IN_FLIGHT at a time: as fast as so many reads
    at once that are as long together, one slice after another. A product computes what is there first, then each slice when it
    has come, and the next one waits for it. A limit counts by token.

    Raises:
        OptionError: the trace does not know a bundle's bytes, or has no decoded tokens.
    """
    if not trace.bundle_bytes:
        raise OptionError("the trace does not say a bundle's bytes: give --bundle-bytes")
    decoded = np.flatnonzero(decode_ubatches(trace))[skip_tokens:]
    if not len(decoded):
        raise OptionError("the trace has no decoded tokens to predict the time of")
    missed, uses = replayed.missed[decoded], replayed.uses[decoded]
    experts_s = np.zeros(len(decoded))
    for layer, n_bytes in enumerate(trace.bundle_bytes):
        for n_used, n_missed in np.unique(np.stack([uses[:, layer], missed[:, layer]], axis=1), axis=0).tolist():
            visits = (uses[:, layer] == n_used) & (missed[:, layer] == n_missed)
            experts_s[visits] += layer_s(n_used, n_missed, n_bytes, compute, reads)
    dense_s = max(0.0, compute.token_s - trace.n_layers * trace.n_used * compute.expert_token_s)
    bundle_bytes = np.array(trace.bundle_bytes, float)
    read_bytes = (missed * bundle_bytes).sum(axis=1)
    limit = reads.limit_bytes_per_s or np.inf
    seconds = float(np.maximum(dense_s + experts_s, read_bytes / limit).sum())
    bare = min(limit, reads.bytes_per_s(float(bundle_bytes.mean()) / PARTS, READS_IN_FLIGHT))
    bound = max(len(decoded) * compute.token_s, float(read_bytes.sum()) / bare)
    return Prediction(len(decoded) / seconds, len(decoded) / bound)


def pieces_of(offset: int, length: int) -> list[tuple[int, int]]:
    """Offset and length of the reads that a slice is read in: as few as may be, equally long (bytes)."""
    size = math.ceil(length / math.ceil(length / PIECE_BYTES))
    return [(offset + done, min(size, length - done)) for done in range(0, length, size)]


def layer_s(used: int, missed: int, bundle_bytes: int, compute: Compute, reads: Reads) -> float:
    """Seconds of one layer's experts, of which some must be read."""
    slice_bytes, product_s = bundle_bytes / PARTS, compute.expert_token_s / PARTS
    n_slices = missed * PARTS
    there: list[float] = []  # of the missing slices, when they have come
    if n_slices:
        n = min(READS_IN_FLIGHT, n_slices * math.ceil(slice_bytes / PIECE_BYTES))
        slice_read_s = slice_bytes / reads.bytes_per_s(n_slices * slice_bytes / n, n)
        there = [(i + 1) * slice_read_s + compute.slice_s for i in range(n_slices)]
    now = 0.0
    for part in range(PARTS):
        now += (used - missed) * product_s
        for arrival in there[part * missed : (part + 1) * missed]:
            now = max(now, arrival) + product_s
    waited_s = compute.visit_s if missed else 0.0
    return waited_s + max(now, used * compute.expert_token_s + missed * bundle_bytes * compute.contention_s)


def limited(reads: Reads, bytes_per_s: float) -> Reads:
    """The same reader behind a control group's limit.

    The kernel lets a group catch up on what it left unused, up to a tenth of a second (blk-throttle's slice), about a token: so
    bytes by time are bounded, not each read. For a disk that is slower, measure its reads instead.
    """
    return dataclasses.replace(reads, limit_bytes_per_s=bytes_per_s)
