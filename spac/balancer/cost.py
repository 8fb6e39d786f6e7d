"""Expected seconds for each accepted token, and what a plan takes of the budget: the model that all methods minimize."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spac.balancer.curves import Floats
from spac.balancer.state import Choice, Plan, State
from spac.errors import BudgetError

MIB = 1 << 20


@dataclass(frozen=True)
class Terms:
    """One choice's part of the cost, all for each accepted token; `m` stands for a cache's misses a token, U for its uses.

        busy = read_s * (target_reads * sum over the model's caches of bytes * m + draft_reads * sum over the draft's)
        seconds = max(compute_s + waits * busy + fast_s * sum over the model's caches of (m in the fast tier - U), reads * busy)

    Attributes:
        compute_s: decoding and drafting with all experts in RAM.
        model_read_s, draft_read_s: seconds of reading for each byte that a token misses.
        waits: the part of reading that nothing hides.
        reads: the same with what is read ahead, and in vain.
        fast_s: saved by each use of an expert in the fast tier.
        flight_bytes: of the budget, for reads in flight.
    """

    choice: Choice
    compute_s: float
    model_read_s: float
    draft_read_s: float
    waits: float
    reads: float
    fast_s: float
    flight_bytes: float

    def read_s(self, state: State) -> Floats:
        """float64 [caches]: seconds of reading for each miss a token."""
        return np.array([c.bundle_bytes * (self.draft_read_s if c.of_draft else self.model_read_s) for c in state.caches])

    def seconds(self, state: State, slots: Sequence[int], fast_slots: Sequence[int]) -> float:
        """Expected, for each accepted token."""
        misses = np.array([float(cache.curve.at(n)) for cache, n in zip(state.caches, slots, strict=True)])
        busy = float((self.read_s(state) * misses).sum())
        compute = self.compute_s + self.waits * busy
        for cache, n in zip(state.caches, fast_slots, strict=True):
            if not cache.of_draft:
                compute -= self.fast_s * float(cache.curve.misses[0] - cache.curve.at(n))
        return max(compute, self.reads * busy)


def terms_of(state: State) -> list[Terms]:
    """Of all choices, those left out that are worse than another one in every respect."""
    rates = {n: state.bytes_per_s(n) for n in sorted(set(state.in_flight))}
    flights = [n for n in rates if all(rates[n] > rates[fewer] for fewer in rates if fewer < n)]
    pairs = [(0, 0)]
    if state.draft_s is not None:
        pairs = [(n, n + more) for n in range(len(state.decode_s)) for more in range(len(state.sensed))]
    found = []
    for verified, drafted in pairs:
        accepted = 1 + sum(state.accepted[:verified])
        compute_s = state.decode_s[verified] + drafted * (state.draft_s or 0.0)
        misses = state.growth[verified] * (1 - state.sensed[drafted - verified])
        fast_s = state.growth[verified] * state.fast.saved_s if state.fast else 0.0
        for depth, (recall, precision) in enumerate(state.lookahead):
            for n in flights:
                found.append(
                    Terms(
                        Choice(verified, drafted, depth, n),
                        compute_s=compute_s / accepted,
                        model_read_s=misses / accepted / rates[n],
                        draft_read_s=drafted / accepted / rates[n],
                        waits=1 - recall,
                        reads=1 - recall + recall / precision,
                        fast_s=fast_s / accepted,
                        flight_bytes=n * state.slice_bytes,
                    )
                )
    return _best(state, found)


def _best(state: State, terms: list[Terms]) -> list[Terms]:
    """Those that no other one dominates; of equals the first."""
    uses = sum(float(cache.curve.misses[0]) for cache in state.caches if not cache.of_draft)
    rows = np.array([
        (
            t.compute_s - t.fast_s * uses, t.fast_s, t.waits * t.model_read_s, t.waits * t.draft_read_s,
            t.reads * t.model_read_s, t.reads * t.draft_read_s, t.flight_bytes,
        )
        for t in terms
    ])  # fmt: skip
    kept: list[int] = []
    for i in np.lexsort((np.arange(len(rows)), rows.sum(1) - rows[:, -1])):  # roughly: good ones first
        others = rows[kept]
        if not len(kept) or not (others <= rows[i]).all(1).any():
            kept = [k for k in kept if not (rows[i] <= rows[k]).all()]
            kept.append(int(i))
    return [terms[i] for i in sorted(kept)]


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
        raise BudgetError(
            f"an expert budget of {state.budget_bytes / MIB:.1f} MiB is too small: {least} take {need / MIB:.1f} MiB; "
            f"raise the memory limit by {(need - state.budget_bytes) / MIB:.1f} MiB"
        )


def used_bytes(state: State, terms: Terms, slots: Sequence[int], fast_slots: Sequence[int]) -> tuple[float, float]:
    """What a plan takes in RAM, and in the fast tier."""
    sizes = np.array([cache.bundle_bytes for cache in state.caches], float)
    fast = float((sizes * np.array(fast_slots)).sum())
    return float((sizes * np.array(slots)).sum()) - fast + terms.flight_bytes, fast


def make_plan(state: State, terms: Terms, slots: Iterable[int], fast_slots: Iterable[int], method: str) -> Plan:
    """With its cost."""
    of_all, of_fast = [int(n) for n in slots], [int(n) for n in fast_slots]
    return Plan(terms.choice, tuple(of_all), tuple(of_fast), terms.seconds(state, of_all, of_fast), method)
