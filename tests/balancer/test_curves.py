"""Miss curves against a list that is searched, and against replays in libspac."""

from __future__ import annotations

import numpy as np
import pytest

from spac.balancer.curves import MissCurve, StackDistances, merged
from spac.trace.simulation import replay
from tests.trace.conftest import MakeTrace


def test_against_a_list_that_is_searched() -> None:
    random = np.random.default_rng(3)
    layers, experts, half_life = 3, 12, 20.0
    measured = StackDistances(layers, experts, half_life)
    stacks: list[list[int]] = [[] for _ in range(layers)]
    expected, weight = np.zeros((layers, experts + 1)), 0.0
    for _ in range(200):
        n_tokens = int(random.integers(1, 4))
        chosen = np.stack([[random.permutation(experts)[:3] for _ in range(layers)] for _ in range(n_tokens)])
        measured.observe(chosen)
        scale = 2 ** (-n_tokens / half_life)
        expected, weight = expected * scale, weight * scale + 1
        for layer, stack in enumerate(stacks):
            for e in set(chosen[:, layer].ravel().tolist()):
                room = stack.index(e) + 1 if e in stack else experts + 1
                expected[layer, :room] += 1
            for e in chosen[:, layer].ravel().tolist():
                if e in stack:
                    stack.remove(e)
                stack.insert(0, e)
    assert measured.misses() == pytest.approx(expected / weight)
    assert measured.n_visits == pytest.approx(weight)


def test_the_numbers_are_those_of_lru_replays(make_trace: MakeTrace) -> None:
    trace = make_trace(tokens=300, layers=3, experts=16, k=2)
    measured = StackDistances(3, 16, half_life_tokens=None)
    for token in trace.ids.astype(int):
        measured.observe(token[None])
    for room in (2, 3, 5, 8, 16):
        missed = replay(trace, 3 * room, "lru", "layer").missed.sum(0)
        assert measured.misses()[:, room] * trace.n_tokens == pytest.approx(missed)


def test_what_is_no_expert_is_ignored() -> None:
    measured = StackDistances(2, 4)
    measured.observe(np.array([[[0, 255], [255, 255]]]))
    assert measured.misses()[:, 0].tolist() == [1, 0]


def test_before_anything_was_seen_nothing_is_missed() -> None:
    assert [curve.misses.tolist() for curve in StackDistances(1, 4).curves()] == [[0, 0]]


def test_hull_is_below_convex_and_exact_at_its_corners() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        raw = np.sort(random.random(17))[::-1]
        curve = MissCurve.through(raw)
        every = curve.at(np.arange(17))
        assert (every <= raw + 1e-12).all() and (np.diff(curve.gains) <= 1e-12).all()
        assert curve.misses == pytest.approx(raw[curve.slots])
        short = curve.simplified(4)
        assert len(short.slots) <= 5 and (short.at(np.arange(17)) >= every - 1e-12).all()
        assert set(short.slots) <= set(curve.slots)


def test_merged_is_the_best_division_of_every_number_of_slots() -> None:
    a, b = MissCurve.through([4.0, 2.0, 1.5, 1.4]), MissCurve.through([3.0, 2.2, 1.5, 0.5])
    both = merged([a, b], n_segments=99)
    for slots in range(7):
        best = min(a.at(i) + b.at(slots - i) for i in range(4) if 0 <= slots - i <= 3)
        assert both.at(slots) == pytest.approx(best)
