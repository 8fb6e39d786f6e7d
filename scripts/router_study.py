#!/usr/bin/env python3
"""Router lookahead: the routers of the next one to three layers, applied to this layer's input, to foresee what those layers choose.

    .venv/bin/python scripts/router_study.py --out docs/benchmarks/router.md

The bundled model answers the benchmark's forty prompts (it was not trained on them) at temperature 0.6. At each decoded token the input
of each router is kept, and what the layer chose. Counted is the second half of the answers. What names experts:

  plain     a router's logits as they are
  biases    logits, less the middle between the k-th and the next one, times a scale for each layer, plus a bias for each expert of each
            layer: log odds of use
  map       plus a linear map of the input, [n_embd, experts] for each layer: as large as the router itself
  tokens    the pager's own tables for the token decoded next (spac/estimator/), which name for all layers before the first begins
  frequency what was chosen most often, decayed as in the cache

Whatever is learned is learned from decoded tokens, one by one from the first answer on, each after it has been named for. Scales, biases
and maps: logistic regression by gradient descent; with rates a third as high recall is one to three points lower, with rates three times
as high up to two points higher. The cache is a simple one for each layer, which the least decayed frequency leaves first (half-life 16
decoded tokens), and what is in use last. Nothing is read ahead in it: an expert is absent if it is not there when its layer's turn comes,
and each absent expert that is named counts as one read.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import spac  # isort: skip - first: it names the library that llama_cpp loads
import llama_cpp.llama_cpp as upstream
import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from spac.bench.prompt import load as load_prompts
from spac.estimator import TokenEstimator
from spac.generate import Sampling, make_sampler, tokenize

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = ROOT / "models/spac-demo-moe.gguf"
TOKENS, TEMPERATURE, SEED = 200, 0.6, 1
SHARES: Final = (0.12, 0.25, 0.5)
AHEAD: Final = (1, 2, 3)  # layers
HALF_LIFE_TOKENS: Final = 16.0
READ_FROM: Final = (0.5, 0.9)  # probabilities
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Rates(NamedTuple):
    """Of learning."""

    bias: float
    scale: float
    map: float


CORRECTIONS: Final = {"plain": Rates(0, 0, 0), "biases": Rates(0.1, 0.005, 0), "map": Rates(0.1, 0.005, 0.003)}


class Tensor(ctypes.Structure):
    """struct ggml_tensor, ggml/include/ggml.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


class Watched(spac.Llama):
    """Keeps what routers are given and what is chosen, one entry for each layer of each token, while `watching`. Single tokens only."""

    def _adjust_context(self, context_params: Any) -> None:
        super()._adjust_context(context_params)
        self.watching = False
        self.inputs: list[Floats] = []
        self.chosen: list[NDArray[np.int32]] = []
        self._on_node = upstream.ggml_backend_sched_eval_callback(self._watch)  # kept alive as long as the context
        context_params.cb_eval = self._on_node

    def _watch(self, node: int, ask: bool, _: Any) -> bool:
        """Asked before a node is computed whether it is wanted, and told after it has been; names as in llama-graph.cpp."""
        name = ctypes.string_at(node + Tensor.name.offset)
        wanted = self.watching and name.startswith((b"ffn_moe_logits-", b"ffn_moe_topk-"))
        if ask or not wanted:
            return wanted or not ask
        tensor = Tensor.from_address(node)
        if name.startswith(b"ffn_moe_topk-"):
            self.chosen.append(np.array((ctypes.c_int32 * tensor.ne[0]).from_address(tensor.data)))
        else:
            source = Tensor.from_address(tensor.src[1])
            self.inputs.append(np.array((ctypes.c_float * source.ne[0]).from_address(source.data)))
        return True


