"""The balancer beside decoding: when it plans, what it makes of what is measured, and that decoding never hangs on it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spac.balancer import live
from spac.balancer.heuristics import greedy
from spac.balancer.live import LEAST_DECODES, MOST_OF_WAITING, MOST_VERIFIED, Decode, LiveBalancer, Measured, Model, ReadCost, gone_on
from spac.balancer.state import Choice, Plan, State
from spac.errors import BudgetError

MIB = 1 << 20
MODEL = Model(n_used=40, n_bundles=320, floor=8, bundle_bytes=12 * MIB, misses_at=lambda share: math.exp(-4 * share))
WAITING = Decode(0, 0.200, 0.170, 14, 170 * MIB, 0, 0, 80 * 12 * MIB)


@pytest.fixture
def balancer() -> Iterator[LiveBalancer]:
    made = LiveBalancer(MODEL)
    yield made
    made.close()


def planned(balancer: LiveBalancer, n: int) -> None:
    """Wait until there were n plans."""
    until(lambda: balancer.plans >= n)


def until(reached: Callable[[], bool]) -> None:
    """Wait for what the other thread does."""
    for _ in range(4000):
        if reached():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came")


def feed(balancer: LiveBalancer, decode: Decode, n: int, chance: float = 0.5, draft_s: float = 0.002) -> None:
    for _ in range(n):
        balancer.drafted([chance**i for i in range(1, 5)], [min(1.0, 1.5 * chance) ** i for i in range(1, 5)], 4 * draft_s)
        balancer.decoded(decode)


def test_it_plans_at_the_lowest_priority() -> None:
    seen: list[tuple[int, int]] = []

    def solve(state: State) -> Plan:
        seen.append((threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return greedy(state)

    with contextlib.closing(LiveBalancer(MODEL, solve)) as balancer:
        feed(balancer, WAITING, live.FIRST_PLAN)
        planned(balancer, 1)
    assert seen[0][0] != threading.get_native_id()
    assert seen[0][1] == 19


def test_it_plans_once_and_not_again_while_nothing_changes(balancer: LiveBalancer) -> None:
    feed(balancer, WAITING, live.FIRST_PLAN)
    planned(balancer, 1)
    feed(balancer, WAITING, live.MOST_STEPS // 2)
    feed(balancer, replace(WAITING, seconds=0.21, stall_s=0.18, misses=15), live.MOST_STEPS // 2 - 1)  # as tokens differ
    assert balancer.plans == 1
    feed(balancer, WAITING, 1)  # now and then it looks anyway
    planned(balancer, 2)
    assert balancer.choice is not None
    assert balancer.choice.drafted > 0
    assert balancer.cpu_s < 5


@pytest.mark.parametrize(
    "after",
    [
        replace(WAITING, seconds=1.7, stall_s=1.67),  # a disk that is ten times slower
        replace(WAITING, budget_bytes=53 * 12 * MIB),  # a third less memory
        replace(WAITING, misses=28, stall_s=0.34, seconds=0.37),  # another kind of text
        replace(WAITING, seconds=0.031, stall_s=0.001, misses=0),  # all is there
    ],
)
def test_a_change_is_planned_for_within_ten_steps(balancer: LiveBalancer, after: Decode) -> None:
    feed(balancer, WAITING, 40)
    planned(balancer, 1)
    feed(balancer, after, 10)
    planned(balancer, 2)


def test_a_draft_that_is_wrong_now_is_a_change(balancer: LiveBalancer) -> None:
    feed(balancer, WAITING, 40, chance=0.8)
    planned(balancer, 1)
    feed(balancer, WAITING, 10, chance=0.1)
    planned(balancer, 2)


def test_what_is_decided_hangs_on_what_is_measured(balancer: LiveBalancer) -> None:
    """Drafting pays where it costs less than the reads that it saves; verifying, where computing is what takes time."""
    feed(balancer, WAITING, live.FIRST_PLAN)
    planned(balancer, 1)
    assert balancer.choice is not None
    assert (balancer.choice.verified, balancer.choice.drafted > 0) == (0, True)
    feed(balancer, WAITING, 10, draft_s=0.050)  # a draft that is slow now
    balancer.ask()
    until(lambda: balancer.choice is not None and balancer.choice.drafted == 0)
    computing = replace(WAITING, seconds=0.100, stall_s=0.0, misses=0, budget_bytes=320 * 12 * MIB)
    feed(balancer, computing, 30, chance=0.9, draft_s=0.001)
    balancer.ask()
    until(lambda: balancer.choice is not None and balancer.choice.verified > 0)


def test_a_draft_whose_tokens_may_not_be_verified_only_senses(balancer: LiveBalancer) -> None:
    balancer.verifies = False
    feed(balancer, replace(WAITING, seconds=0.1, stall_s=0.03), live.FIRST_PLAN, chance=0.95)
    planned(balancer, 1)
    assert balancer.choice is not None
    assert balancer.choice.verified == 0


@pytest.mark.parametrize(("held_mib", "gives_back"), [(0, False), (10, False), (300, True)])
def test_a_draft_goes_where_experts_make_more_of_its_memory(balancer: LiveBalancer, held_mib: int, gives_back: bool) -> None:
    """300 MiB are 8 % of all experts, which save 27 % of the misses; the draft's tokens save about 7 %."""
    balancer.draft_bytes = held_mib * MIB
    feed(balancer, WAITING, live.FIRST_PLAN)
    planned(balancer, 1)
    assert not balancer.gives_back  # one plan may be wrong
    feed(balancer, WAITING, live.MOST_STEPS)
    planned(balancer, 2)
    assert balancer.gives_back == gives_back


