"""What proposes coming tokens, and how far to believe it. Knows nothing of the model that the proposals are for.

A draft is cheap and may be wrong. Verifying its tokens saves decodes (`spac.speculative.loop`); and even unverified they tell
which experts will be wanted. A proposal is made for what comes after a sequence's last token.
"""

from __future__ import annotations

import abc
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import llama_cpp
import llama_cpp.llama_cpp as upstream
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from spac.errors import OptionError
from spac.llama import Llama
from spac.plan import Plan

# tokens: a long prompt is evaluated in more steps, but buffers that would be idle afterwards stay small
DRAFT_UBATCH: Final = 128
BYTES_OF_THREAD: Final = 8 << 20  # of weights, from which one more thread pays for waiting: DraftLlama
N_OTHERS: Final = 5  # alternatives to each drafted token
# vocabularies of a family differ in padding at the end and in control tokens at the beginning: upstream's common/speculative.cpp
MAX_SIZE_DIFFERENCE: Final = 128
FIRST_COMPARED_TOKEN: Final = 5


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next, one after the other.

    Attributes:
        chances: the draft's own probability of each token, given that those before it are right.
        others: for each token, or of none: the likeliest ones in its place, with the same probability. Not to be verified.
    """

    tokens: list[int]
    chances: list[float]
    others: list[list[tuple[int, float]]] = field(default_factory=list)

    def known_to(self, n_vocab: int) -> Proposal:
        """Up to the first token that a vocabulary of this size does not have: that of the draft may be larger."""
        n = next((i for i, token in enumerate(self.tokens) if not 0 <= token < n_vocab), len(self.tokens))
        return self if n == len(self.tokens) else Proposal(self.tokens[:n], self.chances[:n], self.others[:n])


class Draft(LlamaDraftModel, abc.ABC):
    """A source of proposals. It is also a `LlamaDraftModel`, for `llama_cpp.Llama(draft_model=...)`.

    Attributes:
        num_pred_tokens: how many tokens `llama_cpp.Llama` gets at a time.
        held_bytes: of memory that `close()` gives back to the target's experts; 0: none worth speaking of.
    """

    num_pred_tokens = 10
    held_bytes = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in what a sequence says so far. `propose` does so, too, but then it counts as the time of a proposal."""

    @abc.abstractmethod
    def propose(self, tokens: Sequence[int], n: int) -> Proposal:
        """At most n tokens to follow.

        Args:
            tokens: the whole sequence so far, the token sampled last included.
        """

    def cancel(self) -> None:
        """Stop a running `propose`, if it can take long: it raises `Cancelled`. From any thread."""

    def forget_cancel(self) -> None:
        """Undo a `cancel()` that came when nothing was running."""

    def close(self) -> None:
        """Free what it holds. May be called again."""

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **_: Any) -> npt.NDArray[np.intc]:
        return np.array(self.propose(input_ids.tolist(), self.num_pred_tokens).tokens, dtype=np.intc)


