"""Signal "tokens": from tokens that are known or drafted to the experts that they will use, before the target has run.

Three things make the prediction for a token in a layer, each learned online and each worth its cost (docs/benchmarks/estimator.md):

- *memory*: what this token's experts were, the last times, backed off from longer to shorter contexts (`memory.py`);
- *drift*: by how much each expert was used more than predicted of late, with a short and a long half-life (the request's topic);
- *links*: a low-rank linear map from the memory of this token and of the one before, and from the drifts, of *all* layers and experts,
  to the logits of each expert: an expert in layer 3 tells of another in layer 20.

They meet in one logit, with weights for each layer and for each class of support (how often token, pair and triple were seen). All weights
are learned by stochastic gradient on the log loss, as the mixers of context-mixing compressors are (Mahoney, "Adaptive weighing of
context models for lossless data compression", 2005). So the outputs are probabilities, and `reliability.py` checks that they are.

It does not know what a miss costs, what is resident, or how far a draft can be trusted: callers weight the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spac import control
from spac.errors import OptionError
from spac.estimator.memory import NO_TOKEN, SUPPORT_CLASSES, Recall, RoutingMemory

Floats = NDArray[np.float32]

MEMORY_BYTES = 64 << 20
RANK = 16
_DRIFT_HALF_LIVES_TOKENS = (6.0, 48.0)
_DRIFT_SCALES = (6.0, 12.0)  # so that a drift is of the size of a logit
_DRIFT_KEPT = 0.3  # of a drift, when a new request begins
_INPUTS = 2 + len(_DRIFT_HALF_LIVES_TOKENS)  # of the links: this token's memory, the token before's, the drifts
_FEATURES = 4  # of a logit: 1, memory's logit, the drifts
_PRIOR_TOKENS = 4096  # the prior is a running mean over about so many
_LAYER_RATE, _CLASS_RATE, _LINK_RATE, _LINK_STEP = 2.5e-4, 2.5e-3, 5e-4, 0.06
_REFERENCE_WIDTH = 26 * 6  # experts used by a token where the rates were tuned; they are scaled to others
_P_MIN = np.float32(1e-3)


class TokenEstimator:
    """Learns online which experts a token uses, and predicts them for coming tokens. Not thread safe.

    Attributes:
        n_layers, n_experts, n_used: the model's; a layer's index counts layers with experts only.
        memory: the remembered routing, in bounded memory.
        tokens_learned: how many tokens taught it, those of a loaded file included.
    """

    def __init__(
        self, n_layers: int, n_experts: int, n_used: int, *, memory_bytes: int = MEMORY_BYTES, rank: int = RANK, seed: int = 0
    ) -> None:
        """`memory_bytes` bounds everything this object holds; `rank` is that of the links, 0 for none.

        Raises:
            OptionError: the shape is not that of a router, or `memory_bytes` does not hold the weights.
        """
        if not (n_layers > 0 and 0 < n_used <= n_experts <= 65536 and rank >= 0):
            raise OptionError(f"estimator: {n_layers} layers of {n_experts} experts, {n_used} used, rank {rank}: not a router's shape")
        self.n_layers, self.n_experts, self.n_used, self.rank = n_layers, n_experts, n_used, rank
        width = n_layers * n_experts
        weights_bytes = self.weights_bytes(n_layers, n_experts, rank)
        if memory_bytes <= weights_bytes:
            raise OptionError(f"estimator: {memory_bytes} bytes do not hold its weights; {weights_bytes} are needed, and more to learn")
        self.memory = RoutingMemory(n_layers, n_experts, n_used, memory_bytes - weights_bytes)
        self.tokens_learned = 0

        self.prior = np.full(width, n_used / n_experts, np.float32)
        self.layer_weights = np.tile(np.array([0, 1, 0.3, 0.3], np.float32)[:, None], (1, n_layers))
        self.class_weights = np.zeros((SUPPORT_CLASSES, _FEATURES), np.float32)
        self.links_in = np.random.default_rng(seed).normal(0, 0.1, (_INPUTS, rank, width)).astype(np.float32)
        self.links_out = np.zeros((_INPUTS * rank, width), np.float32)

        self._scale = _REFERENCE_WIDTH / (n_layers * n_used)
        self._drifts = np.zeros((len(_DRIFT_HALF_LIVES_TOKENS), width), np.float32)
        self._scratch = np.empty((_INPUTS * rank, width), np.float32)
        self._offsets = np.repeat(np.arange(n_layers) * n_experts, n_used)
        self._request = 0
        self._before, self._previous = NO_TOKEN, NO_TOKEN
        self._previous_memory = np.zeros(width, np.float32)

    @staticmethod
    def weights_bytes(n_layers: int, n_experts: int, rank: int = RANK) -> int:
        """What it holds before it remembers anything: links and as much scratch again; prior, drifts, outputs."""
        width = n_layers * n_experts
        return 4 * (4 * _INPUTS * rank * width + 40 * width) + 4 * SUPPORT_CLASSES * _FEATURES

    def start_request(self) -> None:
        """The next token follows none that was learned: contexts end, drifts fade."""
        self._request += 1
        self._before, self._previous = NO_TOKEN, NO_TOKEN
        self._previous_memory[:] = 0
        self._drifts *= _DRIFT_KEPT

    def predict(self, tokens: Sequence[int], weights: Sequence[float] | None = None) -> Floats:
        """Expected use of each expert by coming tokens.

        Args:
            tokens: the coming tokens in order; the first follows the last one learned.
            weights: what a use by each is worth: the chance that it comes, and a discount for distance. None: 1 each.

        Returns:
            float32 [layers, experts], the sum over the tokens of weight × probability of use.

        Raises:
            OptionError: there are not as many weights as tokens.
        """
        if weights is None:
            weights = [1.0] * len(tokens)
        if len(weights) != len(tokens):
            raise OptionError(f"estimator: {len(weights)} weights for {len(tokens)} tokens")
        if not tokens:
            return np.zeros((self.n_layers, self.n_experts), np.float32)
        probabilities = self.probabilities(tokens).reshape(len(tokens), -1)
        return (np.asarray(weights, np.float32) @ probabilities).reshape(self.n_layers, self.n_experts)

    def probabilities(self, tokens: Sequence[int]) -> Floats:
        """Probability of use of each expert by each coming token: float32 [tokens, layers, experts]."""
        return self._forward(self._recall(tokens))[0].reshape(len(tokens), self.n_layers, self.n_experts)

    def of_candidates(self, coming: Sequence[Sequence[tuple[int, float]]]) -> Floats:
        """The same where coming tokens are guessed.

        What is remembered of a position's candidates is mixed by their chances, and the mixture is mapped to probabilities as
        one token's memory would be: that takes one pass for each position, not for each candidate.

        Args:
            coming: of each coming token the candidates, (token, chance), at least one with a chance above 0, the likeliest
                first: candidates of later tokens follow it.

        Returns:
            float32 [tokens, layers, experts]: probability of use, given that one of the candidates comes.
        """
        before, previous = self._before, self._previous
        contexts, positions, shares = [], [], []
        for position, candidates in enumerate(coming):
            total = sum(chance for _, chance in candidates)
            for token, chance in candidates:
                contexts.append((token, previous, before))
                positions.append(position)
                shares.append(chance / total)
            before, previous = previous, candidates[0][0]
        recall = self.memory.recall(contexts, self._request).mixed(np.array(positions), np.array(shares))
        return self._forward(recall)[0].reshape(len(coming), self.n_layers, self.n_experts)

    def learn(self, tokens: ArrayLike, experts: ArrayLike) -> None:
        """Learns from a decoded batch.

        Args:
            tokens: integers [n], token ids in order; the first follows the last one learned.
            experts: integers [n, layers, k], what the router chose for each.

        Raises:
            OptionError: the shapes do not fit, or an expert or token does not exist; nothing was learned then.
        """
        token_ids, routed = np.asarray(tokens), np.asarray(experts)
        if token_ids.ndim != 1 or routed.shape != (len(token_ids), self.n_layers, self.n_used):
            raise OptionError(
                f"estimator: experts {routed.shape} for tokens {token_ids.shape}; "
                f"expected [tokens, {self.n_layers} layers, {self.n_used} experts]"
            )
        if not token_ids.size:
            return
        if not (np.issubdtype(token_ids.dtype, np.integer) and np.issubdtype(routed.dtype, np.integer)):
            raise OptionError(f"estimator: tokens and experts are integers, not {token_ids.dtype} and {routed.dtype}")
        if routed.min() < 0 or routed.max() >= self.n_experts or token_ids.min() < 0 or token_ids.max() >= 1 << 31:
            raise OptionError(f"estimator: tokens or experts out of range; experts go from 0 to {self.n_experts - 1}")
        for token, chosen in zip(token_ids.tolist(), routed, strict=True):
            self._learn_one(token, chosen)

    def _recall(self, tokens: Sequence[int]) -> Recall:
        known = [self._before, self._previous, *tokens]
        return self.memory.recall(list(zip(tokens, known[1:], known, strict=False)), self._request)

    def _remembered(self, recall: Recall) -> Floats:
        """Probabilities by memory alone, float32 [tokens, width]."""
        remembered = recall.rest.astype(np.float32)[:, None] * self.prior
        counts = remembered.reshape(-1, self.n_layers, self.n_experts)
        control.count_routing(self.memory.ids, recall.slots, recall.owners, recall.weights, counts)
        return remembered

    def _forward(self, recall: Recall) -> tuple[Floats, Floats, Floats, Floats]:
        """Probabilities [n, width], memory's logits and deviations from the prior [n, width], inputs of `links_out` [n, inputs × rank]."""
        remembered = self._remembered(recall)
        deviation = remembered - self.prior
        np.clip(remembered, _P_MIN, 1 - _P_MIN, out=remembered)
        logit = np.log(remembered / (1 - remembered))
        n = len(recall.rest)
        weights = self.layer_weights + self.class_weights[recall.support][:, :, None]  # [n, features, layers]
        shape = (n, self.n_layers, self.n_experts)
        z = logit.reshape(shape) * weights[:, 1, :, None]
        z += weights[:, 0, :, None]
        for i, drift in enumerate(self._drifts):
            z += drift.reshape(shape[1:]) * weights[:, 2 + i, :, None]
        z = z.reshape(n, -1)
        hidden = np.empty((n, _INPUTS, self.rank), np.float32)
        if self.rank:
            hidden[:, 0] = deviation @ self.links_in[0].T
            before = np.concatenate([self._previous_memory[None], deviation[:-1]])
            hidden[:, 1] = before @ self.links_in[1].T
            for i, drift in enumerate(self._drifts):
                hidden[:, 2 + i] = self.links_in[2 + i] @ drift
            # the drifts are the same for all tokens
            of_tokens = 2 * self.rank
            z += hidden[:, :2].reshape(n, -1) @ self.links_out[:of_tokens]
            z += hidden[0, 2:].reshape(-1) @ self.links_out[of_tokens:]
        np.negative(z, out=z)
        np.exp(np.minimum(z, 30, out=z), out=z)
        z += 1
        return np.reciprocal(z, out=z), logit, deviation, hidden.reshape(n, -1)

    def _learn_one(self, token: int, chosen: NDArray[np.integer]) -> None:
        recall = self._recall([token])
        p, logit, deviation, hidden = (array[0] for array in self._forward(recall))
        error = -p
        used = (chosen.reshape(-1) + self._offsets).astype(np.int64)
        error[used] += 1

        if self.rank:
            self._learn_links(error, hidden, deviation)
        by_layer = error.reshape(self.n_layers, self.n_experts)
        gradients = np.stack(
            [by_layer.sum(1), *(np.einsum("le,le->l", by_layer, x.reshape(by_layer.shape)) for x in (logit, *self._drifts))]
        )  # [features, layers]
        self.layer_weights += _LAYER_RATE * gradients
        self.class_weights[recall.support[0]] += _CLASS_RATE * gradients.mean(1)

        for i, (half_life, scale) in enumerate(zip(_DRIFT_HALF_LIVES_TOKENS, _DRIFT_SCALES, strict=True)):
            kept = 2.0 ** (-1 / half_life)
            self._drifts[i] *= kept
            self._drifts[i] += error * np.float32(scale * (1 - kept))
        self.memory.add(token, self._previous, self._before, self._request, chosen)
        rate = 1 / min(self.tokens_learned + 2, _PRIOR_TOKENS)
        self.prior *= np.float32(1 - rate)
        self.prior[used] += np.float32(rate)
        self.tokens_learned += 1
        self._before, self._previous = self._previous, token
        self._previous_memory[:] = deviation

    def _learn_links(self, error: Floats, hidden: Floats, deviation: Floats) -> None:
        """One step of gradient descent; its length is bounded so that it cannot overshoot (normalised least mean squares)."""
        rate = np.float32(_LINK_STEP / (1 + float(hidden @ hidden)))
        back = (self.links_out @ error).reshape(_INPUTS, self.rank) * np.float32(_LINK_RATE * self._scale)
        np.multiply((hidden * rate)[:, None], error, out=self._scratch)
        self.links_out += self._scratch
        scratch = self._scratch.reshape(self.links_in.shape)
        for i, values in enumerate((deviation, self._previous_memory, *self._drifts)):
            np.multiply(back[i][:, None], values, out=scratch[i])
        self.links_in += scratch
