"""Replays of a trace through the pager's policy and through references, in libspac (spac/native/simulate.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from spac import control
from spac.errors import OptionError
from spac.trace.format import Array, Trace

# in the order of SPAC_POLICY_*
POLICIES: Final = ("default", "lru", "lfu", "static", "s3fifo", "min")
QUOTAS: Final = ("auto", "global", "layer")


@dataclass(frozen=True)
class Ahead:
    """Reading ahead while the disk is idle, as the pager does.

    Attributes:
        layers: how many layers, from the one that is computed next on.
        idle_bytes: that the disk could read while all of a layer but its experts is computed.
        idle_use_bytes: the same for one expert; less what is demanded meanwhile.
        read_from: the least probability of what is read.
    """

    layers: int
    idle_bytes: float
    idle_use_bytes: float
    read_from: float = 0.9


@dataclass(frozen=True)
class Replay:
    """What a replay counted. A use is one bundle in one layer in one ubatch.

    Attributes:
        policy: a name of `POLICIES`.
        quota: "global": one cache for all layers; "layer": one for each.
        n_bundles: room in the cache, all layers together.
        bytes: of the bundles missed; None if the trace does not know a bundle's bytes.
        uses: uint16 [ubatches, layers], bundles asked for.
        missed: uint16 [ubatches, layers], those that were not there, or not whole.
        wait_bytes: float64 [ubatches, layers], what was to be read once a layer had chosen.
        ahead_bytes: float64 [ubatches, layers], what was read before.
        wasted_bytes: float64 [ubatches, layers], what had been read before and left unused now.
    """

    policy: str
    quota: str
    n_bundles: int
    hits: int
    misses: int
    bytes: int | None
    uses: Array
    missed: Array
    wait_bytes: Array
    ahead_bytes: Array
    wasted_bytes: Array

    @property
    def requests(self) -> int:
        """Bundles asked for: hits and misses."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0


def replay(
    trace: Trace,
    n_bundles: int,
    policy: str = "default",
    quota: str | Sequence[int] = "auto",
    foresight: NDArray[np.float32] | None = None,
    ahead: Ahead | None = None,
) -> Replay:
    """Replay a trace from an empty cache with room for `n_bundles`; bundles are fetched on demand.

    Args:
        quota: "auto": one cache for all layers for "default", as the pager has it, and one for each layer for the others,
            as the literature has it. Numbers: one for each layer, with room for so many bundles; `n_bundles` is their sum.
        foresight: float32 [tokens, 3, layers, experts], for "default": what the engine would say before each token is decoded
            (`spac.estimator.foresight`); a negative first number: nothing.
        ahead: with foresight and bytes of bundles; None: all is fetched on demand.

    Raises:
        OptionError: no such policy or quota, no room, or foresight of another shape.
    """
    if policy not in POLICIES:
        raise OptionError(f"policy {policy!r} does not exist: use {', '.join(POLICIES)}")
    rooms = None if isinstance(quota, str) else np.array(quota, np.int64)
    if rooms is not None and (rooms.shape != (trace.n_layers,) or (rooms < 0).any() or rooms.sum() != n_bundles):
        raise OptionError(f"room by layer: {rooms.tolist()} are not {trace.n_layers} numbers that sum up to {n_bundles}")
    if rooms is None and quota not in QUOTAS:
        raise OptionError(f"quota {quota!r} does not exist: use {', '.join(QUOTAS)}")
    if foresight is not None and foresight.shape != (trace.n_tokens, 3, trace.n_layers, trace.n_experts):
        raise OptionError(f"foresight has the shape {foresight.shape}; expected [tokens, 3, layers, experts]")
    by_layer = rooms is not None or quota == "layer" or (quota == "auto" and policy != "default")
    ids, ubatch = np.ascontiguousarray(trace.ids, np.uint16), np.ascontiguousarray(trace.ubatch, np.int32)
    bundle_bytes = np.array(trace.bundle_bytes or [0] * trace.n_layers, np.uint64)
    foresight = None if foresight is None else np.ascontiguousarray(foresight, np.float32)
    n_ubatches = len(np.unique(ubatch))
    uses, missed = np.zeros((2, n_ubatches, trace.n_layers), np.uint16)
    wait_bytes, ahead_bytes, wasted_bytes = np.zeros((3, n_ubatches, trace.n_layers))
    raw = control.Simulation(
        struct_size=ctypes.sizeof(control.Simulation),
        ids=ids.ctypes.data,
        ubatch=ubatch.ctypes.data,
        bundle_bytes=bundle_bytes.ctypes.data,
        foresight=None if foresight is None else foresight.ctypes.data,
        layer_bundles=None if rooms is None else rooms.ctypes.data,
        n_tokens=trace.n_tokens,
        n_bundles=max(0, n_bundles),
        n_layers=trace.n_layers,
        n_experts=trace.n_experts,
        n_used=trace.n_used,
        policy=POLICIES.index(policy),
        by_layer=by_layer,
        ahead_layers=ahead.layers if ahead else 0,
        read_from=ahead.read_from if ahead else 0.0,
        idle_bytes=ahead.idle_bytes if ahead else 0.0,
        idle_use_bytes=ahead.idle_use_bytes if ahead else 0.0,
        visit_wait_bytes=wait_bytes.ctypes.data,
        visit_ahead_bytes=ahead_bytes.ctypes.data,
        visit_wasted_bytes=wasted_bytes.ctypes.data,
        visit_uses=uses.ctypes.data,
        visit_misses=missed.ctypes.data,
    )
    control.check(control.spac_simulate(ctypes.byref(raw)))
    n_bytes = int(raw.bytes) if trace.bundle_bytes else None
    quotas = "layer" if by_layer else "global"
    return Replay(policy, quotas, n_bundles, int(raw.hits), int(raw.misses), n_bytes, uses, missed, wait_bytes, ahead_bytes, wasted_bytes)


def parse_cache(text: str, trace: Trace) -> int:
    """Room of a cache, in bundles of all layers together: "25%" of them, or a count.

    Raises:
        OptionError: it is neither, or less than one bundle.
    """
    try:
        n = round(float(text[:-1]) / 100 * trace.n_bundles) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        raise OptionError(f"cache {text!r} is neither a share, like 25%, nor a number of bundles") from None
    if n < 1 or (text.endswith("%") and float(text[:-1]) > 100):
        raise OptionError(f"cache {text!r} is no room for a bundle, or more than all; the trace has {trace.n_bundles} bundles")
    return n
