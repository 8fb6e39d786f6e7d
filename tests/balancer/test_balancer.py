"""What is done when the solver cannot, and what importing costs."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from spac.balancer import Balancer, Cache, MissCurve, State
from spac.balancer import program as program_module
from spac.balancer.heuristics import greedy
from spac.balancer.program import SolverError, solve
from spac.errors import BudgetError
from tests.balancer.test_plan import SLOW_THEN_FASTER, make_state

HIGHS = importlib.util.find_spec("highspy") is not None


@pytest.fixture
def knapsack() -> State:
    """Bundles a and b save most for their bytes; c and d use all of the room, and trading two sizes at a time does not lead there."""
    sizes, gains = (5000, 7500, 6100, 6900), (0.2, 0.199, 0.1985, 0.1985)
    caches = tuple(Cache(name, size, MissCurve.through([gain, 0]), 0) for name, size, gain in zip("abcd", sizes, gains, strict=True))
    return State(caches, 6100 + 6900 + 7500 // 3, SLOW_THEN_FASTER, (0.001,), in_flight=(1,))


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_the_program_finds_what_marginal_gains_miss(knapsack: State, solver: str) -> None:
    if solver == "highs" and not HIGHS:
        pytest.skip("highspy is not installed")
    assert greedy(knapsack).slots == (1, 1, 0, 0)
    found = solve(knapsack, solver=solver)
    assert (found.plan.slots, found.plan.method, found.n_choices) == ((0, 0, 1, 1), "program", 1)
    assert Balancer(solver=solver, deadline_s=10).solve(knapsack) == found.plan


def test_what_marginal_gains_prove_needs_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module.Program, "run", lambda *_: pytest.fail("the solver ran"))
    state = replace(make_state(1), budget_bytes=1 << 20)
    assert Balancer().solve(state).method == "greedy"


@pytest.mark.parametrize(
    ("failure", "said"), [("missing", "not available"), ("raises", "broken"), ("late", "no solution found|solution found")]
)
def test_marginal_gains_take_over_and_it_is_said_once(
    failure: str, said: str, knapsack: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import pulp

    class Solver(pulp.LpSolver):  # type: ignore[misc]
        def available(self) -> bool:
            return failure != "missing"

        def actualSolve(self, lp: Any, **_: Any) -> Any:
            if failure != "late":
                raise pulp.PulpSolverError("not available" if failure == "missing" else "broken")
            lp.assignStatus(pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible)
            return pulp.LpStatusOptimal

    monkeypatch.setattr(pulp, "getSolver", lambda *_, **__: Solver())
    balancer = Balancer()
    with caplog.at_level(logging.WARNING):
        assert balancer.solve(knapsack) == balancer.solve(knapsack) == greedy(knapsack)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("the balancer goes on without its solver, by marginal gains: ")
    with pytest.raises(SolverError, match=said):
        solve(knapsack)


def test_without_highs_cbc_solves(knapsack: State, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "highspy" else find(name, *rest))
    assert solve(knapsack).plan.slots == (0, 0, 1, 1)


def test_a_clock_that_jumps_changes_nothing(knapsack: State, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = solve(knapsack).plan
    wall = iter(range(10**9, -(10**12), -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(wall)))
    assert solve(knapsack).plan == expected


def test_too_small_a_budget_is_no_matter_of_solvers(knapsack: State, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BudgetError):
        Balancer().solve(replace(knapsack, budget_bytes=10))
    assert not caplog.records


def test_importing_imports_no_solver() -> None:
    code = "import sys, spac, spac.balancer; sys.exit('pulp' in sys.modules or 'highspy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
