"""The engine: tells the pager, before tokens are decoded, which experts they and those after them will probably use, and learns
from what they then used.

The tokens decoded next are known before the model runs; a draft guesses those after them. What the estimator makes of both steers
eviction; what is nearly certain of the next tokens is read ahead while the disk is idle. It knows nothing of budgets or disks, and a
decode is as correct without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spac import control
from spac.balancer.live import Decode, LiveBalancer, Model
from spac.estimator import TokenEstimator, load, save
from spac.estimator.foresight import foresight
from spac.estimator.tokens import Floats
from spac.plan.miss_curve import misses

if TYPE_CHECKING:
    from spac.gguf.check import ModelFacts
    from spac.speculative import Proposal

_log = logging.getLogger(__name__)

LEAST_MEMORY_BYTES: Final = 1 << 20  # for what the estimator remembers
LEAST_LEARNED_TOKENS: Final = 32
READ_FROM: Final = 0.9  # probability from which a guess is read ahead: docs/lookahead.md
LEAST_CHANCE: Final = 0.005  # of a drafted token, to be looked up
IDLE_TOKENS: Final = 16  # so many without a miss: there is nothing to steer
NEVER: Final = 2.0  # a probability from which nothing is read ahead


@dataclass
class SignalStats:
    """How good predictions were, counting as predicted what had a probability of at least a half.

    Attributes:
        predicted: experts said to be used.
        right: of these, really used.
        used: experts used.
    """

    predicted: int = 0
    right: int = 0
    used: int = 0

    @property
    def precision(self) -> float | None:
        """None: nothing was predicted."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """None: nothing was used."""
        return self.right / self.used if self.used else None

    def add(self, probabilities: Floats, used: NDArray[np.int64]) -> None:
        """`probabilities` [layers, experts]; `used` [layers, k], experts."""
        predicted = probabilities >= 0.5
        self.predicted += int(predicted.sum())
        self.right += int(np.take_along_axis(predicted, used, 1).sum())
        self.used += used.size


class _Decoded(NamedTuple):
    position: int
    tokens: list[int]
    routed: NDArray[np.int64] | None  # [tokens, layers, k]


class Foresight:
    """The signals of one context of a paged model. Not thread safe: its context calls it while it is busy.

    Attributes:
        stats: by signal: "tokens" about the token decoded next, "draft" about the one after it.
        estimator: what the signals learned.
        balancer: decides how many tokens are drafted and verified, and whether anything is read ahead.
    """

    @classmethod
    def of_model(cls, model_id: int, facts: ModelFacts, signals: Sequence[str], memory_bytes: int) -> Foresight | None:
        """For a paged model; None if its experts cannot be foreseen.

        Args:
            memory_bytes: about what the estimator may hold.
        """
        layers = [layer.layer for layer in control.model_stats_by_layer(model_id)]
        info, n_used = control.model_info(model_id), facts.n_experts_used
        # several sets of experts in a layer: their events could not be told apart
        if len(set(layers)) < len(layers) or info.n_bundles != len(layers) * info.n_experts or not 0 < n_used <= info.n_experts:
            return None
        least = TokenEstimator.weights_bytes(len(layers), info.n_experts) + LEAST_MEMORY_BYTES
        estimator = TokenEstimator(len(layers), info.n_experts, n_used, memory_bytes=max(memory_bytes, least))
        bundle_bytes = info.expert_page_bytes // info.n_bundles
        floor = min(info.n_bundles, -(-info.floor_bytes // bundle_bytes))

        def misses_at(share: float) -> float:
            return misses(share, facts.architecture, info.n_experts, n_used).median

        balancer = LiveBalancer(Model(n_used * len(layers), info.n_bundles, floor, bundle_bytes, misses_at))
        return cls(model_id, layers, estimator, signals, balancer)

    def __init__(
        self, model_id: int, layers: Sequence[int], estimator: TokenEstimator, signals: Sequence[str], balancer: LiveBalancer
    ) -> None:
        """`layers`: block numbers, in the order of computing."""
        self.signals = frozenset(signals)
        self.stats = {name: SignalStats() for name in signals}
        self.estimator = estimator
        self.balancer = balancer
        self._model_id = model_id
        self._place = {layer: i for i, layer in enumerate(layers)}
        self._learned_before = 0
        self._coming: list[list[tuple[int, float]]] = []  # of the proposal: which tokens may come, with the chance of each
        self._pending: _Decoded | None = None
        self._now: Floats | None = None  # predicted for the token being decoded
        self._drafted: Floats | None = None  # the same, when it was only drafted
        self._after: Floats | None = None  # for the token after it
        self._last = control.model_stats(model_id)
        self._calm_tokens = 0
        self._begun_s, self._lookup_s = 0.0, 0.0  # when the decode began; what looking up drafted tokens took

    def load(self, path: Path, model: str) -> None:
        """Take what was learned before, if the file is there and sound; `model` is the model's fingerprint."""
        load(self.estimator, path, model)
        self._learned_before = self.estimator.tokens_learned

    def save(self, path: Path, model: str) -> None:
        """Keep what was learned, if that is worth it; a file that cannot be written is named in one warning."""
        if self.estimator.tokens_learned - self._learned_before < LEAST_LEARNED_TOKENS:
            return
        try:
            save(self.estimator, path, model)
        except OSError as e:
            _log.warning("%s: what was learned of experts cannot be kept: %s", path, e.strerror or e)

    def horizon(self, verifies: bool) -> int:
        """How many drafted tokens are worth their time: 0 where decoding does not wait for reads.

        Args:
            verifies: whether they may be verified, too.
        """
        self.balancer.verifies = verifies
        if "draft" not in self.signals or self._calm_tokens >= IDLE_TOKENS:
            return 0
        return self.balancer.horizon

    def propose(self, proposal: Proposal, chances: Sequence[float], draft_s: float) -> None:
        """What may follow the last token sampled, for the next decode only.

        Args:
            chances: of each proposed token, that it and those before it come.
            draft_s: seconds that the proposal took.
        """
        self._coming = _candidates(proposal, chances, 0)
        known = [sum(chance for _, chance in candidates) for candidates in self._coming]
        self.balancer.drafted(chances, known, draft_s + self._lookup_s)

    def before(self, position: int, tokens: list[int] | None) -> None:
        """Tokens are about to be decoded: the last one sampled, and drafted ones to verify. None: something else.

        Args:
            position: of the first one in its sequence.
        """
        self._begun_s = time.perf_counter()
        self._learn(position, tokens)
        proposed, self._coming = self._coming, []
        self._now, self._drafted, self._after = None, self._after, None
        if not proposed and (tokens is None or len(tokens) > 1):  # a prompt
            self.balancer.begin()
        if tokens is None or self._calm_tokens >= IDLE_TOKENS:
            return
        # chances fall along a proposal, so what follows the verified tokens is the end of what was proposed
        drafts = proposed[len(tokens) - 1 :] if "draft" in self.signals else []
        known = [[(token, 1.0)] for token in tokens]
        choice = self.balancer.choice
        read_from = READ_FROM if choice is not None and choice.depth and "tokens" in self.signals else NEVER
        if self.estimator.tokens_learned == 0 or (not drafts and read_from >= NEVER):
            return
        begin = time.perf_counter()
        p = self.estimator.of_candidates([*known, *drafts])
        masses = np.array([sum(chance for _, chance in candidates) for candidates in drafts], np.float32)
        coming = p[len(tokens) :] * masses[:, None, None]
        self._now, self._after = p[0], coming[0] if drafts and len(tokens) == 1 else None
        now = 1 - np.prod(1 - p[: len(tokens)], axis=0) if "tokens" in self.signals else np.zeros_like(p[0])
        control.foresee(self._model_id, foresight(now, coming), read_from)
        self._lookup_s = (time.perf_counter() - begin) * len(drafts) / (len(tokens) + len(drafts))  # known tokens are looked up anyway

    def after(self, position: int, tokens: list[int] | None) -> None:
        """They were decoded."""
        stats, last = control.model_stats(self._model_id), self._last
        self._last = stats
        self._calm_tokens = 0 if stats.misses > last.misses else self._calm_tokens + 1
        if tokens is None:
            return
        self.balancer.decoded(
            Decode(
                verified=len(tokens) - 1,
                seconds=time.perf_counter() - self._begun_s,
                stall_s=stats.stall_s - last.stall_s,
                misses=stats.misses - last.misses,
                read_bytes=stats.bytes_read - last.bytes_read,
                ahead_bytes=stats.ahead_bytes - last.ahead_bytes,
                wasted_bytes=stats.wasted_bytes - last.wasted_bytes,
                budget_bytes=stats.budget_bytes,
            )
        )
        if self._calm_tokens < IDLE_TOKENS and stats.events - last.events == len(tokens) * len(self._place):
            self._pending = _Decoded(position, tokens, self._routed(last.events, len(tokens)))

    def _learn(self, position: int, tokens: list[int] | None) -> None:
        """From the last decode, now that the next one tells which of its tokens stayed."""
        pending, self._pending = self._pending, None
        follows = pending is not None and tokens is not None and 0 < position - pending.position <= len(pending.tokens)
        if pending is not None and pending.routed is not None:
            stayed = position - pending.position if follows else 1
            routed = pending.routed[:stayed]
            if self._now is not None and "tokens" in self.stats:
                self.stats["tokens"].add(self._now, routed[0])
            if self._drafted is not None and "draft" in self.stats:
                self.stats["draft"].add(self._drafted, routed[0])
            self.estimator.learn(pending.tokens[:stayed], routed)
        if not follows:
            self._after = None
            self.estimator.start_request()

    def _routed(self, first_event: int, n_tokens: int) -> NDArray[np.int64] | None:
        """What the tokens' layers chose: int64 [tokens, layers, k]; None if that is not known."""
        layers, experts = control.routing(self._model_id, first_event, n_tokens * len(self._place))
        if len(layers) != n_tokens * len(self._place) or experts is None or experts.shape[1] != self.estimator.n_used:
            return None
        out = np.empty((n_tokens, len(self._place), experts.shape[1]), np.int64)
        for layer, place in self._place.items():
            of_layer = experts[layers == layer]
            if len(of_layer) != n_tokens:
                return None
            out[:, place] = of_layer
        return out


def _candidates(proposal: Proposal, chances: Sequence[float], n_verified: int) -> list[list[tuple[int, float]]]:
    """Of each coming token that is not decoded yet: which it may be, with the chance that it comes; the drafted one first.

    The draft's other ideas share what its calibrated chance leaves, by the draft's own probabilities.
    """
    coming = []
    path = chances[n_verified - 1] if 0 < n_verified <= len(chances) else 1.0
    for i in range(n_verified, len(proposal.tokens)):
        candidates = [(proposal.tokens[i], chances[i])]
        own = proposal.chances[i]
        if proposal.others and own < 1:
            left = (path - chances[i]) / (1 - own)
            candidates += [(token, left * chance) for token, chance in proposal.others[i]]
        kept = [(token, chance) for token, chance in candidates if chance >= LEAST_CHANCE]
        if not kept or kept[0][0] != proposal.tokens[i]:
            break
        coming.append(kept)
        path = chances[i]
    return coming
