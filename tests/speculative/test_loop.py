"""Speculation changes how fast tokens come, and nothing else: not which ones, not their distribution, not what is left in the context."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import llama_cpp._internals as internals
import llama_cpp.llama_cpp as upstream
import numpy as np
import pytest
from llama_cpp import LlamaGrammar
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import spac
from spac import control
from spac.generate import Generation, Sampling, generate, reuse_prefix
from spac.speculative import Draft, DraftLlama, ModelDraft, NgramDraft, Proposal, Speculation

PROMPTS = ("The open() system call opens the file specified by", "What is a process? A process is", "def main(argv):\n    if")


@pytest.fixture(scope="module")
def llama(model_path: Path) -> Iterator[spac.Llama]:
    result = spac.Llama(model_path, memory="4G", paging="on", n_ctx=512, n_threads=1, verbose=False)
    yield result
    result.close()


@pytest.fixture(scope="module")
def draft(dense_path: Path) -> Iterator[ModelDraft]:
    result = ModelDraft(DraftLlama(dense_path, memory="4G", n_ctx=512, n_threads=1, verbose=False))
    yield result
    result.close()


class Repeat(Draft):
    """Proposes the same tokens whatever came before, and may do something first."""

    def __init__(self, tokens: Sequence[int], before: Any = None) -> None:
        self.tokens = list(tokens)
        self.before = before

    def propose(self, tokens: Sequence[int], n: int) -> Proposal:
        if self.before is not None:
            self.before(tokens)
        return Proposal(self.tokens[:n], [0.5] * len(self.tokens[:n]))


def tokenize(llama: spac.Llama, text: str = PROMPTS[0]) -> list[int]:
    return list(llama.tokenize(text.encode()))


def answer(
    llama: spac.Llama, prompt: list[int], n: int | None, speculation: Speculation | None, sampling: Sampling | None = None
) -> Generation:
    llama.reset()
    result, pieces = generate(llama, prompt, sampling or Sampling(temperature=0), n, speculation)
    for _ in pieces:
        pass
    return result


def stopped(llama: spac.Llama, prompt: list[int], n: int, speculation: Speculation, error: type[spac.SpacError]) -> Generation:
    """An answer that an error ends."""
    result, pieces = generate(llama, prompt, Sampling(temperature=0), n, speculation)
    with pytest.raises(error):
        for _ in pieces:
            pass
    return result


def logits_at(llama: spac.Llama, index: int = -1) -> Any:
    return np.ctypeslib.as_array(llama._ctx.get_logits_ith(index), (llama.n_vocab(),)).copy()


def near_tie(llama: spac.Llama, before: list[int], a: int, b: int) -> bool:
    """Is one token or the other on top after `before` only by how a kernel rounds?

    The model's logits are computed in one batch and token by token; what these differ by is the kernels' noise.
    """
    llama.reset()
    llama.eval(before)
    together = logits_at(llama)
    llama.reset()
    for token in before:
        llama.eval([token])
    alone = logits_at(llama)
    noise = float(np.abs(together - alone).max())
    return bool(abs(together[a] - together[b]) <= 2 * noise)


def count_near_ties(llama: spac.Llama, prompt: list[int], plain: list[int], speculated: list[int]) -> int:
    """0: the same tokens; 1: they part at a near-tie. Fails where they part at anything else."""
    for at, (a, b) in enumerate(zip(plain, speculated, strict=True)):
        if a != b:
            assert near_tie(llama, prompt + plain[:at], a, b), f"token {at}: {a}, not {b}"
            return 1
    return 0


# -- the same tokens --


def test_a_wrong_token_is_no_near_tie(llama: spac.Llama) -> None:
    """What the other tests forgive is only what rounding explains."""
    prompt = tokenize(llama)
    llama.reset()
    llama.eval(prompt)
    best = np.argsort(-logits_at(llama))
    assert near_tie(llama, prompt, int(best[0]), int(best[0]))
    assert not near_tie(llama, prompt, int(best[0]), int(best[9]))


@pytest.mark.parametrize("draft_max", [0, 1, 3, 8, "auto"])
def test_greedy_tokens_with_a_draft_model(llama: spac.Llama, draft: ModelDraft, draft_max: Any) -> None:
    speculation = Speculation(draft, draft_max)
    near_ties = 0
    for text in PROMPTS:
        prompt = tokenize(llama, text)
        plain = answer(llama, prompt, 60, None)
        speculated = answer(llama, prompt, 60, speculation)
        near_ties += count_near_ties(llama, prompt, plain.token_ids, speculated.token_ids)
        assert plain.draft is None
        assert speculated.draft is not None
        assert speculated.draft.accepted <= speculated.draft.proposed <= 8 * speculated.draft.verifications
        if draft_max != "auto":
            assert (speculated.draft.accepted > 0) == (draft_max > 0)
    assert near_ties <= 1
    print(f"near-ties: {near_ties}")


def test_greedy_tokens_with_ngrams(llama: spac.Llama) -> None:
    prompt = tokenize(llama, "one two three four five. " * 3)
    plain, speculated = (answer(llama, prompt, 60, s) for s in (None, Speculation(NgramDraft(), 4)))
    assert count_near_ties(llama, prompt, plain.token_ids, speculated.token_ids) <= 1
    assert speculated.draft is not None
    assert speculated.draft.accepted > 0


def test_a_draft_that_is_the_model_itself(llama: spac.Llama, model_path: Path) -> None:
    """A MoE draft: paged from the same budget, and always right."""
    prompt = tokenize(llama)
    plain = answer(llama, prompt, 24, None)
    with contextlib.closing(ModelDraft(DraftLlama(model_path, memory="4G", paging="on", n_ctx=512, n_threads=1, verbose=False))) as same:
        llama.spac.cap_experts(8 << 20)
        speculated = answer(llama, prompt, 24, Speculation(same, 3))
        stats = llama.spac.stats()
        llama.spac.cap_experts(None)
    assert speculated.token_ids == plain.token_ids
    assert speculated.draft is not None
    assert speculated.draft.acceptance_rate == 1
    assert speculated.draft.mean_accepted_tokens == pytest.approx(17 / 6)  # 1 + 5 * 4 + 3 tokens
    assert stats is not None
    assert stats.budget_bytes == 8 << 20
    assert stats.used_bytes <= stats.budget_bytes


def chain(llama: spac.Llama, kind: str) -> Any:
    sampler: Any = internals.LlamaSampler()
    if kind == "penalties":
        sampler.add_penalties(llama.n_vocab(), 64, 1.3, 0.1, 0.1)
    if kind == "grammar":
        sampler.add_grammar(llama._model, LlamaGrammar.from_string("root ::= ([a-z]+ | [ .,])+", verbose=False))
    sampler.add_top_k(20)
    sampler.add_top_p(0.95, 1)
    sampler.add_min_p(0.02, 1)
    sampler.add_temp(0.9)
    sampler.add_dist(7)
    return sampler


@pytest.mark.parametrize("kind", ["plain", "penalties", "grammar"])
def test_samplers_with_memory(llama: spac.Llama, draft: ModelDraft, kind: str) -> None:
    """The sampler sees the same positions in the same order, so one seed gives the same tokens while logits are equal to the bit."""
    prompt, answers = tokenize(llama), []
    for speculation in (None, Speculation(draft, 3), Speculation(NgramDraft(), 2)):
        llama.reset()
        llama.eval(prompt)
        with contextlib.closing(chain(llama, kind)) as sampler:
            answers.append(list(islice((speculation or Speculation()).tokens(llama, prompt, sampler), 20)))
    assert answers[0] == answers[1] == answers[2]


def test_penalties_and_a_grammar_as_options(llama: spac.Llama, draft: ModelDraft) -> None:
    """Greedy too, and where tokens are verified."""
    prompt = tokenize(llama)
    plain = answer(llama, prompt, 24, None).text
    for sampling in (
        Sampling(temperature=0, repeat_penalty=1.3, frequency_penalty=0.1, presence_penalty=0.1),
        Sampling(temperature=0, grammar='root ::= ("a" | "b" | "c") [a-z]+ "!"'),
        Sampling(temperature=0.9, seed=3, repeat_penalty=1.2, grammar="root ::= [a-z ]+"),
    ):
        for speculation in (None, Speculation(draft, 3)):
            text = answer(llama, prompt, 24, speculation, sampling).text
            assert text != plain
            if sampling.grammar is not None:
                assert re.fullmatch(r"[a-c][a-z]*!?" if "!" in sampling.grammar else "[a-z ]+", text)
    ended = answer(llama, prompt, 24, None, Sampling(grammar='root ::= "yes" | "no"'))
    assert (ended.text, ended.finish) in (("yes", "stop"), ("no", "stop"))
    with pytest.raises(spac.OptionError, match="the grammar has an error, or no rule named root"):
        answer(llama, prompt, 24, None, Sampling(grammar="root :="))


@pytest.mark.parametrize(
    ("name", "value"), [("repeat_penalty", 0), ("repeat_penalty", float("nan")), ("presence_penalty", 101), ("frequency_penalty", -101)]
)
def test_penalties_without_meaning(name: str, value: float) -> None:
    with pytest.raises(spac.OptionError, match=f"{name} is"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_a_draft_of_llama_cpps(llama: spac.Llama) -> None:
    """Serves as it is."""
    prompt = tokenize(llama)
    expected = answer(llama, prompt, 24, None).token_ids
    result = answer(llama, prompt, 24, Speculation(LlamaPromptLookupDecoding(num_pred_tokens=3), 3))
    assert result.draft is not None
    assert count_near_ties(llama, prompt, expected, result.token_ids) <= 1
    assert result.draft.proposed > 0


def test_sampled_tokens_have_the_targets_distribution(llama: spac.Llama) -> None:
    """Chi-square over all answers of three tokens, the top three at each place: a rejected, an accepted and a following token.

    The draft proposes what is likeliest, so that every outcome occurs: both right, one right, none right.
    """
    prompt, top_k, n = tokenize(llama), 3, 1500
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for before, chance in expected.items():
            reuse_prefix(llama, [*prompt, *before])
            llama.eval([*prompt, *before][llama.n_tokens :])
            logits = logits_at(llama)
            best = np.argsort(-logits)[:top_k]
            chances = np.exp(logits[best] - logits[best].max())
            longer |= {(*before, int(t)): chance * float(p) for t, p in zip(best, chances / chances.sum(), strict=True)}
        expected = longer
    likeliest = max(expected, key=lambda key: expected[key])
    speculation = Speculation(Repeat(likeliest[1:]), 2)
    seen = dict.fromkeys(expected, 0)
    accepted = [0, 0, 0]
    for seed in range(n):
        reuse_prefix(llama, prompt)
        llama.eval(prompt[llama.n_tokens :])
        with contextlib.closing(internals.LlamaSampler()) as sampler:
            sampler.add_top_k(top_k)
            sampler.add_dist(seed)
            tokens = speculation.tokens(llama, prompt, sampler)
            seen[tuple(islice(tokens, 3))] += 1
            accepted[speculation.stats.accepted] += 1
            tokens.close()
    assert min(accepted) > n / 20
    cells = [(seen[key], n * chance) for key, chance in expected.items() if n * chance >= 5]
    rest = [(seen[key], n * chance) for key, chance in expected.items() if n * chance < 5]
    cells.append((sum(s for s, _ in rest), sum(e for _, e in rest)))
    cells = [(s, e) for s, e in cells if e > 1]
    assert len(cells) >= 8
    statistic = sum((s - e) ** 2 / e for s, e in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile that one in a thousand exceeds
    most = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    print(f"chi-square: {statistic:.1f}, {freedom} degrees of freedom, one in a thousand exceeds {most:.1f}")
    assert statistic < most


# -- what is left behind --


def test_rejected_tokens_leave_no_trace(llama: spac.Llama) -> None:
    """A draft that is always wrong: afterwards the context holds the sequence, and goes on as a fresh one would."""
    prompt = tokenize(llama)
    speculated = answer(llama, prompt, 24, Speculation(Repeat([5, 6, 7]), 3))
    assert speculated.draft is not None
    assert speculated.draft.accepted == 0
    sequence = prompt + speculated.token_ids[:-1]  # the last one was not evaluated
    assert llama.input_ids[: llama.n_tokens].tolist() == sequence
    assert upstream.llama_memory_seq_pos_max(upstream.llama_get_memory(llama._ctx.ctx), 0) == len(sequence) - 1
    more = tokenize(llama, " and then the file is closed")
    llama.eval(more)
    continued = logits_at(llama)
    llama.reset()
    llama.eval([*sequence, *more])
    fresh = logits_at(llama)
    assert np.abs(continued - fresh).max() < 0.05 * fresh.std() + 0.5
    assert np.corrcoef(continued, fresh)[0, 1] > 0.999


def test_the_next_turn_reuses_what_was_said(llama: spac.Llama, draft: ModelDraft) -> None:
    speculation = Speculation(draft, 3)
    prompt = tokenize(llama)
    first = answer(llama, prompt, 21, speculation)
    following = [*prompt, *first.token_ids, *tokenize(llama, " What else?")]
    second, pieces = generate(llama, following, Sampling(temperature=0), 20, speculation)
    for _ in pieces:
        pass
    assert len(prompt) + 20 <= second.reused_tokens <= len(prompt) + 21
    plain = answer(llama, following, 20, None)
    count_near_ties(llama, following, plain.token_ids, second.token_ids)


def test_stopping_between_accepted_tokens(llama: spac.Llama, model_path: Path) -> None:
    """Whoever stops early finds a context that holds what was taken, and no more."""
    prompt = tokenize(llama)
    expected = answer(llama, prompt, 8, None).token_ids
    llama.reset()
    llama.eval(prompt)
    with contextlib.closing(internals.LlamaSampler()) as sampler:
        sampler.add_greedy()
        tokens = Speculation(Repeat(expected[1:]), 7).tokens(llama, prompt, sampler)
        assert list(islice(tokens, 4)) == expected[:4]
        tokens.close()
    assert llama.input_ids[: llama.n_tokens].tolist() == prompt + expected[:3]
    assert upstream.llama_memory_seq_pos_max(upstream.llama_get_memory(llama._ctx.ctx), 0) == llama.n_tokens - 1


def test_the_context_fills_up_in_the_middle_of_a_draft(model_path: Path, draft: ModelDraft) -> None:
    """No error, and the same tokens as without a draft, down to the last."""
    with contextlib.closing(spac.Llama(model_path, memory="4G", n_ctx=256, n_threads=1, verbose=False)) as small:
        prompt = (tokenize(small, "all of it again and again. ") * 40)[:225]
        plain = answer(small, prompt, None, None)
        assert plain.finish == "context"
        for right in ([], plain.token_ids):
            # one that is always wrong, and one that is right to the end
            draft_of = Repeat([5, 6, 7, 8])
            draft_of.before = lambda tokens, d=draft_of, r=right: r and setattr(d, "tokens", [*r[len(tokens) - len(prompt) :], 5, 6, 7, 8])
            speculated = answer(small, prompt, None, Speculation(draft_of, 8))
            assert speculated.finish == "context"
            assert len(speculated.token_ids) == 256 - 225 + 1
            count_near_ties(small, prompt, plain.token_ids, speculated.token_ids)
        by_model = answer(small, prompt, None, Speculation(draft, 8))
        assert (by_model.finish, len(by_model.token_ids)) == ("context", 32)


def test_no_more_tokens_are_evaluated_than_were_asked_for(llama: spac.Llama) -> None:
    prompt = tokenize(llama)
    result = answer(llama, prompt, 3, Speculation(Repeat([5] * 8), 8))
    assert len(result.token_ids) == 3
    assert result.draft is not None
    assert result.draft.proposed <= 1


# -- what goes wrong --


def test_cancel_in_the_middle(llama: spac.Llama) -> None:
    """The context is as before the cancelled step, and the answer can be continued."""
    prompt = tokenize(llama)
    expected = answer(llama, prompt, 12, None).token_ids

    def cancel(tokens: Sequence[int]) -> None:
        if len(tokens) == len(prompt) + 6:
            llama.spac.cancel()

    llama.reset()
    result = stopped(llama, prompt, 12, Speculation(Repeat([5, 6], before=cancel), 2), spac.Cancelled)
    assert result.token_ids == expected[:6]
    assert llama.input_ids[: llama.n_tokens].tolist() == prompt + expected[:5]
    rest, pieces = generate(llama, prompt + expected[:6], Sampling(temperature=0), 6, Speculation(Repeat([5, 6]), 2))
    for _ in pieces:
        pass
    assert rest.reused_tokens == len(prompt) + 5
    assert rest.token_ids == expected[6:]


def test_a_cancelled_draft(llama: spac.Llama, draft: ModelDraft) -> None:
    """Ctrl-C may come while the draft decodes; it is forgotten with the answer."""
    speculation = Speculation(draft, 2)
    speculation.cancel()
    result = stopped(llama, tokenize(llama), 12, speculation, spac.Cancelled)
    assert len(result.token_ids) == 1
    speculation.cancel()
    speculation.forget_cancel()
    assert len(answer(llama, tokenize(llama), 12, speculation).token_ids) == 12


def test_a_read_that_fails_in_a_verification(model_path: Path) -> None:
    options: dict[str, Any] = {"memory": "4G", "paging": "on", "store": "mock", "n_ctx": 512, "n_threads": 1}
    # without signals: a guess that cannot be read is no error, and would take the failure
    with contextlib.closing(spac.Llama(model_path, signals=(), verbose=False, **options)) as llama:
        llama.spac.cap_experts(1 << 20)
        prompt = tokenize(llama)
        expected = answer(llama, prompt, 8, None).token_ids

        def fail(tokens: Sequence[int]) -> None:
            if len(tokens) == len(prompt) + 4:
                llama.spac.evict_all()
                control.check(control.spac_mock_fail_reads(llama.spac.model_id, 0, 1, errno.EIO))

        llama.reset()
        result = stopped(llama, prompt, 8, Speculation(Repeat([5, 6], before=fail), 2), spac.ExpertReadError)
        assert result.token_ids == expected[:4]
        assert llama.n_tokens == len(prompt) + 3
        rest, pieces = generate(llama, prompt + expected[:4], Sampling(temperature=0), 4, Speculation(Repeat([5, 6]), 2))
        for _ in pieces:
            pass
        assert rest.token_ids == expected[4:]


def test_a_model_that_cannot_take_tokens_back_is_refused(llama: spac.Llama, draft: ModelDraft, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent and hybrid models: with a reason. A draft that is only looked at serves them too."""
    prompt = tokenize(llama)
    expected = answer(llama, prompt, 6, None).token_ids
    monkeypatch.setattr(llama, "_is_hybrid", True)
    for draft_max in (2, "auto"):
        with pytest.raises(spac.OptionError, match=r"recurrent and hybrid models cannot take rejected tokens back.*--draft-max 0"):
            answer(llama, prompt, 6, Speculation(NgramDraft(), draft_max))  # type: ignore[arg-type]
    assert answer(llama, prompt, 6, Speculation(NgramDraft(), 0)).token_ids == expected
    monkeypatch.setattr(draft.llama, "_is_recurrent", True)
    with pytest.raises(spac.OptionError, match="cannot be drafts"):
        ModelDraft(draft.llama)


