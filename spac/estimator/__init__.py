"""The Speculative Utility Estimator: which experts the coming tokens will use, learned while decoding."""

from __future__ import annotations

from spac.estimator.files import default_path, fingerprint, load, save
from spac.estimator.memory import RoutingMemory
from spac.estimator.reliability import Reliability
from spac.estimator.tokens import TokenEstimator

__all__ = ["Reliability", "RoutingMemory", "TokenEstimator", "default_path", "fingerprint", "load", "save"]
