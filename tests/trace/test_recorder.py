"""Recording from the demo model: the trace is what the pager saw, and recording changes no answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import spac
from spac.errors import LibraryError
from spac.gguf.check import check_model
from spac.stats import RoutedLayer
from spac.trace.recorder import Recorder, _Batch
from spac.trace.simulation import replay
from tests.conftest import MODELS

PROMPT = list(range(100, 140))


def record(path: Path, **options: object) -> tuple[spac.Llama, list[int]]:
    llama = spac.Llama(path, n_ctx=256, n_threads=1, verbose=False, **options)
    llama.eval(PROMPT)
    answer = []
    for _ in range(12):
        token = llama.sample(temp=0)
        answer.append(token)
        llama.eval([token])
    return llama, answer


def test_paged_or_not_the_trace_is_the_same(model_path: Path) -> None:
    traces, answers = [], []
    for paging in ("off", "on"):
        llama, answer = record(model_path, paging=paging, record_routing=True, n_ubatch=16)
        assert llama.spac.recorder is not None
        traces.append(llama.spac.recorder.trace())
        answers.append(answer)
        llama.close()
    llama, plain = record(model_path, paging="on", n_ubatch=16)
    llama.close()
    assert answers == [plain, plain]
    first, second = traces
    for name in ("ids", "weights", "seq", "pos", "phase", "token_ids", "ubatch"):
        assert (getattr(first, name) == getattr(second, name)).all(), name
    assert first.ids.shape == (52, 10, 4)
    assert first.token_ids.tolist() == PROMPT + plain
    assert first.pos.tolist() == list(range(52))
    assert np.bincount(first.ubatch).tolist() == [16, 16, 8] + [1] * 12
    assert np.bincount(first.phase).tolist() == [40, 12]
    # the last layer computes only the token whose output is wanted; routers' weights add up to one
    computed = first.ids[:, 9, 0] < 32
    assert computed.tolist() == [False] * 39 + [True] * 13
    assert np.allclose(first.weights[computed].astype(float).sum(axis=2), 1, atol=0.01)
    assert (np.sort(first.ids[computed], axis=2)[:, :, 1:] != np.sort(first.ids[computed], axis=2)[:, :, :-1]).all()
    assert (first.expert_s > 0).all()
    assert (first.ubatch_s >= first.expert_s.sum(axis=1) * 0.99).all() or first.ubatch_s[:3].sum() >= first.expert_s[:3].sum()


def test_a_replay_counts_what_the_pager_counted(model_path: Path) -> None:
    """With room for everything: every bundle missed once, in the replay and in the pager."""
    llama, _ = record(model_path, paging="on", record_routing=True, memory="1G")
    stats, recorder = llama.spac.stats(), llama.spac.recorder
    assert stats is not None
    assert recorder is not None
    result = replay(recorder.trace(), 320)
    assert (result.hits, result.misses) == (stats.hits, stats.misses)
    llama.close()


def test_requests_and_phases_are_marked(model_path: Path) -> None:
    llama, _ = record(model_path, record_routing=True)
    recorder = llama.spac.recorder
    assert recorder is not None
    recorder.clear()
    recorder.phase = "verify"
    llama.eval([5, 6, 7])
    recorder.phase = None
    llama.reset()
    llama._ctx.kv_cache_seq_rm(-1, 0, -1)
    llama.eval([8])
    trace = recorder.trace()
    assert trace.phase.tolist() == [3, 3, 3, 1]
    assert trace.seq.tolist() == [0, 0, 0, 1]
    llama.close()


def test_a_dense_model_records_nothing(dense_path: Path) -> None:
    llama = spac.Llama(dense_path, n_ctx=64, record_routing=True, verbose=False)
    llama.eval([1, 2, 3])
    assert llama.spac.recorder is not None
    assert llama.spac.recorder.trace().n_tokens == 0
    llama.close()


def test_a_router_that_is_asked_twice_is_refused() -> None:
    """Some models route twice in a block: such records would be taken for two ubatches."""
    batch = _Batch([5, 6], [0, 1], [False, True], 0, 0, 0.1)
    recorder = Recorder(check_model(MODELS / "spac-demo-moe.gguf"))
    layers = [RoutedLayer(layer, np.zeros((2, 4), np.uint16), np.zeros((2, 4), np.float32), 0.0) for layer in (0, 0, 1, 1)]
    with pytest.raises(LibraryError, match="routes more than once"):
        recorder._add(batch, layers)
    assert recorder.trace().n_tokens == 0
    recorder.close()
