"""The draft length goes where tokens are cheapest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from spac.speculative.draft_length import DraftLength, FixedLength


def simulate(length: DraftLength, chance: float, decode_s: Sequence[float], draft_s: float, n: int = 2000, seed: int = 1) -> list[int]:
    """Cycles on a machine with these times, 10 % of noise on them, and a draft that is right with this chance; `wanted` of each."""
    rng, wanted = random.Random(seed), []
    for _ in range(n):
        asked = length.wanted
        k = length.choose([chance ** (j + 1) for j in range(asked)], asked, asked * draft_s * rng.uniform(0.9, 1.1))
        length.measured(k, decode_s[k] * rng.uniform(0.9, 1.1))
        wanted.append(asked)
    return wanted


@pytest.mark.parametrize(
    ("chance", "slope", "draft_s", "least", "most"),
    [
        (0.9, 0.05, 0.02, 6, 8),  # compute is shared well: long drafts
        (0.8, 0.30, 0.05, 1, 4),
        (0.8, 1.00, 0.05, 0, 0),  # each token reads its own experts: none
        (0.9, 0.05, 3.00, 0, 0),  # a draft as slow as that
        (0.1, 0.10, 0.10, 0, 0),
    ],
)
def test_the_draft_length_is_what_pays(chance: float, slope: float, draft_s: float, least: int, most: int) -> None:
    """Nine cycles of ten in the right range, whatever the seed; and it seldom changes."""
    decode_s = [1 + slope * k for k in range(DraftLength.MOST + 1)]
    for seed in range(5):
        wanted = simulate(DraftLength(), chance, decode_s, draft_s, seed=seed)[200:]
        assert sum(least <= n <= most for n in wanted) >= 0.9 * len(wanted)
        assert sum(a != b for a, b in pairwise(wanted)) < 0.1 * len(wanted)


def test_the_draft_length_follows_a_change() -> None:
    length = DraftLength()
    assert simulate(length, 0.9, [1 + 0.05 * k for k in range(9)], 0.02)[-1] >= 6
    assert simulate(length, 0.9, [1 + 1.0 * k for k in range(9)], 0.05)[-1] == 0
    assert max(simulate(length, 0.9, [1 + 0.05 * k for k in range(9)], 0.02, n=6000)[-100:]) >= 5


def test_one_pause_of_the_machine_changes_nothing() -> None:
    """Not even in the first decode of a width."""
    length, times = DraftLength(), [1 + 0.05 * k for k in range(9)]
    length.measured(5, 1000.0)
    before = simulate(length, 0.9, times, 0.02)[-1]
    length.choose([0.9], 1, 0.02)
    length.measured(1, 1000.0)
    assert abs(simulate(length, 0.9, times, 0.02, n=200)[-1] - before) <= 1


def test_a_fixed_length() -> None:
    length = FixedLength(3)
    assert length.wanted == 3
    assert length.choose([0.9] * 5, 5, 0.1) == 3
    assert length.choose([0.9], 3, 0.1) == 1
