"""The token signal on made-up routing: what it learns, what it refuses, what it keeps, and its files.

.venv/bin/python -m pytest tests/estimator
"""

from __future__ import annotations

import logging
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spac import control
from spac.errors import OptionError
from spac.estimator import Reliability, RoutingMemory, TokenEstimator, load, save
from spac.estimator.memory import NO_TOKEN, PAIR_WINDOW, TOKEN_WINDOW

LAYERS, EXPERTS, USED = 3, 8, 2
NONE = NO_TOKEN


def make() -> TokenEstimator:
    return TokenEstimator(LAYERS, EXPERTS, USED, memory_bytes=1 << 20)


def routing(first: int) -> np.ndarray:
    """Experts `first` and the next one, in every layer."""
    return np.tile(np.array([first, (first + 1) % EXPERTS]), (LAYERS, 1))


def taught(estimator: TokenEstimator, sequence: list[tuple[int, int]]) -> TokenEstimator:
    """Learns (token, first expert) pairs, one by one."""
    for token, first in sequence:
        estimator.learn([token], routing(first)[None])
    return estimator


def best(estimator: TokenEstimator, token: int) -> int:
    """The first of the two experts most expected in the last layer."""
    p = estimator.probabilities([token])[0, -1]
    return int(np.argmax(p + np.roll(p, -1)))


def test_nothing_learned_predicts_uniform_use() -> None:
    p = make().predict([5])
    assert p.shape == (LAYERS, EXPERTS)
    assert p.dtype == np.float32
    assert np.ptp(p) == 0


def test_a_token_seen_predicts_its_experts() -> None:
    estimator = taught(make(), [(1, 0), (2, 4), (1, 0), (2, 4), (1, 0)])
    estimator.start_request()
    assert best(estimator, 1) == 0
    assert best(estimator, 2) == 4


def test_the_token_before_decides_where_it_was_seen() -> None:
    """Token 9 uses other experts after 1 than after 2."""
    estimator = make()
    for _ in range(6):
        for previous, first in ((1, 0), (2, 4)):
            estimator.start_request()
            taught(estimator, [(previous, 6), (9, first)])
    for previous, first in ((1, 0), (2, 4)):
        estimator.start_request()
        taught(estimator, [(previous, 6)])
        assert best(estimator, 9) == first


def test_coming_tokens_are_each_others_context() -> None:
    estimator = make()
    for _ in range(6):
        for previous, first in ((1, 0), (2, 4)):
            estimator.start_request()
            taught(estimator, [(previous, 6), (9, first)])
    estimator.start_request()
    after_1, after_2 = estimator.probabilities([1, 9])[1, 0], estimator.probabilities([2, 9])[1, 0]
    assert after_1[0] > after_1[4]
    assert after_2[4] > after_2[0]


def test_expected_use_is_the_weighted_sum() -> None:
    estimator = taught(make(), [(1, 0), (2, 4), (3, 6)])
    p = estimator.probabilities([1, 2])
    np.testing.assert_allclose(estimator.predict([1, 2], [0.5, 0.25]), 0.5 * p[0] + 0.25 * p[1], rtol=1e-5)
    np.testing.assert_allclose(estimator.predict([1, 2]), p.sum(0), rtol=1e-5)


def test_no_token_no_use() -> None:
    assert not make().predict([]).any()


def test_predicting_changes_nothing() -> None:
    estimator = taught(make(), [(1, 0), (2, 4)])
    before = estimator.probabilities([1, 2, 3])
    estimator.predict([4, 5, 6])
    np.testing.assert_array_equal(estimator.probabilities([1, 2, 3]), before)


def test_a_batch_teaches_what_its_tokens_teach() -> None:
    one, batch = taught(make(), [(1, 0), (2, 4), (1, 2)]), make()
    batch.learn([1, 2, 1], np.stack([routing(0), routing(4), routing(2)]))
    np.testing.assert_array_equal(one.probabilities([1, 2]), batch.probabilities([1, 2]))


def test_drift_favours_what_is_used_more_than_predicted() -> None:
    """New tokens all use expert 5; so will the next, which nobody has seen."""
    estimator = taught(make(), [(token, token % 4) for token in range(40)])
    before = estimator.probabilities([999])[0, :, 5].mean()
    taught(estimator, [(token, 5) for token in range(100, 112)])
    assert estimator.probabilities([999])[0, :, 5].mean() > 2 * before


