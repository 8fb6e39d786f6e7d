"""Latency as MLPerf Inference reports it for the single-stream scenario: one query at a time, percentiles over what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PERCENTILES: Final = (50, 90, 99)


@dataclass(frozen=True)
class Percentiles:
    """Seconds. With few values the high ones are all the largest: look at `count`."""

    count: int
    p50: float
    p90: float
    p99: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many per cent lie.

    As LoadGen does it: of n sorted values the one at index floor(n × percent / 100), without interpolation (loadgen/results.cc,
    PerformanceSummary::ProcessLatencies).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(len(ordered) * percent / 100))]


def summarise(values: Sequence[float]) -> Percentiles | None:
    """Percentiles of these, or None if there are none."""
    return Percentiles(len(values), *(percentile(values, p) for p in PERCENTILES)) if values else None
