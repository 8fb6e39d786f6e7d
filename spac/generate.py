"""The token loop: prompt tokens in, text and timings out.

Runs over `spac.speculative`, which evaluates, and llama.cpp's samplers. Knows nothing of terminals, chats or memory.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import llama_cpp._internals as internals
import llama_cpp.llama_cpp as upstream

from spac.errors import DecodeError, OptionError
from spac.llama import Llama
from spac.speculative import DraftStats, Speculation
from spac.speculative.draft import common_prefix

RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws one
PENALTY_TOKENS = 64


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The order is penalties, grammar, top-k, top-p, min-p, temperature, as in llama_cpp.Llama.

    Attributes:
        temperature: 0: always the most likely token that penalties and grammar leave; the rest is ignored.
        top_k: keep the k most likely; 0: all.
        top_p: keep the most likely with this much probability together; 1: all.
        min_p: keep those with at least this part of the most likely one's probability; 0: all.
        seed: of the random numbers; None: another one each time.
        repeat_penalty: logits of the answer's last `PENALTY_TOKENS` tokens are divided by it, negative ones multiplied; 1: none.
        frequency_penalty, presence_penalty: taken from their logits, for each time, and once; 0: none.
        grammar: GBNF, of which the answer must be a sentence (grammars/README.md of llama.cpp), of characters that the vocabulary can
            spell; None: any text.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, value, most in (("top_p", self.top_p, 1), ("min_p", self.min_p, 1), ("temperature", self.temperature, 100)):
            if not 0 <= value <= most:
                raise OptionError(f"{name} is {value}, expected 0 to {most}")
        if not 0 < self.repeat_penalty <= 100:
            raise OptionError(f"repeat_penalty is {self.repeat_penalty}, expected more than 0, to 100")
        for name, value in (("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)):
            if not -100 <= value <= 100:
                raise OptionError(f"{name} is {value}, expected -100 to 100")
        if not 0 <= self.top_k < 1 << 31:
            raise OptionError(f"top_k is {self.top_k}, expected 0 to {(1 << 31) - 1}")
        if self.seed is not None and not 0 <= self.seed < RANDOM_SEED:
            raise OptionError(f"seed is {self.seed}, expected 0 to {RANDOM_SEED - 1}")


@dataclass
class Generation:
    """What came out, filled while the text streams. Times in seconds.

    Attributes:
        token_ids: the completion's, the token that ended it left out.
        prompt_tokens: all; `reused_tokens` of them were in the context already and were not evaluated.
        finish: why it ended: "stop" (the model's end token), "length" (max_tokens), "context" (it is full), or "" (it was
            stopped from outside).
        draft: what became of drafted tokens; None without a draft.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish: Literal["", "stop", "length", "context"] = ""
    draft: DraftStats | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Evaluated prompt tokens by prefill time."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first by decode time; the first one comes out of the prefill."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 and self.completion_tokens > 1 else 0.0


def tokenize(llama: Llama, text: str, *, add_special: bool = True) -> list[int]:
    """Token ids of a text; special tokens in it count as such. `add_special`: begin as the model's vocabulary says."""
    return list(llama.tokenize(text.encode(), add_bos=add_special, special=True))


