"""Replays and the time model. The policies themselves are tested in spac/native/simulate_test.cpp."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import spac
from spac.bench.prompt import load as load_prompts
from spac.errors import OptionError
from spac.estimator.foresight import foresight
from spac.generate import Sampling, make_sampler
from spac.trace.format import Trace
from spac.trace.simulation import POLICIES, Ahead, parse_cache
from spac.trace.simulation import replay as run
from spac.trace.timing import Compute, Reads, decode_ubatches, layer_s, limited, predict
from tests.trace.conftest import MakeTrace

FLAT = Reads({(1024, 1): 1e8, (1 << 20, 1): 1e8})


@pytest.mark.parametrize("quota", ["global", "layer"])
@pytest.mark.parametrize("cache", ["12.5%", "25%", "50%", "100%"])
def test_min_misses_least(make_trace: MakeTrace, quota: str, cache: str) -> None:
    trace = make_trace()
    n = parse_cache(cache, trace)
    least = run(trace, n, "min", quota)
    assert least.requests == 400 * 4 * 2
    assert least.uses.sum() == least.requests
    for policy in POLICIES:
        result = run(trace, n, policy, quota)
        assert result.misses >= least.misses
        assert (result.missed.sum(), result.bytes) == (result.misses, result.misses * 3_000_000)
        if cache == "100%":
            assert result.misses == len({(layer, e) for layer in range(4) for e in trace.ids[:, layer].ravel().tolist()})


def test_lru_against_a_model_of_it(make_trace: MakeTrace) -> None:
    trace = make_trace(seed=3)
    misses, room = 0, 4
    for layer in range(trace.n_layers):
        cache: list[int] = []  # the last is the newest
        for chosen in trace.ids[:, layer].tolist():
            misses += len(set(chosen) - set(cache))
            cache = [e for e in cache if e not in chosen] + chosen
            cache = cache[-room:]
    assert run(trace, room * trace.n_layers, "lru", "layer").misses == misses


def test_caches_of_different_room(make_trace: MakeTrace) -> None:
    trace = make_trace(seed=5)
    rooms = [2, 9, 0, 5]
    parts = []
    for layer, room in enumerate(rooms):
        alone = replace(trace, ids=trace.ids[:, layer : layer + 1], blocks=(1,), bundle_bytes=(1,))
        parts.append(run(alone, room, "lru", "layer").misses if room else 2 * trace.n_tokens)
    result = run(trace, 16, "lru", rooms)
    assert (result.missed.sum(0).tolist(), result.quota) == (parts, "layer")
    assert run(trace, 16, "lru", [4] * 4).misses == run(trace, 16, "lru", "layer").misses
    for wrong in ([4, 4, 4], [4, 4, 4, 5], [-4, 8, 8, 4]):
        with pytest.raises(OptionError, match="room by layer"):
            run(trace, 16, "default", wrong)


def test_auto_is_the_pagers_cache_for_default_and_one_by_layer_for_others(make_trace: MakeTrace) -> None:
    trace = make_trace()
    for policy in POLICIES:
        assert run(trace, 16, policy).quota == ("global" if policy == "default" else "layer")


def test_caches(make_trace: MakeTrace) -> None:
    trace = make_trace(tokens=4)
    assert parse_cache("25%", trace) == 16
    assert parse_cache("7", trace) == 7
    for text in ("", "%", "x", "0", "-3", "101%", "nan%", "1e999%"):
        with pytest.raises(OptionError):
            parse_cache(text, trace)
    with pytest.raises(OptionError, match="'magic' does not exist"):
        run(trace, 8, "magic")


@pytest.mark.parametrize(("cache", "lru", "lfu", "least"), [("25%", 67.0, 64.7, 78.2), ("50%", 89.8, 87.7, 95.0)])
def test_reference_figures_of_the_shared_trace(cache: str, lru: float, lfu: float, least: float) -> None:
    """SPAC_SHARED_TRACE=gptoss20b_decode_part.npz pytest tests/trace -k reference"""
    path = os.environ.get("SPAC_SHARED_TRACE")
    if not path:
        pytest.skip("SPAC_SHARED_TRACE does not name the trace")
    trace = Trace.load(path).head(40000)
    for policy, expected in (("lru", lru), ("lfu", lfu), ("min", least)):
        assert 100 * run(trace, parse_cache(cache, trace), policy, "layer").hit_rate == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize("cache", ["25%", "50%", "75%"])
def test_the_default_policy_misses_less_than_lru_on_the_demo_model(demo_trace: Trace, cache: str) -> None:
    n = parse_cache(cache, demo_trace)
    assert run(demo_trace, n, "default").misses < run(demo_trace, n, "lru", "layer").misses


@pytest.fixture(scope="module")
def demo_trace(model_path: Path) -> Trace:
    """Recorded here, greedily, after prompts of five kinds."""
    llama = spac.Llama(model_path, paging="off", n_ctx=512, n_ubatch=64, verbose=False, record_routing=True)
    for prompt in load_prompts(())[::4]:
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval(llama.tokenize(prompt.text.encode()))
        with contextlib.closing(make_sampler(Sampling(temperature=0, repeat_penalty=1.3), llama)) as sampler:
            for _ in range(40):
                llama.eval([sampler.sample(llama._ctx, -1)])
    trace = llama.spac.recorder.trace()
    llama.close()
    return trace


@pytest.mark.parametrize(("cache", "most"), [("25%", 0.88), ("50%", 0.80)])
def test_the_default_policy_on_held_back_requests(cache: str, most: float) -> None:
    path = os.environ.get("SPAC_SHARED_TRACE")
    if not path:
        pytest.skip("SPAC_SHARED_TRACE does not name the trace")
    trace = Trace.load(path).of_requests("second-half")
    n = parse_cache(cache, trace)
    assert run(trace, n, "default").misses <= most * run(trace, n, "lru", "layer").misses


# -- the time model --


def test_without_misses_a_token_takes_its_compute(make_trace: MakeTrace) -> None:
    trace = make_trace(experts=4)
    compute = Compute.measured(trace)
    assert compute.token_s == pytest.approx(0.010)
    assert compute.expert_token_s == pytest.approx(0.001)
    prediction = predict(trace, run(trace, 16), compute, FLAT, skip_tokens=300)
    assert prediction.tokens_per_s == pytest.approx(100)
    assert prediction.bound_tokens_per_s == pytest.approx(100)


def test_misses_cost_their_reads_and_the_products_that_wait_for_them(make_trace: MakeTrace) -> None:
    """Two misses of 3 MB at 100 MB/s are six slices, one after another: 60 ms, and the product that waits for the last one."""
    trace = make_trace(tokens=1)
    result = run(trace, 64)  # all four layers miss both
    prediction = predict(trace, result, Compute(0.010, 0.001), FLAT)
    assert 1 / prediction.tokens_per_s == pytest.approx(0.002 + 4 * (0.060 + 0.001 / 3))
    assert 1 / prediction.bound_tokens_per_s == pytest.approx(0.240)
    assert prediction.tokens_per_s < prediction.bound_tokens_per_s


def test_a_limit_bounds_bytes_by_time(make_trace: MakeTrace) -> None:
    """24 MB at 60 MB/s are 400 ms, whatever is computed meanwhile; a limit above the disk's speed changes nothing."""
    trace = make_trace(tokens=1)
    result, compute = run(trace, 64), Compute(0.010, 0.001)
    prediction = predict(trace, result, compute, limited(FLAT, 60e6))
    assert 1 / prediction.tokens_per_s == pytest.approx(0.400)
    assert 1 / prediction.bound_tokens_per_s == pytest.approx(0.400)
    assert predict(trace, result, compute, limited(FLAT, 200e6)) == predict(trace, result, compute, FLAT)


