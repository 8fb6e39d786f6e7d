"""Drafts propose, forget what was rejected, and are judged by what is then sampled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as upstream
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

import spac
from spac.speculative import draft as draft_module
from spac.speculative.draft import Acceptance, DraftLlama, ForeignDraft, ModelDraft, NgramDraft, Proposal, check_vocabulary, common_prefix

TEXT = b"The open() system call opens the file specified by pathname. If the specified file does not exist,"


@pytest.fixture(scope="module")
def draft(dense_path: Path) -> Iterator[ModelDraft]:
    result = ModelDraft(DraftLlama(dense_path, memory="4G", n_ctx=256, n_threads=1, verbose=False))
    yield result
    result.close()


@pytest.fixture(scope="module")
def tokens(draft: ModelDraft) -> list[int]:
    return list(draft.llama.tokenize(TEXT))


# -- a model --


def test_a_model_proposes_its_greedy_continuation(draft: ModelDraft, tokens: list[int]) -> None:
    proposal = draft.propose(tokens, 4)
    again = DraftLlama(draft.llama.model_path, memory="4G", n_ctx=256, n_threads=1, verbose=False)
    again.eval(tokens)
    greedy = []
    for _ in range(4):
        greedy.append(again.sample(temp=0.0))
        again.eval(greedy[-1:])
    again.close()
    assert proposal.tokens == greedy
    assert all(0 < chance <= 1 for chance in proposal.chances)


def test_rejected_tokens_are_forgotten(draft: ModelDraft, tokens: list[int]) -> None:
    """After a proposal that was wrong, it proposes what it would have without it."""
    expected = draft.propose([*tokens, 300, 301], 3)
    draft.propose(tokens, 8)
    assert draft.propose([*tokens, 300, 301], 3) == expected
    assert draft.propose(tokens[:3], 2).tokens != []


def test_what_it_followed_is_not_evaluated_again(draft: ModelDraft, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draft.propose(tokens, 3).tokens
    draft.follow(tokens[:4])
    draft.follow(tokens[:-1])
    evaluated: list[list[int]] = []
    evaluate = draft.llama.eval
    monkeypatch.setattr(draft.llama, "eval", lambda some: (evaluated.append(list(some)), evaluate(some)))
    draft.follow(tokens[:-1])
    assert not evaluated
    assert draft.propose(tokens, 3).tokens == expected
    assert evaluated[0] == tokens[-1:]


def test_a_full_draft_context_ends_proposals(draft: ModelDraft, tokens: list[int]) -> None:
    """256 tokens are its context: the last proposal may reach one beyond, which is not evaluated."""
    sequence = (tokens * 20)[:254]
    assert len(draft.propose(sequence, 9).tokens) == 3
    assert draft.propose((tokens * 20)[:257], 9) == Proposal([], [])


@pytest.mark.parametrize("of", [llama_cpp.Llama, spac.Llama])
def test_it_serves_llama_cpp(draft: ModelDraft, model_path: Path, of: type[llama_cpp.Llama]) -> None:
    """As `draft_model` of the stock class, and of ours: the text is that without it."""
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "verbose": False, "flash_attn": True}
    texts = []
    for model in (None, draft, NgramDraft()):
        llama = of(str(model_path), draft_model=model, **options)
        texts.append(llama(TEXT.decode(), max_tokens=16, temperature=0)["choices"][0]["text"])
        llama.close()
    assert texts[0] == texts[1] == texts[2] != ""


def test_the_same_vocabulary(draft: ModelDraft, dense_path: Path, tmp_path: Path) -> None:
    check_vocabulary(draft.llama, draft.llama)
    other = DraftLlama(other_vocabulary(dense_path, tmp_path), memory="4G", n_ctx=256, verbose=False)
    with pytest.raises(spac.OptionError, match=r"other.gguf: cannot draft for .*draft.gguf: token \d+ is 'QQQ', the model's is"):
        check_vocabulary(draft.llama, other)
    other.close()


def other_vocabulary(path: Path, folder: Path) -> Path:
    """A copy in which one token has another text."""
    data = path.read_bytes()
    size = (3).to_bytes(8, "little")
    assert data.count(size + b"the") >= 1
    result = folder / "other.gguf"
    result.write_bytes(data.replace(size + b"the", size + b"QQQ", 1))
    return result


# -- prompt lookup, and others' --


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 3, [4, 5, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 1, [8]),  # the latest place
        ([7, 1, 2, 9, 5, 1, 2, 8, 7, 1, 2], 1, [9]),  # the longest n-gram
        ([4, 4, 4], 4, [4, 4, 4, 4]),  # goes on with itself
        ([1, 2, 3, 1, 2, 3, 1], 7, [2, 3, 1, 2, 3, 1, 2]),
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_ngrams(tokens: list[int], n: int, expected: list[int]) -> None:
    assert NgramDraft().propose(tokens, n).tokens == expected
    grown = NgramDraft()
    for end in range(1, len(tokens)):
        grown.propose(tokens[:end], n)
    assert grown.propose(tokens, n).tokens == expected
    grown.propose([5, 6, 5, 6, 5], 2)
    assert grown.propose(tokens, n).tokens == expected


def test_drafts_of_llama_cpp_serve() -> None:
    proposal = ForeignDraft(LlamaPromptLookupDecoding(num_pred_tokens=10)).propose([1, 2, 3, 4, 5, 1, 2], 2)
    assert proposal.tokens == [3, 4]
    assert len(proposal.chances) == 2


def test_drafts_are_llama_cpps() -> None:
    draft = NgramDraft()
    assert isinstance(draft, LlamaDraftModel)
    assert draft(np.array([1, 2, 3, 1, 2], dtype=np.intc)).dtype == np.intc


def test_tokens_beyond_the_vocabulary_are_cut() -> None:
    assert Proposal([5, 9, 12, 3], [0.1] * 4).known_to(10).tokens == [5, 9]
    assert Proposal([-1], [0.5]).known_to(10).tokens == []


def test_common_prefix() -> None:
    for n in range(12):
        a, b = list(range(10)), [*range(min(n, 10)), 99, 98]
        assert common_prefix(a, b) == common_prefix(b, a) == min(n, 10)
    assert common_prefix([], [1]) == 0


# -- how far to believe them --


def test_acceptance_learns_what_a_draft_is_worth() -> None:
    """A draft that says 0.9 and is right in 60 of 100: chances become 0.6, 0.36, 0.216, though nothing is ever verified."""
    acceptance, rng = Acceptance(), random.Random(1)
    for _ in range(3000):
        acceptance.expect(Proposal([1, 1, 1], [0.9] * 3))
        acceptance.saw(1 if rng.random() < 0.6 else 0)
    assert acceptance.chances(Proposal([1, 1, 1], [0.9] * 3)) == pytest.approx([0.6, 0.36, 0.216], abs=0.08)


def test_acceptance_before_anything_was_seen_is_the_drafts_word() -> None:
    assert Acceptance().chances(Proposal([1, 2], [0.5, 0.4])) == pytest.approx([0.5, 0.2])


def test_acceptance_tells_confidence_and_position_apart() -> None:
    acceptance = Acceptance()
    for _ in range(400):
        acceptance.expect(Proposal([1, 2], [0.99, 0.4]))
        acceptance.saw(1)
        acceptance.saw(0)
        acceptance.expect(Proposal([1], [0.4]))
        acceptance.saw(1)
    assert acceptance.chance(0, 0.995) > 0.95
    assert acceptance.chance(1, 0.4) < 0.05
    assert acceptance.chance(0, 0.4) > 0.9


def test_acceptance_of_another_sequence_is_not_judged() -> None:
    acceptance = Acceptance()
    acceptance.expect(Proposal([1], [0.5]))
    acceptance.begin()
    acceptance.saw(0)
    assert acceptance.chance(0, 0.5) == pytest.approx(0.5)


def test_a_small_draft_has_one_thread(dense_path: Path) -> None:
    for bytes_of_thread, n_threads in ((draft_module.BYTES_OF_THREAD, 1), (1, 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draft_module, "BYTES_OF_THREAD", bytes_of_thread)
            llama = DraftLlama(dense_path, memory="4G", n_ctx=256, n_threads=2, verbose=False)
            assert upstream.llama_n_threads(llama._ctx.ctx) == n_threads
            llama.close()
