"""Plans without a solver: slots where they save most, with a proof of how good that is; and in equal shares.

Gains fall with every further slot, so taking slots in the order of what they save for their bytes is optimal for as many bytes
(Fox: Discrete optimization via marginal analysis, Management Science 13(3), 1966). Bundles of one size leave no room over.
Two sizes trade places at the end of that order: every number of the larger ones is tried, so they are exact, too; of more sizes
three trade, within WINDOW of the order. With a fraction of the next slot the order is a bound that no plan passes (Dantzig's, of the
knapsack problem).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from spac.balancer.cost import Costs, check_feasible, floor_fast_slots, whole_bundles
from spac.balancer.curves import Floats
from spac.balancer.state import Plan, State

Ints = NDArray[np.int64]
CELLS: Final = 256
WINDOW: Final = 16  # bundles of a size, more or fewer than in the order


class Filling:
    """Gives slots to a state's caches."""

    def __init__(self, state: State, costs: Costs) -> None:
        gains = [cache.curve.gains for cache in state.caches]
        self._state, self._costs = state, costs
        self._cache = np.repeat(np.arange(len(gains)), [len(g) for g in gains])
        self._slot = np.concatenate([np.arange(len(g)) for g in gains])
        self._gain = np.concatenate(gains)
        self._sizes = np.array([cache.bundle_bytes for cache in state.caches], np.int64)
        self.most = np.array([cache.n_experts for cache in state.caches], np.int64)
        self.floors = np.array([cache.floor for cache in state.caches], np.int64)
        self.fast_floors = np.array(floor_fast_slots(state), np.int64)
        self.floor_misses = np.array([float(cache.curve.at(cache.floor)) for cache in state.caches])
        self.answers = np.array([not cache.of_draft for cache in state.caches])
        fast_bytes = float(whole_bundles(state, state.fast.budget_bytes)) if state.fast else 0.0
        of_floors = float((self.floors * self._sizes).sum())
        self._room_bytes = whole_bundles(state, state.budget_bytes - costs.flight_bytes) + fast_bytes - of_floors  # by choice
        self._most_fast_uses = 0.0
        if state.fast is not None:
            most = np.where(self.answers, self.most, 0)
            _, self._most_fast_uses = self.fill(self.answers.astype(float), np.zeros_like(most), most, fast_bytes)

    def fill(self, weights: Floats, start: Ints, most: Ints, budget_bytes: float) -> tuple[Ints, float]:
        """Slots [caches] from `start` to at most `most`: those that save most for their bytes, as far as the budget goes.

        Args:
            weights: [caches], what a miss costs.
            budget_bytes: for what comes on top of `start`.

        Returns:
            The slots, and what no other slots could save more than.
        """
        open_ = np.flatnonzero((self._slot >= start[self._cache]) & (self._slot < most[self._cache]))
        cache = self._cache[open_]
        saves = self._gain[open_] * weights[cache]
        order = np.argsort(-(saves / self._sizes[cache]), kind="stable")
        cache, saves = cache[order], saves[order]
        sizes = self._sizes[cache]
        spent = np.cumsum(sizes)
        n = int(np.searchsorted(spent, budget_bytes, side="right"))
        bound = float(saves[:n].sum())
        if n < len(cache):
            left = max(0.0, budget_bytes - (float(spent[n - 1]) if n else 0.0))
            bound += float(saves[n]) * left / float(sizes[n])
        of_size = {int(size): np.flatnonzero(sizes == size) for size in np.unique(sizes)}
        taken = {size: int(np.searchsorted(rows, n)) for size, rows in of_size.items()}
        if len(of_size) == 2:
            small, large = of_size
            taken[small], taken[large] = _best_pair(saves[of_size[small]], saves[of_size[large]], small, large, budget_bytes)
        for three in itertools.combinations(of_size, 3):
            room = budget_bytes - sum(size * count for size, count in taken.items() if size not in three)
            best = _best_three([saves[of_size[size]] for size in three], three, [taken[size] for size in three], room)
            taken |= zip(three, best, strict=True)
        rows = np.concatenate([of_size[size][:count] for size, count in taken.items()] or [np.zeros(0, np.int64)])
        if len(of_size) == 2:
            bound = float(saves[rows].sum())
        return start + np.bincount(cache[rows], minlength=len(start)), bound

    def fill_up(self, i: int, slots: Ints, fast: Ints) -> tuple[Ints, Ints]:
        """Slots and fast slots, and on top what the budgets leave room for with choice i."""
        state, costs = self._state, self._costs
        if state.fast is not None:
            _, fast_used = costs.used_bytes(state, i, slots.tolist(), fast.tolist())
            most = np.where(self.answers, self.most, fast)
            fast, _ = self.fill(self.answers.astype(float), fast, most, state.fast.budget_bytes - fast_used)
            slots = np.maximum(slots, fast)
        ram_used, _ = costs.used_bytes(state, i, slots.tolist(), fast.tolist())
        return self.fill(costs.read_s(state, i), slots, self.most, state.budget_bytes - ram_used)[0], fast

    def bound_s(self, i: int) -> float:
        """No plan with choice i takes less: as if the fast tier's memory served as RAM too, and slots could be divided."""
        weights = self._costs.read_s(self._state, i)
        _, saved = self.fill(weights, self.floors, self.most, float(self._room_bytes[i]))
        busy = max(0.0, float((weights * self.floor_misses).sum()) - saved)
        return float(self._costs.seconds(busy, self._most_fast_uses, i))

    def affordable(self) -> NDArray[np.bool_]:
        """Of each choice: whether its reads in flight leave room for the floors."""
        used, _ = self._costs.used_bytes(self._state, 0, self.floors.tolist(), self.fast_floors.tolist())
        return np.asarray(used - self._costs.flight_bytes[0] + self._costs.flight_bytes <= self._state.budget_bytes)

    def rough_bounds_s(self) -> Floats:
        """As `bound_s`, of all choices at once, infinite where one is not affordable.

        The room is divided between both models in one of CELLS ways, and each gets all that it would have within the cell.
        """
        costs = self._costs
        cells = np.linspace(0, max(0.0, float(self._room_bytes.max())), CELLS + 1)
        of_model = self._missed_bytes(self.answers, cells if not self.answers.all() else cells[-1:])
        busy = costs.model_read_s * of_model[-1]
        if not self.answers.all():
            of_draft = self._missed_bytes(~self.answers, cells[::-1])
            busy = (costs.model_read_s[:, None] * of_model[1:] + costs.draft_read_s[:, None] * of_draft[:-1]).min(1)
        return np.asarray(np.where(self.affordable(), costs.seconds(busy, self._most_fast_uses), np.inf))

    def _missed_bytes(self, caches: NDArray[np.bool_], room_bytes: Floats) -> Floats:
        """Bytes that a token misses at least, if these caches have so much room above their floors."""
        mine = caches[self._cache] & (self._slot >= self.floors[self._cache])
        order = np.argsort(-self._gain[mine], kind="stable")
        sizes = self._sizes[self._cache[mine]][order]
        saved = np.interp(room_bytes, np.cumsum([0, *sizes]), np.cumsum([0.0, *(self._gain[mine][order] * sizes)]))
        return np.asarray(np.maximum(0.0, float((caches * self._sizes * self.floor_misses).sum()) - saved))


