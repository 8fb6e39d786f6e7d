"""The integer program, in PuLP: slots of each cache and one choice of the other settings, together.

A cache's curve is convex and its cost is minimized, so its slots are a sum of segments that need no binaries. One binary for
each choice; a choice's share of the misses is a variable of its own (the disaggregated form, whose relaxation is tight:
Balas, Disjunctive programming, 1979), so the product of a choice and the misses is linear. Choices that a bound rules out
(`heuristics.search`) stay out, and curves are exact near the slots found there, coarser elsewhere.

PuLP is imported when the first program is built: it takes longer to import than all of spac's own modules.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from spac.balancer.cost import MIB, Costs, whole_bundles
from spac.balancer.curves import MissCurve
from spac.balancer.heuristics import Filling, search
from spac.balancer.state import Plan, State
from spac.errors import SpacError

N_SEGMENTS: Final = 8  # of a cache's curve, where there are many caches
MANY_CACHES: Final = 8
GAP: Final = 1e-4  # relative; below it the solver stops
LEAST_PART: Final = 1e-6  # of a mixture of choices
MS: Final = 1e3  # the program counts in milliseconds and MiB, which keeps its numbers near one


class SolverError(SpacError):
    """The solver is missing, failed, or ran out of time."""


@dataclass(frozen=True)
class Solved:
    """A plan, and what finding it took.

    Attributes:
        n_choices: how many choices were left to the program.
        search_s: of ruling choices out. build_s: of Python building the program. solve_s: of the solver, PuLP's handing over included.
    """

    plan: Plan
    n_choices: int
    search_s: float
    build_s: float
    solve_s: float


def solve(
    state: State,
    *,
    integral: bool = True,
    relaxed: bool = False,
    solver: str = "auto",
    deadline_s: float | None = None,
    gap: float = GAP,
    n_segments: int | None = None,
) -> Solved:
    """The plan of least cost.

    Args:
        integral: slots are integers in the program. Otherwise they are rounded down and what is left is given out one by one.
        relaxed: the choice may be a mixture too; the best of its parts is taken (LP relaxation and rounding).
        solver: "highs" in process, "cbc" that PuLP carries, or "auto": the first that is there.
        deadline_s: for the solver.
        gap: relative; a plan that is so near the bound is good enough.
        n_segments: of a curve; None: as many as suit the number of caches.

    Raises:
        BudgetError: there is no plan.
        SolverError: the solver is missing, failed, or found no proven plan in time.
    """
    begin = time.monotonic()
    costs = Costs(state)
    filling = Filling(state, costs)
    found = search(state, costs, filling, gap)
    searched = time.monotonic()
    if not found.open_choices and not relaxed:
        return Solved(found.plan, 0, searched - begin, 0.0, 0.0)
    rows = found.open_choices
    if relaxed:  # an ablation: nothing is ruled out but what is not affordable
        rows = tuple(np.flatnonzero(filling.affordable()).tolist())
    program = Program(state, costs, filling, rows, found.plan, integral=integral, relaxed=relaxed, n_segments=n_segments)
    built = time.monotonic()
    program.run(solver, deadline_s, gap)
    plan = program.plan("rounded" if relaxed else "program")
    if not relaxed and found.plan.seconds_per_token <= plan.seconds_per_token:
        plan = found.plan
    return Solved(plan, len(rows), searched - begin, built - searched, time.monotonic() - built)


class Program:
    """One program for one state. `run` it, then ask for the `plan`.

    Args:
        rows: of `costs`, the choices it decides between.
        near: a good plan; curves are exact near its slots.
    """

    def __init__(
        self, state: State, costs: Costs, filling: Filling, rows: tuple[int, ...], near: Plan,
        *, integral: bool, relaxed: bool, n_segments: int | None = None,
    ) -> None:  # fmt: skip
        try:
            import pulp
        except ImportError as e:
            raise SolverError(f"pulp: {e}") from None
        self._pulp, self._state, self._costs, self._filling, self._rows = pulp, state, costs, filling, rows
        if n_segments is None:
            n_segments = N_SEGMENTS if len(state.caches) > MANY_CACHES else 4 * N_SEGMENTS
        self._curves = [
            _from_floor(cache.curve, cache.floor, n_segments, slots) for cache, slots in zip(state.caches, near.slots, strict=True)
        ]
        self._fast_curves = [_from_floor(cache.curve, 0, n_segments, n) for cache, n in zip(state.caches, near.fast_slots, strict=True)]
        # slots of one size fill a room of whole bundles: the best of them are whole by themselves
        needed = state.fast is not None or len({cache.bundle_bytes for cache in state.caches}) > 1
        self._category = "Integer" if integral and not relaxed and needed else "Continuous"
        self._lp = pulp.LpProblem("balancer", pulp.LpMinimize)
        self._taken = [self._lp.add_variable(f"z{i}", 0, 1, "Continuous" if relaxed else "Integer") for i in range(len(rows))]
        self._slots = self._segments("x", self._curves)
        self._fast: list[list[tuple[Any, float]]] = [[] for _ in state.caches]
        self._build()

    def _floor_bytes(self) -> int:
        return sum(cache.floor * cache.bundle_bytes for cache in self._state.caches)

    def _fast_bytes(self) -> float:
        return float(whole_bundles(self._state, self._state.fast.budget_bytes)) if self._state.fast else 0.0

    def _segments(self, name: str, curves: Sequence[MissCurve]) -> list[list[tuple[Any, float]]]:
        """Of each cache: variables for the slots in each segment, with the misses that each of these saves."""
        found = []
        for i, curve in enumerate(curves):
            widths, falls = np.diff(curve.slots).tolist(), (-np.diff(curve.misses)).tolist()
            found.append([
                (self._lp.add_variable(f"{name}{i}_{j}", 0, width, self._category), fall / width)
                for j, (width, fall) in enumerate(zip(widths, falls, strict=True))
            ])  # fmt: skip
        return found

    def _build(self) -> None:
        state, costs, lp = self._state, self._costs, self._lp
        sum_of = self._pulp.LpAffineExpression
        times = [lp.add_variable(f"t{i}", 0) for i in range(len(self._rows))]
        lp += sum_of([(time_ms, 1.0) for time_ms in times])
        lp += sum_of([(z, 1.0) for z in self._taken]) == 1
        if state.fast is not None:
            self._add_fast_tier()
        ram = [(x, cache.bundle_bytes / MIB) for cache, parts in zip(state.caches, self._slots, strict=True) for x, _ in parts]
        ram += [(y, -cache.bundle_bytes / MIB) for cache, parts in zip(state.caches, self._fast, strict=True) for y, _ in parts]
        room = whole_bundles(state, state.budget_bytes - costs.flight_bytes[list(self._rows)])
        ram += [(z, -float(n) / MIB) for z, n in zip(self._taken, room, strict=True)]
        lp += sum_of(ram) <= -self._floor_bytes() / MIB

        of_model = self._shares("m", False, self._slots, self._curves, 1 / MIB)
        of_draft = self._shares("d", True, self._slots, self._curves, 1 / MIB)
        of_fast = self._shares("f", False, self._fast, self._fast_curves, None) if state.fast else []
        uses = sum(float(curve.misses[0]) for cache, curve in zip(state.caches, self._fast_curves, strict=True) if not cache.of_draft)
        for i, row in enumerate(self._rows):
            read = [(of_model[i], float(costs.model_read_s[row]) * MIB * MS)]
            read += [(of_draft[i], float(costs.draft_read_s[row]) * MIB * MS)] if of_draft else []
            waits, reads, fast_s = (float(x[row]) for x in (costs.waits, costs.reads, costs.fast_s))
            waiting = [(m, waits * s) for m, s in read] + [(times[i], -1.0)]
            waiting.append((self._taken[i], (float(costs.compute_s[row]) - (fast_s * uses if of_fast else 0.0)) * MS))
            waiting += [(of_fast[i], fast_s * MS)] if of_fast else []
            lp += sum_of(waiting) <= 0
            if reads > waits:
                lp += sum_of([(m, reads * s) for m, s in read] + [(times[i], -1.0)]) <= 0

    def _add_fast_tier(self) -> None:
        """Fast slots of the answering model's caches: within their budget, and of the slots that there are."""
        pulp, state = self._pulp, self._state
        self._fast = self._segments("y", self._fast_curves)
        for i, cache in enumerate(state.caches):
            if cache.of_draft:  # only floors that RAM has no room for
                self._fast[i] = [(y, 0.0) for y, _ in self._fast[i]]
            within = [(y, 1.0) for y, _ in self._fast[i]] + [(x, -1.0) for x, _ in self._slots[i]]
            self._lp += pulp.LpAffineExpression(within) <= cache.floor
        used = [(y, cache.bundle_bytes / MIB) for cache, parts in zip(state.caches, self._fast, strict=True) for y, _ in parts]
        self._lp += pulp.LpAffineExpression(used) <= self._fast_bytes() / MIB

    def _shares(
        self, name: str, of_draft: bool, segments: list[list[tuple[Any, float]]], curves: Sequence[MissCurve], per_byte: float | None
    ) -> list[Any]:
        """Variables: the taken choice's misses a token, 0 for the others. `per_byte`: times bundles' bytes; None: counted."""
        chosen = [i for i, cache in enumerate(self._state.caches) if cache.of_draft == of_draft]
        if not chosen:
            return []
        weights = {i: self._state.caches[i].bundle_bytes * per_byte if per_byte else 1.0 for i in chosen}
        most = sum(float(curves[i].misses[0]) * weights[i] for i in chosen)
        least = sum(float(curves[i].misses[-1]) * weights[i] for i in chosen)
        shares = [self._lp.add_variable(f"{name}{i}", 0) for i in range(len(self._rows))]
        saved = [(x, gain * weights[i]) for i in chosen for x, gain in segments[i] if gain > 0]
        self._lp += self._pulp.LpAffineExpression([(m, 1.0) for m in shares] + saved) == most
        for share, z in zip(shares, self._taken, strict=True):
            self._lp += self._pulp.LpAffineExpression([(share, 1.0), (z, -most)]) <= 0
            self._lp += self._pulp.LpAffineExpression([(share, 1.0), (z, -least)]) >= 0
        return shares

    def run(self, solver: str, deadline_s: float | None, gap: float) -> None:
        """Raises SolverError."""
        pulp = self._pulp
        if solver == "auto":
            solver = "highs" if importlib.util.find_spec("highspy") else "cbc"
        name = "HiGHS" if solver == "highs" else "PULP_CBC_CMD"
        try:
            with tempfile.TemporaryDirectory(prefix="spac-") as folder:  # PuLP leaves CBC's files behind when it fails
                chosen = pulp.getSolver(name, msg=False, threads=1, timeLimit=deadline_s, gapRel=gap)
                chosen.tmpDir = folder
                self._lp.solve(chosen)
        except Exception as e:  # a solver may raise anything
            raise SolverError(f"{solver}: {e or type(e).__name__}") from None
        if self._lp.sol_status != pulp.LpSolutionOptimal:
            raise SolverError(f"{solver}: {pulp.LpSolution[self._lp.sol_status].lower()}")

    def plan(self, method: str) -> Plan:
        """Of the solution, with the whole curves' cost and nothing left over that a slot fits in; of a mixture its best part."""
        taken = [row for row, z in zip(self._rows, self._taken, strict=True) if (z.value() or 0.0) > LEAST_PART]
        return min((self._plan(row, method) for row in taken), key=lambda plan: plan.seconds_per_token)

    def _plan(self, row: int, method: str) -> Plan:
        slots = self._filling.floors + self._rounded(self._slots)
        fast = np.minimum(self._rounded(self._fast), slots)
        ram, _ = self._costs.used_bytes(self._state, row, slots.tolist(), fast.tolist())
        if ram > self._state.budget_bytes + 1e-3:  # a mixture of choices, or of slots, had less to carry
            slots, fast = self._filling.floors, self._filling.fast_floors
        return self._costs.plan(self._state, row, *self._filling.fill_up(row, slots, fast), method)

    def _rounded(self, segments: list[list[tuple[Any, float]]]) -> Any:
        return np.array([int(sum(x.value() or 0.0 for x, _ in parts) + 1e-6) for parts in segments], np.int64)


def _from_floor(curve: MissCurve, floor: int, n_segments: int, near: int) -> MissCurve:
    """The part of a curve from the floor on, of fewer segments: exact about some slots."""
    corners = np.concatenate([[floor], curve.slots[curve.slots > floor]])
    if len(corners) > n_segments + 1:
        at = int(np.searchsorted(corners, near))
        first = min(max(1, at - n_segments // 2), len(corners) - n_segments)
        corners = np.concatenate([corners[:1], corners[first : first + n_segments - 1], corners[-1:]])
    return MissCurve(corners, np.asarray(curve.at(corners), np.float64))
