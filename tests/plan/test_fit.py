"""The memory plan, as arithmetic; and the governor that keeps to it, on made-up figures."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spac.errors import BudgetError
from spac.governor import Governor
from spac.host.memory import GIB, MIB, parse_memory
from spac.plan.fit import Sizes, fit, make_plan, paged_ubatch, reserve_bytes

SIZES = Sizes(
    dense_bytes=1100 * MIB, expert_bytes=16 * GIB, context_bytes=400 * MIB, compute_bytes=200 * MIB, staging_bytes=100 * MIB,
    vocabulary_bytes=20 * MIB, file_bytes=17 * GIB, floor_bytes=100 * MIB,
)  # fmt: skip
BASE = 80 * MIB


def test_experts_get_what_is_left() -> None:
    plan = make_plan(4 * GIB, BASE, SIZES, paging="auto", n_ctx=8192)
    assert plan.paged
    assert plan.direct_io
    assert plan.expert_budget_bytes == 4 * GIB - (1100 + 400 + 200 + 20) * MIB - BASE - reserve_bytes(4 * GIB)


def test_what_fits_is_not_paged() -> None:
    assert not make_plan(24 * GIB, BASE, SIZES, paging="auto", n_ctx=8192).paged
    assert make_plan(24 * GIB, BASE, SIZES, paging="on", n_ctx=8192).paged


def test_mapped_weights_only_where_a_second_copy_fits() -> None:
    """Repacked weights stand in memory beside the mapping that they came from."""
    assert make_plan(24 * GIB, BASE, SIZES, paging="auto", n_ctx=8192).direct_io
    assert not make_plan(64 * GIB, BASE, SIZES, paging="auto", n_ctx=8192).direct_io


def test_off_asks_for_nothing() -> None:
    plan = make_plan(1, BASE, SIZES, paging="off", n_ctx=8192)
    assert not plan.paged
    assert not plan.direct_io


def test_a_dense_model_is_never_paged() -> None:
    dense = dataclasses.replace(SIZES, expert_bytes=0, floor_bytes=0)
    assert not make_plan(4 * GIB, BASE, dense, paging="on", n_ctx=8192).paged


def test_what_cannot_be_met_says_what_would() -> None:
    with pytest.raises(BudgetError) as caught:
        make_plan(GIB, BASE, SIZES, paging="auto", n_ctx=8192)
    text = str(caught.value)
    for part in ("at least 1.88 GiB", "1 GiB given", "dense weights 1.07 GiB", "context of 8192 tokens 400 MiB", "compute 200 MiB",
                 "expert floor 100 MiB", "lower --ctx or --ubatch, or raise --memory"):  # fmt: skip
        assert part in text


def test_the_named_amount_is_enough_and_no_more() -> None:
    """Planning with just what the message asks for works, with one page less it does not."""
    low, high = GIB, 4 * GIB
    while high - low > 4096:
        middle = (low + high) // 2
        try:
            make_plan(middle, BASE, SIZES, paging="auto", n_ctx=8192)
            high = middle
        except BudgetError:
            low = middle
    assert make_plan(high, BASE, SIZES, paging="auto", n_ctx=8192).expert_budget_bytes - SIZES.floor_bytes < 8192


@given(st.integers(1, 20 << 30), st.integers(64 * MIB, GIB))
def test_what_a_refusal_asks_for_is_enough(dense_bytes: int, limit_bytes: int) -> None:
    """As it is written, rounded: with it the model loads."""
    sizes = dataclasses.replace(SIZES, dense_bytes=dense_bytes)
    with pytest.raises(BudgetError) as caught:
        make_plan(min(limit_bytes, dense_bytes), BASE, sizes, paging="on", n_ctx=8192)
    words = str(caught.value).split()
    enough = parse_memory(words[3] + words[4])
    assert enough is not None
    assert make_plan(enough, BASE, sizes, paging="on", n_ctx=8192).paged


def test_a_ubatch_gets_smaller_before_a_model_is_refused() -> None:
    """At 1.73 GiB half of what is shared is more than the buffers of 128 tokens, which leave less than the floor all the same."""
    measured = []

    def measure(n_ubatch: int) -> Sizes:
        measured.append(n_ubatch)
        return dataclasses.replace(SIZES, compute_bytes=n_ubatch * 480 << 10)

    options = {"paging": "on", "n_ctx": 8192}
    n_ubatch, plan = fit(1770 * MIB, BASE, measure, 512, automatic_ubatch=True, **options)
    assert measured == [512, 128, 64]
    assert n_ubatch == 64
    assert plan.paged
    with pytest.raises(BudgetError):
        fit(1770 * MIB, BASE, measure, 512, automatic_ubatch=False, **options)
    with pytest.raises(BudgetError, match="compute 15 MiB"):
        fit(GIB, BASE, measure, 512, automatic_ubatch=True, **options)


def test_a_paged_ubatch_leaves_memory_to_experts() -> None:
    """Halved until its buffers take half of what they and experts share at most; untouched where the model fits, and never below the least."""
    big = dataclasses.replace(SIZES, compute_bytes=4000 * MIB)
    assert paged_ubatch(512, 4 * GIB, BASE, SIZES) == 512
    assert paged_ubatch(512, 4 * GIB, BASE, big) == 128
    assert paged_ubatch(512, 64 * GIB, BASE, big) == 512
    assert paged_ubatch(512, 64 * MIB, BASE, big) == 32


class Process:
    """A made-up process: what is resident, and what experts take of it."""

    def __init__(self) -> None:
        self.rest, self.experts, self.budget = 500 * MIB, 0, 0
        self.touched, self.trims = 0, 0
        self.watched = False
        self.governor = Governor(self.set_budget, lambda: self.experts, self.set_watched, lambda: self.rest + self.experts)

    def trim(self) -> bool:
        self.rest, self.touched, self.trims = self.rest - self.touched, 0, self.trims + 1
        return True

    def set_watched(self, watched: bool) -> None:
        self.watched = watched

    def set_budget(self, n: int) -> None:
        self.budget, self.experts = n, min(self.experts, n)


def test_budget_is_the_limit_less_the_rest() -> None:
    process = Process()
    member = process.governor.admit(2 * GIB, 50 * MIB, 400 * MIB)
    process.rest += 300 * MIB
    budget = process.governor.settle(member, 50 * MIB, 100 * MIB, 512)
    assert budget == process.budget == 2 * GIB - 800 * MIB - 100 * MIB - reserve_bytes(2 * GIB)


def test_budget_shrinks_when_the_rest_grows_and_never_below_the_floor() -> None:
    process = Process()
    member = process.governor.admit(2 * GIB, 50 * MIB, 0)
    before = process.governor.settle(member, 50 * MIB, 0, 512)
    process.rest += 200 * MIB
    process.governor.after_decode(member, 1, process.trim)
    assert process.budget == before - 200 * MIB
    process.rest = 3 * GIB
    process.governor.after_decode(member, 1, process.trim)
    assert process.budget == 50 * MIB


def test_buffers_that_a_decode_does_not_touch_belong_to_experts() -> None:
    """They are kept free until it is known how many tokens come, and lent to experts but for the part of those."""
    process = Process()
    member = process.governor.admit(2 * GIB, 50 * MIB, 0)
    before = process.governor.settle(member, 50 * MIB, 512 * MIB, 512)
    process.governor.before_decode(member, 100)
    assert process.budget == before + 412 * MIB
    process.rest += 100 * MIB
    process.governor.after_decode(member, 100, process.trim)
    process.governor.before_decode(member, 50)
    assert process.budget == before + 412 * MIB
    process.governor.after_decode(member, 50, process.trim)
    process.governor.before_decode(member, 2048)
    assert process.budget == before
    process.rest += 412 * MIB
    process.governor.after_decode(member, 2048, process.trim)
    process.governor.before_decode(member, 2048)
    assert process.budget == before
    assert process.trims == 0


def test_after_a_prompt_its_buffers_belong_to_experts() -> None:
    """From the first token on that is decoded alone; a few verified together take their part; the next prompt has all it needs."""
    process = Process()
    member = process.governor.admit(2 * GIB, 50 * MIB, 0)
    before = process.governor.settle(member, 50 * MIB, 512 * MIB, 512)
    process.rest += 512 * MIB
    process.touched = 512 * MIB
    process.governor.after_decode(member, 512, process.trim)
    assert process.budget == before
    process.governor.before_decode(member, 1)
    assert process.budget == before
    process.governor.after_decode(member, 1, process.trim)
    assert process.trims == 1
    assert process.budget == before + 512 * MIB
    for n_tokens in (9, 1, 9):
        process.governor.before_decode(member, n_tokens)
        process.governor.after_decode(member, n_tokens, process.trim)
    assert process.trims == 1
    process.governor.before_decode(member, 512)
    assert process.budget <= before + 9 * MIB
    process.governor.before_decode(member, 256)
    assert process.budget == before + 9 * MIB + 256 * MIB


def test_buffers_of_a_prompt_that_failed_are_given_back_all_the_same() -> None:
    """Nobody knows how much of them is in memory; a retry finds room for all."""
    process = Process()
    member = process.governor.admit(2 * GIB, 50 * MIB, 0)
    before = process.governor.settle(member, 50 * MIB, 512 * MIB, 512)
    process.governor.before_decode(member, 20)
    process.governor.after_decode(member, 20, process.trim)
    process.governor.before_decode(member, 512)
    process.rest += 300 * MIB
    process.touched = 300 * MIB
    process.governor.before_decode(member, 512)
    assert process.budget <= before
    process.governor.before_decode(member, 1)
    trims = process.trims
    process.governor.after_decode(member, 1, process.trim)
    assert process.trims == trims + 1
    assert process.budget == before + 512 * MIB


def test_a_limit_leaves_room_for_the_next_prompt() -> None:
    """As does a model that comes: what the buffers gave back to experts is wanted again."""
    process = Process()
    member = process.governor.admit(2 * GIB, 50 * MIB, 0)
    process.governor.settle(member, 50 * MIB, 512 * MIB, 512)
    process.governor.before_decode(member, 1)
    process.governor.after_decode(member, 1, process.trim)
    assert process.governor.rest_bytes(most=True) == process.governor.rest_bytes() + 512 * MIB
    with pytest.raises(BudgetError, match="it needs"):
        process.governor.limit(GIB)
    process.governor.limit(GIB + 120 * MIB)
    assert process.budget > 500 * MIB
    process.governor.before_decode(member, 512)
    assert process.budget >= 50 * MIB
    second = process.governor.admit(GIB + 120 * MIB, 60 * MIB, 0)
    with pytest.raises(BudgetError, match="raise --memory by"):
        process.governor.settle(second, 60 * MIB, 100 * MIB, 512)


def test_buffers_that_cannot_be_given_back_are_counted() -> None:
    """A model that is not paged has none that the pager knows."""
    process = Process()
    member = process.governor.admit(2 * GIB, 50 * MIB, 0)
    before = process.governor.settle(member, 50 * MIB, 512 * MIB, 512)
    process.rest += 512 * MIB
    process.governor.after_decode(member, 512, lambda: False)
    process.governor.after_decode(member, 1, lambda: False)
    process.governor.before_decode(member, 512)
    assert process.budget == before


def test_a_limit_may_change_but_not_below_what_is_loaded() -> None:
    process = Process()
    process.governor.admit(3 * GIB, 0, 0)  # the process's limit, whatever each was loaded with
    member = process.governor.admit(2 * GIB, 50 * MIB, 0)
    before = process.governor.settle(member, 50 * MIB, 0, 512)
    process.governor.limit(GIB)
    assert process.budget == before - GIB - (reserve_bytes(GIB) - reserve_bytes(2 * GIB))
    now = process.budget
    with pytest.raises(BudgetError, match="it needs"):
        process.governor.limit(520 * MIB)
    assert process.budget == now
    process.governor.limit(2 * GIB)
    assert process.budget == before
    process.governor.limit(4 * GIB)
    assert process.budget == before + 2 * GIB - (reserve_bytes(4 * GIB) - reserve_bytes(2 * GIB))


def test_memory_is_watched_while_something_is_paged() -> None:
    process = Process()
    whole = process.governor.admit(2 * GIB, 0, 100 * MIB)
    process.governor.settle(whole, 0, 0, 512)
    assert not process.watched
    paged = process.governor.admit(2 * GIB, 50 * MIB, 0)
    process.governor.settle(paged, 50 * MIB, 0, 512)
    assert process.watched
    process.governor.release(paged)
    process.governor.release(whole)
    assert not process.watched


def test_the_tightest_limit_of_two_models_rules_and_room_comes_back() -> None:
    process = Process()
    first = process.governor.admit(4 * GIB, 50 * MIB, 0)
    alone = process.governor.settle(first, 50 * MIB, 0, 512)
    second = process.governor.admit(2 * GIB, 60 * MIB, 0)
    together = process.governor.settle(second, 60 * MIB, 0, 512)
    assert together == 2 * GIB - 500 * MIB - reserve_bytes(2 * GIB)
    process.governor.release(second)
    assert process.budget == alone


def test_too_little_left_after_the_load_says_how_much() -> None:
    process = Process()
    member = process.governor.admit(600 * MIB, 100 * MIB, 0)
    with pytest.raises(BudgetError, match="raise --memory by"):
        process.governor.settle(member, 100 * MIB, 0, 512)