def test_links_tell_of_a_pair_never_seen() -> None:
    """What the token before used decides, whatever the token is; the pair tested was never learned."""
    rng = np.random.default_rng(0)
    estimator, bare = make(), TokenEstimator(LAYERS, EXPERTS, USED, memory_bytes=1 << 20, rank=0)
    for learner in (estimator, bare):
        for _ in range(800):
            learner.start_request()
            leader = int(rng.integers(2))
            taught(learner, [(leader, 4 * leader), (int(rng.integers(2, 40)), 2 + 4 * leader)])
    rates = []
    for learner in (estimator, bare):
        learner.start_request()
        taught(learner, [(0, 0)])
        p = learner.probabilities([77])[0]
        rates.append(p[:, 2].mean() / p[:, 6].mean())
    linked, unlinked = rates
    assert linked > 1.5 * unlinked


def test_probabilities_are_calibrated() -> None:
    """Half of the uses of a token go one way, half the other: no probability may be far from what happens."""
    rng = np.random.default_rng(1)
    estimator, reliability = make(), Reliability()
    for step in range(1500):
        token = int(rng.integers(10))
        experts = routing((token + 4 * int(rng.integers(2))) % EXPERTS)
        if step >= 500:
            reliability.add(estimator.probabilities([token])[0], experts)
        estimator.learn([token], experts[None])
    assert sum(b.count for b in reliability.bins()) == 1000 * LAYERS * EXPERTS
    assert reliability.error() < 0.06


@pytest.mark.parametrize(
    ("tokens", "experts", "says"),
    [
        ([1], np.zeros((1, LAYERS, USED + 1), int), "expected"),
        ([1, 2], np.zeros((1, LAYERS, USED), int), "expected"),
        ([1], np.full((1, LAYERS, USED), EXPERTS), "out of range"),
        ([1], np.full((1, LAYERS, USED), -1), "out of range"),
        ([-1], np.zeros((1, LAYERS, USED), int), "out of range"),
        ([1], np.zeros((1, LAYERS, USED)), "integers"),
    ],
)
def test_bad_batches_are_refused_whole(tokens: list[int], experts: np.ndarray, says: str) -> None:
    estimator = make()
    with pytest.raises(OptionError, match=says) as caught:
        estimator.learn(tokens, experts)
    assert "\n" not in str(caught.value)
    assert len(estimator.memory) == estimator.tokens_learned == 0


def test_bad_shapes_and_weights_are_refused() -> None:
    with pytest.raises(OptionError, match="shape"):
        TokenEstimator(2, 4, 5)
    with pytest.raises(OptionError, match="do not hold"):
        TokenEstimator(48, 128, 8, memory_bytes=1 << 20)
    with pytest.raises(OptionError, match="2 weights for 1"):
        make().predict([1], [1, 2])


def test_an_empty_batch_is_nothing() -> None:
    estimator = make()
    estimator.learn([], np.zeros((0, LAYERS, USED), int))
    assert estimator.tokens_learned == 0


# --- memory


