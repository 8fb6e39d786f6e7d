"""Expected seconds for each accepted token, and what a plan takes of the budget: the model that all methods minimize."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from spac.balancer.curves import Floats
from spac.balancer.state import Choice, Plan, State
from spac.errors import BudgetError

MIB = 1 << 20


class Costs:
    """All choices of a state, as arrays [choices]; everything is for each accepted token.

        busy = model_read_s * bytes that the model's caches miss a token + draft_read_s * the same of the draft's
        seconds = max(compute_s + waits * busy - fast_s * uses in the fast tier a token, reads * busy)

    Attributes:
        compute_s: decoding and drafting with all experts in RAM.
        model_read_s, draft_read_s: seconds of reading for each byte that a token of theirs misses.
        waits: the part of reading that nothing hides, by the disk itself: a limit counts bytes over a whole decode.
        reads: all of it behind the limit, with what is read ahead, and in vain.
        fast_s: saved by each use a token of an expert in the fast tier.
        flight_bytes: of the budget, for reads in flight.
    """

    def __init__(self, state: State) -> None:
        flights = np.array(sorted(set(state.in_flight)))
        rates = np.array([state.disk_bytes_per_s(n) for n in flights.tolist()])
        faster = rates > np.concatenate([[0.0], np.maximum.accumulate(rates)[:-1]])  # more in flight must give more
        n_verified, n_more = (len(state.decode_s), len(state.sensed)) if state.draft_s is not None else (1, 1)
        shape = n_verified, n_more, len(state.lookahead), int(faster.sum())
        verified, more, depth, flight = (x.ravel() for x in np.indices(shape))
        self.verified, self.drafted, self.depth = verified, verified + more, depth
        self.in_flight = flights[faster][flight]
        self.flight_bytes = self.in_flight * state.slice_bytes
        accepted = np.concatenate([[1.0], 1 + np.cumsum(state.accepted)])[verified]
        recall, precision = np.array(state.lookahead, float)[depth].T
        growth, disk = np.array(state.growth)[verified], rates[faster][flight]
        rate = np.minimum(disk, state.reads.limit_bytes_per_s or np.inf)
        drafting_s = self.drafted * (state.draft_s or 0.0) + (self.drafted > 0) * state.draft_start_s
        self.compute_s = (np.array(state.decode_s)[verified] + drafting_s) / accepted
        self.model_read_s = growth * (1 - np.array(state.sensed)[more]) / accepted / rate
        self.draft_read_s = self.drafted / accepted / rate
        self.waits = (1 - recall) * rate / disk
        self.reads = 1 - recall + recall / precision
        self.fast_s = growth * (state.fast.saved_s if state.fast else 0.0) / accepted

    def __len__(self) -> int:
        return len(self.verified)

    def choice(self, i: int) -> Choice:
        return Choice(int(self.verified[i]), int(self.drafted[i]), int(self.depth[i]), int(self.in_flight[i]))

    def seconds(self, busy: Any, fast_uses: float = 0.0, rows: Any = slice(None)) -> Any:
        """Of some choices, by seconds of reading and uses in the fast tier."""
        waiting = self.compute_s[rows] + self.waits[rows] * busy - self.fast_s[rows] * fast_uses
        return np.maximum(waiting, self.reads[rows] * busy)

    def read_s(self, state: State, i: int) -> Floats:
        """float64 [caches]: seconds of reading for each miss a token, with a choice."""
        return np.array([c.bundle_bytes * float(self.draft_read_s[i] if c.of_draft else self.model_read_s[i]) for c in state.caches])

    def plan(self, state: State, i: int, slots: Iterable[int], fast_slots: Iterable[int], method: str) -> Plan:
        """With its cost."""
        of_all, of_fast = tuple(int(n) for n in slots), tuple(int(n) for n in fast_slots)
        missed = np.array([float(cache.curve.at(n)) for cache, n in zip(state.caches, of_all, strict=True)])
        fast_uses = sum(
            float(cache.curve.misses[0] - cache.curve.at(n))
            for cache, n in zip(state.caches, of_fast, strict=True)
            if n > 0 and not cache.of_draft
        )
        seconds = float(self.seconds((self.read_s(state, i) * missed).sum(), fast_uses, i))
        return Plan(self.choice(i), of_all, of_fast, seconds, method)

    def used_bytes(self, state: State, i: int, slots: Sequence[int], fast_slots: Sequence[int]) -> tuple[float, float]:
        """What a plan takes in RAM, and in the fast tier."""
        sizes = np.array([cache.bundle_bytes for cache in state.caches], float)
        fast = float((sizes * np.array(fast_slots)).sum())
        return float((sizes * np.array(slots)).sum()) - fast + float(self.flight_bytes[i]), fast


def whole_bundles(state: State, budget_bytes: Any) -> Any:
    """What of a budget bundles can fill: its largest multiple of what all their sizes are multiples of."""
    unit = math.gcd(*(cache.bundle_bytes for cache in state.caches))
    return np.floor(np.asarray(budget_bytes) / unit + 1e-9) * unit


def floor_fast_slots(state: State) -> list[int]:
    """Of the floors, what the fast tier takes."""
    left, taken = state.fast.budget_bytes if state.fast else 0, []
    for cache in state.caches:
        taken.append(min(cache.floor, left // cache.bundle_bytes))
        left -= taken[-1] * cache.bundle_bytes
    return taken


def floor_bytes(state: State) -> int:
    """The least budget that a plan exists for: every cache's floor, and the fewest reads in flight."""
    floors = sum((cache.floor - n) * cache.bundle_bytes for cache, n in zip(state.caches, floor_fast_slots(state), strict=True))
    return int(np.ceil(floors + min(state.in_flight) * state.slice_bytes))


def check_feasible(state: State) -> None:
    """Raises:
    BudgetError: there is no plan; with what would be feasible.
    """
    floors = sum(cache.floor for cache in state.caches)
    need = floor_bytes(state)
    if state.budget_bytes < need:
        least = f"{floors} experts and {min(state.in_flight)} read(s) in flight"
        tenth = MIB / 10  # rounded up, so that who follows the advice is done
        raise BudgetError(
            f"an expert budget of {state.budget_bytes / MIB:.1f} MiB is too small: {least} take {math.ceil(need / tenth) / 10:.1f} MiB; "
            f"raise the memory limit by {math.ceil((need - state.budget_bytes) / tenth) / 10:.1f} MiB"
        )