def test_a_draft_that_is_gone_is_planned_for_no_more(balancer: LiveBalancer) -> None:
    balancer.draft_bytes = 300 * MIB
    feed(balancer, WAITING, live.FIRST_PLAN)
    planned(balancer, 1)
    balancer.forget_draft()
    for _ in range(live.MOST_STEPS):
        balancer.decoded(WAITING)
    planned(balancer, 2)
    assert balancer.choice is not None
    assert (balancer.choice.drafted, balancer.choice.verified, balancer.gives_back) == (0, 0, False)


def test_without_a_draft_nothing_is_drafted(balancer: LiveBalancer) -> None:
    for _ in range(live.FIRST_PLAN):
        balancer.decoded(WAITING)
    planned(balancer, 1)
    assert balancer.choice is not None
    assert balancer.choice.drafted == 0


def test_a_draft_is_first_asked_where_decoding_waits_for_longer_than_it_computes(balancer: LiveBalancer) -> None:
    assert not balancer.waits_for_reads  # nothing was decoded
    balancer.decoded(replace(WAITING, seconds=0.031, stall_s=0.014))
    assert not balancer.waits_for_reads
    for _ in range(live.FIRST_PLAN):
        balancer.decoded(WAITING)
    assert balancer.waits_for_reads
    planned(balancer, 1)
    assert balancer.choice is not None
    assert (balancer.has_drafted, balancer.choice.drafted) == (False, 0)
    feed(balancer, WAITING, 1)
    assert (balancer.has_drafted, balancer.choice) == (True, None)  # that plan knew no draft
    feed(balancer, WAITING, live.FIRST_PLAN - 1)
    until(lambda: balancer.choice is not None and balancer.choice.drafted > 0)


def test_a_draft_that_is_never_asked_goes_too(balancer: LiveBalancer) -> None:
    balancer.draft_bytes = 300 * MIB
    for n in range(live.GIVE_BACK_PLANS):
        for _ in range(live.MOST_STEPS):
            balancer.decoded(replace(WAITING, seconds=0.06, stall_s=0.029))
        planned(balancer, n + 1)
    until(lambda: balancer.gives_back)
    assert not balancer.has_drafted


def test_nothing_is_read_ahead_where_the_disk_has_no_idle_time(balancer: LiveBalancer) -> None:
    ahead = replace(WAITING, seconds=0.2, stall_s=0.19, ahead_bytes=60 * MIB, wasted_bytes=24 * MIB)
    for _ in range(live.FIRST_PLAN):
        balancer.decoded(ahead)
    planned(balancer, 1)
    assert balancer.choice is not None
    assert balancer.choice.depth == 0
    for _ in range(40):
        balancer.decoded(replace(ahead, stall_s=0.05))
    balancer.ask()
    until(lambda: balancer.choice is not None and balancer.choice.depth == 1)