@dataclass
class Recorded:
    """Decoded tokens. `gates` are the routers, [layers, experts, n_embd]."""

    gates: Floats
    inputs: Floats  # [tokens, layers, n_embd]
    used: Mask  # [tokens, layers, experts]
    tokens: list[int]
    answer: NDArray[np.int64]  # [tokens]

    @property
    def k(self) -> int:
        return int(self.used[0, 0].sum())

    @property
    def counted(self) -> Mask:
        """[tokens]: those of the second half of the answers."""
        return np.asarray(self.answer > self.answer[-1] // 2)


def record() -> Recorded:
    """What the model answers, and what its routers then see and choose; prompts are left out."""
    weights = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(MODEL).tensors if "ffn_gate_inp" in tensor.name}
    gates = np.stack([weights[f"blk.{layer}.ffn_gate_inp.weight"] for layer in range(len(weights))])
    llama: Any = Watched(MODEL, paging="off", n_gpu_layers=0, n_ctx=1024, n_threads=1, seed=SEED, verbose=False)
    tokens, answer = [], []
    for number, prompt in enumerate(load_prompts(())):
        llama.reset()
        llama.watching = False
        llama.eval(tokenize(llama, prompt.text))
        llama.watching = True
        with contextlib.closing(make_sampler(Sampling(temperature=TEMPERATURE, seed=SEED), llama)) as sampler:
            for _ in range(TOKENS):
                token = int(sampler.sample(llama._ctx, -1))
                if upstream.llama_vocab_is_eog(llama._model.vocab, token):
                    break
                llama.eval([token])
                tokens.append(token)
                answer.append(number)
    inputs = np.stack(llama.inputs).reshape(len(tokens), len(gates), -1)
    chosen = np.stack(llama.chosen).reshape(len(tokens), len(gates), -1)
    llama.close()
    used = np.zeros((*chosen.shape[:2], gates.shape[1]), bool)
    np.put_along_axis(used, chosen, True, 2)
    return Recorded(gates, inputs, used, tokens, np.array(answer))


def highest(values: Floats, k: int) -> Mask:
    """The k highest of the last axis; none where all are the same, as before anything is known."""
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, np.argpartition(-values, k - 1, -1)[..., :k], True, -1)
    mask &= (values.max(-1) > values.min(-1))[..., None]
    return mask


def routers(recorded: Recorded, ahead: int, rates: Rates) -> Floats:
    """Log odds of use [tokens, layers, experts] by routers of so many layers ahead; the first layers, which none foresees, have -inf."""
    n, n_layers, _ = recorded.used.shape
    seen = recorded.inputs[:, : n_layers - ahead]
    used = recorded.used[:, ahead:]
    logits = np.einsum("nli,lei->nle", seen, recorded.gates[ahead:])
    ordered = np.sort(logits, -1)
    logits -= ordered[..., -recorded.k - 1 : -recorded.k + 1 or None].mean(-1, keepdims=True)
    bias = np.zeros(used.shape[1:], np.float32)
    scale = np.ones((len(bias), 1), np.float32)
    maps = np.zeros((*bias.shape, seen.shape[2]), np.float32)
    odds = np.full(recorded.used.shape, -np.inf, np.float32)
    for t in range(n):
        x = seen[t] / np.sqrt(np.square(seen[t]).mean(-1, keepdims=True))
        odds[t, ahead:] = scale * logits[t] + bias + (np.einsum("lei,li->le", maps, x) if rates.map else 0)
        error = used[t] - 1 / (1 + np.exp(-odds[t, ahead:]))
        bias += rates.bias * error
        scale *= np.exp(rates.scale * (error * logits[t]).mean(-1, keepdims=True))
        if rates.map:
            maps += rates.map * error[..., None] * x[:, None]
    return odds


def tables(recorded: Recorded) -> Floats:
    """Probabilities of the signal "tokens"."""
    _, n_layers, n_experts = recorded.used.shape
    estimator = TokenEstimator(n_layers, n_experts, recorded.k)
    found = np.zeros(recorded.used.shape, np.float32)
    for t, token in enumerate(recorded.tokens):
        if t == 0 or recorded.answer[t] != recorded.answer[t - 1]:
            estimator.start_request()
        found[t] = estimator.probabilities([token])[0]
        estimator.learn([token], np.nonzero(recorded.used[t])[1].reshape(1, n_layers, -1))
    return found


def cached(recorded: Recorded) -> tuple[Mask, Floats]:
    """Before each token: what is present, [shares, tokens, layers, experts], and decayed frequencies, [tokens, layers, experts]."""
    n, n_layers, n_experts = recorded.used.shape
    rooms = np.array([max(recorded.k, round(share * n_experts)) for share in SHARES])[:, None, None]
    present = np.zeros((len(SHARES), n, n_layers, n_experts), bool)
    frequency = np.zeros((n, n_layers, n_experts), np.float32)
    for t in range(n - 1):
        used = recorded.used[t]
        frequency[t + 1] = frequency[t] * 2 ** (-1 / HALF_LIFE_TOKENS) + used
        worth = np.where(present[:, t] | used, frequency[t + 1] + 1e6 * used, -1)
        rank = np.argsort(np.argsort(-worth, -1, kind="stable"), -1)
        present[:, t + 1] = (rank < rooms) & (worth >= 0)
    return present, frequency


