"""Routing traces: which experts a model chose for each token, as files, and replays of them."""

from spac.trace.format import PHASES, Trace

__all__ = ["PHASES", "Trace"]