def test_what_was_not_measured_is_guessed() -> None:
    measured = Measured()
    measured.add(WAITING)
    measured.drafted([0.5, 0.25], [0.7, 0.4], 0.01)
    state = MODEL.state(measured, drafts=True, verifies=True)
    assert state.decode_s == pytest.approx((0.03, 0.03 * 1.25, 0.03 * 1.5))
    assert state.growth == pytest.approx((1, 2, 3))
    measured.add(replace(WAITING, verified=1, seconds=0.3, stall_s=0.264, misses=21))
    state = MODEL.state(measured, drafts=True, verifies=True)
    assert state.decode_s == pytest.approx((0.03, 0.036, 0.03 * 1.5))
    assert state.growth == pytest.approx((1, 1.5, 3))


def test_wrong_guesses_save_less_than_right_ones_and_more_than_none() -> None:
    def sensed(known: float) -> float:
        measured = Measured()
        measured.add(WAITING)
        measured.drafted([0.5] * 4, [known] * 4, 0.002)
        return MODEL.state(measured, drafts=True, verifies=True).sensed[-1]

    assert sensed(1.0) == pytest.approx(sum(live.SAVED_BY_KNOWN))
    assert sensed(0.0) == pytest.approx(live.SAVED_BY_WRONG * sensed(1.0))
    assert sensed(0.5) == pytest.approx((sensed(0.0) + sensed(1.0)) / 2)


@pytest.mark.parametrize("budget", [0, 1, 5 * 12 * MIB, 320 * 12 * MIB, 1 << 50])
@pytest.mark.parametrize(("stall_s", "misses"), [(0.0, 0), (0.0, 40), (0.2, 0), (0.2, 40), (0.2, 200)])
def test_any_measurement_is_a_state_that_can_be_planned(budget: int, stall_s: float, misses: int) -> None:
    measured = Measured()
    measured.add(replace(WAITING, stall_s=stall_s, misses=misses, budget_bytes=budget))
    measured.drafted([1.0, 1.0], [1.0, 1.0], 0.0)
    plan = greedy(MODEL.state(measured, drafts=True, verifies=True))
    assert plan.seconds_per_token >= 0


def test_nearly_as_good_a_choice_stays() -> None:
    measured = Measured()
    measured.add(WAITING)
    for _ in range(2):  # the first one's time does not count
        measured.drafted([0.5, 0.25, 0.1, 0.05], [0.7, 0.4, 0.2, 0.1], 0.014)
    state = MODEL.state(measured, drafts=True, verifies=True)
    plan = greedy(state)
    assert plan.choice.drafted >= 3
    fewer = replace(plan.choice, drafted=plan.choice.drafted - 1)
    assert live.kept(fewer, plan, state) == fewer
    assert live.kept(replace(plan.choice, verified=2, drafted=2), plan, state) == plan.choice
    assert live.kept(replace(plan.choice, drafted=9), plan, state) == plan.choice  # no longer to be chosen


@pytest.mark.parametrize("jump", [1e6, -50.0])
def test_decoding_does_not_wait_for_a_plan_and_a_late_one_is_not_used(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """The clock jumps while it plans: forward, or back."""
    planning, go, clock = threading.Event(), threading.Event(), [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])

    def solve(state: State) -> Plan:
        planning.set()
        assert go.wait(20)
        return greedy(state)

    balancer = LiveBalancer(MODEL, solve)
    feed(balancer, WAITING, 40)  # goes on while it plans
    assert balancer.choice is None
    assert planning.wait(20)
    clock[0] += jump
    go.set()
    until(lambda: balancer.late == 1)
    balancer.close()
    assert (balancer.late, balancer.choice) == (1, None)


