"""Plans without a solver: slots where they save most, or in equal shares, for every choice of the other settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spac.balancer.cost import Terms, check_feasible, floor_fast_slots, make_plan, terms_of, used_bytes
from spac.balancer.curves import Floats
from spac.balancer.state import Plan, State

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """Every slot that a cache may get, as arrays [steps]: by cache, then slot."""

    cache: Ints
    slot: Ints
    gain: Floats  # misses a token that it saves
    sizes: Ints  # [caches], bytes of a bundle

    @classmethod
    def of(cls, state: State) -> Steps:
        gains = [cache.curve.gains for cache in state.caches]
        return cls(
            np.repeat(np.arange(len(gains)), [len(g) for g in gains]),
            np.concatenate([np.arange(len(g)) for g in gains]),
            np.concatenate(gains),
            np.array([cache.bundle_bytes for cache in state.caches], np.int64),
        )

    def fill(self, weights: Floats, start: Ints, most: Ints, budget_bytes: float) -> Ints:
        """Slots [caches] from `start` to at most `most`: those that save most for their bytes, as far as the budget goes.

        Where all bundles have one size, no other division of as many slots saves more: gains fall with every slot.

        Args:
            weights: [caches], what a miss costs.
            budget_bytes: for what comes on top of `start`.
        """
        open_ = np.flatnonzero((self.slot >= start[self.cache]) & (self.slot < most[self.cache]))
        cache = self.cache[open_]
        order = np.argsort(-(self.gain[open_] * weights[cache] / self.sizes[cache]), kind="stable")
        cache = cache[order]
        spent = np.cumsum(self.sizes[cache])
        n = int(np.searchsorted(spent, budget_bytes, side="right"))
        slots = start + np.bincount(cache[:n], minlength=len(start))
        left = budget_bytes - (float(spent[n - 1]) if n else 0.0)
        full = np.zeros(len(start), bool)
        for i in cache[n:].tolist() if left >= self.sizes.min() else ():
            full[i] |= self.sizes[i] > left
            if not full[i]:
                slots[i] += 1
                left -= float(self.sizes[i])
                if left < self.sizes.min():
                    break
        return np.asarray(slots, np.int64)


def fill_up(state: State, terms: Terms, steps: Steps, slots: Ints, fast: Ints) -> tuple[Ints, Ints]:
    """Slots and fast slots, and on top what the budgets leave room for."""
    ram_used, fast_used = used_bytes(state, terms, slots.tolist(), fast.tolist())
    most = np.array([cache.n_experts for cache in state.caches], np.int64)
    if state.fast is not None:
        answers = np.array([0.0 if cache.of_draft else 1.0 for cache in state.caches])
        more = steps.fill(answers, fast, np.where(answers > 0, most, fast), state.fast.budget_bytes - fast_used)
        slots = np.maximum(slots, more)
        fast = more
        ram_used, _ = used_bytes(state, terms, slots.tolist(), fast.tolist())
    return steps.fill(terms.read_s(state), slots, most, state.budget_bytes - ram_used), fast


def greedy(state: State) -> Plan:
    """The best choice, with slots one by one where they save most.

    Raises:
        BudgetError: there is no plan.
    """
    check_feasible(state)
    steps = Steps.of(state)
    floors = np.array([cache.floor for cache in state.caches], np.int64)
    fast_floors = np.array(floor_fast_slots(state), np.int64)
    known: dict[tuple[float, float], tuple[Ints, Ints]] = {}  # slots hang on the ratio of the two models' misses, and on the room
    plans = []
    for terms in _affordable(state):
        key = (terms.flight_bytes, round(terms.draft_read_s / max(terms.model_read_s, 1e-30), 9) if _has_draft(state) else 0.0)
        if key not in known:
            known[key] = fill_up(state, terms, steps, floors, fast_floors)
        plans.append(make_plan(state, terms, *known[key], "greedy"))
    return min(plans, key=lambda plan: plan.seconds_per_token)


def uniform(state: State) -> Plan:
    """The best choice with the same part of its experts in every cache.

    Raises:
        BudgetError: there is no plan.
    """
    check_feasible(state)
    return min((_uniform(state, terms) for terms in _affordable(state)), key=lambda plan: plan.seconds_per_token)


def separate(state: State) -> Plan:
    """The best choice for equal parts, and only then slots where they save most.

    Raises:
        BudgetError: there is no plan.
    """
    choice = uniform(state).choice
    terms = next(t for t in _affordable(state) if t.choice == choice)
    floors = np.array([cache.floor for cache in state.caches], np.int64)
    return make_plan(state, terms, *fill_up(state, terms, Steps.of(state), floors, np.array(floor_fast_slots(state), np.int64)), "separate")


def _has_draft(state: State) -> bool:
    return any(cache.of_draft for cache in state.caches)


def _affordable(state: State) -> list[Terms]:
    """The choices whose reads in flight leave room for the floors."""
    floors = [cache.floor for cache in state.caches]
    fast = floor_fast_slots(state)
    return [terms for terms in terms_of(state) if used_bytes(state, terms, floors, fast)[0] <= state.budget_bytes]


def _uniform(state: State, terms: Terms) -> Plan:
    fast_bytes = state.fast.budget_bytes if state.fast else 0

    def share(part: float, budget_bytes: float, least: Sequence[int]) -> list[int]:
        return [max(n, int(part * cache.n_experts)) for n, cache in zip(least, state.caches, strict=True)]

    def bisect(budget_bytes: float, least: Sequence[int]) -> list[int]:
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            taken = sum(n * c.bundle_bytes for n, c in zip(share(middle, budget_bytes, least), state.caches, strict=True))
            low, high = (middle, high) if taken <= budget_bytes else (low, middle)
        all_fit = sum(c.n_experts * c.bundle_bytes for c in state.caches) <= budget_bytes
        return share(1.0 if all_fit else low, budget_bytes, least)

    fast = bisect(fast_bytes, floor_fast_slots(state)) if state.fast else [0] * len(state.caches)
    taken = sum(n * c.bundle_bytes for n, c in zip(fast, state.caches, strict=True))
    slots = bisect(state.budget_bytes - terms.flight_bytes + taken, [max(f, c.floor) for f, c in zip(fast, state.caches, strict=True)])
    return make_plan(state, terms, slots, fast, "uniform")
