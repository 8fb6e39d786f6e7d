"""LoRA adapters: with experts paged, logits are bit for bit those of an unpaged model with the same adapter."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import spac
from spac import log
from spac.errors import ModelFileError
from spac.stats import ModelStats

RANK, N_EXPERTS = 4, 32
# of the demo model: rows and columns, as numpy counts
SHAPES = {"ffn_gate_exps": (256, 256), "ffn_up_exps": (256, 256), "ffn_down_exps": (256, 256), "attn_q": (256, 256), "attn_output": (256, 256)}
TOKENS = list(range(300, 360))


def write_adapter(path: Path, *parts: str, architecture: str = "qwen3moe") -> Path:
    """A random adapter for these tensors in every layer."""
    random = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for layer in range(10):
        for part in parts:
            rows, columns = SHAPES[part]
            experts = (N_EXPERTS,) if "exps" in part else ()
            for suffix, shape in (("a", (*experts, RANK, columns)), ("b", (*experts, rows, RANK))):
                values = random.normal(0, columns**-0.5, shape).astype(np.float32)
                writer.add_tensor(f"blk.{layer}.{part}.weight.lora_{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def evaluate(model: Path, adapter: Path | None, **options: object) -> tuple[npt.NDArray[np.float32], ModelStats | None]:
    lora = {} if adapter is None else {"lora_path": str(adapter)}
    llama = spac.Llama(model, n_ctx=128, logits_all=True, verbose=False, n_threads=2, **lora, **options)  # type: ignore[arg-type]
    try:
        info = llama.spac.info()
        if info is not None:
            llama.spac.cap_experts(info.floor_bytes)
        for begin in (0, 30):  # two batches: what the first one read, the second reads again
            llama.eval(TOKENS[begin : begin + 30])
        return np.array(llama.scores[: len(TOKENS)]), llama.spac.stats()
    finally:
        llama.close()


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("parts", [("ffn_up_exps",), ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), ("attn_q", "attn_output"), ("attn_q", "ffn_down_exps")])
def test_paged_is_exact(model_path: Path, tmp_path: Path, parts: tuple[str, ...], repack: bool) -> None:
    adapter = write_adapter(tmp_path / "adapter.gguf", *parts)
    expected, _ = evaluate(model_path, adapter, paging="off", repack=repack)
    actual, stats = evaluate(model_path, adapter, paging="on", memory="8G", repack=repack)
    assert np.array_equal(actual, expected)
    assert stats is not None
    assert stats.evictions > 0
    assert stats.rereads > 0
    without, _ = evaluate(model_path, None, paging="off", repack=repack)
    assert np.abs(actual - without).max() > 0.1  # the adapter does something


def test_bad_adapters(model_path: Path, tmp_path: Path) -> None:
    """One clear line that names the file, and the next model loads as if nothing had been."""
    missing = tmp_path / "missing.gguf"
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not an adapter")
    other = write_adapter(tmp_path / "other.gguf", "attn_q", architecture="llama")
    for path, words in ((missing, "No such file"), (garbage, "invalid magic"), (other, "arch mismatch"), (model_path, "general.type")):
        with pytest.raises(ModelFileError) as caught:
            evaluate(model_path, path, paging="on", memory="8G")
        text = str(caught.value)
        assert text.startswith(f"{path}: llama.cpp cannot load this adapter: ") and words in text and "\n" not in text
    _, stats = evaluate(model_path, None, paging="on", memory="8G")
    assert stats is not None and stats.misses > 0


def test_level_of_errors_is_upstreams() -> None:
    """The reason why something does not load is the last line that llama.cpp logged as an error."""
    header = (Path(__file__).parent.parent / "vendor/llama.cpp/ggml/include/ggml.h").read_text()
    found = re.findall(r"GGML_LOG_LEVEL_ERROR\s*=\s*(\d+)", header)
    assert [int(level) for level in found] == [log._ERROR_LEVEL]
