"""Foresight: what the engine learns, tells the pager, keeps in a file, and that it never changes an answer."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import spac
from spac import control, engine
from spac.balancer.live import HORIZON, LiveBalancer
from spac.balancer.state import Choice
from spac.bench.prompt import load as load_prompts
from spac.engine import Foresight, SignalStats, _candidates
from spac.estimator import TokenEstimator
from spac.estimator.foresight import STEP_DISCOUNT, TAIL, foresight
from spac.generate import Sampling, generate, tokenize
from spac.host.memory import MIB, resident_bytes
from spac.speculative import DraftLlama, ModelDraft, Proposal, Speculation

LIMIT = "300M"


def load(path: Path, share: float = 0.25, **options: object) -> spac.Llama:
    """The demo model with room for a share of its experts."""
    llama = spac.Llama(path, memory=LIMIT, paging="on", n_ctx=1024, n_ubatch=64, verbose=False, **options)  # type: ignore[arg-type]
    info = llama.spac.info()
    assert info is not None
    llama.spac.cap_experts(int(info.expert_page_bytes * share))
    return llama


def foresight_of(llama: spac.Llama) -> Foresight:
    found = llama._ctx.foresight
    assert isinstance(found, Foresight)
    return found


def answers(llama: spac.Llama, speculation: Speculation | None = None, n_prompts: int = 6, n_tokens: int = 80) -> list[list[int]]:
    out = []
    for prompt in load_prompts(())[:n_prompts]:
        generation, pieces = generate(llama, tokenize(llama, prompt.text), Sampling(temperature=0.6, seed=1), n_tokens, speculation)
        for _ in pieces:
            pass
        out.append(generation.token_ids)
    return out


def misses(llama: spac.Llama) -> int:
    stats = llama.spac.stats()
    assert stats is not None
    return stats.misses


@pytest.fixture
def draft(model_path: Path, dense_path: Path) -> Iterator[ModelDraft]:
    draft = ModelDraft(DraftLlama(dense_path, memory=LIMIT, n_ctx=1024, verbose=False))
    yield draft
    draft.close()


# -- arithmetic --


def test_what_the_pager_is_told() -> None:
    now = np.array([[0.5, 0.0]], np.float32)
    coming = np.array([[[1.0, 0.5]], [[1.0, 0.2]]], np.float32)
    told = foresight(now, coming)
    assert told[0] == pytest.approx(now)
    assert told[1][0] == pytest.approx([1, 0.5 + STEP_DISCOUNT * 0.5 * 0.2])
    assert told[2][0] == pytest.approx([0, TAIL * STEP_DISCOUNT**2 * 0.5 * 0.8])
    nothing = foresight(now, np.zeros((0, 1, 2), np.float32))
    assert nothing[1].tolist() == [[0, 0]]
    assert nothing[2].tolist() == [[1, 1]]  # the pager's own value is left as it is


def test_candidates_share_what_the_draft_leaves() -> None:
    proposal = Proposal([7, 8, 9], [0.5, 0.6, 0.1], [[(1, 0.25), (2, 0.001)], [(3, 0.2)], [(4, 0.3)]])
    coming = _candidates(proposal, [0.6, 0.3, 0.001], 0)
    assert [[token for token, _ in candidates] for candidates in coming] == [[7, 1], [8, 3]]
    assert coming[0][1][1] == pytest.approx((1 - 0.6) / 0.5 * 0.25)
    assert coming[1][1][1] == pytest.approx((0.6 - 0.3) / 0.4 * 0.2)
    verified = _candidates(proposal, [0.6, 0.3, 0.001], 1)  # the first one is decoded: only what follows it is a guess
    assert [[token for token, _ in candidates] for candidates in verified] == [[8, 3]]
    assert _candidates(Proposal([5], [1.0]), [1.0], 0) == [[(5, 1.0)]]
    assert _candidates(Proposal([], []), [], 0) == []


def test_precision_and_recall() -> None:
    stats = SignalStats()
    assert stats.precision is None
    assert stats.recall is None
    stats.add(np.array([[0.9, 0.6, 0.1, 0.0]], np.float32), np.array([[0, 2]]))
    assert (stats.precision, stats.recall) == (0.5, 0.5)


def test_certain_candidates_are_tokens() -> None:
    estimator = TokenEstimator(2, 8, 2)
    rng = np.random.default_rng(0)
    estimator.learn(rng.integers(0, 5, 200), np.argsort(rng.random((200, 2, 8)))[..., :2])
    known = estimator.probabilities([1, 2])
    assert estimator.of_candidates([[(1, 1.0)], [(2, 1.0)]]) == pytest.approx(known)
    assert estimator.of_candidates([[(1, 0.2)]])[0] == pytest.approx(known[0])  # given that it comes
    mixture = estimator.of_candidates([[(1, 0.5), (2, 0.25)]])[0]
    assert not np.allclose(mixture, known[0])
    assert (mixture > 0).all()
    assert (mixture < 1).all()


# -- in a run --


def test_answers_do_not_change_and_fewer_experts_are_missed(
    model_path: Path, draft: ModelDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft only senses: nothing is verified. Reads ahead are off, so that misses are exactly repeatable."""
    monkeypatch.setattr(engine, "READ_FROM", engine.NEVER)
    seen: dict[str, int] = {}
    texts = []
    for name, signals, speculation in (("none", (), None), ("all", ("tokens", "draft"), Speculation(draft, 0, horizon=HORIZON))):
        llama = load(model_path, signals=signals)
        texts.append(answers(llama, speculation))
        seen[name] = misses(llama)
        if signals:
            assert foresight_of(llama).estimator.tokens_learned > 300
            stats = llama.spac.signals()
            assert 0.2 < (stats["tokens"].recall or 0) <= 1
            assert 0.5 < (stats["tokens"].precision or 0) <= 1
            assert 0 < (stats["draft"].recall or 0) < (stats["tokens"].recall or 0)
        else:
            assert llama.spac.signals() == {}
        llama.close()
    assert texts[0] == texts[1]
    assert seen["all"] < 0.98 * seen["none"]