def small_memory(observations: int, n_layers: int = 1, n_experts: int = 4, n_used: int = 1) -> RoutingMemory:
    probe = RoutingMemory(n_layers, n_experts, n_used, 1 << 20)
    return RoutingMemory(n_layers, n_experts, n_used, -(-(1 << 20) // probe.capacity) * observations)


def test_a_frequent_token_keeps_its_window_only() -> None:
    memory = RoutingMemory(1, 4, 1, 1 << 20)
    for i in range(200):
        memory.add(7, NONE, NONE, 0, np.array([[i % 4]]))
    assert len(memory) == TOKEN_WINDOW


def test_a_pair_outlives_its_token_window() -> None:
    memory = RoutingMemory(1, 4, 1, 1 << 20)
    memory.add(7, 3, NONE, 0, np.array([[2]]))
    for _ in range(TOKEN_WINDOW + 5):
        memory.add(7, 5, NONE, 0, np.array([[1]]))
    assert (memory.ids[memory.recall([(7, 3, NONE)], 1).slots] == 2).any()
    assert len(memory) <= TOKEN_WINDOW + PAIR_WINDOW


def test_rare_rows_go_first_when_full() -> None:
    memory = small_memory(20)
    assert memory.capacity == 20
    for i in range(100):
        memory.add(1000 + i, NONE, NONE, 0, np.array([[0]]))
        memory.add(7, NONE, NONE, 0, np.array([[1]]))
    assert 19 <= len(memory) <= 20  # one may just have become free
    assert len(memory.recall([(7, NONE, NONE)], 0).slots) > 8
    assert not len(memory.recall([(1000, NONE, NONE)], 0).slots)


def test_weights_sum_to_one() -> None:
    memory = RoutingMemory(1, 4, 1, 1 << 20)
    for i in range(60):
        memory.add(i % 3, i % 2, i % 5, i // 20, np.array([[i % 4]]))
    contexts = [(0, 1, 2), (1, 0, NONE), (2, NONE, NONE), (50, 1, 1)]
    for request in range(3):
        recall = memory.recall(contexts, request)
        assert np.bincount(recall.owners, recall.weights, len(contexts)) + recall.rest == pytest.approx(np.ones(4))
        for i, context in enumerate(contexts):
            alone = memory.recall([context], request)
            assert (alone.slots.tolist(), alone.weights.tolist()) == (recall.slots[recall.owners == i].tolist(), recall.weights[recall.owners == i].tolist())


def test_memory_is_bounded() -> None:
    """48 × 128 with tokens and pairs that hardly repeat, the worst case: all that it holds stays below the limit."""
    limit = 16 << 20
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 128, (48, 8)).astype(np.uint8)
    tracemalloc.start()
    try:
        estimator = TokenEstimator(48, 128, 8, memory_bytes=limit)
        n = int(2.5 * estimator.memory.capacity)
        tokens = [NONE, NONE, *rng.integers(0, 150_000, n).tolist()]
        for before, previous, token in zip(tokens, tokens[1:], tokens[2:], strict=False):
            estimator.memory.add(token, previous, before, 0, ids)
        estimator.learn([1], ids[None])
        assert len(estimator.memory) == estimator.memory.capacity
        assert tracemalloc.get_traced_memory()[0] < limit
    finally:
        tracemalloc.stop()


# --- files


@pytest.fixture
def saved(tmp_path: Path) -> tuple[TokenEstimator, Path]:
    estimator = taught(make(), [(i % 7, i % 5) for i in range(200)])
    path = tmp_path / "tables.npz"
    save(estimator, path, "model")
    return estimator, path


def test_what_was_saved_is_known_again(saved: tuple[TokenEstimator, Path]) -> None:
    estimator, path = saved
    other = make()
    assert load(other, path, "model")
    for each in (estimator, other):
        each.start_request()
        each._drifts[:] = 0
    np.testing.assert_allclose(other.probabilities([0, 1, 2, 99]), estimator.probabilities([0, 1, 2, 99]), rtol=1e-5)
    assert other.tokens_learned == 200
    assert [path] == list(path.parent.iterdir())


def test_learning_goes_on_after_loading(saved: tuple[TokenEstimator, Path]) -> None:
    """Rows, windows and free observations are those of an estimator that never stopped."""
    estimator, path = saved
    other = make()
    load(other, path, "model")
    for each in (estimator, other):
        each.start_request()
        each._drifts[:] = 0
        taught(each, [(i % 11, i % 3) for i in range(100)])
    assert len(other.memory) == len(estimator.memory)
    np.testing.assert_allclose(other.probabilities([0, 1, 9]), estimator.probabilities([0, 1, 9]), rtol=1e-4)


def test_no_file_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not load(make(), tmp_path / "none.npz", "model")
    assert not caplog.records


def damage(path: Path, **arrays: np.ndarray | None) -> None:
    """Rewrites the file with some arrays replaced, or left out."""
    with np.load(path) as file:
        kept = {**dict(file), **arrays}
    np.savez(path, **{name: array for name, array in kept.items() if array is not None})


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": None},
        {"more": np.zeros(3)},
        {"format": np.int64(99)},
        {"shape": np.array([LAYERS, EXPERTS, USED, 3])},
        {"tokens_learned": np.int64(-1)},
        {"prior": np.full(LAYERS * EXPERTS, np.nan, np.float32)},
        {"prior": np.full(LAYERS * EXPERTS, 2, np.float32)},
        {"links_out": np.zeros((2, 2), np.float32)},
        {"layer_weights": np.full((4, LAYERS), np.inf, np.float32)},
        {"ids": np.full((1, LAYERS * USED), 250, np.uint8)},
        {"ids": np.zeros((1, LAYERS * USED), np.uint8)},
        {"ids": np.zeros((1, LAYERS * USED), np.int64)},
        {"ids": np.array([[None]], object)},
        {"context": np.full((1, 3), -5, np.int64)},
        {"context": np.array([[[1]]])},
        {"context": np.array([None, "x"], object)},
    ],
)
def test_damaged_arrays_are_ignored(
    saved: tuple[TokenEstimator, Path], caplog: pytest.LogCaptureFixture, arrays: dict[str, np.ndarray | None]
) -> None:
    _, path = saved
    damage(path, **arrays)
    refused(path, "model", caplog)


