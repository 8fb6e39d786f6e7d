"""Paging is bit-exact: the same library, with and without it, gives the same logits.

Every case compares all logits of a 320-token prompt (enough rows for each expert that batched kernels take over) and of
twelve greedy tokens after it. Both sides repack weights, or neither does: repacked kernels round differently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import spac
from spac.gguf.inflate import inflate
from spac.stats import ModelStats

N_PROMPT, N_DECODED = int(os.environ.get("SPAC_EXACT_PROMPT", 320)), 12  # fewer in an emulator: scripts/cross test
SHARES = [1.0, 0.5, 0.25, 0.12, 0.0]  # of all experts; 0: the floor
TYPES = ["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"]
REPACKED_TYPES = ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"]  # on some CPU

Logits = npt.NDArray[np.float32]
Reference = Callable[..., Logits]


@pytest.fixture(scope="module")
def model_of(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The demo model with its experts in another type, made once."""
    folder = tmp_path_factory.mktemp("types")
    made: dict[str, Path] = {}

    def make(expert_type: str) -> Path:
        if expert_type not in made:
            path = folder / f"{expert_type}.gguf"
            assert inflate(model_path, path, expert_type=expert_type, factor=1).expert_type == expert_type
            made[expert_type] = path
        return made[expert_type]

    yield make
    for path in made.values():
        path.unlink()


def evaluate(llama: spac.Llama) -> Logits:
    """All logits [token, vocabulary] of the prompt and of greedy tokens after it."""
    llama.eval(np.random.default_rng(5).integers(300, 4000, N_PROMPT).tolist())
    for _ in range(N_DECODED):
        llama.eval([int(np.argmax(llama.scores[llama.n_tokens - 1]))])
    return np.array(llama.scores[: llama.n_tokens])


def load(path: Path, **options: object) -> spac.Llama:
    defaults = {"n_ctx": 512, "logits_all": True, "verbose": False, "n_threads": 2, "repack": False}
    return spac.Llama(path, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference(model_of: Callable[[str], Path]) -> Reference:
    """Logits without paging, computed once for each set of options."""
    known: dict[object, Logits] = {}

    def compute(expert_type: str, **options: object) -> Logits:
        key = (expert_type, *sorted(options.items()))
        if key not in known:
            llama = load(model_of(expert_type), paging="off", **options)
            known[key] = evaluate(llama)
            llama.close()
        return known[key]

    return compute


def paged(path: Path, share: float, **options: object) -> tuple[Logits, ModelStats]:
    """Logits and counters with that share of the experts as budget, from cold."""
    llama = load(path, memory="8G", paging="on", **options)
    info = llama.spac.info()
    assert info is not None
    llama.spac.cap_experts(max(info.floor_bytes, int(share * info.expert_page_bytes)))
    try:
        logits = evaluate(llama)
        stats = llama.spac.stats()
        assert stats is not None
        assert stats.peak_bytes <= stats.budget_bytes
        return logits, stats
    finally:
        llama.close()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("expert_type", TYPES)
def test_types_and_budgets(model_of: Callable[[str], Path], reference: Reference, expert_type: str, share: float) -> None:
    path = model_of(expert_type)
    found = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors if "_exps" in t.name}
    assert found == {expert_type}
    logits, stats = paged(path, share)
    assert np.array_equal(logits, reference(expert_type))
    assert stats.misses > 0


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("expert_type", REPACKED_TYPES)
def test_repacked(model_of: Callable[[str], Path], reference: Reference, expert_type: str, share: float) -> None:
    """Experts that are repacked when they are read are those of a model that llama.cpp repacked while loading."""
    logits, stats = paged(model_of(expert_type), share, repack=True)
    assert np.array_equal(logits, reference(expert_type, repack=True))
    assert stats.misses > 0


def test_what_is_repacked(model_of: Callable[[str], Path], reference: Reference) -> None:
    """On a CPU that has kernels for it, Q4_0 is repacked, and rounds differently; F16 and a mapped file never are."""

    def n_repacked(expert_type: str, **options: object) -> int:
        llama = load(model_of(expert_type), memory="8G", paging="on", **options)
        info = llama.spac.info()
        llama.close()
        assert info is not None
        return info.n_repacked

    assert n_repacked("Q4_0", repack=False) == 0
    assert n_repacked("Q4_0", repack=True, store="mmap") == 0
    assert n_repacked("F16", repack=True) == 0
    if n_repacked("Q4_0", repack=True):
        assert not np.array_equal(reference("Q4_0", repack=True), reference("Q4_0"))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("store", ["buffered", "mmap"])
def test_stores(model_of: Callable[[str], Path], reference: Reference, store: str, share: float) -> None:
    logits, _ = paged(model_of("Q4_0"), share, store=store)
    assert np.array_equal(logits, reference("Q4_0"))


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("n_ubatch", [1, 32, 512])
@pytest.mark.parametrize("repack", [False, True])
def test_ubatches(model_of: Callable[[str], Path], reference: Reference, repack: bool, n_ubatch: int, share: float) -> None:
    """Waves: below the working set of a ubatch, slices come and go within it."""
    logits, stats = paged(model_of("Q4_K"), share, n_ubatch=n_ubatch, repack=repack)
    assert np.array_equal(logits, reference("Q4_K", n_ubatch=n_ubatch, repack=repack))
    if share < 1:
        assert stats.evictions > 0
        assert stats.rereads > 0


@pytest.mark.parametrize("share", [0.25, 0.0])
@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("repack", [False, True])
def test_threads(model_of: Callable[[str], Path], reference: Reference, repack: bool, n_threads: int, share: float) -> None:
    logits, _ = paged(model_of("Q4_0"), share, n_threads=n_threads, repack=repack)
    assert np.array_equal(logits, reference("Q4_0", n_threads=n_threads, repack=repack))


def test_split_files(model_path: Path, reference: Reference, tmp_path: Path) -> None:
    """A model of several files is paged from all of them."""
    split = inflate(model_path, tmp_path / "split.gguf", expert_type="Q4_0", factor=1, n_splits=3)
    assert len(split.paths) == 3
    logits, _ = paged(split.paths[0], 0.25)
    assert np.array_equal(logits, reference("Q4_0"))


def test_two_models_share_the_budget(model_of: Callable[[str], Path], reference: Reference) -> None:
    """Two models, one budget for both: both exact, turn by turn."""
    models = [load(model_of(t), memory="8G", paging="on") for t in ("Q4_0", "Q8_0")]
    info = models[1].spac.info()
    assert info is not None
    models[0].spac.cap_experts(info.expert_page_bytes // 4)
    results = [evaluate(llama) for llama in models]
    stats = models[0].spac.stats()
    for llama in models:
        llama.close()
    assert np.array_equal(results[0], reference("Q4_0"))
    assert np.array_equal(results[1], reference("Q8_0"))
    assert stats is not None
    assert stats.peak_bytes <= stats.budget_bytes
