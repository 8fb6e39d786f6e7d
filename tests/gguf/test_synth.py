"""Synthetic models have the structure of those they are like, load, and are paged at true expert counts.

The sizes to compare with are those of published quantised files of the same model and recipe.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest

import spac
from spac import device
from spac.errors import ModelFileError, OptionError
from spac.gguf.check import check_model
from spac.gguf.reader import read_gguf
from spac.gguf.structures import STRUCTURES, Structure
from spac.gguf.synth import Written, synthesise
from tests.conftest import Result
from tests.devices import make_device

GIB = 1 << 30
# tensors, layers with experts, experts, used, bytes of a bundle, GiB of the file in its usual recipe
KNOWN = {
    "qwen3-30b-a3b": (579, 48, 128, 8, 3059712, 17.3),
    "gpt-oss-20b": (459, 24, 32, 4, 13219200, 11.3),
    "granite-3.1-3b-a800m": (322, 32, 40, 8, 1529856, 1.9),
    "olmoe-1b-7b": (195, 16, 64, 8, 4079616, 3.9),
    "deepseek-v2-lite": (377 + 27, 26, 64, 6, 6307840, 9.7),
    "qwen3.6-35b-a3b": (753, 40, 256, 8, 2039808, 20.2),
}


def test_every_structure_is_known() -> None:
    assert set(KNOWN) == set(STRUCTURES)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """The header of a model, written once."""
    folder = tmp_path_factory.mktemp("headers")
    return cache(lambda like: synthesise(like, folder / f"{like}.gguf", content="header"))


@pytest.mark.parametrize("like", KNOWN)
def test_header(like: str, header: Callable[[str], Written], cli: Callable[..., Result]) -> None:
    """`spac inspect` finds the counts and sizes of the real model in a header; next to nothing is on the disk."""
    n_tensors, n_layers, n_experts, n_used, bundle_bytes, file_gib = KNOWN[like]
    written = header(like)
    assert written.n_tensors == n_tensors
    assert written.disk_bytes < 16 << 20
    assert abs(written.file_bytes / GIB - file_gib) < 0.06
    found = json.loads(cli("inspect", written.path, "--json").out)
    assert (found["expert_layers"], found["experts"], found["experts_used"]) == (n_layers, n_experts, n_used)
    assert found["bundle_bytes"] == bundle_bytes
    assert found["floor_bytes"] < 32 << 20
    assert (found["skipped_bytes"] > 0) == (like == "qwen3.6-35b-a3b")


@pytest.mark.parametrize("like", KNOWN)
def test_plan(like: str, header: Callable[[str], Written], cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp itself accepts the tensors and their shapes: a load that allocates nothing; what is skipped is not planned for."""
    path = header(like).path
    facts = check_model(path)
    monkeypatch.setattr(device, "probe", lambda *_, **__: make_device(quick=True))  # this machine is not measured
    plan = json.loads(cli("plan", path, "--memory", "4G", "--ctx", "512", "--json").out)
    budget = plan["budget"]
    assert plan["fits"]
    assert budget["paged"] == (like != "granite-3.1-3b-a800m")
    assert abs(budget["all_expert_bytes"] - facts.expert_bytes) < 0.01 * facts.expert_bytes
    assert abs(budget["dense_bytes"] - facts.dense_bytes) < 0.01 * facts.dense_bytes


@pytest.mark.parametrize("recipe", ["MXFP4", "Q4_0", "Q8_0", "IQ2_XXS", "F16"])
def test_recipes(recipe: str, tmp_path: Path) -> None:
    """Experts are in the type that was asked for, or in what upstream falls back to where rows are too short for its blocks."""
    for like, rows in (("granite-3.1-3b-a800m", 512), ("deepseek-v2-lite", 1408)):
        small = dataclasses.replace(STRUCTURES[like], n_vocab=1000)  # a long vocabulary takes long to write
        path = synthesise(small, tmp_path / "model.gguf", recipe=recipe, content="header").path
        found = {tensor.name: tensor.type_name for tensor in read_gguf(path).tensors}
        assert found["blk.1.ffn_up_exps.weight"] == recipe
        falls_back = rows % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[recipe]][0] != 0
        assert found["blk.1.ffn_down_exps.weight"] == ("IQ4_NL" if falls_back else recipe)
        assert found["blk.1.ffn_gate_inp.weight"] == "F32"


