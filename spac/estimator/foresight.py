"""From probabilities of use by coming tokens to what the pager takes (spac_model_foresee), and how far drafted tokens can be trusted.

The pager evicts what is used again last. So of a use by a coming token counts the probability that it is the *first* one, less the
farther off it is; what is beyond the known tokens is left to the pager's own value, which past uses give it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Found on the first half of the demo model's requests (scripts/estimator_study.py); the optimum is flat.
STEP_DISCOUNT = np.float32(0.7)  # of a known use a token later, as Policy::step_discount
TAIL = np.float32(2.0)  # of the pager's own value, after the known tokens

_BINS = 10


def foresight(now: Floats, coming: Floats) -> Floats:
    """What the pager is told.

    Args:
        now: [layers, experts], probability that the tokens decoded next use an expert.
        coming: [tokens, layers, experts], the same of each token known after them; the chance that it comes at all included.

    Returns:
        float32 [3, layers, experts]: now, later, rest.
    """
    out = np.zeros((3, *now.shape), np.float32)
    np.clip(now, 0, 1, out=out[0])
    unused, discount = np.ones_like(out[0]), np.float32(1)
    for p in coming:
        out[1] += discount * unused * p
        unused *= 1 - p
        discount *= STEP_DISCOUNT
    np.clip(unused, 0, 1, out=unused)
    out[2] = TAIL * discount * unused
    return out


class DraftTrust:
    """How often a draft's candidates come true, by position, rank and the draft's own probability; learned online."""

    def __init__(self, n_positions: int, n_ranks: int) -> None:
        self._right = np.full((n_positions, n_ranks, _BINS), 0.3)
        self._seen = np.ones((n_positions, n_ranks, _BINS))

    def chances(self, probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
        """Chance of each candidate [positions, ranks], given that the likeliest ones before it came; at most 1 by position."""
        at = self._bins(probabilities)
        chances = self._right[at] / self._seen[at]
        chances /= np.maximum(1, chances.sum(1, keepdims=True))
        return np.asarray(chances)

    def learn(self, tokens: NDArray[np.integer], probabilities: NDArray[np.floating], came: Sequence[int]) -> None:
        """`tokens`, `probabilities` [positions, ranks]: what was proposed; `came`: tokens that then came, as far as they are known."""
        bins = self._bins(probabilities)[2]
        ranks = np.arange(tokens.shape[1])
        for position, token in enumerate(came[: len(tokens)]):
            right = tokens[position] == token
            self._right[position, ranks, bins[position]] += right
            self._seen[position, ranks, bins[position]] += 1
            if not right[0]:
                return  # what follows it was proposed after another token

    def _bins(self, probabilities: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        grid = np.indices(probabilities.shape)
        return grid[0], grid[1], np.clip(np.asarray(probabilities) * _BINS, 0, _BINS - 1).astype(np.int64)
