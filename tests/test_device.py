"""Keeping what was measured, and measuring it; no time is asserted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spac import control, device
from spac.errors import ModelFileError, OptionError, SpacError
from tests.devices import RATE, make_device


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    kept = make_device()
    device.save(kept, tmp_path / "new/device.json")
    assert device.load(tmp_path / "new/device.json", build="test") == kept


def test_nothing_was_kept(tmp_path: Path) -> None:
    assert device.load(tmp_path / "device.json") is None


def test_another_build_does_not_count(tmp_path: Path) -> None:
    device.save(make_device(), tmp_path / "device.json")
    with pytest.raises(device.UnusableProfile, match="another build"):
        device.load(tmp_path / "device.json")


def change(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found | values


@pytest.mark.parametrize(
    "damage",
    [
        change(format="other"),
        change(version=99),
        change(op_s=-1),
        change(op_s=float("nan")),
        change(op_s="fast"),
        change(threads=True),
        change(cpu=None),
        change(reads=[]),
        change(reads=[{"store": "direct"}]),
        change(reads=[[1, 2]]),
        change(products=[]),
        change(products=[{"type": "Q99", "n_tokens": 1, "weights_per_s": 1.0}]),
        change(repack=7),
        change(visit_s=-1e-3),
        change(visit_s=float("inf")),
        change(visit_s=True),
        change(contention_s=-1e-9),
        change(signals_s="none"),
        change(signals_expert_s=-1e-9),
        change(surprise=1),
        lambda found: {key: value for key, value in found.items() if key != "disk"},
        lambda found: [found],
        lambda found: "text",
    ],
)
def test_a_damaged_file(damage: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    device.save(make_device(), path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(device.UnusableProfile, match="damaged"):
        device.load(path, build="test")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]" + b" " * (1 << 21)])
def test_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_bytes(content)
    with pytest.raises(device.UnusableProfile, match="damaged"):
        device.load(path)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(device.UnusableProfile, match="cannot be read"):
        device.load(tmp_path)


def test_products_between_batches_and_of_types_not_measured() -> None:
    found = make_device()
    assert found.weights_per_s("Q4_0", 1) == pytest.approx(1e10)
    assert found.weights_per_s("Q4_0", 8) == pytest.approx(1e10 * 10**0.5)
    assert found.weights_per_s("Q4_0", 1000) == pytest.approx(1e11)
    assert found.weights_per_s("Q8_0", 1) == pytest.approx(5e9)
    assert found.weights_per_s("F16", 1) == pytest.approx(5e9 * 8.5 / 16)  # the nearest is Q8_0; its bytes count
    assert found.weights_per_s("F16", 64) == pytest.approx(1e11)


def test_the_default_store_is_direct_where_it_works() -> None:
    both = make_device()
    buffered = tuple(dataclasses.replace(row, store="buffered", seconds=2 * row.seconds) for row in both.reads)
    assert make_device(reads=both.reads + buffered).store == "direct"
    assert make_device(reads=both.reads + buffered).read_table().bytes_per_s(1 << 20, 6) == pytest.approx(RATE)
    assert make_device(reads=buffered).read_table().bytes_per_s(1 << 20, 6) == pytest.approx(RATE / 2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring that takes a second."""
    for name, value in {
        "SIZES": (1 << 16, 1 << 18), "DEPTHS": (1, 2), "TYPES": ("Q4_0", "Q6_K"), "BATCHES": (1, 2), "SCRATCH_BYTES": 1 << 23,
        "PROBE_SCRATCH_BYTES": 1 << 22, "CELL_S": 0.001, "PRODUCT_SHAPE": (256, 64), "PRODUCT_BYTES": 1 << 18,
    }.items():  # fmt: skip
        monkeypatch.setattr(device, name, value)


@pytest.mark.usefixtures("small")
def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    said: list[str] = []
    found = device.measure(tmp_path, n_threads=2, progress=said.append)
    assert not list(tmp_path.iterdir())
    for store in {row.store for row in found.reads}:
        assert {(r.size_bytes, r.depth) for r in found.reads if r.store == store} == {
            (1 << 16, 1),
            (1 << 16, 2),
            (1 << 18, 1),
            (1 << 18, 2),
        }
    assert [(r.type, r.n_tokens) for r in found.products] == [("Q4_0", 1), ("Q4_0", 2), ("Q6_K", 1), ("Q6_K", 2)]
    assert all(row.fast_s <= row.seconds <= row.slow_s for row in found.reads)
    assert found.signals_s + found.signals_expert_s > 0
    assert any("reads" in text for text in said)
    device.save(found, tmp_path / "device.json")
    assert device.load(tmp_path / "device.json") == found