class ModelDraft(Draft):
    """A smaller model of the same vocabulary, decoding greedily in a context of its own.

    The context is kept in step by what it has in common with the sequence: rejected tokens are dropped, those that the
    draft did not see are evaluated. Proposals end before an end-of-generation token.

    Args:
        llama: used by nobody else; closed by `close()`.

    Raises:
        OptionError: the model is recurrent or hybrid, so it cannot drop tokens.
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        if llama._is_recurrent or llama._is_hybrid:
            raise OptionError(f"{llama.model_path}: recurrent and hybrid models cannot take tokens back, so they cannot be drafts")
        self.llama = llama
        self._sequence: list[int] = []  # what is in the context
        self._spac = getattr(llama, "spac", None)  # llama_cpp.Llama has none
        plan = self._spac.plan if self._spac is not None else None
        if plan is not None:
            self.held_bytes = plan.sizes.dense_bytes + plan.sizes.context_bytes + plan.sizes.compute_bytes

    def follow(self, tokens: Sequence[int]) -> None:
        """As `propose`, with the same errors."""
        tokens = list(tokens)
        if len(tokens) <= self.llama.n_ctx():
            self._go_to(tokens, common_prefix(self._sequence, tokens))

    def propose(self, tokens: Sequence[int], n: int) -> Proposal:
        """As `Draft.propose`; fewer at the end of its context.

        Raises:
            ExpertReadError, ModelChangedError, Cancelled, DecodeError: as `spac.Llama.eval`; the next call may succeed.
        """
        tokens = list(tokens)
        n = min(n, self.llama.n_ctx() + 1 - len(tokens))  # the last one is not evaluated
        proposal = Proposal([], [])
        if n < 1 or not tokens:
            return proposal
        self._go_to(tokens, min(common_prefix(self._sequence, tokens), len(tokens) - 1))
        while True:
            (token, chance), *others = self._likeliest()
            if upstream.llama_vocab_is_eog(self.llama._model.vocab, token):
                return proposal
            proposal.tokens.append(token)
            proposal.chances.append(chance)
            proposal.others.append(others)
            if len(proposal.tokens) == n:
                return proposal
            self._evaluate([token])

    def _go_to(self, tokens: list[int], keep: int) -> None:
        """Evaluate these tokens, but for the first `keep`, which the context has."""
        if keep < len(tokens):
            self._sequence[keep:] = []
            self.llama.n_tokens = keep  # eval() removes what comes after
            self._evaluate(tokens[keep:])

    def _evaluate(self, tokens: Sequence[int]) -> None:
        self.llama.eval(tokens)
        self._sequence += tokens

    def _likeliest(self) -> list[tuple[int, float]]:
        """The most likely next tokens and their probabilities, best first."""
        logits = np.ctypeslib.as_array(self.llama._ctx.get_logits_ith(-1), (self.llama._n_vocab,))
        n = min(1 + N_OTHERS, len(logits))
        best = np.argpartition(logits, -n)[-n:]
        best = best[np.argsort(-logits[best], kind="stable")]
        chances = np.exp(logits[best] - logits[best[0]]) / np.exp(logits - logits[best[0]]).sum()
        return list(zip(best.tolist(), chances.tolist(), strict=True))

    def cancel(self) -> None:
        if self._spac is not None:
            self._spac.cancel()

    def forget_cancel(self) -> None:
        if self._spac is not None:
            self._spac.forget_cancel()

    def close(self) -> None:
        self.llama.close()


class DraftLlama(Llama):
    """A `spac.Llama` that leaves to the target what it can: load it first, with the same `memory`, which bounds both.

    Its weights are read past the page cache even where all fits, compute buffers are small, and there are logits for the
    last token only. A small one has one thread: threads that wait for each other in each of its many small steps wait for tens
    of milliseconds when one of them loses its processor to a thread that reads. Experts, if it has any, share the budget with
    the target's: load both with paging="on" then.
    """

    def __init__(self, model_path: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(model_path, **{"n_ubatch": DRAFT_UBATCH, **kwargs})

    def _make_plan(self, path: str, params: Any) -> Plan:
        return replace(super()._make_plan(path, params), direct_io=True)

    def _adjust_context(self, context_params: Any) -> None:
        super()._adjust_context(context_params)
        context_params.n_outputs_max = 1
        context_params.n_threads = min(context_params.n_threads, 1 + self.spac.facts.dense_bytes // BYTES_OF_THREAD)


class NgramDraft(Draft):
    """Prompt lookup: what followed the last time that the sequence's last few tokens stood there.

    The longest n-gram that was seen before counts, its latest place; a continuation that reaches the end of the sequence
    goes on with itself. (`llama_cpp.LlamaPromptLookupDecoding` takes the first place instead and searches the whole sequence
    each time; `ForeignDraft` takes it.)
    """

    # rough, for want of better: they tell the n-grams apart, and `Acceptance` learns what they are worth
    CHANCES: Final = {4: 0.8, 3: 0.6, 2: 0.4}  # by length, longest first

    def __init__(self) -> None:
        self._sequence: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest place

    def propose(self, tokens: Sequence[int], n: int) -> Proposal:
        self._follow(list(tokens))
        for length, chance in self.CHANCES.items():
            begin = self._next.get(tuple(self._sequence[-length:]))
            if begin is not None and n > 0:
                period = len(self._sequence) - begin
                proposed = [self._sequence[begin + i % period] for i in range(n)]
                return Proposal(proposed, [chance] * n)
        return Proposal([], [])

    def _follow(self, tokens: list[int]) -> None:
        """Index the n-grams that end before the last token; from the beginning if this is another sequence."""
        known = common_prefix(self._sequence, tokens)
        if known < len(self._sequence):
            self._next.clear()
            known = 0
        self._sequence[known:] = tokens[known:]
        for end in range(max(known, 1), len(self._sequence)):
            for length in self.CHANCES:
                if length <= end:
                    self._next[tuple(self._sequence[end - length : end])] = end


class ForeignDraft(Draft):
    """Any `LlamaDraftModel` of llama-cpp-python.

    Args:
        chance: taken for the probability of each of its tokens, which it does not tell.
    """

    def __init__(self, model: LlamaDraftModel, chance: float = 0.5) -> None:
        self._model = model
        self._chance = chance

    def propose(self, tokens: Sequence[int], n: int) -> Proposal:
        proposed = self._model(np.array(tokens, dtype=np.intc)).tolist()[: max(n, 0)]
        return Proposal(proposed, [self._chance] * len(proposed))


class Acceptance:
    """How often drafted tokens turn out right, learned from what is sampled, whether they were verified or not.

    Counted by position in the proposal and by the draft's own probability, given that the tokens before were right. Where
    little was seen, an entry leans on all positions together, and those on the draft's word. Old counts fade.
    """

    EDGES: Final = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)  # between bins of the draft's probability
    POSITIONS: Final = 16  # later ones count as the last
    WEIGHT: Final = 4.0  # of what an entry leans on, in observations
    WINDOW: Final = 512  # counts of an entry are halved when it has seen so many

    def __init__(self) -> None:
        shape = (self.POSITIONS, len(self.EDGES) + 1)
        self._seen = np.zeros(shape)
        self._right = np.zeros(shape)
        self._open: list[tuple[list[int], list[int], int]] = []  # tokens, bins, how many were right so far

    def expect(self, proposal: Proposal) -> None:
        """A proposal for what is sampled next was made."""
        if proposal.tokens:
            self._open.append((proposal.tokens, [self._bin(chance) for chance in proposal.chances], 0))

    def saw(self, token: int) -> None:
        """A token was sampled: it is held against all proposals that reach so far."""
        still_open = []
        for tokens, bins, at in self._open:
            right = tokens[at] == token
            self._count(min(at, self.POSITIONS - 1), bins[at], right)
            if right and at + 1 < len(tokens):
                still_open.append((tokens, bins, at + 1))
        self._open = still_open

    def begin(self) -> None:
        """Another sequence follows: open proposals are void."""
        self._open = []

    def chances(self, proposal: Proposal) -> list[float]:
        """For each token the probability that it and all before it are right."""
        result, product = [], 1.0
        for position, chance in enumerate(proposal.chances):
            product *= self.chance(position, chance)
            result.append(product)
        return result

    def chance(self, position: int, chance: float) -> float:
        """Probability that the token at a position (from 0) is right, if those before it are and the draft says `chance`."""
        position, bin_ = min(position, self.POSITIONS - 1), self._bin(chance)
        general = self._lean(self._right[:, bin_].sum(), self._seen[:, bin_].sum(), chance)
        return self._lean(self._right[position, bin_], self._seen[position, bin_], general)

    def _lean(self, right: float, seen: float, prior: float) -> float:
        return float((right + self.WEIGHT * prior) / (seen + self.WEIGHT))

    def _bin(self, chance: float) -> int:
        return bisect_right(self.EDGES, chance)

    def _count(self, position: int, bin_: int, right: bool) -> None:
        if self._seen[position, bin_] >= self.WINDOW:
            self._seen[position, bin_] /= 2
            self._right[position, bin_] /= 2
        self._seen[position, bin_] += 1
        self._right[position, bin_] += right


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def check_vocabulary(target: llama_cpp.Llama, draft: llama_cpp.Llama) -> None:
    """A draft's token ids must mean the same to the target. As upstream, a few tokens more or less at the end may differ.

    Raises:
        OptionError: they do not; with what differs.
    """
    vocab, draft_vocab = target._model.vocab, draft._model.vocab

    def fail(what: str, its: object, ours: object) -> OptionError:
        return OptionError(f"{draft.model_path}: cannot draft for {target.model_path}: {what} is {its}, the model's is {ours}")

    kinds = [upstream.llama_vocab_type(v) for v in (vocab, draft_vocab)]
    if kinds[0] != kinds[1]:
        names = ("none", "SPM", "BPE", "WPM", "UGM", "RWKV", "PLAMO2")
        ours, its = (names[kind] if kind < len(names) else kind for kind in kinds)
        raise fail("its kind of vocabulary", its, ours)
    sizes = [upstream.llama_vocab_n_tokens(v) for v in (vocab, draft_vocab)]
    if abs(sizes[0] - sizes[1]) > MAX_SIZE_DIFFERENCE:
        raise fail("the size of its vocabulary", sizes[1], sizes[0])
    adds = [bool(upstream.llama_vocab_get_add_bos(v)) for v in (vocab, draft_vocab)]
    if adds[0] != adds[1]:
        raise fail("whether a text begins with a special token", *(("no", "yes")[add] for add in reversed(adds)))
    for token in range(FIRST_COMPARED_TOKEN, min(sizes)):
        text, draft_text = upstream.llama_vocab_get_text(vocab, token), upstream.llama_vocab_get_text(draft_vocab, token)
        if text != draft_text:
            raise fail(f"token {token}", *(repr((t or b"").decode(errors="replace")) for t in (draft_text, text)))