def test_a_memory_that_turns_out_to_keep_tokens(llama: spac.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some caches only show by refusing that they cannot drop tokens: then all is evaluated again once, and nothing verified any more."""
    prompt = tokenize(llama)
    expected = answer(llama, prompt, 12, None).token_ids
    remove = llama._ctx.kv_cache_seq_rm
    monkeypatch.setattr(
        llama._ctx,
        "kv_cache_seq_rm",
        lambda s, begin, end: (begin == 0 or len_in_cache(llama) <= begin) and remove(s, begin, end),
    )
    result = answer(llama, prompt, 12, Speculation(Repeat([5, 6]), 2))
    assert result.token_ids == expected
    assert result.draft is not None
    assert result.draft.verifications == 1


def len_in_cache(llama: spac.Llama) -> int:
    return int(upstream.llama_memory_seq_pos_max(upstream.llama_get_memory(llama._ctx.ctx), 0)) + 1


@pytest.mark.parametrize(("draft_max", "horizon"), [(-1, 0), (65, 0), ("lots", 0), (1.5, 0), (2, -1), (2, 9)])
def test_numbers_without_meaning(draft_max: Any, horizon: int) -> None:
    with pytest.raises(spac.OptionError, match="expected 0"):
        Speculation(NgramDraft(), draft_max, horizon=horizon)


# -- who looks on --


def test_the_pager_is_told_what_may_come_before_it_is_evaluated(llama: spac.Llama, draft: ModelDraft, monkeypatch: Any) -> None:
    """Drafted tokens beyond those verified are told too; without a draft, none."""
    told: list[tuple[list[int], list[float], int]] = []

    def propose(proposal: Proposal, chances: Sequence[float], draft_s: float) -> None:
        assert draft_s >= 0
        told.append((proposal.tokens, list(chances), llama.n_tokens))

    monkeypatch.setattr(llama.spac, "propose", propose)
    prompt = tokenize(llama)
    result = answer(llama, prompt, 16, Speculation(draft, 1, horizon=4))
    sequence = prompt + result.token_ids
    assert result.draft is not None
    assert result.draft.proposed <= len(told)
    for tokens, chances, n in told:
        assert n < len(sequence)
        assert all(0 < b <= a <= 1 for a, b in pairwise(chances))
        assert len(tokens) == len(chances) <= 4
    assert max(len(tokens) for tokens, *_ in told) == 4
    told.clear()
    answer(llama, prompt, 4, Speculation())
    assert [len(tokens) for tokens, *_ in told] == [0, 0, 0]
