"""Miss curves, kept online: how many misses a token a cache of any size would have, from routing alone.

The k-th most recently used expert of a layer is a hit for every LRU cache of k places or more: one histogram of such stack
distances gives the misses at all sizes (Mattson, Gecsei, Slutz, Traiger: Evaluation techniques for storage hierarchies, IBM
Systems Journal 9(2), 1970).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HALF_LIFE_TOKENS: Final = 1024.0


@dataclass(frozen=True)
class MissCurve:
    """Misses a token by slots: a decreasing convex line through `slots`, `misses`, ends included.

    Attributes:
        slots: int64 [n], rising from 0 to the number of experts.
        misses: float64 [n], misses for each decoded token, falling.
    """

    slots: NDArray[np.int64]
    misses: Floats

    @classmethod
    def through(cls, misses: Sequence[float] | Floats) -> MissCurve:
        """The lower convex hull of `misses` [experts + 1], by slots from 0 on; exact at its corners.

        What lies above the hull could be reached by dividing a cache in two (Beckmann, Sanchez: Talus, HPCA 2015).
        """
        y = np.minimum.accumulate(np.asarray(misses, np.float64))
        hull: list[int] = []
        for x in range(len(y)):
            while len(hull) > 1:
                a, b = hull[-2:]
                if (y[b] - y[a]) * (x - a) < (y[x] - y[a]) * (b - a):
                    break
                hull.pop()
            hull.append(x)
        corners = np.array(hull, np.int64)
        return cls(corners, y[corners])

    def at(self, slots: Any) -> Any:
        """Misses a token with so many slots: a number, or an array of the same shape."""
        return np.interp(slots, self.slots, self.misses)

    def simplified(self, n_segments: int) -> MissCurve:
        """Of some of the corners: starting from the ends, always the one that is farthest below the line so far."""
        if len(self.slots) <= n_segments + 1:
            return self
        chosen = [0, len(self.slots) - 1]
        while len(chosen) <= n_segments:
            line = np.interp(self.slots, self.slots[chosen], self.misses[chosen])
            chosen = sorted([*chosen, int(np.argmax(line - self.misses))])
        return MissCurve(self.slots[chosen], self.misses[chosen])

    def scaled(self, factor: float) -> MissCurve:
        """By a factor, so that it agrees with misses that were counted."""
        return MissCurve(self.slots, self.misses * factor)

    @property
    def gains(self) -> Floats:
        """float64 [experts]: misses a token that each further slot saves, falling."""
        gains: Floats = np.minimum.accumulate(-np.diff(self.at(np.arange(int(self.slots[-1]) + 1))))
        return gains


def merged(curves: Sequence[MissCurve], n_segments: int = 24) -> MissCurve:
    """The curve of one cache for all these layers, if every slot goes where it saves most."""
    gains = np.sort(np.concatenate([curve.gains for curve in curves]))[::-1]
    total = sum(float(curve.misses[0]) for curve in curves)
    return MissCurve.through(np.maximum(0.0, total - np.concatenate([[0.0], np.cumsum(gains)]))).simplified(n_segments)


class StackDistances:
    """Decayed histograms of stack distances, one for each layer. About 0.2 ms a token at 48 × 128 experts.

    Give it what is decoded, not prompts: those pass once. Not thread-safe.

    Args:
        half_life_tokens: after so many tokens a use counts half; None: all count the same.
    """

    def __init__(self, n_layers: int, n_experts: int, half_life_tokens: float | None = HALF_LIFE_TOKENS) -> None:
        self._decay = 1.0 if half_life_tokens is None else 2 ** (-1 / half_life_tokens)
        self._last = np.full((n_layers, n_experts), -1, np.int64)  # when an expert was used
        self._order = np.tile(np.arange(n_experts), (n_layers, 1))  # the latest first
        self._uses = np.zeros((n_layers, n_experts))  # by distance, 0: the latest
        self._first_uses = np.zeros(n_layers)
        self._weight = 0.0  # of the visits counted
        self._clock = 0

    @property
    def n_visits(self) -> float:
        """How many batches the curves rest on, decayed."""
        return self._weight

    def observe(self, experts: NDArray[np.integer[Any]]) -> None:
        """Tokens computed together chose these: int [tokens, layers, k]. Numbers that are no expert's are ignored.

        Each expert that is used counts once, as it is read once.
        """
        n_tokens, n_layers, k = experts.shape
        known = (experts >= 0) & (experts < self._last.shape[1])
        when = self._clock + np.arange(n_tokens)[:, None, None] * k + np.arange(k)[None, None, :]
        self._clock += n_tokens * k
        last = self._last.copy()
        layers = np.broadcast_to(np.arange(n_layers)[None, :, None], experts.shape)
        np.maximum.at(last, (layers[known], experts[known]), np.broadcast_to(when, experts.shape)[known])
        used, seen = last > self._last, self._last >= 0
        scale = self._decay**n_tokens
        self._uses *= scale
        self._first_uses *= scale
        self._weight = self._weight * scale + 1
        self._uses += np.take_along_axis(used & seen, self._order, 1)
        self._first_uses += (used & ~seen).sum(1)
        self._last = last
        self._order = np.argsort(-last, axis=1, kind="stable")

    def misses(self) -> Floats:
        """float64 [layers, experts + 1]: misses of each batch observed, by slots of an LRU cache from 0 on."""
        out = np.zeros((len(self._uses), self._uses.shape[1] + 1))
        out[:, :-1] = np.cumsum(self._uses[:, ::-1], axis=1)[:, ::-1]
        return (out + self._first_uses[:, None]) / max(self._weight, 1e-12)

    def curves(self) -> list[MissCurve]:
        """Of each layer. First uses are misses at any size."""
        return [MissCurve.through(row) for row in self.misses()]
