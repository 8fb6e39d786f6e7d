"""How many routed experts miss, by the share of experts that memory holds, for a model of which nothing is known but its header.

Measured on recorded routing (docs/plan.md): misses depend on how a model routes far more than on its numbers of experts, so models
of other families get the middle of those measured, with an interval that spans all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np


@dataclass(frozen=True)
class Reference:
    """Misses for each routed expert of a measured model.

    Attributes:
        name: of the model.
        architecture, n_experts, n_used: what a model of the same kind has in common with it.
        shares: of experts in memory beyond what one token uses: 0 holds one token's, 1 holds all.
        low, median, high: of single requests from an empty cache: 5 %, 50 % and 95 % of them are below.
    """

    name: str
    architecture: str
    n_experts: int
    n_used: int
    shares: tuple[float, ...]
    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]


_SHARES: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REFERENCES: Final = (
    # docs/benchmarks/plan/misses.md
    Reference(
        "spac demo", "qwen3moe", 32, 4, _SHARES,
        low=(0.608, 0.562, 0.493, 0.429, 0.387, 0.296, 0.223, 0.165, 0.110, 0.071, 0.034, 0.014),
        median=(0.653, 0.612, 0.546, 0.490, 0.439, 0.346, 0.272, 0.207, 0.150, 0.098, 0.057, 0.030),
        high=(0.696, 0.656, 0.590, 0.532, 0.482, 0.392, 0.307, 0.237, 0.174, 0.124, 0.076, 0.054),
    ),
    Reference(
        "gpt-oss-20b", "gpt-oss", 32, 4, _SHARES,
        low=(0.399, 0.340, 0.272, 0.216, 0.171, 0.097, 0.053, 0.028, 0.012, 0.005, 0.004, 0.004),
        median=(0.496, 0.432, 0.358, 0.287, 0.233, 0.146, 0.087, 0.049, 0.023, 0.011, 0.008, 0.008),
        high=(0.560, 0.507, 0.427, 0.357, 0.298, 0.198, 0.124, 0.078, 0.042, 0.021, 0.013, 0.013),
    ),
    # docs/benchmarks/lookahead-misses.md, "pager's own", at 12, 25, 50 and 75 % of experts: one figure for 8,000 tokens; low and
    # high by the spread of gpt-oss-20b's requests around its median
    Reference(
        "DeepSeek-V2-Lite", "deepseek2", 64, 6, (0.029, 0.172, 0.448, 0.724),
        low=(0.535, 0.377, 0.155, 0.042), median=(0.677, 0.502, 0.262, 0.092), high=(0.772, 0.632, 0.393, 0.166),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Misses:
    """Probability that a routed expert is not in memory: expected, and the interval of nine requests in ten."""

    low: float
    median: float
    high: float


def reference_of(architecture: str, n_experts: int, n_used: int) -> Reference | None:
    """A measured model of the same family and shape, if there is one."""
    kind = (architecture, n_experts, n_used)
    return next((r for r in REFERENCES if (r.architecture, r.n_experts, r.n_used) == kind), None)


def misses(share: float, architecture: str, n_experts: int, n_used: int) -> Misses:
    """Misses of an answer's first hundred tokens or so.

    Args:
        share: of all experts in memory, 0.0 to 1.0.
        n_experts: in a layer.
        n_used: by a token.
    """
    used = n_used / n_experts
    if used >= 1:  # every token uses all: what is not there is missed
        return Misses(*[min(1.0, max(1 - share, 1e-3))] * 3)
    beyond = (share - used) / (1 - used)
    own = reference_of(architecture, n_experts, n_used)
    chosen = (own,) if own is not None else REFERENCES

    def at(values: str) -> list[float]:
        return [_interpolate(beyond, used, reference.shares, getattr(reference, values)) for reference in chosen]

    median = float(np.exp(np.mean(np.log(at("median")))))
    return Misses(min(at("low")), median, max(at("high")))


def _interpolate(beyond: float, used: float, shares: tuple[float, ...], values: tuple[float, ...]) -> float:
    """Between the measured shares by the logarithm of misses; without memory everything misses, and almost nothing where all fits."""
    xs = (-used / (1 - used), *shares, 1.0)
    return float(np.exp(np.interp(beyond, xs, np.log((1.0, *values, min(values[-1], 0.01))))))
