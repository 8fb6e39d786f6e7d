#!/usr/bin/env python3
"""Trains the bundled draft further, on what the bundled target writes (scripts/sample_demo.py), and says so in the data card.

    pip install torch gguf                                   # as for scripts/train_demo.py
    scripts/train_demo.py corpus WORK
    .venv/bin/python scripts/sample_demo.py WORK             # WORK/samples.npz
    scripts/refine_draft.py WORK                             # models/spac-demo-draft.gguf, training.json and README.md

The loss is the cross entropy with the target's own probabilities of its likeliest tokens. The weights are those in the file, before and after.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from train_demo import DRAFT, Model, write_card

MODELS = Path(__file__).resolve().parent.parent / "models"
DRAFT_FILE = MODELS / "spac-demo-draft.gguf"
BATCH, PEAK_RATE, WARM_UP, SEED = 16, 2e-3, 60, 20261126
UNSEEN = 128  # sequences of the sampled text that only judge
SKIPPED = 16  # first tokens of a piece, that only give the draft something to go by


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
        for tensor in gguf.GGUFReader(path).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            parameters[tensor.name].copy_(torch.from_numpy(values.copy()))
    return model


def store(model: Model, path: Path) -> None:
    """Into the file's own tensors: types and all else stay."""
    parameters = parameters_by_tensor(model)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        values = parameters[tensor.name].detach().float().numpy()
        tensor.data[:] = gguf.quants.quantize(values, tensor.tensor_type)
        tensor.data.flush()


def agreement(model: Model, samples: dict[str, Tensor], rows: slice) -> tuple[float, float]:
    """How often the target's likeliest token is the draft's; and how likely the draft finds what the target finds so, in nats lost."""
    model.eval()
    same, loss = [], []
    with torch.no_grad():
        for part in range(rows.start, rows.stop, BATCH):
            batch = slice(part, min(part + BATCH, rows.stop))
            logits = model(samples["tokens"][batch].long())
            best = samples["ids"][batch].long().gather(-1, samples["chances"][batch].argmax(-1, keepdim=True)).squeeze(-1)
            same.append((logits.argmax(-1) == best)[:, SKIPPED:].float().mean())
            loss.append(cross_entropy(logits, samples, batch))
    model.train()
    return float(torch.stack(same).mean()), float(torch.stack(loss).mean())


def cross_entropy(logits: Tensor, samples: dict[str, Tensor], rows: Any) -> Tensor:
    chances = samples["chances"][rows].float()
    chances = chances / chances.sum(-1, keepdim=True)
    return -(chances * logits.float().log_softmax(-1).gather(-1, samples["ids"][rows].long())).sum(-1).mean()


def refine(work: Path, minutes: float) -> dict[str, Any]:
    torch.manual_seed(SEED)
    with np.load(work / "samples.npz") as saved:
        sampled, held_out = (
            {key: torch.from_numpy(saved[f"{name}_{key}"].astype(dtype)) for key, dtype in (("tokens", np.int32), ("ids", np.int16), ("chances", np.float16))}
            for name in ("sampled", "held_out")
        )
    n = len(sampled["tokens"]) - UNSEEN
    unseen, documents = slice(n, n + UNSEEN), slice(0, len(held_out["tokens"]))
    model = load(DRAFT_FILE)
    report = {"seed": SEED, "minutes": minutes, "batch": BATCH, "peak_rate": PEAK_RATE, "sequences": n, "loss_curve": []}  # type: dict[str, Any]
    report["before"] = {"own_text": agreement(model, sampled, unseen)[0], "documents": agreement(model, held_out, documents)[0]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.02)
    order, begin, step = torch.randperm(n), time.monotonic(), 0
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARM_UP, max(0.02, 1 - share))
        at = step * BATCH % n
        if at + BATCH > n:
            order, at = torch.randperm(n), 0
        rows = order[at : at + BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(sampled["tokens"][rows].long())
        loss = cross_entropy(logits, sampled, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            same, unseen_loss = agreement(model, sampled, slice(n, n + 2 * BATCH))
            entry = {"step": step, "seconds": round(time.monotonic() - begin, 1), "loss": round(float(loss.detach()), 4),
                     "unseen": round(unseen_loss, 4), "agreement": round(same, 4)}  # fmt: skip
            report["loss_curve"].append(entry)
            print(json.dumps(entry), flush=True)
        step += 1
    store(model, DRAFT_FILE)
    model = load(DRAFT_FILE)  # as it is after quantisation
    report["steps"] = step
    report["after"] = {"own_text": agreement(model, sampled, unseen)[0], "documents": agreement(model, held_out, documents)[0]}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=15, help="training time (%(default)g)")
    arguments = parser.parse_args()
    report = refine(arguments.work, arguments.minutes)
    print(json.dumps({key: report[key] for key in ("before", "after", "steps")}))
    parts = json.loads((MODELS / "training.json").read_text())
    write_card({**parts, "refined": [*parts.get("refined", []), report]})


if __name__ == "__main__":
    main()