def token_bytes(llama: Llama, token: int) -> bytes:
    """The token's text, b"" for control tokens. Not always whole UTF-8 characters."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = upstream.llama_token_to_piece(llama._model.vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def generate(
    llama: Llama,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int | None = None,
    speculation: Speculation | None = None,
) -> tuple[Generation, Generator[str, None, None]]:
    """Continue a prompt.

    Args:
        prompt: token ids. What it has in common with what is in the context is not evaluated again.
        max_tokens: at most so many; None: until the model ends or the context is full.
        speculation: drafts tokens to verify several in one decode; the same one for all answers of a model.

    Returns:
        The result, and a generator of pieces of text that fills it; closing it ends the answer. The pieces are whole characters.

    Raises (from the iterator):
        DecodeError: the prompt is empty or longer than the context.
        OptionError: the draft cannot serve this model, or it cannot follow the grammar.
        ExpertReadError, ModelChangedError, Cancelled: as `spac.Llama.eval`; the result holds what came before.
    """
    result = Generation(prompt_tokens=len(prompt))
    return result, _stream(llama, list(prompt), sampling, max_tokens, speculation or Speculation(), result)


def _stream(
    llama: Llama, prompt: list[int], sampling: Sampling, max_tokens: int | None, speculation: Speculation, result: Generation
) -> Generator[str, None, None]:
    if not prompt:
        raise DecodeError("the prompt is empty")
    if len(prompt) >= llama.n_ctx():
        raise DecodeError(f"the prompt has {len(prompt)} tokens, the context {llama.n_ctx()}, and an answer needs room too; raise --ctx")
    speculation.check(llama)
    with contextlib.ExitStack() as stack:
        sampler = stack.enter_context(contextlib.closing(make_sampler(sampling, llama)))
        begin = time.perf_counter()
        result.reused_tokens = reuse_prefix(llama, prompt)
        try:
            llama.eval(prompt[result.reused_tokens :])
        finally:
            result.prefill_s = time.perf_counter() - begin
        begin = time.perf_counter()
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokens = stack.enter_context(contextlib.closing(speculation.tokens(llama, prompt, sampler, max_tokens)))
        try:
            for token in tokens:
                result.draft = speculation.stats if speculation.draft is not None or speculation.stats.given_back_bytes else None
                if upstream.llama_vocab_is_eog(llama._model.vocab, token):
                    result.finish = "stop"
                    break
                result.token_ids.append(token)
                piece = decoder.decode(token_bytes(llama, token))
                result.text += piece
                if piece:
                    yield piece
                if max_tokens is not None and len(result.token_ids) >= max_tokens:
                    result.finish = "length"
                    break
                if llama.n_tokens >= llama.n_ctx():
                    result.finish = "context"
                    break
        finally:
            result.decode_s = time.perf_counter() - begin
    rest = decoder.decode(b"", final=True)
    if rest:
        result.text += rest
        yield rest


def reuse_prefix(llama: Llama, prompt: Sequence[int]) -> int:
    """Cut the context back to what it has in common with the prompt, at least one token less; returns that many tokens."""
    keep = min(common_prefix(llama.input_ids[: llama.n_tokens].tolist(), list(prompt)), len(prompt) - 1)
    if keep == llama.n_tokens or (keep > 0 and llama._ctx.kv_cache_seq_rm(-1, keep, -1)):
        llama.n_tokens = keep
    else:
        llama.reset()  # type: ignore[no-untyped-call]  # recurrent models cannot be cut back
        llama._ctx.kv_cache_seq_rm(-1, 0, -1)
    return int(llama.n_tokens)


def make_sampler(sampling: Sampling, llama: Llama) -> Any:
    """llama.cpp's sampler chain, for this model; to be closed.

    Raises:
        OptionError: the grammar has an error, or the model no token that would end the answer.
    """
    sampler: Any = internals.LlamaSampler()  # type: ignore[no-untyped-call]
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1.0, 0.0, 0.0):
        sampler.add_penalties(llama.n_vocab(), PENALTY_TOKENS, *penalties)
    if sampling.grammar is not None:
        upstream.llama_sampler_chain_add(sampler.sampler, _grammar_sampler(sampling.grammar, llama))
    if sampling.temperature == 0:
        sampler.add_greedy()
        return sampler
    sampler.add_top_k(sampling.top_k)
    sampler.add_top_p(sampling.top_p, 1)
    sampler.add_min_p(sampling.min_p, 1)
    sampler.add_temp(sampling.temperature)
    sampler.add_dist(RANDOM_SEED if sampling.seed is None else sampling.seed)
    return sampler


def _grammar_sampler(grammar: str, llama: Llama) -> Any:
    vocab = llama._model.vocab
    if upstream.llama_vocab_eos(vocab) < 0 and upstream.llama_vocab_eot(vocab) < 0:
        raise OptionError(f"{llama.model_path}: the model has no token that ends a text, so it cannot follow a grammar")
    # of an empty one llama.cpp makes a sampler that allows everything
    made = upstream.llama_sampler_init_grammar(vocab, grammar.encode(), b"root") if grammar.strip() else None
    if not made:
        raise OptionError("the grammar has an error, or no rule named root")
    return made
