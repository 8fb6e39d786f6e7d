"""Which method plans: marginal gains where their bound proves them good enough, else the integer program, within a deadline."""

from __future__ import annotations

import logging
from typing import Final

from spac.balancer.heuristics import greedy
from spac.balancer.program import SolverError, solve
from spac.balancer.state import Plan, State

_log = logging.getLogger(__name__)

GAP: Final = 0.01  # a plan so near the bound is good enough
DEADLINE_S: Final = 0.05


class Balancer:
    """Plans, one at a time; not thread-safe. A state is all that a plan hangs on: nothing is remembered but what was logged.

    Args:
        gap: relative; the program is run only if marginal gains cannot be proven to be that near the best plan.
        deadline_s: for the solver, by its own clock. A late one is not waited for.
        solver: "auto", "highs" or "cbc".
    """

    def __init__(self, gap: float = GAP, deadline_s: float = DEADLINE_S, solver: str = "auto") -> None:
        self._gap, self._deadline_s, self._solver = gap, deadline_s, solver
        self._said = False

    def solve(self, state: State) -> Plan:
        """The plan for a state. Where the solver is missing, fails or is late, that of marginal gains; logged once.

        Raises:
            BudgetError: the budget is too small for any plan; with what would be feasible.
        """
        try:
            return solve(state, gap=self._gap, deadline_s=self._deadline_s, solver=self._solver).plan
        except SolverError as e:
            if not self._said:
                _log.warning("the balancer goes on without its solver, by marginal gains: %s", e)
                self._said = True
            return greedy(state)
