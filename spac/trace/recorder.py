"""Recording a trace from a running context. `spac.Llama(..., record_routing=True)` has one as `llama.spac.recorder`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spac import control
from spac.errors import LibraryError
from spac.stats import RoutedLayer
from spac.trace.format import PHASES, Array, Trace

if TYPE_CHECKING:
    from spac.gguf.check import ModelFacts

MISSING = 65535


@dataclass
class _Batch:
    """Tokens that one llama_decode computed, and where their outputs were wanted."""

    token_ids: list[int]
    pos: list[int]
    outputs: list[bool]
    phase: int
    seq: int
    seconds: float


@dataclass
class _Rows:
    """What was recorded, one entry for each ubatch."""

    ids: list[Array] = field(default_factory=list)
    weights: list[Array] = field(default_factory=list)
    expert_s: list[Array] = field(default_factory=list)
    ubatch_s: list[float] = field(default_factory=list)
    tokens: list[tuple[int, int, int, int]] = field(default_factory=list)  # token id, pos, phase, seq
    ubatch: list[int] = field(default_factory=list)


class Recorder:
    """Collects routing while a model decodes; one context, one thread at a time.

    Attributes:
        phase: what the coming decodes are, a name of `PHASES`; None: "decode" for one token, "prefill" for more.
    """

    def __init__(self, facts: ModelFacts) -> None:
        self.phase: str | None = None
        self._facts = facts
        self._blocks = [layer.layer for layer in facts.expert_layers]
        self._rows = _Rows()
        self._seq = -1
        self._begin = 0.0
        self.handle: int | None = control.spac_recorder_new()

    def close(self) -> None:
        """Free libspac's part; what was recorded stays. After the context is freed."""
        handle, self.handle = self.handle, None
        if handle is not None:
            control.spac_recorder_free(handle)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._rows = _Rows()
        self._seq = -1

    def before_decode(self) -> None:
        """A decode begins."""
        self._begin = time.perf_counter()

    def after_decode(self, batch: Any, ok: bool) -> None:
        """A decode has ended; `batch`: llama_batch. What a failed one recorded is dropped.

        Raises:
            LibraryError: the model's router looks otherwise than this recorder knows.
        """
        seconds = time.perf_counter() - self._begin
        records = control.take_routing(self.handle) if self.handle is not None else []
        if not ok or not records:
            return
        n = int(batch.n_tokens)
        positions = [int(batch.pos[i]) for i in range(n)]
        if self._seq < 0 or positions[0] == 0:
            self._seq += 1
        phase = self.phase or ("decode" if n == 1 else "prefill")
        outputs = [bool(batch.logits[i]) for i in range(n)] if batch.logits else [False] * (n - 1) + [True]
        self._add(_Batch([int(batch.token[i]) for i in range(n)], positions, outputs, PHASES.index(phase), self._seq, seconds), records)

    def _add(self, batch: _Batch, records: list[RoutedLayer]) -> None:
        begins = [i for i, record in enumerate(records) if i == 0 or record.layer <= records[i - 1].layer]
        ubatches = [records[begin:end] for begin, end in zip(begins, [*begins[1:], len(records)], strict=True)]
        lengths = [max(len(record.ids) for record in layers) for layers in ubatches]
        if sum(lengths) > len(batch.token_ids):
            raise LibraryError(f"{self._facts.path}: a layer routes more than once: such a model cannot be traced")
        first = 0
        for layers, n in zip(ubatches, lengths, strict=True):
            self._add_ubatch(batch, first, n, layers)
            first += n

    def _add_ubatch(self, batch: _Batch, first: int, n: int, layers: list[RoutedLayer]) -> None:
        rows, k = self._rows, layers[0].ids.shape[1]
        ids = np.full((n, len(self._blocks), k), MISSING, np.uint16)
        weights = np.zeros(ids.shape, np.float16)
        expert_s = np.zeros(len(self._blocks), np.float32)
        for record in layers:
            at = self._blocks.index(record.layer)
            have = len(record.ids)
            # a last layer computes only the tokens whose output is wanted
            wanted = np.flatnonzero(batch.outputs[first : first + n])
            tokens = np.arange(n) if have == n else wanted if have == len(wanted) else np.arange(n - have, n)
            ids[tokens, at] = record.ids
            weights[tokens, at] = record.weights
            expert_s[at] = record.expert_s
        rows.ids.append(ids)
        rows.weights.append(weights)
        rows.expert_s.append(expert_s)
        rows.ubatch_s.append(batch.seconds * n / len(batch.token_ids))
        for i in range(first, first + n):
            rows.tokens.append((batch.token_ids[i], batch.pos[i], batch.phase, batch.seq))
        rows.ubatch += [len(rows.ids) - 1] * n

    def trace(self) -> Trace:
        """What was recorded so far; no tokens if nothing was routed (a dense model)."""
        rows, layers = self._rows, len(self._blocks)
        tokens = np.array(rows.tokens, np.int64).reshape(-1, 4)
        empty = np.zeros((0, layers, self._facts.n_experts_used or 1))
        return Trace(
            ids=np.concatenate(rows.ids or [empty]).astype(np.uint16),
            weights=np.concatenate(rows.weights or [empty]).astype(np.float16),
            token_ids=tokens[:, 0].astype(np.int32),
            pos=tokens[:, 1].astype(np.int32),
            phase=tokens[:, 2].astype(np.uint8),
            seq=tokens[:, 3].astype(np.int32),
            ubatch=np.array(rows.ubatch, np.int32),
            ubatch_s=np.array(rows.ubatch_s, np.float32),
            expert_s=np.array(rows.expert_s, np.float32).reshape(len(rows.expert_s), layers),
            n_experts=self._facts.n_experts,
            blocks=tuple(self._blocks),
            bundle_bytes=tuple(layer.bundle_bytes for layer in self._facts.expert_layers),
            meta={
                "model": self._facts.name,
                "architecture": self._facts.architecture,
                "dense_bytes": self._facts.dense_bytes,
            },
        )