@pytest.mark.parametrize("signal", ["tokens", "draft"])
def test_each_signal_alone_changes_no_answer(model_path: Path, draft: ModelDraft, signal: str) -> None:
    llama = load(model_path, signals=())
    expected = answers(llama, None, n_prompts=1)
    llama.close()
    llama = load(model_path, signals=(signal,))
    balancer = foresight_of(llama).balancer
    balancer.close()
    balancer.has_drafted, balancer.choice = True, Choice(drafted=HORIZON, depth=1)  # reads ahead, or "tokens" is not asked
    assert answers(llama, Speculation(draft, 0, horizon=HORIZON), n_prompts=1) == expected
    assert list(llama.spac.signals()) == [signal]
    assert llama.spac.signals()[signal].used > 0
    llama.close()


def test_verified_tokens_teach_like_others(model_path: Path, draft: ModelDraft) -> None:
    llama = load(model_path)
    text = answers(llama, Speculation(draft, 2, horizon=2), n_prompts=1, n_tokens=60)
    learned = foresight_of(llama).estimator.tokens_learned
    assert len(text[0]) - 4 <= learned <= len(text[0])
    llama.close()


def test_a_failed_decode_teaches_nothing(model_path: Path) -> None:
    llama = load(model_path, share=0.1, store="mock")
    answers(llama, n_prompts=1, n_tokens=20)
    learned = foresight_of(llama).estimator.tokens_learned
    control.check(control.spac_mock_fail_reads(llama.spac.model_id, 0, 1000, 5))
    with pytest.raises(spac.ExpertReadError):
        answers(llama, n_prompts=2, n_tokens=20)
    control.check(control.spac_mock_fail_reads(llama.spac.model_id, 0, 0, 0))
    answers(llama, n_prompts=1, n_tokens=20)
    assert foresight_of(llama).estimator.tokens_learned > learned
    llama.close()


def test_drafts_are_not_made_where_nothing_is_waited_for(model_path: Path, draft: ModelDraft) -> None:
    llama = load(model_path, share=1.0)
    speculation = Speculation(draft, 0)
    answers(llama, speculation, n_prompts=1, n_tokens=200)
    assert llama.spac.horizon() == 0
    llama.close()


