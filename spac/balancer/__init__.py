"""The Heterogeneous Workload Balancer: from what was measured to slots, draft length, horizon, lookahead and reads in flight.

docs/balancer.md has the formulas and what was found. Importing this imports no solver.
"""

from spac.balancer.balancer import Balancer
from spac.balancer.curves import MissCurve, StackDistances, merged
from spac.balancer.state import Cache, Choice, FastTier, Lookahead, Plan, State

__all__ = ["Balancer", "Cache", "Choice", "FastTier", "Lookahead", "MissCurve", "Plan", "StackDistances", "State", "merged"]
