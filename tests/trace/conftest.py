"""Synthetic traces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from spac.trace.format import Trace

MakeTrace = Callable[..., Trace]


@pytest.fixture
def make_trace() -> MakeTrace:
    """`make_trace(tokens=400, layers=4, experts=16, k=2, requests=4, seed=1)`: each choice is, half the time, the token's before."""

    def make(tokens: int = 400, layers: int = 4, experts: int = 16, k: int = 2, requests: int = 4, seed: int = 1) -> Trace:
        random = np.random.default_rng(seed)
        ids = np.zeros((tokens, layers, k), np.uint16)
        for t in range(tokens):
            for layer in range(layers):
                fresh = random.permutation(np.minimum(random.permutation(experts), random.permutation(experts)))
                kept = ids[t - 1, layer][random.random(k) < 0.5] if t else []
                chosen = list(dict.fromkeys([*kept, *fresh.tolist(), *range(experts)]))
                ids[t, layer] = chosen[:k]
        seq = np.arange(tokens) * requests // tokens
        pos = np.arange(tokens) - np.searchsorted(seq, seq)
        return Trace(
            ids=ids,
            weights=np.full(ids.shape, 1 / k, np.float16),
            seq=seq.astype(np.int32),
            pos=pos.astype(np.int32),
            phase=np.ones(tokens, np.uint8),
            token_ids=np.arange(tokens, dtype=np.int32),
            ubatch=np.arange(tokens, dtype=np.int32),
            ubatch_s=np.full(tokens, 0.010, np.float32),
            expert_s=np.full((tokens, layers), 0.002, np.float32),
            n_experts=experts,
            blocks=tuple(range(1, layers + 1)),
            bundle_bytes=(3_000_000,) * layers,
            meta={"model": "synthetic"},
        )

    return make
