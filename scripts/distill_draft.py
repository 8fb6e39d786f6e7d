#!/usr/bin/env python3
"""Distils the bundled draft from the bundled target, on text that the target writes meanwhile, and says so in the data card.

    pip install torch tokenizers gguf                       # as for scripts/train_demo.py
    scripts/train_demo.py corpus WORK                       # what both were trained on: WORK/train.txt, and held_out.txt
    scripts/distill_draft.py WORK --minutes 9               # models/spac-demo-draft.gguf, training.json and README.md; wants a GPU

A draft is asked what the target will write, which is not quite what people wrote. Each sequence begins as a document or a question of the
training text does and goes on with the target's own words, half of them sampled at temperature 0.6, half at 0.8, never a token with less
than a twentieth of the best one's probability; no sequence is used for long. A quarter of what the draft sees is training text. The loss is the cross
entropy with all of the target's own probabilities. The weights are those in the file, before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_demo import DRAFT, SPECIALS, TARGET, Model, byte_level, load_tokens, pieces, rotate, write_card

MODELS: Final = Path(__file__).resolve().parent.parent / "models"
TARGET_FILE: Final = MODELS / "spac-demo-moe.gguf"
DRAFT_FILE: Final = MODELS / "spac-demo-draft.gguf"
LENGTH: Final = 256
WRITTEN: Final = 4096  # sequences at a time
USES: Final = 4  # of each
BATCH, OF_TEXT = 256, 64  # sequences of a step; of these, training text
PEAK_RATE, WARM_UP, SEED = 3e-3, 200, 20261126
BEGINNINGS: Final = 65536
BEGINNING: Final = (12, 80)  # tokens, shortest and longest
TEMPERATURES, MIN_P = (0.6, 0.8), 0.05
UNSEEN: Final = 256  # sequences that only judge, each way
SKIPPED: Final = 16  # first tokens of a sequence, that only give the draft something to go by


def weights(path: Path) -> dict[str, Tensor]:
    """By name, as they are after quantisation."""
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in gguf.GGUFReader(path).tensors}


# -- target -----------------------------------------------------------------------------------------------------------


class Target:
    """The bundled target, as llama.cpp computes it (src/models/qwen3moe.cpp) but for rounding: all experts of all tokens at once."""

    def __init__(self, path: Path, device: str) -> None:
        found = {name: tensor.to(device) for name, tensor in weights(path).items()}
        self.embedding, self.norm = found["token_embd.weight"], found["output_norm.weight"]
        self.layers = [self.layer({key.split(".")[2]: t for key, t in found.items() if key.startswith(f"blk.{i}.")}) for i in range(TARGET.n_layers)]

    @staticmethod
    def layer(w: dict[str, Tensor]) -> SimpleNamespace:
        gate, up, down = (w[f"ffn_{name}_exps"].bfloat16() for name in ("gate", "up", "down"))  # [experts, out, in]
        return SimpleNamespace(
            **{name: w[name] for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")},
            **{name: w[name].T for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")},
            gate=gate.flatten(0, 1).T, up=up.flatten(0, 1).T, down=down.transpose(1, 2).flatten(0, 1),
        )  # fmt: skip

    def cache(self, n: int) -> list[tuple[Tensor, Tensor]]:
        """Of n sequences: keys and values by layer."""
        shape = (n, TARGET.n_kv_heads, LENGTH, TARGET.head_width)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None, place: int = 0) -> Tensor:
        """Of tokens [n, t] the logits [n, t, vocabulary]; with a cache they follow what it holds up to `place`."""
        c, (n, t) = TARGET, tokens.shape
        frequency = c.rope_base ** (-torch.arange(0, c.head_width, 2) / c.head_width)
        angle = torch.arange(place, place + t)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        heads = (n, t, -1, c.head_width)
        x = F.embedding(tokens, self.embedding)
        for i, w in enumerate(self.layers):
            h = rms(x, w.attn_norm)
            q = rotate(rms((h @ w.attn_q).view(heads), w.attn_q_norm).transpose(1, 2), cos, sin)
            k = rotate(rms((h @ w.attn_k).view(heads), w.attn_k_norm).transpose(1, 2), cos, sin)
            v = (h @ w.attn_v).view(heads).transpose(1, 2)
            if cache is not None:
                keys, values = cache[i]
                keys[:, :, place : place + t], values[:, :, place : place + t] = k, v
                k, v = keys[:, :, : place + t], values[:, :, : place + t]
            group = c.n_heads // c.n_kv_heads
            y = F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=t > 1)
            x = x + y.transpose(1, 2).reshape(n, t, -1) @ w.attn_output
            x = x + self.experts(w, rms(x, w.ffn_norm).flatten(0, 1)).view(n, t, -1)
        return rms(x, self.norm) @ self.embedding.T

    @staticmethod
    def experts(w: SimpleNamespace, x: Tensor) -> Tensor:
        chances = F.softmax(x @ w.ffn_gate_inp, -1)
        weight, chosen = chances.topk(TARGET.n_used, -1)
        share = torch.zeros_like(chances).scatter(1, chosen, weight / weight.sum(-1, keepdim=True))
        x = x.bfloat16()
        hidden = (F.silu(x @ w.gate) * (x @ w.up)).view(-1, TARGET.n_experts, TARGET.n_ff) * share.bfloat16()[:, :, None]
        return (hidden.flatten(1) @ w.down).float()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + TARGET.norm_eps) * weight


@torch.no_grad()
def write(target: Target, given: Tensor, lengths: Tensor) -> Tensor:
    """Sequences [n, LENGTH] that begin with `lengths` [n] tokens of `given` [n, longest] and go on with the target's own."""
    n = len(given)
    cache, temperatures = target.cache(n), torch.tensor(TEMPERATURES).repeat(n)[:n, None]
    tokens = F.pad(given, (0, LENGTH - given.shape[1]))
    for place in range(LENGTH - 1):
        logits = target.logits(tokens[:, place : place + 1], cache, place)[:, 0]
        below = logits - logits.max(-1, keepdim=True).values
        chances = F.softmax((below / temperatures).masked_fill(below < math.log(MIN_P), -math.inf), -1)
        sampled = torch.multinomial(chances, 1)[:, 0]
        tokens[:, place + 1] = torch.where(place + 1 < lengths, tokens[:, place + 1], sampled)
    return tokens


