"""What is done when the solver cannot, and what importing costs."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

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
    ("failure", "solver", "said"),
    [
        ("no PuLP", "auto", "pulp"),
        ("it crashes", "cbc", "cbc: "),
        ("late", "cbc", "cbc: no solution found"),
        ("late", "auto", "no solution found"),
    ],
)
def test_marginal_gains_take_over_and_it_is_said_once(
    failure: str, solver: str, said: str, knapsack: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import pulp

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if failure == "no PuLP":
        monkeypatch.setitem(sys.modules, "pulp", None)
    if failure == "it crashes":
        monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", shutil.which("false"))
    deadline_s = 1e-9 if failure == "late" else 10
    balancer = Balancer(solver=solver, deadline_s=deadline_s)
    with caplog.at_level(logging.WARNING):
        assert balancer.solve(knapsack) == balancer.solve(knapsack) == greedy(knapsack)
    (record,) = [record for record in caplog.records if record.name.startswith("spac")]
    assert record.getMessage().startswith("the balancer goes on without its solver, by marginal gains: ")
    with pytest.raises(SolverError, match=said):
        solve(knapsack, solver=solver, deadline_s=deadline_s)
    assert not list(tmp_path.iterdir())


def test_a_machine_without_highspy(knapsack: State) -> None:
    """In a process of its own: PuLP looks for highspy once, when it is imported."""
    code = """
import logging, pickle, sys
sys.modules["highspy"] = None
logging.basicConfig(format="%(message)s")
from spac.balancer import Balancer
state = pickle.load(sys.stdin.buffer)
with_cbc, without = Balancer(), Balancer(solver="highs")
print(with_cbc.solve(state).method, without.solve(state).method, without.solve(state).method)
"""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=pickle.dumps(knapsack), capture_output=True, check=True)
    assert found.stdout.split() == [b"program", b"greedy", b"greedy"]
    assert found.stderr.count(b"the balancer goes on without its solver, by marginal gains: highs: ") == 1, found.stderr


def test_without_highs_cbc_solves(knapsack: State, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "highspy" else find(name, *rest))
    assert solve(knapsack).plan.slots == (0, 0, 1, 1)


JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec * t) {
    static int (*real)(clockid_t, struct timespec *);
    static int n;
    if (!real) *(void **) &real = dlsym(RTLD_NEXT, "clock_gettime");
    const int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += ++n % 2 ? 3600 : -3600;
    return code;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler, and Linux' loader")
def test_a_wall_clock_that_jumps_by_hours_costs_a_plan_at_most(knapsack: State, tmp_path: Path) -> None:
    """The solver's own clock, too: every look at it is hours off. A plan comes from marginal gains then, as if it were late."""
    (tmp_path / "jump.c").write_text(JUMPING_CLOCK)
    library = tmp_path / "jump.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "jump.c", "-ldl"], check=True)
    code = """
import pickle, sys, time
first, second = time.time(), time.time()
assert abs(second - first) > 3600, "the clock does not jump"
from spac.balancer import Balancer
balancer, state = Balancer(deadline_s=10), pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps([balancer.solve(state) for _ in range(4)]))
"""
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    found = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(knapsack), env=environment, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
    plans = pickle.loads(found.stdout[found.stdout.index(b"\x80") :])  # after HiGHS' banner
    assert set(plans) <= {solve(knapsack, deadline_s=10).plan, greedy(knapsack)} and len(plans) == 4


def test_too_small_a_budget_is_no_matter_of_solvers(knapsack: State, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BudgetError):
        Balancer().solve(replace(knapsack, budget_bytes=10))
    assert not caplog.records


def test_importing_imports_no_solver() -> None:
    code = "import sys, spac, spac.balancer; sys.exit('pulp' in sys.modules or 'highspy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