def recall_table(recorded: Recorded, named: dict[str, Mask]) -> list[str]:
    """Of as many named as are used: precision and recall are the same number."""
    right = {name: (mask & recorded.used)[recorded.counted].sum((0, 2)) for name, mask in named.items()}
    uses = recorded.counted.sum() * recorded.k
    lines = ["| target layer | " + " | ".join(named) + " |", "|---|" + "---:|" * len(named)]
    for layer in range(recorded.used.shape[1]):
        cells = [
            f"{found[layer] / uses:.0%}" if mask[:, layer].any() else "" for found, mask in zip(right.values(), named.values(), strict=True)
        ]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    means = [found.sum() / (uses * mask.any((0, 2)).sum()) for found, mask in zip(right.values(), named.values(), strict=True)]
    return [*lines, "| **mean** | " + " | ".join(f"**{mean:.1%}**" for mean in means) + " |"]


def reads_table(recorded: Recorded, present: Mask, named: dict[str, Mask]) -> list[str]:
    used = recorded.used[recorded.counted]
    heads = [f"{share:.0%}: {what}" for share in SHARES for what in ("used", "misses named", "wasted")]
    lines = ["| named by | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, mask in named.items():
        cells = []
        for there in present[:, recorded.counted]:
            reads = mask[recorded.counted] & ~there
            right, misses = (reads & used).sum(), (used & ~there).sum()
            cells += [f"{right / max(1, reads.sum()):.0%}", f"{right / misses:.0%}", f"{(reads.sum() - right) / misses:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def report(recorded: Recorded) -> list[str]:
    used, k = recorded.used, recorded.k
    own = highest(np.einsum("nli,lei->nle", recorded.inputs, recorded.gates), k)
    same = (own == used).all(-1)
    if same.mean() < 0.999:
        raise SystemExit(f"{MODEL.name}: what its routers name is not what was chosen: their inputs were not read")
    present, frequency = cached(recorded)
    known = tables(recorded)
    odds = {f"{name}, {n} ahead": routers(recorded, n, rates) for n in AHEAD for name, rates in CORRECTIONS.items()}
    highest_k = {name: highest(of, k) for name, of in odds.items()}
    named = highest_k | {"plain, any of 1 to 3 ahead": np.any([highest_k[f"plain, {n} ahead"] for n in AHEAD], axis=0)}
    named |= {f"{name}, 1 ahead, beyond tokens": highest_k[f"{name}, 1 ahead"] & (known < READ_FROM[-1]) for name in CORRECTIONS}
    for p in READ_FROM:
        above = {name: of >= np.log(p / (1 - p)) for name, of in odds.items() if not name.startswith("plain")} | {"tokens": known >= p}
        above |= {f"tokens or {name}": above["tokens"] | above[name] for name in ("biases, 1 ahead", "map, 1 ahead")}
        named |= {f"{name}, from {p}": mask for name, mask in above.items()}
    misses = [(used & ~there)[recorded.counted].sum() / recorded.counted.sum() for there in present]
    return [
        "# Router lookahead\n",
        "Written by `scripts/router_study.py`, which says what the rows and columns are.",
        f"{MODEL.name}: {used.shape[1]} × {used.shape[2]}, top-{k}; {len(used)} decoded tokens, {recorded.counted.sum()} counted.\n",
        f"Control: applied to its own layer's input, a router names exactly what was chosen in {same.sum()} of {same.size} cases.\n",
        "## The k highest, named\n",
        "As many are named as are used, so that precision and recall are the same.\n",
        *recall_table(recorded, highest_k | {"tokens": highest(known, k), "frequency": highest(frequency, k)}),
        "\n## Worth for reading ahead\n",
        "By part of the experts in memory. Of the experts that are named *and* absent: *used*, the part that is; *misses named*, the part",
        "of all misses, also those of the first layers, that are among them; *wasted*, those not used, for each miss.",
        "Without *from*: the k highest; else what has at least this probability.",
        f"*Beyond tokens*: only what tokens do not name from {READ_FROM[-1]}.",
        "Misses for each token: " + ", ".join(f"{n:.1f} at {share:.0%}" for n, share in zip(misses, SHARES, strict=True)) + ".\n",
        *reads_table(recorded, present, named),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Router lookahead: how good it is, and what reading ahead by it would be worth.")
    parser.add_argument("--out", type=Path, default=Path("build/router-study.md"), help="where the tables are written (%(default)s)")
    args = parser.parse_args()
    text = "\n".join(report(record())) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
