#!/usr/bin/env python3
"""Trains the demo model: a small mixture-of-experts target (qwen3moe), and a dense draft (qwen3) with the same tokenizer.

    pip install torch tokenizers numpy gguf        # only for training: nothing else in spac needs torch
    scripts/train_demo.py corpus   WORK            # text of Debian documentation packages (apt-get download)
    scripts/train_demo.py target   WORK            # byte-pair tokenizer, then the target; writes WORK/target.pt
    scripts/train_demo.py draft    WORK            # distilled from the target; writes WORK/draft.pt
    scripts/train_demo.py evaluate WORK            # held-out loss, LRU hit rates, draft acceptance, expert use: WORK/evaluation.json
    scripts/train_demo.py export   WORK            # WORK/target.gguf (experts F16, the rest Q8_0) and WORK/draft.gguf (Q8_0)
    scripts/inflate WORK/target.gguf models/spac-demo-moe.gguf --factor 1 --type Q4_0
    cp WORK/draft.gguf models/spac-demo-draft.gguf
    scripts/train_demo.py card     WORK            # models/README.md and models/training.json: what was trained on what, and how well
    scripts/distill_draft.py       WORK            # the draft once more, on a GPU

The architecture is what llama.cpp computes for these two names (src/models/qwen3moe.cpp, qwen3.cpp); this file knows nothing
of paging. Experts are computed as batched matrix products over [expert, slot, channel], never in a loop over experts.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Each package's text in one format only, so that no held-out document was seen in another.
PACKAGES = {
    "manpages": "", "manpages-dev": "", "bash-doc": "", "python3.11-doc": ".rst.txt", "debian-reference-en": ".txt",
    "git-doc": ".txt", "perl-doc": ".pod", "vim-runtime": ".txt", "postgresql-doc-15": ".html",
}  # fmt: skip
SEED = 20261124
HELD_OUT_SHARE = 0.03
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# the regular expression that llama.cpp applies for tokenizer.ggml.pre = "qwen2"
QWEN2_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# -- corpus -----------------------------------------------------------------------------------------------------------


def plain_from_man(text: str) -> str:
    """Roff source to readable text: macros out, escapes resolved, section names kept."""
    out: list[str] = []
    for line in text.splitlines():
        if line.startswith((".\\\"", "'\\\"")) or re.match(r"^\.(so|if|ie|el|de|\.|ds|nr|ad|nh|hy|tr|ft|ll|in|ti|ta)\b", line):
            continue
        if line.startswith((".SH", ".Sh", ".SS")):
            out.append("\n" + line[3:].strip().strip('"') + "\n")
            continue
        if line.startswith((".PP", ".P", ".LP", ".TP", ".IP", ".sp", ".br", ".Pp")):
            words = line.split(None, 1)
            out.append("\n" + (words[1].split('"')[1] if len(words) > 1 and '"' in words[1] else ""))
            continue
        line = re.sub(r"^\.[A-Za-z]+ ?", "", line)
        line = re.sub(r"\\f[A-Z]|\\f\([A-Z]{2}|\\f\[[A-Z]*\]|\\&|\\/|\\,|\\c", "", line).replace("\\-", "-").replace("\\e", "\\")
        line = re.sub(r"\\\((aq|cq|oq)", "'", line)
        line = re.sub(r"\\\((dq|lq|rq)", '"', line)
        line = re.sub(r"\\\((em|en)", "-", line)
        out.append(re.sub(r"\\(\(..|\[[^]]*\]|\*\(..|s[-+]?\d|.)", "", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out))


def plain_from_html(text: str) -> str:
    text = re.sub(r"(?s)<(script|style|head|nav).*?</\1>", " ", text)
    text = re.sub(r"</(p|div|h\d|li|tr|pre|dt|dd)>|<br/?>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n\s*\n\s*\n+", "\n\n", re.sub(r"[ \t]+\n", "\n", text))


def read_document(path: Path) -> str | None:
    """The text of a documentation file, or None for what is not text."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".txt", ".html", ".pod", ".rst")) and not re.search(r"\.\d[a-z]*$", name):
        return None
    raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if re.search(r"\.\d[a-z]*$", name):
        return plain_from_man(text)
    return plain_from_html(text) if name.endswith(".html") else text