def test_a_planner_that_fails_is_said_once_and_the_last_plan_stays(caplog: pytest.LogCaptureFixture) -> None:
    plans = [greedy]

    def solve(state: State) -> Plan:
        if not plans:
            raise BudgetError("no plan is possible")
        return plans.pop()(state)

    balancer = LiveBalancer(MODEL, solve)
    feed(balancer, WAITING, live.FIRST_PLAN)
    planned(balancer, 1)
    choice = balancer.choice
    with caplog.at_level(logging.WARNING):
        for factor in (3, 9, 27):
            feed(balancer, replace(WAITING, seconds=0.2 * factor, stall_s=0.17 * factor), 20)
        until(lambda: bool(caplog.records))
        balancer.close()
    assert choice is not None
    assert balancer.choice == choice
    assert [record.message for record in caplog.records] == ["the balancer ends, the last plan stays: no plan is possible"]


@pytest.mark.parametrize(("of_computing", "wanted"), [(0.0, 1.0), (0.3, 1.3), (2.0, MOST_OF_WAITING)])
def test_reads_cost_what_decodes_with_more_of_them_take_longer(of_computing: float, wanted: float) -> None:
    """Not only what is waited for; but no more than half as much again."""
    cost = ReadCost()
    for n in range(LEAST_DECODES):
        stall_s = 0.004 * (10 + n % 4)
        decode = replace(WAITING, seconds=0.05 + (1 + of_computing) * stall_s, stall_s=stall_s, read_bytes=(10 + n % 4) * 12 * MIB)
        assert cost.seconds(decode) == stall_s  # too little is known
        cost.add(decode)
    assert cost.seconds(decode) == pytest.approx(wanted * decode.stall_s)
    assert cost.seconds(replace(decode, stall_s=10.0, seconds=10.1)) == 10.0
    assert cost.seconds(replace(decode, stall_s=0.0)) == 0.0


def test_what_reads_cost_is_what_was_waited_where_all_read_alike() -> None:
    measured = Measured()
    for _ in range(3 * LEAST_DECODES):
        measured.add(WAITING)
    assert measured.reading_s.get() == pytest.approx(WAITING.stall_s)
    assert measured.compute_s[0].get() == pytest.approx(WAITING.seconds - WAITING.stall_s)


def test_a_shorter_proposal_goes_on_as_it_ended() -> None:
    """What was drafted no longer would stay as it was first seen."""
    assert gone_on([0.8, 0.4], 4) == pytest.approx([0.8, 0.4, 0.2, 0.1])
    assert gone_on([0.8], 3) == pytest.approx([0.8, 0.64, 0.512])
    assert gone_on([0.5, 0.5, 0.5, 0.5], 4) == [0.5, 0.5, 0.5, 0.5]
    assert gone_on([0.0, 0.0], 3) == [0.0, 0.0, 0.0]
    measured = Measured()
    measured.drafted([0.5], [0.5], 0.01)
    assert [mean.get() for mean in measured.known] == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert [mean.value is None for mean in measured.accepted] == [False, True, True, True]


@pytest.mark.parametrize(("decode", "most"), [(WAITING, 0), (replace(WAITING, stall_s=0.0), MOST_VERIFIED)])
def test_nothing_is_verified_where_decoding_waits_for_reads_whatever_was_planned(balancer: LiveBalancer, decode: Decode, most: int) -> None:
    """Elsewhere a plan without drafting is no reason never to try again."""
    assert balancer.most_verified == 0  # nothing is known yet
    balancer.decoded(decode)
    assert balancer.most_verified == most
    for choice in (Choice(verified=2, drafted=3), Choice(verified=0, drafted=0)):
        balancer.choice = choice
        assert balancer.most_verified == most


@pytest.mark.parametrize(("stall_s", "may_verify"), [(0.060, 0), (0.040, 4)])
def test_no_plan_verifies_where_decoding_waits_for_reads(stall_s: float, may_verify: int) -> None:
    asked: list[State] = []

    def solve(state: State) -> Plan:
        asked.append(state)
        return greedy(state)

    with contextlib.closing(LiveBalancer(MODEL, solve)) as balancer:
        feed(balancer, replace(WAITING, seconds=0.100, stall_s=stall_s), live.FIRST_PLAN, chance=0.95)
        planned(balancer, 1)
    assert [len(state.accepted) for state in asked] == [may_verify]


