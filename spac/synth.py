"""Structure-exact synthetic models: the tensors, shapes, types and metadata of a known model, with random weights.

What a loader, a plan or a pager meets at true scale (expert counts, bundle sizes, odd row lengths, a vocabulary of the true
size) can so be tried without the model. The text that comes out means nothing, but logits are finite, and the routers send
tokens to differing experts. Names and shapes are those that upstream's `convert_hf_to_gguf.py` writes for the published
config.json; types follow `llama_tensor_get_type_impl` in upstream's src/llama-quant.cpp.

With content "sparse" the routed experts are a hole in the file: they read as zeros, which is a valid block of every type, so
that the model runs and a 30B file takes a gigabyte on disk. With "header" everything is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import gguf
import numpy as np
import numpy.typing as npt

from spac.errors import ModelFileError, OptionError
from spac.gguf_check import expert_layer_of
from spac.inflate import Progress, Quantiser, write_failure
from spac.memory import format_bytes

Content = Literal["full", "sparse", "header"]
Shape = tuple[int, ...]  # innermost dimension first, as ggml counts
Tensors = dict[str, Shape]
Value = int | float | str | bool | list[int] | list[bool]

RECIPES: Final = ("Q4_K_M", "MXFP4")  # mixtures of types; any ggml type's name is one too
POOL_ROWS: Final = 256  # tensors are made of so many differing rows for each type and length
CHUNK_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Structure:
    """What a published model is made of.

    Attributes:
        name: as users of --like type it.
        architecture: upstream's name.
        recipe: in which types it is usually run.
        n_vocab: tokens; `pre` is upstream's name of how text is split before they are looked up.
        metadata: without the architecture's prefix.
        tensors: names and shapes, in the order of the file.
    """

    name: str
    architecture: str
    recipe: str
    n_vocab: int
    pre: str
    metadata: dict[str, Value]
    tensors: Tensors

    @property
    def n_layers(self) -> int:
        """Blocks, those for predicting several tokens included."""
        return int(self.metadata["block_count"])  # type: ignore[arg-type]


# -- the models, from their published config.json --


def _model(n_embd: int, n_vocab: int, blocks: list[Tensors], *, tied: bool = False) -> Tensors:
    tensors: Tensors = {"token_embd.weight": (n_embd, n_vocab)}
    for layer, block in enumerate(blocks):
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    tensors["output_norm.weight"] = (n_embd,)
    return tensors if tied else tensors | {"output.weight": (n_embd, n_vocab)}


def _attention(n_embd: int, n_head: int, n_head_kv: int, n_head_dim: int, *, q_factor: int = 1) -> Tensors:
    return {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_embd, q_factor * n_head * n_head_dim),
        "attn_k.weight": (n_embd, n_head_kv * n_head_dim),
        "attn_v.weight": (n_embd, n_head_kv * n_head_dim),
        "attn_output.weight": (n_head * n_head_dim, n_embd),
    }


def _head_norms(n: int) -> Tensors:
    return {"attn_q_norm.weight": (n,), "attn_k_norm.weight": (n,)}


def _gated(suffix: str, n_embd: int, n_ff: int, *n_experts: int) -> Tensors:
    """Gate, up and down of a dense ffn (suffix ""), shared experts ("_shexp") or routed ones ("_exps")."""
    return {
        f"ffn_gate{suffix}.weight": (n_embd, n_ff, *n_experts),
        f"ffn_up{suffix}.weight": (n_embd, n_ff, *n_experts),
        f"ffn_down{suffix}.weight": (n_ff, n_embd, *n_experts),
    }


def _routed(n_embd: int, n_ff: int, n_experts: int, norm: str = "ffn_norm") -> Tensors:
    return {f"{norm}.weight": (n_embd,), "ffn_gate_inp.weight": (n_embd, n_experts)} | _gated("_exps", n_embd, n_ff, n_experts)


def _qwen3_30b() -> Structure:
    # https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json
    block = _attention(2048, 32, 4, 128) | _head_norms(128) | _routed(2048, 768, 128)
    metadata: dict[str, Value] = {
        "block_count": 48, "context_length": 40960, "embedding_length": 2048, "feed_forward_length": 6144,
        "attention.head_count": 32, "attention.head_count_kv": 4, "attention.key_length": 128, "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
        "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768,
    }  # fmt: skip
    return Structure("qwen3-30b-a3b", "qwen3moe", "Q4_K_M", 151936, "qwen2", metadata, _model(2048, 151936, [block] * 48))


def _gpt_oss_20b() -> Structure:
    # https://huggingface.co/openai/gpt-oss-20b/blob/main/config.json
    n_embd, n_ff, n_experts = 2880, 2880, 32
    block = _attention(n_embd, 64, 8, 64) | _routed(n_embd, n_ff, n_experts, norm="post_attention_norm") | {
        "attn_q.bias": (4096,), "attn_k.bias": (512,), "attn_v.bias": (512,), "attn_output.bias": (n_embd,),
        "attn_sinks.weight": (64,), "ffn_gate_inp.bias": (n_experts,),
        "ffn_gate_exps.bias": (n_ff, n_experts), "ffn_up_exps.bias": (n_ff, n_experts), "ffn_down_exps.bias": (n_embd, n_experts),
    }  # fmt: skip
    metadata: dict[str, Value] = {
        "block_count": 24, "context_length": 131072, "embedding_length": n_embd, "feed_forward_length": n_ff,
        "attention.head_count": 64, "attention.head_count_kv": 8, "attention.key_length": 64, "attention.value_length": 64,
        "attention.sliding_window": 128, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        "expert_count": n_experts, "expert_used_count": 4, "expert_feed_forward_length": n_ff,
    }  # fmt: skip
    return Structure("gpt-oss-20b", "gpt-oss", "MXFP4", 201088, "gpt-4o", metadata, _model(n_embd, 201088, [block] * 24))


def _granite_3b() -> Structure:
    # https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-instruct/blob/main/config.json
    block = _attention(1536, 24, 8, 64) | _routed(1536, 512, 40)
    metadata: dict[str, Value] = {
        "block_count": 32, "context_length": 131072, "embedding_length": 1536, "feed_forward_length": 512, "vocab_size": 49155,
        "attention.head_count": 24, "attention.head_count_kv": 8, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 6.0,
        "rope.dimension_count": 64, "rope.freq_base": 1e7, "expert_count": 40, "expert_used_count": 8,
    }  # fmt: skip
    tensors = _model(1536, 49155, [block] * 32, tied=True)
    return Structure("granite-3.1-3b-a800m", "granitemoe", "Q4_K_M", 49155, "refact", metadata, tensors)


def _olmoe() -> Structure:
    # https://huggingface.co/allenai/OLMoE-1B-7B-0924/blob/main/config.json
    block = _attention(2048, 16, 16, 128) | _head_norms(2048) | _routed(2048, 1024, 64)
    metadata: dict[str, Value] = {
        "block_count": 16, "context_length": 4096, "embedding_length": 2048, "feed_forward_length": 1024,
        "attention.head_count": 16, "attention.head_count_kv": 16, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "expert_count": 64, "expert_used_count": 8,
    }  # fmt: skip
    return Structure("olmoe-1b-7b", "olmoe", "Q4_K_M", 50304, "olmo", metadata, _model(2048, 50304, [block] * 16))


def _deepseek_v2_lite() -> Structure:
    # https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json
    n_embd, n_head, kv_rank, nope, rope, v = 2048, 16, 512, 128, 64, 128
    attention: Tensors = {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_embd, n_head * (nope + rope)),
        "attn_kv_a_mqa.weight": (n_embd, kv_rank + rope),
        "attn_kv_a_norm.weight": (kv_rank,),
        "attn_k_b.weight": (nope, kv_rank, n_head),
        "attn_v_b.weight": (kv_rank, v, n_head),
        "attn_output.weight": (n_head * v, n_embd),
    }
    dense = attention | {"ffn_norm.weight": (n_embd,)} | _gated("", n_embd, 10944)
    routed = attention | _routed(n_embd, 1408, 64) | _gated("_shexp", n_embd, 2 * 1408)
    metadata: dict[str, Value] = {
        "block_count": 27, "context_length": 163840, "embedding_length": n_embd, "feed_forward_length": 10944,
        "leading_dense_block_count": 1, "vocab_size": 102400,
        "attention.head_count": n_head, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.kv_lora_rank": kv_rank, "attention.key_length": kv_rank + rope, "attention.value_length": kv_rank,
        "attention.key_length_mla": nope + rope, "attention.value_length_mla": v,
        "rope.dimension_count": rope, "rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096, "rope.scaling.yarn_log_multiplier": 0.0707,
        "expert_count": 64, "expert_used_count": 6, "expert_feed_forward_length": 1408, "expert_shared_count": 2,
        "expert_weights_scale": 1.0, "expert_gating_func": 1,
    }  # fmt: skip
    tensors = _model(n_embd, 102400, [dense] + [routed] * 26)
    return Structure("deepseek-v2-lite", "deepseek2", "Q4_K_M", 102400, "deepseek-llm", metadata, tensors)


def _qwen36_35b() -> Structure:
    # https://huggingface.co/Qwen/Qwen3.6-35B-A3B, text model; three blocks of linear attention to one of full attention, and one
    # more that predicts the token after the next, which upstream skips unless it is asked for
    n_embd, n_layers, key_dim, value_dim, n_v_heads = 2048, 40, 16 * 128, 32 * 128, 32
    linear: Tensors = {
        "attn_norm.weight": (n_embd,),
        "attn_qkv.weight": (n_embd, 2 * key_dim + value_dim),
        "attn_gate.weight": (n_embd, value_dim),
        "ssm_conv1d.weight": (4, 2 * key_dim + value_dim),
        "ssm_dt.bias": (n_v_heads,),
        "ssm_a": (n_v_heads,),
        "ssm_beta.weight": (n_embd, n_v_heads),
        "ssm_alpha.weight": (n_embd, n_v_heads),
        "ssm_norm.weight": (128,),
        "ssm_out.weight": (value_dim, n_embd),
    }
    full = _attention(n_embd, 16, 2, 256, q_factor=2) | _head_norms(256)  # the second half of q is a gate
    ffn = _routed(n_embd, 512, 256, norm="post_attention_norm") | {"ffn_gate_inp_shexp.weight": (n_embd,)} | _gated("_shexp", n_embd, 512)
    predict: Tensors = {
        "nextn.eh_proj.weight": (2 * n_embd, n_embd), "nextn.enorm.weight": (n_embd,), "nextn.hnorm.weight": (n_embd,),
        "nextn.shared_head_norm.weight": (n_embd,),
    }  # fmt: skip
    recurrent = [(layer + 1) % 4 != 0 for layer in range(n_layers)]
    metadata: dict[str, Value] = {
        "block_count": n_layers + 1, "nextn_predict_layers": 1, "context_length": 262144, "embedding_length": n_embd,
        "attention.head_count": 16, "attention.head_count_kv": 2, "attention.key_length": 256, "attention.value_length": 256,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.recurrent_layers": [*recurrent, False], "full_attention_interval": 4,
        "rope.dimension_count": 64, "rope.dimension_sections": [11, 11, 10, 0], "rope.freq_base": 1e7,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": n_v_heads, "ssm.inner_size": value_dim,
        "expert_count": 256, "expert_used_count": 8, "expert_feed_forward_length": 512, "expert_shared_feed_forward_length": 512,
    }  # fmt: skip
    blocks = [(linear if r else full) | ffn for r in recurrent] + [full | ffn | predict]
    return Structure("qwen3.6-35b-a3b", "qwen35moe", "Q4_K_M", 248320, "qwen35", metadata, _model(n_embd, 248320, blocks))


STRUCTURES: Final = {
    structure.name: structure
    for structure in (_qwen3_30b(), _gpt_oss_20b(), _granite_3b(), _olmoe(), _deepseek_v2_lite(), _qwen36_35b())
}


# -- types --


@cache
def _quantiser(type_name: str) -> Quantiser:
    return Quantiser(type_name)


def _quantiser_for(structure: Structure, name: str, recipe: str) -> Quantiser:
    """The type that upstream's quantiser would give a tensor."""
    shape = structure.tensors[name]
    kept = len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight"))
    if kept:
        return _quantiser("F32")
    quantiser = _quantiser(_wanted_type(structure, name, recipe))
    if shape[0] % quantiser.block:
        smaller = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
        quantiser = _quantiser(smaller.get(quantiser.type.name, "IQ4_NL"))
    return _quantiser("F16") if shape[0] % quantiser.block else quantiser


