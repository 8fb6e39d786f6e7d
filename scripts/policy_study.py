"""Every eviction order that was tried, on both halves of a trace's requests: misses against per-layer LRU's.

    .venv/bin/python scripts/policy_study.py TRACE > docs/benchmarks/policy.md

The first half was used for choosing, the second only for reporting. Takes some minutes; needs a C++ compiler. The chosen
policy itself and the references run through libspac, as `spac simulate` does; what lost is in scripts/policy_study.cpp.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from spac.trace.format import Trace
from spac.trace.simulation import POLICIES, parse_cache, replay

SHARES = ("25%", "50%", "75%")


def tried(trace: Trace, program: Path) -> list[tuple[str, str, list[int]]]:
    """Name, quota and misses by share, of all orders in policy_study.cpp."""
    with tempfile.NamedTemporaryFile() as raw:
        np.array([trace.n_tokens, trace.n_layers, trace.n_experts, trace.n_used], np.int32).tofile(raw)
        trace.ids.astype(np.uint16).tofile(raw)
        trace.weights.astype(np.float32).tofile(raw)
        raw.flush()
        out = subprocess.run([program, raw.name], check=True, capture_output=True, text=True).stdout
    return [(name, quota, [int(x) for x in misses]) for name, quota, *misses in (line.split("\t") for line in out.splitlines())]


def references(trace: Trace) -> list[tuple[str, str, list[int]]]:
    """The same, of the policies in libspac."""
    names = {"default": "**spac's policy**", "lru": "LRU", "lfu": "LFU", "static": "static, by frequency", "s3fifo": "S3-FIFO", "min": "Belady's MIN"}
    return [
        (names[policy], quota, [replay(trace, parse_cache(share, trace), policy, quota).misses for share in SHARES])
        for policy in POLICIES
        for quota in ("layer", "global")
    ]


def main() -> None:
    trace = Trace.load(sys.argv[1])
    halves = [trace.of_requests(half) for half in ("first-half", "second-half")]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "policy_study"
        subprocess.run(["g++", "-std=c++17", "-O3", "-march=native", "-o", program, Path(__file__).with_suffix(".cpp")], check=True)
        rows = [references(half) + tried(half, program) for half in halves]
    base = [next(misses for name, quota, misses in half if (name, quota) == ("LRU", "layer")) for half in rows]
    print("# Eviction orders\n\nMisses against LRU with one cache for each layer, in as many bundles, cold start.")
    print(f"Trace: {trace.meta.get('model', '')}; {halves[0].n_tokens} tokens to choose by, {halves[1].n_tokens} held back.")
    print("Command: `.venv/bin/python scripts/policy_study.py TRACE`.\n")
    print("| order | caches | " + " | ".join(f"{share}, chosen by" for share in SHARES) + " | " + " | ".join(f"{share}, held back" for share in SHARES) + " |")
    print("|---|---|" + "---:|" * 6)
    for first, second in zip(*rows, strict=True):
        cells = [f"{m / b - 1:+.1%}" for half, misses in enumerate((first[2], second[2])) for m, b in zip(misses, base[half], strict=True)]
        print(f"| {first[0]} | {'one' if first[1] == 'global' else 'by layer'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