@pytest.mark.usefixtures("small")
def test_a_probe_reads_from_a_model(model_path: Path) -> None:
    before = model_path.stat().st_mtime_ns
    found = device.probe(model_path, types=["Q4_0", "Q8_0", "Q4_0"], read_bytes=100_000, n_threads=1)
    assert found.quick
    assert sorted((row.type, row.n_tokens) for row in found.products) == [(name, n) for name in ("Q4_0", "Q8_0") for n in (1, 32)]
    assert {row.size_bytes for row in found.reads} == {98304}
    assert model_path.stat().st_mtime_ns == before


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_as_it_is_now(model_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    other = device.ReadRow("buffered", 1 << 20, 6, 0.1, 0.05, 0.2)
    kept = make_device(reads=(*make_device().reads, other))
    monkeypatch.setattr(
        control, "reads_measure", lambda _, at, sizes, *, depth, store: time.sleep(0.01) or slower * len(at) * sizes[0] / RATE
    )
    monkeypatch.setattr(device, "NOW_S", 0.01)
    visits = itertools.chain([0.003, 0.001, 7.0], itertools.repeat(None))  # for a while the disk stands still
    monkeypatch.setattr(device, "measure_visit", lambda *_: next(visits))
    beside = itertools.chain([device.Beside(0.5e-10 * i, 0.5e-9 * i, 3e-10 * i) for i in (1, 0.9, 30)], itertools.repeat(None))
    monkeypatch.setattr(device, "beside_reads", lambda *_: next(beside))
    found = device.as_it_is_now(kept, model_path, 1_000_000, "Q4_0")
    assert found.reads[-1] == other
    for now, then in zip(found.reads[:-1], kept.reads[:-1], strict=True):
        assert now.seconds == pytest.approx(slower * then.seconds)
        assert (now.fast_s, now.slow_s) == pytest.approx((min(slower, 1) * then.fast_s, max(slower, 1) * then.slow_s))
    for product, before in zip(found.products, kept.products, strict=True):
        assert product.weights_per_s == pytest.approx(2 * before.weights_per_s)
    assert found.repack["Q4_0"] == pytest.approx(2e9)
    assert (found.visit_s, found.contention_s) == (0.003, 3e-10)
    again = device.as_it_is_now(kept, model_path, 1_000_000, "Q4_0")
    assert dataclasses.replace(again, reads=kept.reads) == kept


@pytest.mark.parametrize("store", ["direct", "buffered"])
def test_what_computing_loses(store: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 << 20))
    found = device.beside_reads(path, store, "Q6_K", 2, 0.02)
    assert found is not None
    assert found.weight_s > 0
    assert min(found) >= 0
    path.write_bytes(bytes(1000))
    assert device.beside_reads(path, store, "Q6_K", 2, 0.02) is None
    with pytest.raises(ModelFileError, match="missing"):
        control.contention_measure(2, (256, 64, 4), str(tmp_path / "missing"), [0], 1000, depth=2, store=store, n_threads=2, min_s=0.01)


@pytest.mark.parametrize("store", ["direct", "buffered"])
def test_visits_of_a_layer(store: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 << 20))
    seconds = control.visits_measure(str(path), 100_000, n_missing=3, n_visits=5, n_threads=2, store=store)
    assert len(seconds) == 5 and min(seconds) > 0
    with pytest.raises(OptionError, match="too small"):
        control.visits_measure(str(path), 1 << 20, n_missing=1, n_visits=1, n_threads=1, store=store)
    with pytest.raises(ModelFileError, match="cannot be read"):
        control.visits_measure(str(tmp_path / "none"), 4096, n_missing=1, n_visits=1, n_threads=1, store=store)
    assert device.measure_visit(path, store, 1, 1e-5, 0.0) is None, "too small for its visits"


@pytest.mark.parametrize("slower", [0.002, 0.0])
def test_a_visit_is_what_it_takes_besides_its_reads(slower: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 << 20)  # nobody reads it
    bare_s = 0.01
    monkeypatch.setattr(control, "reads_measure", lambda *_, **__: bare_s)
    monkeypatch.setattr(control, "visits_measure", lambda *_, n_visits, **__: [1.0] + [bare_s + slower] * (n_visits - 1))
    assert device.measure_visit(path, "direct", 2, 0.0005, 0.0) == pytest.approx(max(0.0, slower - 0.0005))


@pytest.mark.usefixtures("small")
def test_where_nothing_can_be_measured(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"x")
    with pytest.raises(SpacError, match="too small"):
        device.measure(tmp_path / "tiny.gguf", n_threads=1)
    with pytest.raises(SpacError, match="no such file or folder"):
        device.measure(tmp_path / "nowhere", n_threads=1)


@pytest.mark.usefixtures("small")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(device.os, "urandom", full)
    with pytest.raises(SpacError, match="No space left"):
        device.measure(tmp_path, n_threads=1)
    assert not list(tmp_path.iterdir())
