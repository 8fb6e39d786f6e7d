"""The engine: tells the pager, before tokens are decoded, which experts they and those after them will probably use, and learns
from what they then used.

The tokens decoded next are known before the model runs; a draft guesses those after them. What the estimator makes of both steers
eviction; what is nearly certain of the next tokens is read ahead while the disk is idle. It knows nothing of budgets or disks, and a
decode is as correct without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spac import control
from spac.estimator import TokenEstimator
from spac.estimator.foresight import DraftTrust, foresight

SIGNALS: Final = ("tokens", "draft")
READ_FROM: Final = 0.9  # probability from which a guess is read ahead: docs/benchmarks/lookahead.md
LEAST_CHANCE: Final = 0.02  # of a candidate, to be looked up
MAX_POSITIONS: Final = 8
MAX_BATCH: Final = 16  # of more tokens, a prompt's, nothing is learned
IDLE_TOKENS: Final = 64  # so many without a miss: there is nothing to steer


class Proposal(NamedTuple):
    """What a draft thinks comes.

    Attributes:
        tokens: integers [positions, ranks]: of each coming token the likeliest candidates, best first; a later position follows the
            best of the ones before.
        probabilities: the draft's own, the same shape.
    """

    tokens: NDArray[np.integer]
    probabilities: NDArray[np.floating]


@dataclass
class SignalStats:
    """How good the predictions for decoded tokens were, at the probability 0.5.

    Attributes:
        predicted: experts said to be used.
        right: of these, really used.
        used: experts used.
    """

    predicted: int = 0
    right: int = 0
    used: int = 0

    @property
    def precision(self) -> float:
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.right / self.used if self.used else 0.0


class _Decoded(NamedTuple):
    position: int
    tokens: list[int]
    routed: NDArray[np.int64] | None  # [tokens, layers, k]


class Foresight:
    """The signals of one context of a paged model. Not thread safe: its context calls it while it is busy."""

    def __init__(self, model_id: int, signals: Sequence[str] = SIGNALS, read_from: float = READ_FROM) -> None:
        layers = [layer.layer for layer in control.model_stats_by_layer(model_id)]
        info = control.model_info(model_id)
        self.signals, self._read_from = frozenset(signals), read_from
        self.stats = {name: SignalStats() for name in SIGNALS if name in self.signals}
        self._model_id = model_id
        self._place = {layer: i for i, layer in enumerate(layers)}
        self._n_experts = info.n_experts
        # several sets of experts in a layer: their events could not be told apart
        self.possible = len(self._place) == len(layers) and info.n_bundles == len(layers) * info.n_experts
        self.estimator: TokenEstimator | None = None  # made when the first token tells how many experts it uses
        self._trust: DraftTrust | None = None
        self._proposal: Proposal | None = None
        self._open: list[tuple[Proposal, list[int]]] = []  # proposals, and what came after each so far
        self._pending: _Decoded | None = None
        self._predicted: NDArray[np.float32] | None = None
        self._next_event = 0
        self._misses, self._calm_tokens = 0, 0

    def propose(self, proposal: Proposal) -> None:
        """What may follow the last token sampled; for the next decode only."""
        self._proposal = Proposal(proposal.tokens[:MAX_POSITIONS], proposal.probabilities[:MAX_POSITIONS])

    def before(self, position: int, tokens: list[int] | None) -> None:
        """Tokens are about to be decoded: the last one sampled, and drafted ones to verify. None: something else.

        Args:
            position: of the first one in its sequence.
        """
        self._settle(position, tokens)
        proposal, self._proposal = self._proposal, None
        self._predicted = None
        if self.estimator is None or tokens is None or self._calm_tokens >= IDLE_TOKENS:
            return
        p = 1 - np.prod(1 - self.estimator.probabilities(tokens), axis=0) if "tokens" in self.signals else None
        coming = self._coming(tokens, proposal) if proposal is not None and "draft" in self.signals else np.zeros((0, 1, 1), np.float32)
        if p is None:
            p = np.zeros((self.estimator.n_layers, self.estimator.n_experts), np.float32)
        else:
            self._predicted = p
        control.foresee(self._model_id, foresight(p, coming), self._read_from)

    def after(self, position: int, tokens: list[int] | None) -> None:
        """They were decoded."""
        stats = control.model_stats(self._model_id)
        first, self._next_event = self._next_event, stats.events
        self._calm_tokens = 0 if stats.misses > self._misses else self._calm_tokens + 1
        self._misses = stats.misses
        if tokens is not None and self._calm_tokens < IDLE_TOKENS and stats.events - first == len(tokens) * len(self._place):
            self._pending = _Decoded(position, tokens, self._routed(first, len(tokens)))

    def _coming(self, tokens: list[int], proposal: Proposal) -> NDArray[np.float32]:
        """Probability of use by the tokens after those decoded next: [tokens, layers, experts]."""
        assert self.estimator is not None
        if self._trust is None:
            self._trust = DraftTrust(MAX_POSITIONS, proposal.tokens.shape[1])
        self._open.append((proposal, []))
        chances = self._trust.chances(proposal.probabilities)
        known: list[list[tuple[int, float]]] = [[(token, 1.0)] for token in tokens]
        masses, path = [], float(np.prod(chances[: len(tokens) - 1, 0]))
        for candidates, shares in zip(proposal.tokens[len(tokens) - 1 :].tolist(), chances[len(tokens) - 1 :].tolist(), strict=True):
            kept = [(token, share) for token, share in zip(candidates, shares, strict=True) if share * path >= LEAST_CHANCE]
            if not kept:
                break
            known.append(kept)
            masses.append(path * sum(share for _, share in kept))
            path *= shares[0]
        of_candidates = self.estimator.of_candidates(known)[len(tokens) :]
        return np.asarray(of_candidates * np.array(masses, np.float32)[:, None, None])

    def _settle(self, position: int, tokens: list[int] | None) -> None:
        """Learn from the last decode, now that it is known which of its tokens stayed."""
        pending, self._pending = self._pending, None
        follows = pending is not None and tokens is not None and 0 < position - pending.position <= len(pending.tokens)
        if pending is None or not follows:
            self._open.clear()
            stayed = len(pending.tokens) if pending is not None else 0
        else:
            assert tokens is not None
            stayed = position - pending.position
            self._judge([*pending.tokens[1:stayed], tokens[0]])
        if pending is not None and pending.routed is not None:
            routed = pending.routed[:stayed]
            if self.estimator is None:
                self.estimator = TokenEstimator(len(self._place), self._n_experts, routed.shape[2])
            self.estimator.learn(pending.tokens[:stayed], routed)
        if not follows and self.estimator is not None:
            self.estimator.start_request()

    def _judge(self, came: list[int]) -> None:
        """These tokens came after those of the last decode: how good were the proposals?"""
        still = []
        for proposal, so_far in self._open:
            so_far += came
            n = min(len(so_far), len(proposal.tokens))
            if n == len(proposal.tokens) or list(proposal.tokens[:n, 0]) != so_far[:n]:
                assert self._trust is not None
                self._trust.learn(proposal.tokens, proposal.probabilities, so_far)
            else:
                still.append((proposal, so_far))
        self._open = still

    def _routed(self, first_event: int, n_tokens: int) -> NDArray[np.int64] | None:
        """What the tokens' layers chose: int64 [tokens, layers, k]; None if that is not known."""
        layers, experts = control.routing(self._model_id, first_event, n_tokens * len(self._place))
        if len(layers) != n_tokens * len(self._place) or experts is None:
            return None
        out = np.empty((n_tokens, len(self._place), experts.shape[1]), np.int64)
        for layer, place in self._place.items():
            of_layer = experts[layers == layer]
            if len(of_layer) != n_tokens:
                return None
            out[:, place] = of_layer
        return out
