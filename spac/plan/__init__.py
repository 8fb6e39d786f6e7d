"""The memory plan of a model (`fit.py`), the sizes that go into it, and what is foretold of its speed (`forecast.py`).

Importing this imports the arithmetic of the plan only; docs/plan.md has the rest.
"""

from spac.plan.fit import Paging, Plan, Sizes, reserve_bytes

__all__ = ["Paging", "Plan", "Sizes", "reserve_bytes"]