def test_foreign_and_broken_files_are_ignored(saved: tuple[TokenEstimator, Path], caplog: pytest.LogCaptureFixture) -> None:
    _, path = saved
    refused(path, "another model", caplog)
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:200] + b"\0" * 200 + whole[400:]):
        path.write_bytes(content)
        refused(path, "model", caplog)


def test_a_file_that_would_inflate_beyond_measure_is_not_inflated(saved: tuple[TokenEstimator, Path], caplog: pytest.LogCaptureFixture) -> None:
    _, path = saved
    with np.load(path) as file:
        arrays = {**dict(file), "ids": np.zeros((100_000_000, 1), np.uint8)}
    np.savez_compressed(path, **arrays)
    refused(path, "model", caplog)
    assert "more than" in caplog.text


def test_an_archive_that_numpy_did_not_write_so_is_ignored(saved: tuple[TokenEstimator, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Compressed members, names without their suffix, and ids that are longer or shorter than their header says."""
    _, path = saved
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    ids = members["ids.npy"]
    for changed, compression in (
        (members, zipfile.ZIP_DEFLATED),
        ({name.removesuffix(".npy"): data for name, data in members.items()}, zipfile.ZIP_STORED),
        ({**members, "ids.npy": ids + b"\0"}, zipfile.ZIP_STORED),
        ({**members, "ids.npy": ids[:-1]}, zipfile.ZIP_STORED),
        ({**members, "ids.npy": ids[:20]}, zipfile.ZIP_STORED),
        ({**members, "ids.npy": b""}, zipfile.ZIP_STORED),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
        refused(path, "model", caplog)


def test_of_more_than_fits_the_last_is_kept(tmp_path: Path) -> None:
    """A file learned in more memory: what is loaded goes first, oldest first, unless it is seen again."""
    big, other = make(), make()
    big.memory, other.memory = small_memory(40, LAYERS, EXPERTS, USED), small_memory(10, LAYERS, EXPERTS, USED)
    for i in range(2, 30):
        big.memory.add(i, i - 1, i - 2, 0, np.full((LAYERS, USED), i % EXPERTS))
    save(big, tmp_path / "tables.npz", "model")
    assert load(other, tmp_path / "tables.npz", "model")

    def known() -> list[int]:
        return [i for i in range(200) if len(other.memory.recall([(i, NONE, NONE)], 0).slots)]

    assert known() == list(range(20, 30))
    for i in known():
        (slot,) = other.memory.recall([(i, i - 1, i - 2)], 0).slots
        assert (other.memory.ids[slot] == i % EXPERTS).all()
    other.memory.add(20, NONE, NONE, 0, np.zeros((LAYERS, USED), int))
    for i in range(100, 105):
        other.memory.add(i, NONE, NONE, 0, np.zeros((LAYERS, USED), int))
    assert known() == [20, *range(26, 30), *range(100, 105)]


def test_loading_is_logged(saved: tuple[TokenEstimator, Path], caplog: pytest.LogCaptureFixture) -> None:
    estimator, path = saved
    with caplog.at_level(logging.INFO):
        load(make(), path, "model")
    assert f"{path}: tables of {len(estimator.memory)} tokens loaded in " in caplog.text


def refused(path: Path, model: str, caplog: pytest.LogCaptureFixture) -> None:
    """The file changes nothing and is named in one warning line."""
    caplog.clear()
    estimator = make()
    assert not load(estimator, path, model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(estimator.memory) == estimator.tokens_learned == 0
    assert np.ptp(estimator.probabilities([1])) == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_observations_are_counted(kind: type[np.unsignedinteger[Any]]) -> None:
    rng = np.random.default_rng(0)
    n_layers, n_experts, k = 3, 300 if kind is np.uint16 else 60, 4
    ids = rng.integers(0, n_experts, (50, n_layers * k)).astype(kind)
    observations, owners, weights = rng.integers(0, 50, 200), rng.integers(0, 5, 200), rng.random(200)
    counts = rng.random((5, n_layers, n_experts), np.float32)
    expected = counts.astype(np.float64)
    layers = np.repeat(np.arange(n_layers), k)
    np.add.at(expected, (owners[:, None], layers, ids[observations]), weights[:, None])
    control.count_routing(ids, observations, owners, weights, counts)
    np.testing.assert_allclose(counts, expected, rtol=1e-5)