def test_a_draft_is_not_asked_before_a_decode_waited_long_for_reads(
    model_path: Path, draft: ModelDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(ModelDraft, "propose", lambda _, sequence, n: asked.append(n) or Proposal([], []))
    llama = load(model_path, share=0.5)
    speculation = Speculation(draft, 0)
    for waits in (False, True):
        monkeypatch.setattr(LiveBalancer, "waits_for_reads", waits)
        answers(llama, speculation, n_prompts=1, n_tokens=HORIZON + 2)
        assert asked[:1] == [HORIZON] * waits
    llama.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_what_is_read_ahead_is_the_balancers_choice(model_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    llama = load(model_path)
    answers(llama, n_prompts=2)
    told: list[float] = []
    monkeypatch.setattr(control, "foresee", lambda _, __, read_from: told.append(read_from))
    engine = foresight_of(llama)
    engine.balancer.close()  # a plan that is still being made would come after this choice
    engine.balancer.choice = Choice(depth=depth)
    engine.before(llama.n_tokens, [5])
    assert told == ([0.9] if depth else [])
    llama.close()


def test_each_prompt_is_another_text_for_the_balancer(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[LiveBalancer] = []
    monkeypatch.setattr(LiveBalancer, "begin", lambda self: begun.append(self))
    llama = load(model_path)
    llama.eval(list(range(3, 20)))
    n = len(begun)
    assert n > 0
    llama.eval([5])
    llama.eval([6])
    assert len(begun) == n
    llama.eval(list(range(3, 20)))
    assert len(begun) > n
    llama.close()


def test_the_balancer_plans_while_tokens_come(model_path: Path, draft: ModelDraft) -> None:
    """And its thread ends with the model."""
    llama = load(model_path)
    answers(llama, Speculation(draft), n_prompts=2, n_tokens=40)
    balancer = llama.spac.balancer()
    assert balancer is not None
    llama.close()
    assert balancer.plans >= 1
    assert balancer.choice is not None
    assert "spac-balancer" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(("reading_s", "wanted"), [(0.02, 0), (0.01, 4)])
def test_where_decoding_waits_for_reads_nothing_is_drafted_to_be_verified(
    model_path: Path, draft: ModelDraft, reading_s: float, wanted: int
) -> None:
    llama = load(model_path)
    measured = foresight_of(llama).balancer.measured
    measured.compute_s[0].add(0.015)
    measured.reading_s.add(reading_s)
    assert Speculation(draft)._most_verified(llama) == wanted
    assert Speculation(draft, 3)._most_verified(llama) == 64  # asked for
    llama.close()


def test_a_draft_that_is_given_back_leaves_its_memory_to_experts(model_path: Path, dense_path: Path) -> None:
    """The answer goes on as if nothing had happened."""
    limit = resident_bytes() + 80 * MIB
    draft = ModelDraft(DraftLlama(dense_path, memory=limit, n_ctx=8192, verbose=False))
    llama = spac.Llama(model_path, memory=limit, paging="on", n_ctx=1024, n_ubatch=64, verbose=False)
    speculation = Speculation(draft, 0)
    assert draft.held_bytes > 0
    speculation.check(llama)
    balancer = llama.spac.balancer()
    assert balancer is not None
    assert balancer.draft_bytes == draft.held_bytes
    balancer.draft_bytes = 0  # or it would be given back already
    expected = answers(llama, speculation, n_prompts=1)
    before = llama.spac.stats()
    assert before is not None
    balancer.gives_back = True
    assert answers(llama, speculation, n_prompts=1) == expected
    after = llama.spac.stats()
    assert speculation.draft is None
    assert speculation.stats.given_back_bytes == draft.held_bytes
    assert after is not None
    assert after.granted_bytes > before.granted_bytes
    llama.close()


def test_numbers_that_are_no_probabilities_are_refused(model_path: Path) -> None:
    llama = load(model_path)
    good = np.zeros((3, 10, 32), np.float32)
    assert control.foresee(llama.spac.model_id, good, 0.9) == 0
    good[0, 3, 5] = 1
    assert control.foresee(llama.spac.model_id, good, 0.9) == 3  # slices queued
    for value in (np.nan, -0.1, 1.5, np.inf):
        bad = good.copy()
        bad[0, 2, 2] = value
        with pytest.raises(spac.SpacError, match="no probability"):
            control.foresee(llama.spac.model_id, bad, 0.9)
    with pytest.raises(spac.SpacError, match="320 bundles"):
        control.foresee(llama.spac.model_id, good[:, :5], 0.9)
    with pytest.raises(spac.SpacError):
        control.check(control.spac_model_foresee(llama.spac.model_id, ctypes.POINTER(ctypes.c_float)(), None, None, 320, 0.9))
    llama.close()


def test_unknown_signals(model_path: Path) -> None:
    with pytest.raises(spac.OptionError, match="signal 'stars' does not exist: use tokens, draft"):
        load(model_path, signals=("stars",))


# -- what was learned is kept --


def test_learned_from_one_run_to_the_next(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "learned.npz"
    llama = load(model_path, learned=file)
    first = answers(llama, n_prompts=2)
    learned = foresight_of(llama).estimator.tokens_learned
    llama.close()
    assert file.is_file()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    again = load(model_path, learned=file)
    assert foresight_of(again).estimator.tokens_learned == learned
    assert answers(again, n_prompts=2) == first
    again.close()
    before = file.stat().st_mtime_ns
    load(model_path, learned=file).close()  # nothing new
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\3\4 broken"])
def test_a_broken_file_is_ignored_with_a_warning(
    model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    file = tmp_path / "learned.npz"
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        llama = load(model_path, learned=file)
    assert foresight_of(llama).estimator.tokens_learned == 0
    llama.close()
    assert len(caplog.records) == 1
    assert str(file) in caplog.text


def test_another_models_file_is_ignored(model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from spac.estimator import save

    estimator = TokenEstimator(10, 32, 4)
    estimator.learn(np.zeros(1, np.int64), np.tile(np.arange(4), (1, 10, 1)))
    save(estimator, tmp_path / "learned.npz", "someone else's")
    with caplog.at_level(logging.WARNING):
        llama = load(model_path, learned=tmp_path / "learned.npz")
    assert foresight_of(llama).estimator.tokens_learned == 0
    assert "another model" in caplog.text
    llama.close()


def test_a_file_that_cannot_be_written(model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    llama = load(model_path, learned=tmp_path / "file" / "learned.npz")
    answers(llama, n_prompts=1, n_tokens=60)
    with caplog.at_level(logging.WARNING):
        llama.close()
    assert "cannot be kept" in caplog.text
