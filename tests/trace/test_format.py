"""Trace files: what is written is read, what is no trace is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spac.trace.format import VERSION, Trace, TraceError
from tests.trace.conftest import MakeTrace

ARRAYS = ("ids", "weights", "seq", "pos", "phase", "token_ids", "ubatch", "ubatch_s", "expert_s")


@pytest.mark.parametrize("experts", [16, 255, 256, 400])
def test_what_is_written_is_read(make_trace: MakeTrace, tmp_path: Path, experts: int) -> None:
    """Also where the narrow type is full, and with layers that were not computed."""
    trace = make_trace(tokens=20, experts=experts)
    trace.ids[3, 2] = 65535
    trace.ids[4, 0, 0] = experts - 1
    trace.save(tmp_path / "t.npz")
    again = Trace.load(tmp_path / "t.npz")
    for name in ARRAYS:
        assert (getattr(again, name) == getattr(trace, name)).all(), name
    assert (again.n_experts, again.blocks, again.bundle_bytes) == (experts, trace.blocks, trace.bundle_bytes)
    assert again.meta["model"] == "synthetic"
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_the_shared_format_is_read(tmp_path: Path) -> None:
    """Only ids, weights, seq, pos, meta; no version."""
    ids = np.array([[[1, 2]], [[2, 3]]], np.uint8)
    path = tmp_path / "shared.npz"
    np.savez(path, ids=ids, weights=np.ones(ids.shape, np.float16), seq=np.zeros(2, np.int32), pos=np.arange(2), meta=json.dumps({"experts": 4}))
    trace = Trace.load(path)
    assert (trace.n_tokens, trace.n_layers, trace.n_used, trace.n_experts) == (2, 1, 2, 4)
    assert trace.phase.tolist() == [1, 1]
    assert trace.ubatch.tolist() == [0, 1]
    assert trace.bundle_bytes == ()


def fields(trace: Trace, path: Path) -> dict[str, Any]:
    trace.save(path)
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": None}, "ids not in it"),
        ({"ids": np.zeros((2, 3))}, "ids must be"),
        ({"ids": np.full((20, 4, 2), 200)}, "no id in it"),
        ({"seq": np.zeros(3)}, "seq is"),
        ({"ubatch": np.arange(20)[::-1]}, "ubatch falls"),
        ({"phase": np.full(20, 9)}, "phase has no meaning"),
        ({"meta": np.array("[]")}, "meta is not"),
        ({"meta": np.array("{")}, "meta is not"),
        ({"meta": np.array('{"experts": "many"}')}, "experts"),
        ({"meta": np.array(json.dumps({"experts": 16, "format": "other"}))}, "format 'other'"),
        ({"meta": np.array(json.dumps({"experts": 16, "version": VERSION + 1}))}, f"version {VERSION + 1}"),
        ({"meta": np.array(json.dumps({"experts": 16, "bundle_bytes": [1, 2]}))}, "bundle_bytes is not a list of 4"),
    ],
)
def test_broken_fields(make_trace: MakeTrace, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "t.npz"
    content = fields(make_trace(tokens=20), path) | change
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    with pytest.raises(TraceError) as error:
        Trace.load(path)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere(make_trace: MakeTrace, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    make_trace(tokens=50).save(path)
    whole = path.read_bytes()
    for n in range(0, len(whole), len(whole) // 23):
        path.write_bytes(whole[:n])
        with pytest.raises(TraceError):
            Trace.load(path)


def test_requests_are_split_by_their_beginning(make_trace: MakeTrace) -> None:
    trace = make_trace(tokens=50, requests=5)
    assert trace.requests.tolist() == [0, 1, 2, 3, 4]
    assert trace.of_requests("first-half").requests.tolist() == [0, 1, 2]
    assert trace.of_requests("second-half").requests.tolist() == [3, 4]
    assert trace.of_requests("odd").requests.tolist() == [1, 3]
    assert trace.of_requests("all") is trace
    with pytest.raises(TraceError, match="none is in second-half"):
        make_trace(tokens=5, requests=1).of_requests("second-half")