@pytest.mark.parametrize(("stall_s", "drafted"), [(0.170, live.MOST_DRAFTED), (0.010, 0)])
def test_another_text_is_planned_for_anew(balancer: LiveBalancer, stall_s: float, drafted: int) -> None:
    """Soon, though nothing has changed; a draft that was not asked is, where reads are waited for."""
    decode = replace(WAITING, stall_s=stall_s)
    feed(balancer, decode, live.FIRST_PLAN)
    planned(balancer, 1)
    balancer.choice = Choice(depth=1)
    balancer.begin()
    assert balancer.choice == Choice(depth=1, drafted=drafted)
    feed(balancer, decode, live.FIRST_PLAN - 1)
    assert balancer.plans == 1
    feed(balancer, decode, 1)
    planned(balancer, 2)


@example([(1, 1e-6), (3, 0.00333)])
@given(st.lists(st.tuples(st.integers(1, 6), st.floats(1e-6, 10.0)), min_size=1, max_size=12))
def test_drafting_never_takes_less_than_nothing(proposals: list[tuple[int, float]]) -> None:
    """Rounding once made beginning to draft take -1e-18 s, of which no plan can be made."""
    cost = live.DraftCost()
    for n, seconds in proposals:
        cost.add(n, seconds)
        assert min(cost.parts()) >= 0


@st.composite
def decodes(draw: st.DrawFn) -> Decode:
    seconds = draw(st.floats(1e-6, 100))
    ahead_bytes = draw(st.integers(0, 1 << 40))
    return Decode(
        verified=draw(st.integers(0, MOST_VERIFIED + 1)), seconds=seconds, stall_s=draw(st.floats(0, 2 * seconds)), misses=draw(st.integers(0, 1000)),
        read_bytes=draw(st.integers(0, 1 << 40)), ahead_bytes=ahead_bytes, wasted_bytes=draw(st.integers(0, 2 * ahead_bytes)),
        budget_bytes=draw(st.integers(0, 1 << 40)),
    )  # fmt: skip


chances = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@pytest.mark.filterwarnings("error")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(decodes(), st.tuples(chances, chances, st.floats(0, 10))), min_size=1, max_size=30), st.booleans(), st.booleans())
def test_a_plan_can_be_made_of_whatever_was_measured(events: list[Any], drafts: bool, verifies: bool) -> None:
    measured = Measured()
    for event in events:
        if isinstance(event, Decode):
            measured.add(event)
        else:
            measured.drafted(*event)
        state = MODEL.state(measured, drafts, verifies)
        assert greedy(state).seconds_per_token >= 0
        assert greedy(MODEL.without_draft(state, 100 * MIB)).seconds_per_token >= 0


def test_what_no_plan_can_be_made_of_ends_no_answer(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer = LiveBalancer(MODEL)
    monkeypatch.setattr(live.DraftCost, "parts", lambda _: (-1.0, 0.0))
    balancer.has_drafted = True
    with caplog.at_level(logging.WARNING):
        for _ in range(live.FIRST_PLAN):
            balancer.decoded(Decode(0, 0.1, 0.05, 10, 1000, 0, 0, 100))
    assert balancer.choice is None
    assert [record.message for record in caplog.records] == [
        "the balancer cannot plan with this: a number is negative or no number; the last plan stays"
    ]


def test_a_proposals_first_token_takes_longer_than_the_others() -> None:
    """Else one token, once it is all that is drafted, would look as dear for ever as the first one is."""
    cost = live.DraftCost()
    assert cost.parts() == (0, 0)
    cost.add(4, 0.005)
    assert cost.parts() == pytest.approx((0.001, 0.001))  # one number alone
    cost.add(1, 0.0026)
    assert cost.parts() == pytest.approx((0.0018, 0.0008))
    cost.add(2, 0.0034)
    assert cost.parts() == pytest.approx((0.0018, 0.0008))
    for _ in range(100):
        cost.add(8, 0.080)  # the machine has changed; the times of fewer tokens are old
    assert cost.parts() == pytest.approx((0, 0.010))
    for _ in range(100):
        cost.add(1, 0.004)
    assert cost.parts() == pytest.approx((0, 0.004))
