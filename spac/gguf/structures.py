"""The structures of published mixture-of-experts models: tensors, shapes and metadata, from their config.json.

Names and shapes are those that upstream's `convert_hf_to_gguf.py` writes. Data only: `spac.gguf.synth` makes files of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Shape = tuple[int, ...]  # innermost dimension first, as ggml counts
Tensors = dict[str, Shape]
Value = int | float | str | bool | list[int] | list[bool]


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