def test_slices_come_one_after_another() -> None:
    """Three misses are nine slices, six in flight; one miss is three, and each product computes what is there while it waits."""
    rates = Reads({(1 << 20, 3): 100e6, (1 << 20, 6): 200e6})
    assert layer_s(3, 3, 2_700_000, Compute(1, 0.003), rates) == pytest.approx(9 * 0.0045 + 0.001)
    assert layer_s(4, 1, 2_700_000, Compute(1, 0.003), rates) == pytest.approx(3 * 0.009 + 0.001)
    assert layer_s(4, 0, 2_700_000, Compute(1, 0.003), rates) == pytest.approx(4 * 0.003)


def test_pieces_of_one_slice_are_in_flight_together() -> None:
    """Three slices of 2 MB are nine pieces, six in flight, as fast as six reads of 1 MB; what a slice costs besides is waited for once."""
    rates = Reads({(1_000_000, 6): 200e6, (4_000_000, 6): 400e6})
    assert layer_s(1, 1, 6_000_000, Compute(1, 0.003, 0.0005), rates) == pytest.approx(0.030 + 0.0005 + 0.001)


def test_reads_are_interpolated_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "reads.txt"
    path.write_text(
        "MB/s, median\n  KiB depth threads\n 64  1   100 ( 90 to 110)  7\n 64  4   200 (1 to 2)\n 1024 1 400 (3 to 4)\n 1024 4 800 (5 to 6)\n"
    )
    reads = Reads.load(str(path))
    assert reads.bytes_per_s(64 << 10, 1) == pytest.approx(100e6)
    assert reads.bytes_per_s(64 << 10, 2) == pytest.approx(150e6)
    assert reads.bytes_per_s(256 << 10, 4) == pytest.approx(500e6)
    assert reads.bytes_per_s(1 << 30, 64) == pytest.approx(800e6)
    assert limited(reads, 300e6).bytes_per_s(1 << 20, 4) == pytest.approx(800e6)
    path.write_text("nothing measured")
    with pytest.raises(OptionError, match="no rows"):
        Reads.load(str(path))


