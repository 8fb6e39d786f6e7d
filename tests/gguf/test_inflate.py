"""Inflation preserves the function: the same logits from more hidden units, and the types that were asked for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import spac
from spac.errors import ModelFileError, OptionError
from spac.gguf.inflate import Quantiser, _copy_metadata, inflate

TOKENS = list(range(300, 340))


def logits(path: Path) -> np.ndarray:
    llama = spac.Llama(path, paging="off", n_ctx=64, logits_all=True, verbose=False, n_threads=2)
    llama.eval(TOKENS)
    result = np.array(llama.scores[: len(TOKENS)])
    llama.close()
    return result


def in_f32(source: Path, target: Path) -> Path:
    """A copy without quantised tensors: products with those round their input to 8 bits, and where that flips hangs on the processor."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    _copy_metadata(writer, reader, architecture, 1, Quantiser("F32"))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_function_is_preserved(model_path: Path, tmp_path: Path) -> None:
    """In F32, twice the hidden units give the same logits up to the order of a sum."""
    source, small, big = in_f32(model_path, tmp_path / "f32.gguf"), tmp_path / "small.gguf", tmp_path / "big.gguf"
    assert inflate(source, small, expert_type="F32", factor=1).factor == 1
    assert inflate(source, big, expert_type="F32", factor=2).total_bytes > 1.9 * small.stat().st_size * 0.95
    a, b = logits(small), logits(big)
    assert np.abs(a).max() > 1
    np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(a).max())


def test_tiles_are_what_upstream_would_quantise(model_path: Path, tmp_path: Path) -> None:
    """Dequantised, every repetition is the small model's weight, down divided by the factor."""
    big = tmp_path / "big.gguf"
    inflate(model_path, big, expert_type="Q4_0", factor=4)
    once = tmp_path / "once.gguf"
    inflate(model_path, once, expert_type="Q4_0", factor=1)
    small = {t.name: t for t in gguf.GGUFReader(once).tensors}
    for tensor in gguf.GGUFReader(big).tensors:
        if "blk.3.ffn_" not in tensor.name or "_exps" not in tensor.name:
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = gguf.quants.dequantize(small[tensor.name].data, small[tensor.name].tensor_type)
        if "down" in tensor.name:
            assert np.array_equal(values, np.tile(expected / 4, (1, 1, 4)))
        else:
            assert np.array_equal(values, np.tile(expected, (1, 4, 1)))


def test_size_chooses_the_factor(model_path: Path, tmp_path: Path) -> None:
    result = inflate(model_path, tmp_path / "sized.gguf", expert_type="Q4_0", size_bytes=100_000_000)
    assert result.factor == 4
    assert result.total_bytes >= 100_000_000
    assert result.expert_type == "Q4_0"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"factor": 3}, "power of two"), ({"factor": 0}, "power of two"), ({"factor": 1, "expert_type": "Q9_9"}, "no such ggml type"),
     ({"factor": 1, "n_splits": 0}, "split")],
)  # fmt: skip
def test_what_cannot_be_is_refused(model_path: Path, tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        inflate(model_path, tmp_path / "x.gguf", **{"expert_type": "Q4_0", **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_a_type(tmp_path: Path) -> None:
    """Upstream would silently take another type for rows of 32 in a type with blocks of 256."""
    source = tmp_path / "narrow.gguf"
    writer = gguf.GGUFWriter(source, "qwen3moe")
    for part in ("gate", "up", "down"):
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", np.zeros((4, 64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(OptionError, match="silently take another type"):
        inflate(source, tmp_path / "x.gguf", expert_type="Q4_K", factor=1)


def test_sources_that_do_not_serve(dense_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no expert tensors"):
        inflate(dense_path, tmp_path / "x.gguf", expert_type="Q4_0", factor=1)
    with pytest.raises(ModelFileError, match="cannot be read"):
        inflate(tmp_path / "missing.gguf", tmp_path / "x.gguf", expert_type="Q4_0", factor=1)
    with pytest.raises(ModelFileError, match="cannot be written"):
        inflate(dense_path.with_name("spac-demo-moe.gguf"), tmp_path / "no" / "folder" / "x.gguf", expert_type="Q4_0", factor=1)


class _FullAfter:
    """Stands for numpy's tofile on a disk that is full after so many tensors: no errno, as numpy has it."""

    def __init__(self, tensors: int) -> None:
        self.left = tensors

    def __call__(self, writer: gguf.GGUFWriter, tensor: np.ndarray, **_: object) -> None:
        if self.left == 0:
            raise OSError(f"{tensor.nbytes} requested and 17 written")
        self.left -= 1


@pytest.mark.parametrize("tensors", [0, 5])
def test_a_full_disk_is_said_and_leaves_nothing(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: int) -> None:
    """In the middle of the file as at its start."""
    full = _FullAfter(tensors)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda writer, tensor: full(writer, tensor))
    with pytest.raises(ModelFileError, match=r"x\.gguf: cannot be written: the disk is full; .* are needed"):
        inflate(model_path, tmp_path / "x.gguf", expert_type="Q4_0", factor=1)
    assert full.left == 0
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_inflation_leaves_nothing(model_path: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inflate(model_path, tmp_path / "x.gguf", expert_type="Q4_0", factor=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