def test_paged_at_true_scale(tmp_path: Path) -> None:
    """A model of 1.9 GiB with 40 experts in each of 32 layers, experts a hole, in 600 MiB: all bundles, finite logits, evictions."""
    written = synthesise("granite-3.1-3b-a800m", tmp_path / "model.gguf", content="sparse")
    assert written.disk_bytes < written.file_bytes / 8
    llama = spac.Llama(written.path, memory="8G", paging="on", n_ctx=64, n_ubatch=32, verbose=False, n_threads=2)
    try:
        info = llama.spac.info()
        assert info is not None
        assert (info.n_bundles, info.n_tensors) == (32 * 40, 32 * 3)
        llama.spac.cap_experts(info.expert_page_bytes // 8)
        for token in range(300, 306):
            llama.eval([token])
        logits = np.array(llama._ctx.get_logits()[: llama.n_vocab()])
        stats = llama.spac.stats()
        assert stats is not None
        assert np.isfinite(logits).all() and logits.std() > 0
        assert stats.evictions > 0
        assert stats.peak_bytes <= stats.budget_bytes
        used = [{e.experts for e in llama.spac.events() if e.layer == layer} for layer in range(32)]
        assert all(len(routes) > 1 for routes in used)  # routers send tokens to differing experts
    finally:
        llama.close()


def many_slices() -> Structure:
    """94 layers of 128 experts, each of three slices of 4.5 MiB: as in a 235B model, with next to nothing around them."""
    n_embd, n_ff = 256, 32768
    block = {
        "attn_norm.weight": (n_embd,), "attn_q.weight": (n_embd, 64), "attn_k.weight": (n_embd, 64), "attn_v.weight": (n_embd, 64),
        "attn_output.weight": (64, n_embd), "attn_q_norm.weight": (64,), "attn_k_norm.weight": (64,), "ffn_norm.weight": (n_embd,),
        "ffn_gate_inp.weight": (n_embd, 128), "ffn_gate_exps.weight": (n_embd, n_ff, 128), "ffn_up_exps.weight": (n_embd, n_ff, 128),
        "ffn_down_exps.weight": (n_ff, n_embd, 128),
    }  # fmt: skip
    tensors = {"token_embd.weight": (n_embd, 512), "output_norm.weight": (n_embd,)}
    tensors |= {f"blk.{layer}.{name}": shape for layer in range(94) for name, shape in block.items()}
    metadata: dict[str, int | float | str | bool | list[int] | list[bool]] = {
        "block_count": 94, "context_length": 64, "embedding_length": n_embd, "feed_forward_length": n_ff, "attention.head_count": 1,
        "attention.head_count_kv": 1, "attention.key_length": 64, "attention.value_length": 64, "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": 128, "expert_used_count": 1, "expert_feed_forward_length": n_ff,
    }  # fmt: skip
    return Structure("many slices", "qwen3moe", "Q4_0", 512, "qwen2", metadata, tensors)


def test_more_slices_than_mappings(tmp_path: Path) -> None:
    """36,096 slices, each with a huge page, would take more mappings than a process may have; some are left to everything else."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    path = synthesise(many_slices(), tmp_path / "model.gguf", content="sparse").path
    llama = spac.Llama(path, memory="8G", paging="on", n_ctx=64, n_ubatch=32, verbose=False, n_threads=2)
    try:
        info = llama.spac.info()
        assert info is not None and info.n_bundles == 94 * 128
        llama.spac.cap_experts(64 << 20)
        llama.eval([300])
        assert np.isfinite(llama._ctx.get_logits()[: llama.n_vocab()]).all()
        assert len(Path("/proc/self/maps").read_text().splitlines()) < 0.8 * most
    finally:
        llama.close()


def test_paged_is_exact(tmp_path: Path) -> None:
    """With weights in the experts, of a layout with rows that are no whole number of large blocks: paged as unpaged, to the bit."""
    structure = STRUCTURES["granite-3.1-3b-a800m"]
    tensors = {name: shape for name, shape in structure.tensors.items() if not name.startswith("blk.") or int(name.split(".")[1]) < 3}
    small = Structure("three layers", "granitemoe", "Q4_K_M", structure.n_vocab, "refact", structure.metadata | {"block_count": 3}, tensors)
    path = synthesise(small, tmp_path / "model.gguf").path

    def logits(**options: object) -> tuple[np.ndarray, int]:
        llama = spac.Llama(path, n_ctx=64, n_ubatch=32, verbose=False, n_threads=2, **options)  # type: ignore[arg-type]
        info = llama.spac.info()
        if info is not None:
            llama.spac.cap_experts(info.floor_bytes)
        llama.eval(list(range(300, 320)))
        result, stats = np.array(llama._ctx.get_logits()[: llama.n_vocab()]), llama.spac.stats()
        llama.close()
        return result, stats.evictions if stats else 0

    expected, _ = logits(paging="off")
    actual, evictions = logits(paging="on", memory="8G")
    assert np.array_equal(actual, expected) and expected.std() > 0
    assert evictions > 0


def test_bad_wishes(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such structure; known are qwen3-30b-a3b"):
        synthesise("gpt-5", tmp_path / "model.gguf")
    with pytest.raises(OptionError, match="no such ggml type"):
        synthesise("olmoe-1b-7b", tmp_path / "model.gguf", recipe="Q4_L", content="header")
    with pytest.raises(ModelFileError, match=r"cannot be written: No such file or directory; 3.9\d GiB are needed"):
        synthesise("olmoe-1b-7b", tmp_path / "missing" / "model.gguf", content="header")
    assert not list(tmp_path.iterdir())