# -- text -------------------------------------------------------------------------------------------------------------


def tokenizer_of(path: Path) -> Any:
    """The model's own, as `tokenizers` has it: WORK/tokenizer.json as scripts/train_demo.py would write it."""
    from tokenizers import AddedToken, models

    fields = gguf.GGUFReader(path).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    tokenizer = byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return tokenizer


def beginnings(work: Path, name: str, tokenizer: Any, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of documents, from the beginning of a word on, and of questions, with and without the chat template: ids [n, longest], lengths [n]."""
    chance, texts = random.Random(seed), []
    documents = (work / f"{name}.txt").read_text(encoding="utf-8").split("\0")
    while len(texts) < n:
        text = chance.choice(documents)
        if text.startswith("<|im_start|>"):
            question = chance.choice(text.split("<|im_start|>user\n")[1:]).split("<|im_end|>")[0]
            texts.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" if chance.random() < 0.5 else question)
        else:
            at = text.find(chance.choice("\n ."), chance.randrange(max(1, len(text) - 600))) + 1
            texts.append(text[at : at + chance.randint(4 * BEGINNING[0], 4 * BEGINNING[1])])
    ids, lengths = torch.zeros((n, BEGINNING[1]), dtype=torch.long, device="cpu"), torch.zeros(n, dtype=torch.long, device="cpu")
    for i, encoding in enumerate(tokenizer.encode_batch(texts)):
        of_text = torch.tensor(encoding.ids[: BEGINNING[1]] or [0], device="cpu")
        ids[i, : len(of_text)], lengths[i] = of_text, len(of_text)
    return ids, lengths


# -- draft ------------------------------------------------------------------------------------------------------------


def parameters_by_tensor(model: Model) -> dict[str, nn.Parameter]:
    """Of a dense model, by its name in a GGUF file."""
    found = {"token_embd.weight": model.embedding, "output_norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        a, f = block.attention, block.ffn
        found |= {f"blk.{i}.{name}.weight": each.weight for name, each in (
            ("attn_norm", block.attention_norm), ("ffn_norm", block.ffn_norm), ("attn_q_norm", a.q_norm), ("attn_k_norm", a.k_norm),
            ("attn_q", a.q), ("attn_k", a.k), ("attn_v", a.v), ("attn_output", a.out), ("ffn_gate", f.gate), ("ffn_up", f.up), ("ffn_down", f.down),
        )}  # fmt: skip
    return found


def load(path: Path) -> Model:
    model = Model(DRAFT)
    parameters = parameters_by_tensor(model)
    with torch.no_grad():
        for name, values in weights(path).items():
            parameters[name].copy_(values)
    return model


def store(model: Model, path: Path) -> None:
    """Into the file's own tensors: types and all else stay."""
    parameters = parameters_by_tensor(model)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        values = parameters[tensor.name].detach().float().cpu().numpy()
        tensor.data[:] = gguf.quants.quantize(values, tensor.tensor_type)
        tensor.data.flush()


def agreement(model: Model, target: Target, sequences: Tensor) -> float:
    """How often the target's likeliest token is the draft's."""
    with torch.no_grad():
        same = [(model(part).argmax(-1) == target.logits(part).argmax(-1))[:, SKIPPED:].float().mean() for part in sequences.split(BATCH)]
    return float(torch.stack(same).mean())


def distill(work: Path, minutes: float, device: str) -> dict[str, Any]:
    torch.manual_seed(SEED)
    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")
    tokenizer = tokenizer_of(TARGET_FILE)
    tokenizer.save(str(work / "tokenizer.json"))
    text = {name: load_tokens(work, name, TARGET.vocabulary) for name in ("train", "held_out")}
    chance = np.random.default_rng(SEED)
    target, model = Target(TARGET_FILE, device), load(DRAFT_FILE)
    given, lengths = (t.to(device) for t in beginnings(work, "train", tokenizer, BEGINNINGS, SEED))
    judges = {
        "own_text": write(target, *(t.to(device) for t in beginnings(work, "held_out", tokenizer, UNSEEN, SEED + 1))),
        "documents": pieces(text["held_out"], UNSEEN, LENGTH, chance).to(device),
    }
    report = {"seed": SEED, "minutes": minutes, "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "batch": BATCH, "peak_rate": PEAK_RATE,
              "loss_curve": []}  # type: dict[str, Any]  # fmt: skip
    report["before"] = {name: agreement(model, target, sequences) for name, sequences in judges.items()}
    print(json.dumps(report["before"]), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.02)
    own, step, begin, n_written = torch.zeros((0, LENGTH), dtype=torch.long), 0, time.monotonic(), 0
    n_own = BATCH - OF_TEXT
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1:
        if step * n_own >= USES * n_written:
            rows = torch.randint(BEGINNINGS, (WRITTEN,))
            own = write(target, given[rows], lengths[rows])
            n_written += WRITTEN
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARM_UP, max(0.005, 1 - share))
        batch = torch.cat([own[torch.randint(len(own), (n_own,))], pieces(text["train"], OF_TEXT, LENGTH, chance).to(device)])
        goal = target.logits(batch).softmax(-1)
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch)
        loss = -(goal * logits.float().log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            entry = {"step": step, "seconds": round(time.monotonic() - begin, 1), "loss": round(float(loss.detach()), 4),
                     "agreement": round(agreement(model, target, judges["own_text"]), 4)}  # fmt: skip
            report["loss_curve"].append(entry)
            print(json.dumps(entry), flush=True)
        step += 1
    store(model, DRAFT_FILE)
    model = load(DRAFT_FILE)  # as it is after quantisation
    report["steps"], report["written_tokens"], report["tokens"] = step, n_written * LENGTH, step * BATCH * LENGTH
    report["after"] = {name: agreement(model, target, sequences) for name, sequences in judges.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=9, help="training time (%(default)g)")
    arguments = parser.parse_args()
    report = distill(arguments.work, arguments.minutes, "cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({key: report[key] for key in ("before", "after", "steps", "written_tokens", "tokens")}))
    parts = json.loads((MODELS / "training.json").read_text())
    write_card({**parts, "distilled": report})


if __name__ == "__main__":
    main()