def test_times_that_are_not_there(make_trace: MakeTrace) -> None:
    trace = make_trace(tokens=20)
    with pytest.raises(OptionError, match="no times"):
        Compute.measured(trace.head(10))
    with pytest.raises(OptionError, match="--bundle-bytes"):
        predict(replace(trace, bundle_bytes=()), run(trace, 8), Compute(1, 0.1), FLAT)
    prefill = replace(trace, phase=np.zeros(20, np.uint8))
    with pytest.raises(OptionError, match="no decoded tokens"):
        predict(prefill, run(prefill, 8), Compute(1, 0.1), FLAT)
    assert not decode_ubatches(replace(trace, ubatch=np.zeros(20, np.int32))).any()


def test_meta_is_json(make_trace: MakeTrace, tmp_path: Path) -> None:
    make_trace(tokens=3).save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        meta = json.loads(str(file["meta"]))
    assert (meta["format"], meta["version"], meta["experts"], meta["layers"], meta["k"]) == ("spac-trace", 1, 16, 4, 2)


def test_what_is_foreseen_is_kept(make_trace: MakeTrace) -> None:
    """The next tokens known: fewer misses, but no fewer than MIN's; where nothing is said, those of the default policy."""
    trace = make_trace(tokens=600)
    told = np.zeros((trace.n_tokens, 3, trace.n_layers, trace.n_experts), np.float32)
    for t in range(trace.n_tokens):
        known = np.zeros((5, trace.n_layers, trace.n_experts), np.float32)
        for j in range(min(5, trace.n_tokens - t)):
            np.put_along_axis(known[j], trace.ids[t + j].astype(np.int64), 1, 1)
        told[t] = foresight(known[0], known[1:])
    plain, known_ahead = run(trace, 24), run(trace, 24, foresight=told)
    assert run(trace, 24, "min", "global").misses <= known_ahead.misses < 0.9 * plain.misses
    told[:, 0, 0, 0] = -1
    assert run(trace, 24, foresight=told).misses == plain.misses
    with pytest.raises(OptionError, match="shape"):
        run(trace, 24, foresight=told[:, :2])


def test_what_is_sure_is_read_ahead_while_the_disk_is_idle(make_trace: MakeTrace) -> None:
    """With the next token known: all of it on an idle disk, nothing on a busy one; what is waited for and what is read ahead are the misses."""
    trace = make_trace(tokens=200)
    told = np.zeros((trace.n_tokens, 3, trace.n_layers, trace.n_experts), np.float32)
    for t in range(trace.n_tokens):
        np.put_along_axis(told[t, 0], trace.ids[t].astype(np.int64), 1, 1)
    n, size = 24, float(trace.bundle_bytes[0])
    plain = run(trace, n, foresight=told)
    assert (plain.wait_bytes == plain.missed * size).all() and not plain.ahead_bytes.any()
    unknown = run(replace(trace, bundle_bytes=()), n, foresight=told)
    assert (unknown.missed == plain.missed).all() and unknown.misses == plain.misses > 0 and unknown.bytes is None
    busy = run(trace, n, foresight=told, ahead=Ahead(trace.n_layers, 0, 0))
    assert (busy.wait_bytes == plain.wait_bytes).all()
    idle = run(trace, n, foresight=told, ahead=Ahead(1, 1e12, 0))
    assert not idle.wait_bytes.any() and not idle.misses and idle.ahead_bytes.sum() > 0.9 * plain.wait_bytes.sum()
    some = run(trace, n, foresight=told, ahead=Ahead(trace.n_layers, size / 2, 0))
    assert 0 < some.wait_bytes.sum() < plain.wait_bytes.sum()
    assert (some.ahead_bytes <= trace.n_layers * size).all()
    assert not idle.wasted_bytes.any()
    assert (run(trace, n, foresight=told, ahead=Ahead(1, 1e12, 0, read_from=1.5)).wait_bytes == plain.wait_bytes).all()
