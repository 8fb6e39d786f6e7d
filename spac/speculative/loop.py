"""The inner half of the token loop: propose, evaluate, sample, accept. Knows nothing of text.

A cycle evaluates the token sampled last with some drafted ones after it, in one batch, and samples at each position for as
long as the sampled token is the drafted one. What is sampled does not depend on what was drafted: the same sampler sees the
same positions in the same order, so every kind of sampling keeps its distribution.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from llama_cpp.llama_speculative import LlamaDraftModel

from spac.errors import OptionError
from spac.host.memory import format_bytes
from spac.llama import Llama
from spac.speculative.draft import Acceptance, Draft, ForeignDraft, ModelDraft, Proposal, check_vocabulary
from spac.speculative.draft_length import DraftLength, FixedLength, Length

_log = logging.getLogger(__name__)

MOST_VERIFIED: Final = 64
MOST_SENSED: Final = 8


@dataclass
class DraftStats:
    """What became of drafted tokens in one answer.

    Attributes:
        proposed: drafted tokens that were verified; those only looked at do not count.
        accepted: those of them that were right.
        verifications: decodes with drafted tokens in them.
        given_back_bytes: of a draft that was closed, since experts make more of its memory; then nothing is drafted any more.
    """

    proposed: int = 0
    accepted: int = 0
    verifications: int = 0
    given_back_bytes: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """None: nothing was verified."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def mean_accepted_tokens(self) -> float | None:
        """By verification, without the token that every decode gives. None: nothing was verified."""
        return self.accepted / self.verifications if self.verifications else None


