"""The engine: tells the pager, before a token is decoded, which experts it will probably use, and learns which it then used.

The token that was sampled last is known before the model runs. What the estimator makes of it steers eviction only: no read is
begun for a guess. It knows nothing of budgets, and a decode is as correct without it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from spac import control
from spac.estimator import TokenEstimator

SIGNALS: Final = ("tokens",)
READ_FROM: Final = float(__import__('os').environ.get('RF','0.5'))
IDLE_TOKENS: Final = 64  # so many without a miss: there is nothing to steer


class Foresight:
    """The signals of one context of a paged model. Not thread safe: its context calls it while it is busy.

    Only tokens decoded alone are predicted and learned: the layers of a prompt do not all compute the same tokens.
    """

    def __init__(self, model_id: int) -> None:
        layers = [layer.layer for layer in control.model_stats_by_layer(model_id)]
        info = control.model_info(model_id)
        self._model_id = model_id
        self._place = {layer: i for i, layer in enumerate(layers)}
        self._n_experts = info.n_experts
        # several sets of experts in a layer: their events could not be told apart
        self.possible = len(self._place) == len(layers) and info.n_bundles == len(layers) * info.n_experts
        self._estimator: TokenEstimator | None = None  # made when the first token tells how many experts it uses
        self._next_event = 0
        self._misses, self._calm_tokens = 0, 0

    def before(self, token: int | None) -> None:
        """A token is about to be decoded; None: several at once."""
        if self._estimator is not None and token is not None and self._calm_tokens < IDLE_TOKENS:
            control.expect(self._model_id, self._estimator.predict([token]), READ_FROM)

    def after(self, token: int | None) -> None:
        """It was decoded."""
        stats = control.model_stats(self._model_id)
        first, self._next_event = self._next_event, stats.events
        self._calm_tokens = 0 if stats.misses > self._misses else self._calm_tokens + 1
        self._misses = stats.misses
        if self._calm_tokens >= IDLE_TOKENS:
            return
        routed = self._routed(first) if token is not None and stats.events - first == len(self._place) else None
        if token is None or routed is None:
            if self._estimator is not None:
                self._estimator.start_request()
            return
        if self._estimator is None:
            self._estimator = TokenEstimator(len(self._place), self._n_experts, routed.shape[1])
        self._estimator.learn([token], routed[None])

    def _routed(self, first_event: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
        """What a token's layers chose: int64 [layers, k]; None if that is not known."""
        events = control.model_events(self._model_id, first_event, len(self._place))
        chosen = {self._place[event.layer]: event.experts for event in events}
        if len(chosen) != len(self._place) or len({len(experts) for experts in chosen.values()}) != 1:
            return None
        return np.array([chosen[i] for i in range(len(chosen))])
