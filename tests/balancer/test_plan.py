"""Programs and heuristics against all plans that there are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from spac.balancer.cost import Costs, floor_bytes
from spac.balancer.curves import MissCurve
from spac.balancer.heuristics import Filling, greedy, search, separate, uniform
from spac.balancer.program import solve
from spac.balancer.state import Cache, Choice, FastTier, Lookahead, Plan, State
from spac.errors import BudgetError, OptionError
from spac.trace.timing import Reads

KIB = 1024
SLOW_THEN_FASTER = Reads({(KIB, 1): 1e6, (KIB, 4): 2e6, (KIB, 16): 2.2e6})


def make_state(seed: int, sizes: tuple[int, ...] = (3 * KIB,) * 3, *, draft: bool = False, fast: bool = False) -> State:
    """Caches of five experts; every time and chance is random."""
    random = np.random.default_rng(seed)
    caches = [
        Cache(f"layer {i}", size, MissCurve.through(np.sort(random.random(6))[::-1] * 2), floor=int(random.integers(0, 2)))
        for i, size in enumerate(sizes)
    ]
    if draft:
        caches[-1] = replace(caches[-1], of_draft=True)
    room = sum(cache.floor * cache.bundle_bytes for cache in caches) + int(random.integers(1, 5 * len(sizes)) * 3 * KIB) + max(sizes)
    return State(
        caches=tuple(caches),
        budget_bytes=room,
        reads=SLOW_THEN_FASTER,
        decode_s=tuple(np.cumsum(random.random(3) * 0.01).tolist()),
        growth=(1.0, 1.8, 2.5),
        accepted=tuple((random.random() * np.array([1.0, 0.7])).tolist()),
        draft_s=random.random() * 0.003,
        draft_start_s=random.random() * 0.003,
        sensed=(0.0, 0.1, 0.15),
        lookahead=(Lookahead(0, 1), Lookahead(float(random.random()), float(random.uniform(0.2, 1)))),
        in_flight=(1, 4, 16),
        fast=FastTier(int(random.integers(1, 6) * 3 * KIB), 0.001 * random.random()) if fast else None,
    )


def least_seconds(state: State) -> float:
    """Of all plans within the budgets."""
    costs, caches = Costs(state), state.caches
    fast_room = state.fast.budget_bytes if state.fast else 0
    best = np.inf
    for slots in itertools.product(*(range(c.floor, c.n_experts + 1) for c in caches)):
        for fast in itertools.product(*(range(n + 1 if state.fast else 1) for n in slots)):
            ram, fast_used = costs.used_bytes(state, 0, slots, fast)
            fits = ram - costs.flight_bytes[0] + costs.flight_bytes <= state.budget_bytes
            if fast_used > fast_room or not fits.any():
                continue
            missed = [c.bundle_bytes * float(c.curve.at(n)) for c, n in zip(caches, slots, strict=True)]
            of_model = sum(m for c, m in zip(caches, missed, strict=True) if not c.of_draft)
            uses = sum(float(c.curve.misses[0] - c.curve.at(n)) for c, n in zip(caches, fast, strict=True) if not c.of_draft)
            seconds = costs.seconds(costs.model_read_s * of_model + costs.draft_read_s * (sum(missed) - of_model), uses)
            best = min(best, float(seconds[fits].min()))
    return best


def row_of(costs: Costs, choice: Choice) -> int:
    return next(i for i in range(len(costs)) if costs.choice(i) == choice)


def check(state: State, plan: Plan) -> None:
    """A plan keeps within every limit and costs what it says."""
    costs = Costs(state)
    row = row_of(costs, plan.choice)
    ram, fast = costs.used_bytes(state, row, plan.slots, plan.fast_slots)
    assert ram <= state.budget_bytes + 1e-6 and fast <= (state.fast.budget_bytes if state.fast else 0)
    for cache, n, f in zip(state.caches, plan.slots, plan.fast_slots, strict=True):
        assert max(cache.floor, f) <= n <= cache.n_experts
    assert costs.plan(state, row, plan.slots, plan.fast_slots, plan.method) == plan


KINDS = {
    "equal bundles": {},
    "two sizes": {"sizes": (3 * KIB, 5 * KIB, 5 * KIB)},
    "unequal bundles": {"sizes": (3 * KIB, 6 * KIB, 15 * KIB)},
    "draft with experts": {"draft": True},
    "fast tier": {"sizes": (3 * KIB, 6 * KIB), "fast": True},
    "fast tier, draft with experts": {"sizes": (3 * KIB, 3 * KIB), "draft": True, "fast": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_no_plan_is_better_than_the_programs(kind: str, seed: int) -> None:
    state = make_state(seed, **KINDS[kind])
    best = least_seconds(state)
    solved = solve(state, gap=0)
    check(state, solved.plan)
    assert solved.plan.seconds_per_token == pytest.approx(best, rel=1e-6)
    costs = Costs(state)
    found = search(state, costs, Filling(state, costs))
    assert found.bound_s <= best * (1 + 1e-9) and found.plan == greedy(state)
    for other in (greedy(state), uniform(state), separate(state), solve(state, integral=False).plan, solve(state, relaxed=True).plan):
        check(state, other)
        assert other.seconds_per_token >= best * (1 - 1e-9)
    if kind in ("equal bundles", "two sizes"):
        assert greedy(state).seconds_per_token == pytest.approx(best)
        assert solve(state, gap=1e-9).n_choices == 0  # and proven, without a solver


def _by_hand(state: State, choice: Choice, slots: tuple[int, ...]) -> float:
    """The formulas of docs/balancer.md, without a fast tier."""
    look = state.lookahead[choice.depth]
    disk = state.disk_bytes_per_s(choice.in_flight)
    rate = min(disk, state.reads.limit_bytes_per_s or disk)
    missed = 0.0
    for cache, n in zip(state.caches, slots, strict=True):
        times = choice.drafted if cache.of_draft else state.growth[choice.verified] * (1 - state.sensed[choice.drafted - choice.verified])
        missed += times * cache.bundle_bytes * float(cache.curve.at(n))
    read_s, wait_s = missed / rate, missed / disk
    compute_s = state.decode_s[choice.verified] + choice.drafted * (state.draft_s or 0) + (choice.drafted > 0) * state.draft_start_s
    cycle_s = max(compute_s + (1 - look.recall) * wait_s, (1 - look.recall + look.recall / look.precision) * read_s)
    return cycle_s / (1 + sum(state.accepted[: choice.verified]))


@pytest.mark.parametrize("limit", [None, 1.5e6, 1e3])
def test_cost_is_the_documented_one(limit: float | None) -> None:
    state = make_state(4, draft=True)
    state = replace(state, reads=replace(state.reads, limit_bytes_per_s=limit))
    costs = Costs(state)
    assert len(costs) == 3 * 3 * 2 * 3
    for i in range(len(costs)):
        plan = costs.plan(state, i, (2, 1, 3), (0, 0, 0), "")
        assert plan.seconds_per_token == pytest.approx(_by_hand(state, plan.choice, plan.slots))


def test_without_a_draft_nothing_is_drafted() -> None:
    choice = solve(replace(make_state(1), draft_s=None)).plan.choice
    assert (choice.verified, choice.drafted) == (0, 0)


def test_a_draft_that_is_always_right_is_verified_where_compute_is_the_limit_only() -> None:
    state = replace(
        make_state(1),
        draft_s=1e-5,
        decode_s=(1.0, 1.01, 1.02),
        accepted=(1.0, 1.0),
        budget_bytes=1 << 20,
        sensed=(0.0,),
        growth=(1.0, 2.0, 3.0),
    )
    assert solve(state).plan.choice.verified == 2
    disk = replace(state, decode_s=(1e-6, 1.01e-6, 1.02e-6), growth=(1.0, 2.5, 4.0), budget_bytes=floor_bytes(state))
    assert solve(disk).plan.choice.verified == 0


def test_memory_goes_from_a_draft_that_does_not_pay_to_the_model() -> None:
    state = make_state(2, draft=True)
    state = replace(state, caches=tuple(replace(c, floor=0) for c in state.caches), budget_bytes=8 * 3 * KIB)
    never = solve(replace(state, accepted=(0.0, 0.0), sensed=(0.0,)))
    assert never.plan.choice.drafted == 0 and never.plan.slots[2] == 0


def test_the_fast_tier_gets_the_most_used_experts() -> None:
    state = make_state(3, (3 * KIB, 3 * KIB), fast=True)
    flat, steep = MissCurve.through([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]), MissCurve.through([1.0, 0.2, 0.1, 0.05, 0.02, 0.0])
    state = replace(state, caches=tuple(replace(c, curve=curve, floor=0) for c, curve in zip(state.caches, (flat, steep), strict=True)))
    plan = solve(replace(state, fast=FastTier(3 * KIB, 0.001))).plan
    assert plan.fast_slots == (0, 1)


def test_what_is_too_small_is_said_with_what_would_do() -> None:
    state = make_state(5)
    need = floor_bytes(state)
    solve(replace(state, budget_bytes=need))
    for method in (solve, greedy, uniform, separate):
        with pytest.raises(
            BudgetError, match=r"^an expert budget of 0\.0 MiB is too small: .* take 0\.1 MiB; raise the memory limit by"
        ) as e:
            method(replace(state, budget_bytes=need - 1))  # type: ignore[operator]
        advice = float(str(e.value).split()[-2])
        method(replace(state, budget_bytes=need - 1 + int(advice * (1 << 20))))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"decode_s": (float("nan"), 0.1, 0.1)}, "no number"),
        ({"accepted": (0.5,)}, "3 decode times, 3 growths, acceptance up to 1"),
        ({"accepted": (0.5, 1.5)}, "above 1"),
        ({"caches": ()}, "no cache of the model"),
        ({"in_flight": (0,)}, "at least one"),
        ({"in_flight": ()}, "nothing to choose from"),
        ({"lookahead": (Lookahead(0.5, 0),)}, "lookahead outside"),
        ({"caches": (Cache("layer 3", 3, MissCurve.through([1.0, 0.0]), floor=2),)}, "layer 3: a floor of 2 slots for 1 experts"),
        ({"caches": (Cache("layer 3", 0, MissCurve.through([1.0, 0.0])),)}, "layer 3: bundles of 0 bytes"),
    ],
)
def test_numbers_that_make_no_sense_are_named(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        replace(make_state(1), **wrong)  # type: ignore[arg-type]