def question_and_answer(name: str, text: str) -> list[str]:
    """Short chat samples from a manual page's NAME line or a Python document's function descriptions."""
    samples = []
    for match in re.finditer(r"\nNAME\n\s*([\w.,:+ -]{2,60}?) - (.{10,200})", text):
        page, purpose = match.group(1).split(",")[0].strip(), match.group(2).strip()
        samples += [(f"What is {page}?", f"{page} - {purpose}"), (f"What does {page} do?", f"{page}: {purpose}.")]
    for match in re.finditer(r"\.\. (?:function|method|class):: ([\w.]+)(\([^\n]*\))?\n\n((?:   [^\n]+\n){1,4})", text):
        answer = re.sub(r":\w+:`~?([^`]*)`", r"\1", re.sub(r"\s+", " ", match.group(3)).replace("``", "")).strip()
        samples.append((f"Explain {match.group(1)} in Python.", f"{match.group(1)}{match.group(2) or ''}: {answer}"))
    return [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in samples]


def build_corpus(work: Path) -> None:
    """Downloads and unpacks the packages; writes train.txt and held_out.txt, documents separated by a NUL byte."""
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
    files = {"train": [], "held_out": []}  # type: dict[str, list[str]]
    chats: list[str] = []
    sources: dict[str, int] = {}
    for archive in sorted(packages.glob("*.deb")):
        package = archive.name.split("_")[0]
        root = work / "unpacked" / package
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg", "-x", str(archive), str(root)], check=True)
        for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
            if not path.name.removesuffix(".gz").endswith(PACKAGES[package]):
                continue
            text = read_document(path)
            if not text or not 500 <= len(text) <= 400_000:
                continue
            digest = hashlib.sha256(str(path.relative_to(root)).encode()).digest()
            held_out = digest[0] / 256 < HELD_OUT_SHARE
            files["held_out" if held_out else "train"].append(text)
            sources[package] = sources.get(package, 0) + len(text)
            if not held_out:
                chats += question_and_answer(path.name, text)
    random.Random(SEED).shuffle(chats)
    for start in range(0, len(chats), 8):
        files["train"].append("".join(chats[start : start + 8]))
    for name, documents in files.items():
        random.Random(SEED).shuffle(documents)
        (work / f"{name}.txt").write_text("\0".join(documents), encoding="utf-8")
    report = {"characters_by_package": sources, "chat_samples": len(chats), "documents": {k: len(v) for k, v in files.items()}}
    (work / "corpus.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


# -- tokenizer --------------------------------------------------------------------------------------------------------


def byte_level(model: Any) -> Any:
    """A tokenizer of a byte-pair model, with Qwen2's way of cutting text."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(work: Path, vocabulary: int) -> Any:
    """A byte-level byte-pair tokenizer, trained on the first 16 MB of the training text if there is none yet."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    path = work / "tokenizer.json"
    if not path.exists():
        tokenizer = byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        text = (work / "train.txt").read_text(encoding="utf-8")[:16_000_000]
        tokenizer.train_from_iterator(text.split("\0"), trainer)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def load_tokens(work: Path, name: str, vocabulary: int) -> np.ndarray:
    """All documents of WORK/NAME.txt as one array of token ids (uint16), <|endoftext|> between documents."""
    path = work / f"{name}.npy"
    if not path.exists():
        tokenizer = load_tokenizer(work, vocabulary)
        end = tokenizer.token_to_id(SPECIALS[0])
        documents = (work / f"{name}.txt").read_text(encoding="utf-8").split("\0")
        ids: list[int] = []
        for start in range(0, len(documents), 256):
            for encoding in tokenizer.encode_batch(documents[start : start + 256]):
                ids += [*encoding.ids, end]
        np.save(path, np.array(ids, dtype=np.uint16))
    return np.load(path)


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes. n_experts = 0 is a dense model."""

    architecture: str
    n_layers: int
    n_ff: int
    n_experts: int = 0
    n_used: int = 0
    vocabulary: int = 4096
    width: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    head_width: int = 64
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    sequence: int = 256


# From which share of the training time on: weights, for each layer, of the load-balance loss and of the reward for
# neighbouring tokens that choose alike. At first no expert may die; later they may specialise, and keep to a subject.
ROUTING = [(0.0, 0.01, 0.0), (0.31, 0.002, 0.0), (0.42, 0.002, 0.02), (0.56, 0.002, 0.05), (0.68, 0.002, 0.0), (0.84, 0.0, 0.0)]

TARGET = Config("qwen3moe", n_layers=10, n_ff=256, n_experts=32, n_used=4)
DRAFT = Config("qwen3", n_layers=2, n_ff=1024)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NEOX rotary embedding of [batch, head, time, channel]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q = nn.Linear(c.width, c.n_heads * c.head_width, bias=False)
        self.k = nn.Linear(c.width, c.n_kv_heads * c.head_width, bias=False)
        self.v = nn.Linear(c.width, c.n_kv_heads * c.head_width, bias=False)
        self.out = nn.Linear(c.n_heads * c.head_width, c.width, bias=False)
        self.q_norm, self.k_norm = Norm(c.head_width, c.norm_eps), Norm(c.head_width, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time_steps, _ = x.shape
        shape = (batch, time_steps, -1, self.c.head_width)
        q = rotate(self.q_norm(self.q(x).view(shape)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k(x).view(shape)).transpose(1, 2), cos, sin)
        v = self.v(x).view(shape).transpose(1, 2)
        group = self.c.n_heads // self.c.n_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time_steps, -1))


class Dense(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(c.width, c.n_ff, bias=False), nn.Linear(c.width, c.n_ff, bias=False)
        self.down = nn.Linear(c.n_ff, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Softmax over all experts, the best n_used, renormalised; SwiGLU experts. Keeps what the losses need of the last call."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.router = nn.Linear(c.width, c.n_experts, bias=False)
        scale = c.width**-0.5
        self.gate = nn.Parameter(torch.randn(c.n_experts, c.width, c.n_ff) * scale)
        self.up = nn.Parameter(torch.randn(c.n_experts, c.width, c.n_ff) * scale)
        self.down = nn.Parameter(torch.randn(c.n_experts, c.n_ff, c.width) * c.n_ff**-0.5)
        self.balance, self.locality = torch.zeros(()), torch.zeros(())
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        shape, c = x.shape, self.c
        x = x.reshape(-1, c.width)
        n_tokens = x.shape[0]
        probability = F.softmax(F.linear(x.float(), self.router.weight.float()), dim=-1)
        weight, chosen = probability.topk(c.n_used, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        self.chosen = chosen
        share = F.one_hot(chosen, c.n_experts).float().sum(1).mean(0) / c.n_used
        self.balance = c.n_experts * (share * probability.mean(0)).sum()  # Switch Transformer (2101.03961), eq. 4

        by_sequence = probability.view(*shape[:2], c.n_experts)
        self.locality = (by_sequence[:, 1:] * by_sequence[:, :-1]).sum(-1).mean()

        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        expert = flat[order]
        first = torch.searchsorted(expert, torch.arange(c.n_experts))
        slot = torch.arange(flat.numel()) - first[expert]
        capacity = int(1.25 * n_tokens * c.n_used / c.n_experts) + 4 if self.training else int(slot.max()) + 1
        kept = slot < capacity  # training drops what overflows
        order, expert, slot = order[kept], expert[kept], slot[kept]
        token = order // c.n_used
        slots = x.new_zeros(c.n_experts, capacity, c.width).index_put((expert, slot), x[token])
        hidden = F.silu(torch.bmm(slots, self.gate.to(x.dtype))) * torch.bmm(slots, self.up.to(x.dtype))
        result = torch.bmm(hidden, self.down.to(x.dtype))[expert, slot]
        result = result * weight.reshape(-1)[order].unsqueeze(1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, result).view(shape)


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(c.width, c.norm_eps), Norm(c.width, c.norm_eps)
        self.attention = Attention(c)
        self.ffn: Experts | Dense = Experts(c) if c.n_experts else Dense(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Parameter(torch.randn(c.vocabulary, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = Norm(c.width, c.norm_eps)
        for block in self.blocks:  # residual branches start small
            with torch.no_grad():
                down = block.ffn.down if isinstance(block.ffn, Experts) else block.ffn.down.weight  # type: ignore[union-attr]
                down.mul_((2 * c.n_layers) ** -0.5)
                block.attention.out.weight.mul_((2 * c.n_layers) ** -0.5)  # type: ignore[union-attr, operator]

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [batch, time] to logits [batch, time, vocabulary]; embeddings are tied."""
        c = self.c
        frequency = c.rope_base ** (-torch.arange(0, c.head_width, 2) / c.head_width)
        angle = torch.arange(tokens.shape[1])[:, None] * frequency[None, :]
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding)

    def experts(self) -> Iterator[Experts]:
        return (block.ffn for block in self.blocks if isinstance(block.ffn, Experts))


