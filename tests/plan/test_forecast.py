"""From a header to tokens/s: arithmetic on a made-up device."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from spac.gguf.check import check_model
from spac.gguf.reader import read_gguf
from spac.host.limits import Limits
from spac.host.memory import GIB, MIB
from spac.plan.fit import Sizes, make_plan
from spac.plan.forecast import (
    Choice,
    LayerWork,
    Machine,
    Question,
    Speed,
    Work,
    curve,
    decode_s,
    pick,
    prefill_s,
    quantisations,
    scaled_sizes,
)  # fmt: skip
from spac.plan.miss_curve import REFERENCES, misses, reference_of
from tests.devices import make_device

WEIGHTS = 24_000_000  # of an expert
BYTES = WEIGHTS * 18 // 32
LAYER = LayerWork(64, BYTES, BYTES + 3 * 4096, (("Q4_0", WEIGHTS),))
WORK = Work("some", 4, 20, (LAYER,) * 20, (("Q8_0", 500_000_000),), 2048)
EXPERTS = 20 * 64 * (BYTES + 3 * 4096)
SIZES = Sizes(
    dense_bytes=600 * MIB, expert_bytes=EXPERTS, context_bytes=100 * MIB, compute_bytes=100 * MIB, staging_bytes=10 * MIB,
    vocabulary_bytes=10 * MIB, file_bytes=EXPERTS + 600 * MIB, floor_bytes=2 * (BYTES + 3 * 4096),
)  # fmt: skip
FREE = Machine(make_device(wakeup_s=1e-9, repack={}), Limits())


def question(machine: Machine = FREE) -> Question:
    return Question(
        WORK, lambda n: dataclasses.replace(SIZES, compute_bytes=SIZES.compute_bytes * n // 512), machine, 60 * MIB, 4096, None, 512
    )


def test_a_header_says_what_a_token_takes(model_path: Path) -> None:
    work = Work.of(check_model(model_path), read_gguf(model_path).tensors)
    assert (work.n_layers, work.n_used, len(work.layers), work.n_bundles, work.columns) == (10, 4, 10, 320, 256)
    assert work.main_types == ["Q4_0", "Q8_0"]  # routers' F32 is next to nothing
    assert work.layers[0].weights == (("Q4_0", 3 * 256 * 256),)
    assert dict(work.dense)["Q8_0"] == 10 * (2 * 256 * 256 + 2 * 256 * 128) + 256 * 4096  # attention, and the embedding as output


def test_resident_speed_is_computing() -> None:
    seconds = decode_s(WORK, FREE, 0.0, FREE.reads())
    products = 20 * 4 * WEIGHTS / 1e10 + 5e8 / 5e9
    assert seconds == pytest.approx(products + 20 * 45 * 2e-6 + 0.5e-3)


def test_a_read_limit_bounds_bytes_by_time() -> None:
    limited = Machine(FREE.device, Limits(read_bytes_per_s=100_000_000))
    assert decode_s(WORK, limited, 0.5, limited.reads()) == pytest.approx(0.5 * 4 * 20 * (BYTES + 3 * 4096) / 1e8)  # a slice ends in blocks


def test_a_share_of_processors_bounds_computing() -> None:
    whole = decode_s(WORK, FREE, 0.0, FREE.reads())
    half = Machine(FREE.device, Limits(cores=4, cpu_share=0.5))
    assert decode_s(WORK, half, 0.0, half.reads()) == pytest.approx(2 * whole)
    one = Machine(FREE.device, Limits(cores=1))
    assert 3 * whole < decode_s(WORK, one, 0.0, one.reads()) < 4 * whole


def test_a_slower_machine_is_never_faster() -> None:
    base = decode_s(WORK, FREE, 0.3, FREE.reads())
    for device in (make_device(), make_device(repack={}, wakeup_s=1e-3), make_device(repack={"Q4_0": 1e9}, wakeup_s=1e-9)):
        assert decode_s(WORK, Machine(device, Limits()), 0.3, device.read_table()) > base
    assert decode_s(WORK, FREE, 0.4, FREE.reads()) > base
    assert decode_s(WORK, FREE, 0.3, FREE.reads(), attention_s=0.01) == pytest.approx(base + 0.01)


def test_each_layer_that_misses_something_is_visited() -> None:
    device = make_device(wakeup_s=1e-9, repack={}, visit_s=1e-3)
    machine = Machine(device, Limits())
    for miss in (0.0, 0.3, 1.0):
        expected = decode_s(WORK, FREE, miss, FREE.reads()) + 20 * (1 - (1 - miss) ** 4) * 1e-3
        assert decode_s(WORK, machine, miss, machine.reads()) == pytest.approx(expected, rel=1e-5)


def test_signals_take_their_time_where_something_is_missed() -> None:
    machine = Machine(make_device(wakeup_s=1e-9, repack={}, signals_s=1e-3, signals_expert_s=1e-7), Limits())
    for miss, signals_s in ((0.0, 0.0), (0.3, 1e-3 + 20 * 64 * 1e-7)):
        assert decode_s(WORK, machine, miss, machine.reads()) == pytest.approx(decode_s(WORK, FREE, miss, FREE.reads()) + signals_s)


def test_reads_take_processors_from_computing() -> None:
    """Reading and computing go on side by side as far as there are processors for both."""
    alone = decode_s(WORK, FREE, 0.5, FREE.reads())
    little, much = (Machine(make_device(wakeup_s=1e-9, repack={}, contention_s=s), Limits()) for s in (1e-15, 1e-6))
    assert decode_s(WORK, little, 0.5, little.reads()) == pytest.approx(alone)
    products = decode_s(WORK, FREE, 0.0, FREE.reads())
    assert decode_s(WORK, much, 0.5, much.reads()) == pytest.approx(products + 0.5 * 4 * 20 * (BYTES + 3 * 4096) * 1e-6)
    plan = make_plan(3 * GIB, 60 * MIB, SIZES, paging="auto", n_ctx=4096)
    assert prefill_s(WORK, plan, much, 512, 512) == pytest.approx(20 * 64 * (BYTES + 3 * 4096) * 1e-6, rel=0.1)


def test_rearranging_takes_processors_from_computing() -> None:
    slow = Machine(make_device(wakeup_s=1e-9, repack={"Q4_0": 1e6}, cores=2), Limits())
    layer = WORK.layers[0]
    assert slow.contention_s(layer) == pytest.approx(sum(n for _, n in layer.weights) / 1e6 / 2 / layer.read_bytes)


def test_a_prompt_reads_each_expert_once_for_a_ubatch() -> None:
    plan = make_plan(3 * GIB, 60 * MIB, SIZES, paging="auto", n_ctx=4096)
    slow = Machine(FREE.device, Limits(read_bytes_per_s=100_000_000))
    once = prefill_s(WORK, plan, slow, 512, 512)
    assert once == pytest.approx(20 * 64 * BYTES / 1e8, rel=0.01)
    assert once < prefill_s(WORK, plan, slow, 256, 512) < 2 * once


def test_an_answer_that_fits_and_one_that_does_not() -> None:
    paged, whole, none = (question().answer(n) for n in (3 * GIB, 40 * GIB, 300 * MIB))
    assert paged.plan is not None and paged.plan.paged and paged.speed is not None
    assert whole.plan is not None and not whole.plan.paged and whole.speed is not None
    assert none.plan is None and none.speed is None and "needs at least" in none.why_not
    assert paged.speed.low_tokens_per_s < paged.speed.decode_tokens_per_s < paged.speed.high_tokens_per_s
    assert paged.speed.decode_tokens_per_s < whole.speed.decode_tokens_per_s
    assert whole.speed.read_bytes_per_token == 0 < paged.speed.read_bytes_per_token


def test_the_floor_caches_nothing() -> None:
    """In so little memory every expert is read each time, but for what compute buffers leave that are not in use; here there are none."""
    asked = dataclasses.replace(question(), n_ubatch=512, measure=lambda _: dataclasses.replace(SIZES, compute_bytes=0))
    least = next(limit for limit in range(800 * MIB, 2 * GIB, MIB) if asked.answer(limit).speed is not None)
    found = asked.answer(least)
    assert found.plan is not None and found.speed is not None
    assert found.plan.expert_budget_bytes < SIZES.floor_bytes + MIB
    assert 0.99 < found.speed.miss_rate <= 1.0


def test_compute_buffers_hold_experts_while_no_prompt_is_read() -> None:
    """After a long prompt all but a token's part; a short prompt's part stays what it is."""

    def miss_rate(prompt_tokens: int, compute_bytes: int) -> float:
        asked = dataclasses.replace(question(), n_ubatch=512, prompt_tokens=prompt_tokens, measure=lambda _: sizes(compute_bytes))
        speed = asked.answer(3 * GIB).speed
        assert speed is not None
        return speed.miss_rate

    def sizes(compute_bytes: int) -> Sizes:
        return dataclasses.replace(SIZES, compute_bytes=compute_bytes)

    none = miss_rate(512, 0)
    assert miss_rate(512, 512 * MIB) == pytest.approx(none, rel=0.01)
    assert miss_rate(512, 512 * MIB) == miss_rate(33, 512 * MIB) == miss_rate(1, 512 * MIB)
    tight = dataclasses.replace(question(), n_ubatch=32, measure=lambda _: sizes(512 * MIB))  # a ubatch that is never given back
    of_tight = tight.answer(3 * GIB).speed
    assert of_tight is not None
    assert of_tight.miss_rate > miss_rate(32, 512 * MIB)
    assert none < miss_rate(512, 512 * MIB) < miss_rate(16, 512 * MIB) < miss_rate(32, 512 * MIB)


def test_the_curve_rises_with_memory_and_with_the_disk() -> None:
    points = curve(question(), 4 * GIB)
    assert {4 * GIB, 5 * GIB} <= {point.memory_bytes for point in points}
    rates = [point.speed.decode_tokens_per_s for point in points]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    for point in points:
        assert point.faster_disk_tokens_per_s >= point.speed.decode_tokens_per_s
    assert points[0].faster_disk_tokens_per_s > 1.5 * rates[0]
    assert points[-1].faster_disk_tokens_per_s == pytest.approx(rates[-1])  # all is in memory


def test_a_disk_limit_doubles_too() -> None:
    limited = question(Machine(FREE.device, Limits(read_bytes_per_s=100_000_000)))
    assert limited.with_disk(2).machine.limits.read_bytes_per_s == 200_000_000


def test_other_types_scale_what_tensors_take() -> None:
    work = WORK.quantised("Q8_0")
    assert work.layers[0].bundle_bytes == WEIGHTS * 34 // 32
    sizes = scaled_sizes(SIZES, WORK, work)
    assert sizes.dense_bytes == SIZES.dense_bytes
    assert sizes.expert_bytes == SIZES.expert_bytes + 20 * 64 * (work.layers[0].bundle_bytes - BYTES)
    assert sizes.context_bytes == SIZES.context_bytes


def test_quantisations_are_compared() -> None:
    found = quantisations(question(), 8 * GIB)
    assert [choice.type_name for choice in found] == ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]
    assert [choice.file_bytes for choice in found] == sorted((choice.file_bytes for choice in found), reverse=True)
    narrow = dataclasses.replace(question(), work=dataclasses.replace(WORK, columns=96))
    assert [choice.type_name for choice in quantisations(narrow, 8 * GIB)] == ["Q8_0"]  # blocks of 256 do not divide its rows


def choice(name: str, rate: float | None) -> Choice:
    speed = None if rate is None else Speed(rate, rate, rate, 1.0, 1.0, 0.0, 0.0)
    return Choice(name, 0, speed, True)


@pytest.mark.parametrize(
    ("rates", "picked"),
    [
        ({"Q8_0": 6.0, "Q4_K": 9.0}, "Q8_0"),
        ({"Q8_0": 2.0, "Q4_K": 5.5, "Q2_K": 9.0}, "Q4_K"),
        ({"Q8_0": 1.0, "Q4_K": 2.0, "Q2_K": 4.0}, "Q4_K"),
        ({"Q8_0": None, "Q2_K": 0.5}, "Q2_K"),
        ({"Q8_0": None}, None),
        ({}, None),
    ],
)
def test_what_is_picked(rates: dict[str, float | None], picked: str | None) -> None:
    found = pick([choice(name, rate) for name, rate in rates.items()])
    assert (found.type_name if found else None) == picked


# -- misses --


@pytest.mark.parametrize(
    ("architecture", "n_experts", "n_used"), [("qwen3moe", 32, 4), ("gpt-oss", 32, 4), ("qwen3moe", 128, 8), ("x", 8, 8)]
)
def test_misses_fall_with_the_share(architecture: str, n_experts: int, n_used: int) -> None:
    found = [misses(share / 50, architecture, n_experts, n_used) for share in range(51)]
    assert found[0].median == pytest.approx(1.0)
    assert all(a.median >= b.median for a, b in itertools.pairwise(found))
    assert all(0 < m.low <= m.median <= m.high <= 1 for m in found)


def test_an_unknown_model_lies_between_the_measured_ones() -> None:
    unknown = misses(0.3, "unknown", 32, 4)
    known = [misses(0.3, r.architecture, r.n_experts, r.n_used) for r in REFERENCES]
    assert min(m.median for m in known) < unknown.median < max(m.median for m in known)
    assert reference_of("unknown", 32, 4) is None
    for reference in REFERENCES:
        own = reference_of(reference.architecture, reference.n_experts, reference.n_used)
        assert own is reference
        assert len(reference.shares) == len(reference.low) == len(reference.median) == len(reference.high)
