#!/usr/bin/env python3
"""Signal "counts": how many tokens of a verification choose an expert, as levels of an eviction order; against the pager's own policy.

    .venv/bin/python scripts/verification_study.py --out docs/benchmarks/verification.md

MoE-SpAc (arXiv 2603.09983) takes the verification of drafted tokens for a sensor: an expert that several of them choose, right or wrong,
will be wanted again. It keeps a level for each expert, raised at once and lowered slowly, and evicts from the lowest. Here:

  levels, patience N    an expert that c tokens of a verification choose goes up to level c at once; after N verifications in a row that
                        chose it less often than its level says, it goes down by one. Evicted is the lowest level, in it the least
                        recently used
  ..., frequency        in a level the least decayed frequency (half-life 16 verifications) instead
  frequency, by token   decayed frequency alone, each token of a verification a use; *by decode*: one use, whatever the number

Decodes are those of scripts/sweep_study.py: the bundled model answers the benchmark's prompts, and really evaluates the bundled
draft's tokens, right or wrong. The pager's own policy and LRU go through the same decodes in libspac. Misses count in the second
half of the answers, for each token that they give; what is read while a prompt is, does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sweep_study import MODEL, Recorded, Run, record, run_of

from spac.gguf.check import check_model
from spac.trace.simulation import parse_cache, replay

SHARES: Final = ("12%", "25%", "50%")
VERIFIED: Final = (1, 2, 3)
PATIENCE: Final = (1, 4, 16)  # verifications
HALF_LIFE: Final = 16.0
Numbers = NDArray[np.float64]


@dataclass
class Order:
    """Worth of each expert of each layer, [layers, experts]; the least goes first. Ties go by last use.

    Attributes:
        patience: of levels; 0: there are none.
        by_frequency: within a level, or without levels.
        by_token: what counts as a use for the frequency.
    """

    shape: tuple[int, int]
    patience: int = 0
    by_frequency: bool = False
    by_token: bool = False
    level: Numbers = field(init=False)
    short: Numbers = field(init=False)  # verifications in a row that chose it less often than its level says
    frequency: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.short, self.frequency = (np.zeros(self.shape) for _ in range(3))

    def saw(self, layer: int, counts: Numbers) -> None:
        """A verification's tokens that chose each expert of a layer."""
        uses = counts if self.by_token else np.minimum(counts, 1)
        self.frequency[layer] = self.frequency[layer] * 2 ** (-1 / HALF_LIFE) + uses
        level, short = self.level[layer], self.short[layer]
        np.copyto(short, np.where(counts >= level, 0, short + 1))
        np.maximum(level, counts, out=level)
        falls = short >= max(self.patience, 1)
        level[falls] -= 1
        short[falls] = 0

    def worth(self, layers: slice) -> Numbers:
        """A level is worth more than any frequency."""
        worth = self.level[layers] * (1e6 if self.patience else 0.0)
        return worth + self.frequency[layers] if self.by_frequency else worth


def visits(run: Run) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """Of each ubatch: its number, and what its tokens choose, [tokens, layers, k]."""
    starts = np.flatnonzero(np.diff(run.trace.ubatch, prepend=-1))
    yield from enumerate(np.split(run.trace.ids, starts[1:]))


def misses(run: Run, n_bundles: int, one_cache: bool, order: Order) -> NDArray[np.int64]:
    """Of each ubatch."""
    n_layers, n_experts = order.shape
    room = n_bundles if one_cache else n_bundles // n_layers
    present, last = np.zeros(order.shape, bool), np.zeros(order.shape)
    found = np.zeros(len(run.width), np.int64)
    now = 0
    for number, chosen in visits(run):
        for layer in range(n_layers):
            ids = chosen[:, layer]
            counts = np.bincount(ids[ids < n_experts], minlength=n_experts).astype(float)  # beyond: a token that this layer skips
            now += 1
            used = np.flatnonzero(counts)
            absent = used[~present[layer, used]]
            found[number] += len(absent)
            last[layer, used] = now
            if run.width[number]:
                order.saw(layer, counts)
            mine = slice(None) if one_cache else slice(layer, layer + 1)
            present[layer, absent] = True
            over = int(present[mine].sum()) - room
            if over > 0:
                worth = np.where(present[mine], order.worth(mine), np.inf)
                worth[layer if one_cache else 0, used] = 1e12  # what is being computed goes last
                at = np.lexsort((last[mine].ravel(), worth.ravel()))[:over]
                present[mine].reshape(-1)[at] = False
    return found


def orders(shape: tuple[int, int]) -> dict[str, Callable[[], Order]]:
    """By what the table calls them."""
    found: dict[str, Callable[[], Order]] = {f"levels, patience {n}": partial(Order, shape, n) for n in PATIENCE}
    found |= {f"levels, patience {n}, frequency": partial(Order, shape, n, True, True) for n in PATIENCE}
    found["frequency, by token"] = partial(Order, shape, 0, True, True)
    found["frequency, by decode"] = partial(Order, shape, 0, True)
    return found


def table(recorded: Recorded, n_experts: int) -> list[str]:
    half = len(recorded.answers) // 2
    rows: dict[tuple[str, str], list[float]] = {}
    for verified in VERIFIED:
        run = run_of(dict(enumerate(recorded.answers)), verified, n_experts)
        held = (run.width > 0) & (run.answer >= half)
        given = run.given[held].sum()
        shape = run.trace.n_layers, n_experts
        for share in SHARES:
            n_bundles = parse_cache(share, run.trace)
            for quota, name in (("layer", "by layer"), ("global", "one")):
                ways = {
                    "LRU": lambda q=quota: replay(run.trace, n_bundles, "lru", q).missed.sum(1),  # noqa: B023
                    "**the pager's own**": lambda q=quota: replay(run.trace, n_bundles, "default", q).missed.sum(1),  # noqa: B023
                }
                for label, make in orders(shape).items():
                    ways[label] = lambda make=make, name=name: misses(run, n_bundles, name == "one", make())  # noqa: B023
                for label, way in ways.items():
                    rows.setdefault((label, name), []).append(float(way()[held].sum() / given))
    heads = [f"{verified} verified, {share}" for verified in VERIFIED for share in SHARES]
    lines = ["| order | caches | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    lines += [f"| {label} | {name} | " + " | ".join(f"{x:.2f}" for x in values) + " |" for (label, name), values in rows.items()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts of verification as an eviction order.")
    parser.add_argument("--out", type=Path, default=Path("build/verification.md"), help="where the table is written (%(default)s)")
    args = parser.parse_args()
    n_experts = check_model(str(MODEL)).n_experts
    lines = [
        "# Counts of verification as a signal\n",
        "Written by `scripts/verification_study.py`, which says what the orders are. Misses for each token that decoding gives, by drafted tokens",
        "verified in each decode and part of the experts in memory.\n",
        *table(record(), n_experts),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print(args.out.read_text(), end="")


if __name__ == "__main__":
    main()