class Speculation:
    """Drafts for one target model and learns how good they are. Lasts as long as the target, over many answers.

    Args:
        draft: what proposes tokens, one of llama-cpp-python's, too; None: nothing does. Closed by `close()`.
        draft_max: how many drafted tokens to verify in a cycle, at most 64; "auto": what pays.
        horizon: how many tokens to draft for the pager's sake, even where fewer are verified; "auto": what pays.

    Raises:
        OptionError: a number has no meaning.
    """

    def __init__(
        self,
        draft: Draft | LlamaDraftModel | None = None,
        draft_max: int | Literal["auto"] = "auto",
        *,
        horizon: int | Literal["auto"] = "auto",
    ) -> None:
        if draft_max != "auto" and not (isinstance(draft_max, int) and 0 <= draft_max <= MOST_VERIFIED):
            raise OptionError(f"draft_max is {draft_max!r}, expected 0 to {MOST_VERIFIED}, or auto")
        if horizon != "auto" and not (isinstance(horizon, int) and 0 <= horizon <= MOST_SENSED):
            raise OptionError(f"horizon is {horizon!r}, expected 0 to {MOST_SENSED}, or auto")
        self.draft = draft if draft is None or isinstance(draft, Draft) else ForeignDraft(draft)
        self.acceptance = Acceptance()
        self.stats = DraftStats()
        self._length: Length = DraftLength() if draft_max == "auto" else FixedLength(draft_max)
        self._horizon = horizon
        self._target: Llama | None = None  # that was checked
        self._can_verify = True

    def check(self, llama: Llama) -> None:
        """Can this draft serve this target?

        Raises:
            OptionError: the target cannot take tokens back, or the draft has another vocabulary.
        """
        if self.draft is None or self._target is llama:
            return
        if (llama._is_recurrent or llama._is_hybrid) and not self._verifies_nothing:
            raise OptionError(
                f"{llama.model_path}: recurrent and hybrid models cannot take rejected tokens back;"
                " use it without a draft, or verify nothing (--draft-max 0)"
            )
        if isinstance(self.draft, ModelDraft):
            check_vocabulary(llama, self.draft.llama)
        balancer = llama.spac.balancer()
        if balancer is not None and self._horizon == "auto" and (isinstance(self._length, DraftLength) or self._verifies_nothing):
            balancer.draft_bytes = self.draft.held_bytes
        self._target = llama

    @property
    def _verifies_nothing(self) -> bool:
        return isinstance(self._length, FixedLength) and self._length.wanted == 0

    def tokens(self, llama: Llama, prompt: Sequence[int], sampler: Any, max_tokens: int | None = None) -> Generator[int, None, None]:
        """What the target samples after a prompt that it has just evaluated, without end.

        While a token is looked at, `llama.n_tokens` counts what is before it. After max_tokens, or when the context is full,
        no more can be asked for.

        Args:
            sampler: llama_cpp's `LlamaSampler`, or what has its `sample(context, index)`.

        Raises:
            ExpertReadError, ModelChangedError, Cancelled, DecodeError: as `spac.Llama.eval`.
        """
        self.stats = DraftStats(given_back_bytes=self.stats.given_back_bytes)
        self.acceptance.begin()
        sequence = list(prompt)
        end = llama.n_ctx()  # length of the sequence after which nothing is evaluated
        if max_tokens is not None:
            end = min(end, len(sequence) + max_tokens - 1)
        drafted: list[int] = []
        try:
            while True:
                # logits of the last token that is known and of those drafted after it
                for index, guess in enumerate([*drafted, None], start=-1 - len(drafted)):
                    token = int(sampler.sample(llama._ctx, index))
                    sequence.append(token)
                    self.acceptance.saw(token)
                    self.stats.accepted += token == guess
                    yield token
                    if token != guess:
                        break
                    llama.n_tokens += 1
                if token != guess and drafted:
                    self._can_verify = llama.forget_after(llama.n_tokens)
                drafted = self._propose(llama, sequence, room=end - len(sequence))
                drafted = self._evaluate(llama, sequence, drafted)
        finally:
            if drafted and not llama.closed:
                llama.forget_after(llama.n_tokens)

    def _propose(self, llama: Llama, sequence: list[int], room: int) -> list[int]:
        """Drafted tokens to verify, at most as many as there is room for."""
        self._give_back(llama)
        sensed = llama.spac.horizon(not self._verifies_nothing) if self._horizon == "auto" else self._horizon
        most = self._most_verified(llama)
        asked = min(max(sensed, min(self._length.wanted, most)), room) if self.draft is not None else 0
        proposal, draft_s = Proposal([], []), 0.0
        if self.draft is not None and asked > 0:
            self.draft.follow(sequence[:-1])  # a prompt, or what came while nothing was drafted
            begin = time.perf_counter()
            proposal = self.draft.propose(sequence, asked).known_to(llama.n_vocab())
            draft_s = time.perf_counter() - begin
        self.acceptance.expect(proposal)
        chances = self.acceptance.chances(proposal)
        llama.spac.propose(proposal, chances, draft_s)
        n = self._length.choose(chances, asked, draft_s) if self.draft is not None else 0
        return proposal.tokens[: min(n, most, llama.n_batch - 1)] if self._can_verify else []

    def _give_back(self, llama: Llama) -> None:
        """Close a draft whose memory is worth more to experts; they get it with the next decode."""
        balancer = llama.spac.balancer()
        if self.draft is not None and balancer is not None and balancer.gives_back:
            draft, self.draft = self.draft, None
            self.stats.given_back_bytes = draft.held_bytes
            balancer.forget_draft()
            _log.info("the draft is closed: its %s are worth more to this model's experts", format_bytes(draft.held_bytes))
            draft.close()

    def _most_verified(self, llama: Llama) -> int:
        """A number that was asked for is kept to; else as the balancer says."""
        balancer = llama.spac.balancer()
        return MOST_VERIFIED if balancer is None or isinstance(self._length, FixedLength) else balancer.most_verified

    def _evaluate(self, llama: Llama, sequence: list[int], drafted: list[int]) -> list[int]:
        """Evaluate what the context lacks of the sequence, and drafted tokens after it; returns those that were."""
        missing = sequence[llama.n_tokens :]  # one token, or all where the context was lost
        if len(missing) > 1:
            drafted = []
        begin = time.perf_counter()
        if drafted:
            with llama.spac.recording("verify"):
                llama.eval_all([*missing, *drafted])
            llama.n_tokens -= len(drafted)
            self.stats.proposed += len(drafted)
            self.stats.verifications += 1
        else:
            llama.eval(missing)
        if len(missing) == 1:
            self._length.measured(len(drafted), time.perf_counter() - begin)
        return drafted

    def cancel(self) -> None:
        """Stop a draft that is being made: the loop raises `Cancelled`. From any thread."""
        draft = self.draft  # the loop may give it back meanwhile
        if draft is not None:
            draft.cancel()

    def forget_cancel(self) -> None:
        """Undo a `cancel()` that came when nothing was running."""
        if self.draft is not None:
            self.draft.forget_cancel()

    def close(self) -> None:
        """Free the draft. May be called again."""
        if self.draft is not None:
            self.draft.close()