def _wanted_type(structure: Structure, name: str, recipe: str) -> str:
    is_output = name == ("output.weight" if "output.weight" in structure.tensors else "token_embd.weight")
    if recipe == "MXFP4":
        return "MXFP4" if len(structure.tensors[name]) == 3 else "Q8_0"
    if recipe != "Q4_K_M":
        return "Q6_K" if is_output and _quantiser(recipe).block > 1 and recipe != "Q8_0" else recipe
    if is_output:
        return "Q6_K"
    values = [n for n in structure.tensors if n.endswith(("attn_v.weight", "attn_qkv.weight"))]
    if name in values:
        more = _more_bits(values.index(name), len(values))
    else:
        more = "ffn_down" in name and _more_bits(int(name.split(".")[1]), structure.n_layers)
    return "Q6_K" if more else "Q4_K"


def _more_bits(layer: int, n_layers: int) -> bool:
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


# -- the vocabulary --

SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _vocabulary(n_vocab: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: three special tokens, all bytes, then pairs of bytes, then pairs and a byte."""
    # GPT-2's way to write a byte as a printable character
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(unprintable))]
    left, tokens = list(characters), [*SPECIAL_TOKENS, *characters]
    merges: list[str] = []
    at = 0
    while len(tokens) < n_vocab:
        merges.extend(f"{left[at]} {right}" for right in characters[: n_vocab - len(tokens)])
        made = [left[at] + right for right in characters[: n_vocab - len(tokens)]]
        tokens.extend(made)
        left.extend(made)
        at += 1
    return tokens, merges


# -- weights --


class _Weights:
    """Random rows: quantised once for each type and length, then drawn from."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pools: dict[tuple[str, int], npt.NDArray[np.uint8]] = {}

    def chunks(self, name: str, shape: Shape, quantiser: Quantiser) -> Iterator[bytes]:
        """The bytes of a tensor, some rows at a time."""
        if quantiser.type == gguf.GGMLQuantizationType.F32:
            yield self._plain(name, shape).astype("<f4").tobytes()
            return
        n, n_rows = shape[0], math.prod(shape[1:])
        pool = self._pool(n, quantiser)
        step = max(1, CHUNK_BYTES // pool.shape[1])
        for begin in range(0, n_rows, step):
            yield pool[self._random.integers(len(pool), size=min(step, n_rows - begin))].tobytes()

    def _plain(self, name: str, shape: Shape) -> npt.NDArray[np.float32]:
        if name.endswith(("norm.weight", "ssm_norm.weight")):
            return np.ones(shape, dtype=np.float32)
        if name.endswith("ssm_a"):  # minus the exponential of what the checkpoint has: a decay
            return -self._random.uniform(1, 16, shape).astype(np.float32)
        scale = 0.02 if len(shape) == 1 or name.endswith(".bias") else shape[0] ** -0.5
        return self._random.normal(0, scale, shape).astype(np.float32)

    def _pool(self, n: int, quantiser: Quantiser) -> npt.NDArray[np.uint8]:
        key = (quantiser.type.name, n)
        if key not in self._pools:  # inputs are normalised: such rows keep the size of what goes through
            self._pools[key] = quantiser(self._random.normal(0, n**-0.5, (POOL_ROWS, n)).astype(np.float32))
        return self._pools[key]


# -- the file --


@dataclass(frozen=True)
class Written:
    """What was written: the file's size, and what of it is on the disk."""

    path: Path
    file_bytes: int
    disk_bytes: int
    n_tensors: int


def synthesise(
    like: str | Structure,
    target: Path,
    *,
    recipe: str | None = None,
    content: Content = "full",
    seed: int = 0,
    progress: Progress | None = None,
) -> Written:
    """Write a model with the structure of `like`.

    Args:
        like: a key of STRUCTURES, or one of your own.
        target: the file to write.
        recipe: of RECIPES or a ggml type's name; None: what the model is usually run in.
        content: "full", "sparse" (routed experts are a hole) or "header" (all weights are).
        progress: called with (bytes written, bytes in all), holes included.

    Raises:
        OptionError: no such structure or type.
        ModelFileError: `target` cannot be written (a partial file is removed).
    """
    if isinstance(like, str) and like not in STRUCTURES:
        raise OptionError(f"{like!r}: no such structure; known are {', '.join(STRUCTURES)}")
    structure = STRUCTURES[like] if isinstance(like, str) else like
    recipe = (recipe or structure.recipe).upper()
    if recipe not in RECIPES:
        _quantiser(recipe)  # a wrong name is said before anything is written
    quantisers = {name: _quantiser_for(structure, name, recipe) for name in structure.tensors}
    sizes = {name: quantisers[name].row_bytes(math.prod(shape)) for name, shape in structure.tensors.items()}
    total = sum(sizes.values())
    partial = target.with_name(target.name + ".part")
    try:
        _write_header(partial, structure, recipe, quantisers, sizes)
        with partial.open("r+b") as file:
            _write_weights(file, structure, quantisers, sizes, content, seed, lambda done: progress and progress(done, total))
        partial.replace(target)
    except OSError as error:
        raise ModelFileError(f"{target}: cannot be written: {write_failure(error)}; {format_bytes(total)} are needed") from error
    finally:
        partial.unlink(missing_ok=True)
    status = target.stat()
    return Written(target, status.st_size, 512 * status.st_blocks, len(structure.tensors))


def _write_header(path: Path, structure: Structure, recipe: str, quantisers: dict[str, Quantiser], sizes: dict[str, int]) -> None:
    writer = gguf.GGUFWriter(path, structure.architecture)
    writer.add_name(f"synthetic, like {structure.name}")
    writer.add_file_type(int(getattr(gguf.LlamaFileType, f"MOSTLY_{'MXFP4_MOE' if recipe == 'MXFP4' else recipe}", 0)))
    for key, value in structure.metadata.items():
        _add(writer, f"{structure.architecture}.{key}", value)
    tokens, merges = _vocabulary(structure.n_vocab)
    n_special = len(SPECIAL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(structure.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.CONTROL if i < n_special else gguf.TokenType.NORMAL) for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, shape in structure.tensors.items():
        quantiser = quantisers[name]
        plain = quantiser.type == gguf.GGMLQuantizationType.F32
        bytes_shape = tuple(reversed(shape)) if plain else (*reversed(shape[1:]), quantiser.row_bytes(shape[0]))
        dtype = np.dtype(np.float32 if plain else np.uint8)
        writer.add_tensor_info(name, bytes_shape, dtype, sizes[name], raw_dtype=None if plain else quantiser.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    types = gguf.GGUFValueType
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    if isinstance(value, list):
        writer.add_key_value(key, value, types.ARRAY, kinds[type(value[0])])
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _write_weights(
    file: BinaryIO,
    structure: Structure,
    quantisers: dict[str, Quantiser],
    sizes: dict[str, int],
    content: Content,
    seed: int,
    progress: Callable[[int], object],
) -> None:
    weights, done = _Weights(seed), 0
    at = _aligned(file.seek(0, 2))
    for name, shape in structure.tensors.items():
        if content == "full" or (content == "sparse" and expert_layer_of(name) is None):
            file.seek(at)
            for chunk in weights.chunks(name, shape, quantisers[name]):
                file.write(chunk)
        at += _aligned(sizes[name])
        done += sizes[name]
        progress(done)
    file.truncate(at)


def _aligned(n: int) -> int:
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    return -(-n // alignment) * int(alignment)
