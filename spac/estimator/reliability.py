"""Are the estimator's probabilities probabilities? Of the experts given one of about p, a share of p should be used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Bin:
    """Experts whose predicted probability lies in one interval.

    Attributes:
        low, high: the interval, [low, high).
        predicted: mean of the predicted probabilities.
        real: share that was used.
        count: how many predictions.
    """

    low: float
    high: float
    predicted: float
    real: float
    count: int


class Reliability:
    """Collects predictions and outcomes into bins of equal width."""

    def __init__(self, n_bins: int = 10) -> None:
        self.n_bins = n_bins
        self._count = np.zeros(n_bins, np.int64)
        self._predicted, self._real = np.zeros(n_bins), np.zeros(n_bins)

    def add(self, probabilities: ArrayLike, experts: ArrayLike) -> None:
        """`probabilities` [..., layers, experts] in 0..1, `experts` integers [..., layers, k]: those used."""
        p: NDArray[np.float64] = np.asarray(probabilities, np.float64)
        used = np.zeros(p.shape)
        np.put_along_axis(used, np.asarray(experts, np.int64), 1.0, axis=-1)
        which = np.clip((p * self.n_bins).astype(np.int64), 0, self.n_bins - 1).ravel()
        self._count += np.bincount(which, minlength=self.n_bins)
        self._predicted += np.bincount(which, p.ravel(), self.n_bins)
        self._real += np.bincount(which, used.ravel(), self.n_bins)

    def bins(self) -> list[Bin]:
        """The bins that have predictions, lowest first."""
        return [
            Bin(i / self.n_bins, (i + 1) / self.n_bins, self._predicted[i] / count, self._real[i] / count, count)
            for i, count in enumerate(self._count.tolist())
            if count
        ]

    def error(self) -> float:
        """Expected calibration error: the mean distance of a bin's predicted and real share, weighted by count; 0 without data."""
        total = self._count.sum()
        return float(np.abs(self._predicted - self._real).sum() / total) if total else 0.0