def _best_pair(saves_small: Floats, saves_large: Floats, small_bytes: int, large_bytes: int, room_bytes: float) -> tuple[int, int]:
    """How many bundles of two sizes to take. Of each size the best ones go first, so every number of large ones is tried."""
    n_large = np.arange(min(len(saves_large), int(max(0.0, room_bytes) // large_bytes)) + 1)
    n_small = np.clip((room_bytes - n_large * large_bytes) // small_bytes, 0, len(saves_small)).astype(np.int64)
    of_small, of_large = (np.concatenate([[0.0], np.cumsum(saves)]) for saves in (saves_small, saves_large))
    best = int(np.argmax(of_small[n_small] + of_large[n_large]))
    return int(n_small[best]), int(n_large[best])


def _best_three(saves: Sequence[Floats], sizes: Sequence[int], taken: Sequence[int], room_bytes: float) -> list[int]:
    """How many bundles of three sizes to take: of the larger two some more or fewer than in `taken`, of the smallest what fits."""
    of_small, of_middle, of_large = (np.concatenate([[0.0], np.cumsum(part)]) for part in saves)
    n_middle, n_large = (
        np.arange(max(0, n - WINDOW), min(len(part), n + WINDOW) + 1) for n, part in zip(taken[1:], saves[1:], strict=True)
    )
    left = room_bytes - n_middle[:, None] * sizes[1] - n_large * sizes[2]
    n_small = np.clip(left // sizes[0], 0, len(saves[0])).astype(np.int64)
    saved = np.where(left >= 0, of_small[n_small] + of_middle[n_middle][:, None] + of_large[n_large], -1.0)
    i, j = np.unravel_index(int(np.argmax(saved)), saved.shape)
    return [int(n_small[i, j]), int(n_middle[i]), int(n_large[j])]


@dataclass(frozen=True)
class Found:
    """A plan, a bound that no plan passes, and the choices (rows of `Costs`) that could still be better by more than the gap."""

    plan: Plan
    bound_s: float
    open_choices: tuple[int, ...]


def search(state: State, costs: Costs, filling: Filling, gap: float = 0.0) -> Found:
    """The choices in the order of their rough bounds, until none can be better by more than the gap (relative); slots one by one
    where they save most.

    Raises:
        BudgetError: there is no plan.
    """
    check_feasible(state)
    rough = filling.rough_bounds_s()
    best: Plan | None = None
    bounds: dict[int, float] = {}
    rest_s = np.inf
    known: dict[tuple[float, float], tuple[Ints, Ints]] = {}  # slots hang on the ratio of both models' misses, and on the room
    for i in np.argsort(rough, kind="stable").tolist():
        if best is not None and rough[i] >= best.seconds_per_token * (1 - gap):
            rest_s = float(rough[i])
            break
        ratio = float(costs.draft_read_s[i] / max(costs.model_read_s[i], 1e-30)) if not filling.answers.all() else 0.0
        key = float(costs.flight_bytes[i]), ratio
        if key not in known:
            known[key] = filling.fill_up(i, filling.floors, filling.fast_floors)
        plan = costs.plan(state, i, *known[key], "greedy")
        bounds[i] = float(rough[i])
        if best is None or plan.seconds_per_token < best.seconds_per_token:
            best = plan
    assert best is not None  # check_feasible: the fewest reads in flight are affordable
    limit = best.seconds_per_token * (1 - gap)
    bounds = {i: filling.bound_s(i) if bound < limit else bound for i, bound in bounds.items()}
    open_ = [i for i in bounds if bounds[i] < limit]
    return Found(best, min([best.seconds_per_token, rest_s, *bounds.values()]), tuple(open_))


def greedy(state: State) -> Plan:
    """The best choice, with slots one by one where they save most.

    Raises:
        BudgetError: there is no plan.
    """
    costs = Costs(state)
    return search(state, costs, Filling(state, costs)).plan


def uniform(state: State) -> Plan:
    """The best choice with the same part of its experts in every cache.

    Raises:
        BudgetError: there is no plan.
    """
    check_feasible(state)
    costs = Costs(state)
    rows = np.flatnonzero(Filling(state, costs).affordable()).tolist()
    shares = {float(costs.flight_bytes[i]): _equal_shares(state, float(costs.flight_bytes[i])) for i in rows}
    plans = [costs.plan(state, i, *shares[float(costs.flight_bytes[i])], "uniform") for i in rows]
    return min(plans, key=lambda plan: plan.seconds_per_token)


def separate(state: State) -> Plan:
    """The best choice for equal parts, and only then slots where they save most.

    Raises:
        BudgetError: there is no plan.
    """
    choice, costs = uniform(state).choice, Costs(state)
    filling = Filling(state, costs)
    i = next(i for i in range(len(costs)) if costs.choice(i) == choice)
    return costs.plan(state, i, *filling.fill_up(i, filling.floors, filling.fast_floors), "separate")


def _equal_shares(state: State, flight_bytes: float) -> tuple[Ints, Ints]:
    most = np.array([cache.n_experts for cache in state.caches], np.int64)
    sizes = np.array([cache.bundle_bytes for cache in state.caches], np.int64)

    def share(least: Ints, budget_bytes: float) -> Ints:
        low, high = 0.0, 1.0
        if (most * sizes).sum() <= budget_bytes:
            return most
        for _ in range(24):
            middle = (low + high) / 2
            fits = (np.maximum(least, (middle * most).astype(np.int64)) * sizes).sum() <= budget_bytes
            low, high = (middle, high) if fits else (low, middle)
        return np.maximum(least, (low * most).astype(np.int64))

    fast = np.array(floor_fast_slots(state), np.int64)
    if state.fast is not None:
        fast = share(fast, state.fast.budget_bytes)
    floors = np.maximum(fast, np.array([cache.floor for cache in state.caches], np.int64))
    return share(floors, state.budget_bytes - flight_bytes + float((fast * sizes).sum())), fast
