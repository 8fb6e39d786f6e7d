"""What a paged model, and the stores beneath it, report: plain, frozen values. Knows nothing of ctypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

SIGNALS: Final = ("tokens", "draft")  # what foresees experts: docs/lookahead.md


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a paged model. Bytes, unless the name says otherwise.

    Attributes:
        expert_bytes: all expert tensors, as in the file.
        expert_page_bytes: the same in whole pages: a budget of this much holds everything.
        max_bundle_bytes: the largest bundle (one expert's tensors in one layer), in whole pages.
        floor_bytes: the smallest expert budget that this model runs in.
        n_layers: layers that have experts.
        n_experts: experts in such a layer.
        n_tensors: paged tensors.
        n_repacked: of which slices are repacked, when they are read, for the CPU's faster kernels.
        n_bundles: experts of all layers together.
        store: how experts are read: "direct", "buffered", "mmap" or "mock".
    """

    expert_bytes: int
    expert_page_bytes: int
    max_bundle_bytes: int
    floor_bytes: int
    n_layers: int
    n_experts: int
    n_tensors: int
    n_repacked: int
    n_bundles: int
    store: str


@dataclass(frozen=True)
class ModelStats:
    """Counters from the model's load on. A use is one expert in one layer in one ubatch.

    `budget_bytes`, `used_bytes`, `peak_bytes`, `granted_bytes` and `shortages` are the process's, shared by all models; the
    rest is this model's. `granted_bytes` is what experts may take, `budget_bytes` the same or less while memory is short.
    """

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    model_used_bytes: int
    hits: int
    misses: int
    reads: int
    bytes_read: int
    evictions: int
    rereads: int
    read_errors: int
    stall_s: float
    read_s: float
    tokens: int
    ubatches: int
    events: int
    ahead_reads: int
    ahead_bytes: int
    wasted_bytes: int
    granted_bytes: int
    shortages: int

    @property
    def hit_rate(self) -> float:
        """Hits by uses, 0.0 to 1.0; 0.0 before the first use."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 0.0


@dataclass(frozen=True)
class LayerStats:
    """Hits and misses of one paged layer (`layer`: block number in the model)."""

    layer: int
    hits: int
    misses: int


@dataclass(frozen=True)
class RoutingEvent:
    """One token's routing in one layer.

    Attributes:
        sequence: running number of the event within the model.
        token: running number of the token within the model.
        layer: block number.
        experts: the experts chosen, at most 32 of them.
        hits: for each of `experts`: whether it was wholly in memory when the layer began.
        stall_s: the model's stall time when the layer began; subtract neighbours.
    """

    sequence: int
    token: int
    layer: int
    experts: tuple[int, ...]
    hits: tuple[bool, ...]
    stall_s: float


@dataclass(frozen=True)
class RoutedLayer:
    """What a recorder saw in one layer of one ubatch.

    Attributes:
        layer: block number.
        ids: int32 [tokens, k], experts; a last layer may have computed fewer tokens than the ubatch has.
        weights: float32 [tokens, k].
        expert_s: seconds from the router's end to the end of the experts' last product.
    """

    layer: int
    ids: Any
    weights: Any
    expert_s: float


@dataclass(frozen=True)
class StoresProbe:
    """What of the kernel's means the stores find here: spac_probe in spac.h.

    Attributes:
        page_bytes: the unit of budgets.
        direct_align: of direct reads of the file that was asked about, bytes; 0 if they are refused.
        direct_error: errno of that, or 0.
        populates: a mapping can be read in at once.
    """

    page_bytes: int
    direct_align: int
    direct_error: int
    populates: bool