# -- training ---------------------------------------------------------------------------------------------------------


def pieces(tokens: np.ndarray, n: int, length: int, chance: np.random.Generator) -> Tensor:
    """From random places: ids [n, length]."""
    starts = chance.integers(0, len(tokens) - length, n)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))


def batches(tokens: np.ndarray, n: int, length: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        yield pieces(tokens, n, length + 1, rng)


def held_out_loss(model: Model, tokens: np.ndarray, n: int = 16) -> float:
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batch = next(batches(tokens, n, model.c.sequence, 7))
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
    model.train()
    return float(loss)


def train(work: Path, name: str, config: Config, minutes: float, batch_size: int, peak_rate: float, teacher: Model | None) -> None:
    """Trains for a given time with a warm-up, a constant and a linear decay; writes WORK/NAME.pt and WORK/NAME.json."""
    torch.manual_seed(SEED)
    tokens, held_out = load_tokens(work, "train", config.vocabulary), load_tokens(work, "held_out", config.vocabulary)
    model = Model(config)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=peak_rate, betas=(0.9, 0.95), fused=True
    )
    log: list[dict[str, float]] = []
    start, step, source = time.monotonic(), 0, batches(tokens, batch_size, config.sequence, SEED)
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = peak_rate * min(1.0, (step + 1) / 100, max(0.02, (1 - share) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
            if teacher is None:
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            else:
                with torch.no_grad():
                    goal = teacher(batch[:, :-1]).float().log_softmax(-1)
                loss = F.kl_div(logits.float().log_softmax(-1), goal, log_target=True, reduction="sum") / batch[:, 1:].numel()
            extra = sum((e.balance for e in model.experts()), torch.zeros(()))
            locality = sum((e.locality for e in model.experts()), torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        _, balance_weight, locality_weight = next(row for row in reversed(ROUTING) if share >= row[0])
        (loss + balance_weight * extra - locality_weight * locality).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            seconds = time.monotonic() - start
            entry = {"step": step, "seconds": round(seconds, 1), "loss": round(float(loss.detach()), 4),
                     "balance": round(float(extra.detach()) / max(1, config.n_layers), 4), "held_out": round(held_out_loss(model, held_out), 4),
                     "tokens": (step + 1) * batch_size * config.sequence}  # fmt: skip
            if config.n_experts and step % 200 == 0:
                entry["lru_hit_rate"] = round(lru_hit_rate(routing(model, held_out, 4)).mean().item(), 4)
            log.append(entry)
            print(json.dumps(entry), flush=True)
        step += 1
    torch.save({"config": asdict(config), "state": model.state_dict()}, work / f"{name}.pt")
    report = {"config": asdict(config), "seed": SEED, "minutes": minutes, "batch": batch_size, "peak_rate": peak_rate,
              "routing_weights": ROUTING if config.n_experts else None, "steps": step, "loss_curve": log}  # fmt: skip
    (work / f"{name}.json").write_text(json.dumps(report, indent=1))


def load(work: Path, name: str) -> Model:
    saved = torch.load(work / f"{name}.pt", weights_only=True)
    model = Model(Config(**saved["config"]))
    model.load_state_dict(saved["state"])
    return model.eval()


# -- evaluation -------------------------------------------------------------------------------------------------------


def routing(model: Model, tokens: np.ndarray, n_sequences: int) -> np.ndarray:
    """Chosen experts [layer, token, n_used] on held-out text."""
    model.eval()
    chosen = []
    with torch.no_grad():
        for batch in next(batches(tokens, n_sequences, model.c.sequence, 11)).split(4):
            with torch.autocast("cpu", torch.bfloat16):
                model(batch[:, :-1])
            chosen.append(torch.stack([e.chosen for e in model.experts()]))  # type: ignore[misc]
    model.train()
    return torch.cat(chosen, 1).numpy()


def lru_hit_rate(chosen: np.ndarray, share: float = 0.25, n_experts: int = 32) -> np.ndarray:
    """Hit rate by layer of one LRU cache for each layer, a token's experts asked for at once; one cold start."""
    rates = []
    for layer in chosen:
        cache: dict[int, None] = {}
        hits = 0
        for token in layer:
            hits += sum(int(e) in cache for e in token)
            for e in token:
                cache.pop(int(e), None)
                cache[int(e)] = None
            while len(cache) > share * n_experts:
                cache.pop(next(iter(cache)))
        rates.append(hits / layer.size)
    return np.array(rates)


def evaluate(work: Path) -> None:
    target, draft = load(work, "target"), load(work, "draft")
    held_out = load_tokens(work, "held_out", target.c.vocabulary)
    chosen = routing(target, held_out, 32)
    rates = lru_hit_rate(chosen)
    agree, total = 0, 0
    with torch.no_grad():
        for batch in next(batches(held_out, 64, target.c.sequence, 13)).split(8):
            same = target(batch[:, :-1]).argmax(-1) == draft(batch[:, :-1]).argmax(-1)
            agree, total = agree + int(same[:, 16:].sum()), total + same[:, 16:].numel()
    result = {
        "held_out_loss": {"target": held_out_loss(target, held_out, 64), "draft": held_out_loss(draft, held_out, 64)},
        "lru_hit_rate_at_25_percent": {"mean": float(rates.mean()), "by_layer": rates.round(4).tolist(), "tokens": int(chosen.shape[1])},
        "experts_shared_with_the_token_before": float(np.mean([[np.isin(layer[t], layer[t - 1]).mean() for t in range(1, len(layer))] for layer in chosen])),
        "draft_greedy_agreement": agree / total,
        "expert_use_by_layer": [np.bincount(layer.ravel(), minlength=target.c.n_experts).tolist() for layer in chosen],
    }  # fmt: skip
    (work / "evaluation.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "expert_use_by_layer"}, indent=1))


# -- export -----------------------------------------------------------------------------------------------------------


def write_vocabulary(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    import gguf

    saved = json.loads(tokenizer.to_str())
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, f"<unused{i}>") for i in range(vocabulary)]
    types = [gguf.TokenType.CONTROL if t in SPECIALS else gguf.TokenType.UNUSED if i not in by_id else gguf.TokenType.NORMAL
             for i, t in enumerate(tokens)]  # fmt: skip
    merges = [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]]
    end_of_text, _, end_of_turn = (tokenizer.token_to_id(s) for s in SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_turn)
    writer.add_eot_token_id(end_of_turn)
    writer.add_pad_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export(work: Path, name: str) -> None:
    """Writes WORK/NAME.gguf: experts F16, other matrices Q8_0, norms and routers F32."""
    import gguf

    model = load(work, name)
    c = model.c
    writer = gguf.GGUFWriter(work / f"{name}.gguf", c.architecture)
    writer.add_name(f"spac demo {name}")
    writer.add_license("mixed: see the data card")
    writer.add_context_length(2048)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.n_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_width)
    writer.add_value_length(c.head_width)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if c.n_experts else gguf.LlamaFileType.MOSTLY_Q8_0)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.n_used)
        writer.add_expert_feed_forward_length(c.n_ff)
    write_vocabulary(writer, load_tokenizer(work, c.vocabulary), c.vocabulary)

    kinds = gguf.GGMLQuantizationType

    def add(tensor: str, value: Tensor, kind: gguf.GGMLQuantizationType = kinds.Q8_0) -> None:
        data = gguf.quants.quantize(value.detach().float().contiguous().numpy(), kind)
        writer.add_tensor(tensor + ".weight", data, raw_dtype=kind)

    add("token_embd", model.embedding)
    add("output_norm", model.norm.weight, kinds.F32)
    for i, block in enumerate(model.blocks):
        a, f, p = block.attention, block.ffn, f"blk.{i}."
        add(p + "attn_norm", block.attention_norm.weight, kinds.F32)
        add(p + "ffn_norm", block.ffn_norm.weight, kinds.F32)
        add(p + "attn_q_norm", a.q_norm.weight, kinds.F32)
        add(p + "attn_k_norm", a.k_norm.weight, kinds.F32)
        for part, layer in (("q", a.q), ("k", a.k), ("v", a.v), ("output", a.out)):
            add(f"{p}attn_{part}", layer.weight)
        if isinstance(f, Experts):
            add(p + "ffn_gate_inp", f.router.weight, kinds.F32)
            for part in ("gate", "up", "down"):  # [expert, in, out] here, [expert, out, in] there
                add(f"{p}ffn_{part}_exps", getattr(f, part).transpose(1, 2), kinds.F16)
        else:
            for part in ("gate", "up", "down"):
                add(f"{p}ffn_{part}", getattr(f, part).weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- data card --------------------------------------------------------------------------------------------------------

CARD = """# The demo models

`spac-demo-moe.gguf` is a small mixture of experts (`qwen3moe`: {layers} layers, {experts} experts, {used} used, width {width}, expert width
{n_ff}, vocabulary {vocabulary}; experts Q4_0, the rest Q8_0), `spac-demo-draft.gguf` a dense draft for it (`qwen3`, {draft_layers} layers, Q8_0).
They exist so that everything in this repository can be tried and measured without a download: they know the style of Linux documentation
and little else. Written by `scripts/train_demo.py card`; all figures are in `training.json`.

## Text

Documentation packages of Debian 12, as `apt-get download` gave them on the day of training; characters by package:

{packages}

{n_train} documents for training, {n_held_out} never seen (chosen by a hash of their path), and {n_chats} questions and answers made from manual
pages' NAME lines and Python's function descriptions. Each package keeps its own licence: GPL, PSF, Artistic, PostgreSQL, Vim.

## Training

Seed {seed}; AdamW; the target on one core, the draft on two. The target: {steps} steps of {batch} x {sequence} tokens, peak rate {rate}, load-balance loss (Switch Transformer,
arXiv 2101.03961) and a small reward for neighbouring tokens that choose the same experts, which stands in for the locality that larger models
learn by themselves. Their weights by time, in `training.json`, were set by hand while the hit rate was watched; the script repeats them. The draft: distilled from the target (KL divergence on the same text),
{draft_steps} steps.

| minutes | target, held-out loss | LRU hit rate | draft, held-out loss |
|---|---|---|---|
{curve}
{distilled}
## What makes it a fair stand-in

On text that it never saw (greedy, 32 pieces of 256 tokens, one LRU cache of 25 % of the experts for each layer, one cold start):

| figure | value | real models |
|---|---|---|
| LRU hit rate at 25 %, mean of layers | {lru:.3f} | 0.47 (DeepSeek-V2-Lite) to 0.69 (gpt-oss-20b) |
| by layer | {lru_layers} | |
| experts shared with the token before | {shared:.3f} | 0.35 to 0.43 (Qwen3.6, Qwen3-30B) |
| draft accepted, greedy | {accepted:.3f} | 0.5 to 0.8 |
| loss by token, target and draft | {target_loss:.3f}, {draft_loss:.3f} | |

Use of experts by layer on that text, most used to least, each column an expert (full block: {top:.1%} of the uses; {even:.1%} would be even):

```
{histogram}
```
"""

DISTILLED = """
Then the draft was distilled further, on what the target writes (`scripts/distill_draft.py`; seed {seed}): {steps} steps in {minutes:g} minutes of one {device} on
{tokens:,} tokens, a quarter of them training text, the others of {written:,} tokens that the target wrote meanwhile. On text that it begins after documents that
neither saw, the draft's likeliest token is the target's in {before_own:.1%} of places before and {after_own:.1%} after; on those documents in {before_documents:.1%} and
{after_documents:.1%}. The draft's losses below and above are those before.
"""


def card(work: Path) -> None:
    """From what the other steps left in WORK."""
    write_card({name: json.loads((work / f"{name}.json").read_text()) for name in ("corpus", "target", "draft", "evaluation")})


def write_card(parts: dict[str, Any]) -> None:
    """Writes models/README.md and models/training.json: of each step its report; "distilled", that of scripts/distill_draft.py, may be missing."""
    corpus, target, draft, evaluation = (parts[name] for name in ("corpus", "target", "draft", "evaluation"))
    use = np.array(evaluation["expert_use_by_layer"], dtype=float)
    use = -np.sort(-use / use.sum(1, keepdims=True), axis=1)
    distilled = parts.get("distilled")
    blocks = " ▁▂▃▄▅▆▇█"
    histogram = [f"{i:2d} " + "".join(blocks[max(1, round(8 * share / use.max()))] for share in layer) for i, layer in enumerate(use)]
    every = max(1, len(target["loss_curve"]) // 12)
    hit_rates = [(e["seconds"], e["lru_hit_rate"]) for e in target["loss_curve"] if "lru_hit_rate" in e]
    curve = []
    for entry in target["loss_curve"][::every]:
        hit = min(hit_rates, key=lambda pair: abs(pair[0] - entry["seconds"]))[1]
        same = min(draft["loss_curve"], key=lambda e: abs(e["seconds"] - entry["seconds"] * draft["minutes"] / target["minutes"]))
        curve.append(f"| {entry['seconds'] / 60:.0f} ({same['seconds'] / 60:.0f}) | {entry['held_out']:.3f} | {hit:.3f} | {same['held_out']:.3f} |")
    c, rates = target["config"], evaluation["lru_hit_rate_at_25_percent"]
    text = CARD.format(
        layers=c["n_layers"], experts=c["n_experts"], used=c["n_used"], width=c["width"], n_ff=c["n_ff"], vocabulary=c["vocabulary"],
        draft_layers=draft["config"]["n_layers"], packages="\n".join(f"- {k}: {v:,}" for k, v in corpus["characters_by_package"].items()),
        n_train=corpus["documents"]["train"], n_held_out=corpus["documents"]["held_out"], n_chats=corpus["chat_samples"], seed=SEED,
        steps=target["steps"], batch=target["batch"], sequence=c["sequence"], rate=target["peak_rate"], draft_steps=draft["steps"],
        curve="\n".join(curve), lru=rates["mean"], lru_layers=", ".join(f"{r:.2f}" for r in rates["by_layer"]),
        shared=evaluation["experts_shared_with_the_token_before"],
        accepted=distilled["after"]["documents"] if distilled else evaluation["draft_greedy_agreement"],
        distilled="" if not distilled else DISTILLED.format(
            **{name: distilled[name] for name in ("seed", "steps", "minutes", "device", "tokens")}, written=distilled["written_tokens"],
            **{f"{when}_{what}": distilled[when][text] for when in ("before", "after") for what, text in (("own", "own_text"), ("documents", "documents"))},
        ),
        target_loss=evaluation["held_out_loss"]["target"], draft_loss=evaluation["held_out_loss"]["draft"], top=use.max(),
        even=1 / c["n_experts"], histogram="\n".join(histogram),
    )  # fmt: skip
    models = Path(__file__).resolve().parent.parent / "models"
    (models / "README.md").write_text(text)
    (models / "training.json").write_text(json.dumps(parts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["corpus", "target", "draft", "evaluate", "export", "card"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, help="training time (default: 80 for the target, 12 for the draft)")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.step == "corpus":
        build_corpus(arguments.work)
    elif arguments.step == "target":
        train(arguments.work, "target", TARGET, arguments.minutes or 80, 8, 1.2e-3, None)
    elif arguments.step == "draft":
        train(arguments.work, "draft", DRAFT, arguments.minutes or 12, 12, 3e-3, load(arguments.work, "target"))
    elif arguments.step == "export":
        for name in ("target", "draft"):
            if (arguments.work / f"{name}.pt").exists():
                export(arguments.work, name)
    elif arguments.step == "evaluate":
        evaluate(arguments.work)
    else:
        card(arguments.work)


if __name__ == "__main__":
    main()
