#!/usr/bin/env python3
"""Misses by share of the experts in memory, request by request from an empty cache: what spac/plan/miss_curve.py interpolates.

    .venv/bin/python scripts/trace_demo.py build/demo/run.npz --penalty
    .venv/bin/python scripts/miss_curve.py build/demo/run.npz [TRACE ...] > docs/benchmarks/plan/misses.md

A request is replayed alone through the pager's policy. Its prompt, or where none was recorded its first tokens, fill the cache; then
misses for each routed expert are counted over the next tokens. Shares count from what one token uses (0) to all experts (1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from spac.trace.format import PHASES, Trace
from spac.trace.simulation import replay

POINTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WARM_TOKENS = 48  # where no prompt was recorded
TOKENS = 64  # counted
REQUESTS = 120


def measure(trace: Trace) -> np.ndarray:
    """float [requests, points]: misses for each routed expert."""
    chosen = trace.requests[:: max(1, len(trace.requests) // REQUESTS)][:REQUESTS]
    rows = []
    for number in chosen:
        tokens = trace.seq == number
        if not (trace.phase[tokens] == PHASES.index("prefill")).any() and tokens.sum() < WARM_TOKENS + TOKENS // 2:
            continue
        request = trace.select(tokens)
        _, first = np.unique(request.ubatch, return_index=True)
        decoded = np.flatnonzero(request.phase[first] == PHASES.index("decode"))
        skip = 0 if (request.phase == PHASES.index("prefill")).any() else WARM_TOKENS
        counted = decoded[skip : skip + TOKENS]
        if len(counted) < TOKENS // 2:
            continue
        row = []
        for share in POINTS:
            used = trace.n_used / trace.n_experts
            n = round((used + share * (1 - used)) * trace.n_layers * trace.n_experts)
            replayed = replay(request, n)
            row.append(replayed.missed[counted].sum() / max(1, int(replayed.uses[counted].sum())))
        rows.append(row)
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="misses by share of experts")
    parser.add_argument("traces", nargs="+", type=Path)
    options = parser.parse_args()
    print("# Misses by share of the experts in memory\n")
    print(f"Misses for each routed expert, of {TOKENS} tokens of single requests from an empty cache, after a prompt or {WARM_TOKENS} tokens; the pager's policy.")
    print("Share: (experts in memory / experts - k / n) / (1 - k / n). Written by `scripts/miss_curve.py`.\n")
    for path in options.traces:
        trace = Trace.load(str(path))
        found = measure(trace)
        print(f"## {trace.meta.get('model', path.stem)}: {trace.n_layers} × {trace.n_experts}, top-{trace.n_used}; {len(found)} requests\n")
        print("| share | median | 5 % of requests below | 95 % below |\n| --- | --- | --- | --- |")
        for i, share in enumerate(POINTS):
            low, middle, high = np.quantile(found[:, i], (0.05, 0.5, 0.95))
            print(f"| {share:.2f} | {middle:.3f} | {low:.3f} | {high:.3f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
