#!/usr/bin/env python3
"""What lookahead saves: misses of the pager's own policy with and without foresight, on recorded routing.

    .venv/bin/python scripts/lookahead_study.py                              # the bundled model with its draft, five kinds of prompts
    .venv/bin/python scripts/lookahead_study.py --deepseek FOLDER            # DeepSeek-V2-Lite: see scripts/estimator_study.py
    .venv/bin/python scripts/lookahead_study.py --out docs/benchmarks/lookahead-misses.md

The bundled model answers the benchmark's forty prompts (spac/bench/prompts/, written for it, so it was not trained on them) at
temperature 0.6; after each token its draft is asked for eight more. Tables are learned on the first half of the requests and go on
learning in the second, where misses are counted. A miss is one expert of one layer in one token; all layers share one cache.

  tokens    only the token decoded next is known, as it always is
  draft N   N drafted tokens after it, with the draft's other ideas, by calibrated chance: nothing is verified
  known N   the N tokens that really came, looked up in the same tables
  perfect N the experts that they really used

*Together*: one number for each expert, that any of the next tokens uses it. Where matplotlib is installed, a plot beside the tables shows
how honest the probabilities are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from estimator_study import read_deepseek
from numpy.typing import NDArray

import spac
from spac.bench import plots
from spac.bench.prompt import load as load_prompts
from spac.engine import SignalStats, _candidates
from spac.estimator import Reliability, TokenEstimator
from spac.estimator.foresight import foresight
from spac.generate import Sampling, generate, tokenize
from spac.speculative import Acceptance, DraftLlama, ModelDraft, Proposal
from spac.trace.format import Trace
from spac.trace.simulation import parse_cache, replay

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("12%", "25%", "50%", "75%")
HORIZONS = (1, 2, 4, 8)
TOKENS, TEMPERATURE, SEED = 200, 0.6, 1
TOGETHER = (2, 3, 5)
COMBINED = max(TOGETHER)  # the token decoded next, and four after it
HELD_BACK_TOKENS = 8000  # of a long trace, so many are counted
Floats = NDArray[np.float32]


@dataclass
class Study:
    """A trace, of which only tokens decoded one by one are foreseen, and what was drafted after each of them."""

    trace: Trace
    first_held_back: int  # token
    proposals: list[Proposal | None] | None
    kinds: dict[int, str]  # of requests


def record_demo() -> Study:
    model, draft_model = ROOT / "models/spac-demo-moe.gguf", ROOT / "models/spac-demo-draft.gguf"
    llama = spac.Llama(model, paging="off", n_ctx=1024, n_ubatch=64, verbose=False, record_routing=True)
    prompts = load_prompts(())
    for prompt in prompts:
        llama.reset()
        llama._ctx.kv_cache_clear()
        _, pieces = generate(llama, tokenize(llama, prompt.text), Sampling(temperature=TEMPERATURE, seed=SEED), TOKENS)
        for _ in pieces:
            pass
    trace = llama.spac.recorder.trace()
    llama.close()
    draft = ModelDraft(DraftLlama(draft_model, n_ctx=1024, verbose=False))
    proposals: list[Proposal | None] = []
    for t in range(trace.n_tokens):
        begin = t - int(trace.pos[t])
        decoded = trace.phase[t] == 1
        proposals.append(draft.propose(trace.token_ids[begin : t + 1].tolist(), max(HORIZONS)) if decoded else None)
    draft.close()
    kinds = {int(request): prompt.kind for request, prompt in zip(np.unique(trace.seq), prompts, strict=True)}
    half = np.unique(trace.seq)[len(kinds) // 2]
    return Study(trace, int(np.argmax(trace.seq == half)), proposals, kinds)


def from_deepseek(folder: Path) -> Study:
    """The second half of the requests is held back; the trace is cut after the tokens that are counted."""
    raw = read_deepseek(folder)
    requests = np.unique(raw.seq)
    first = int(np.argmax(raw.seq == requests[len(requests) // 2]))
    n = min(len(raw.tokens), first + HELD_BACK_TOKENS)
    pos = np.arange(n) - np.searchsorted(raw.seq[:n], raw.seq[:n])
    trace = Trace(
        ids=raw.ids[:n].astype(np.uint16), weights=np.zeros(raw.ids[:n].shape, np.float16), seq=raw.seq[:n], pos=pos.astype(np.int32),
        phase=np.ones(n, np.uint8), token_ids=raw.tokens[:n], ubatch=np.arange(n, dtype=np.int32),
        ubatch_s=np.zeros(0, np.float32), expert_s=np.zeros((0, 0), np.float32), n_experts=raw.n_experts,
        blocks=tuple(range(raw.ids.shape[1])), bundle_bytes=(), meta={"model": raw.name},
    )  # fmt: skip
    return Study(trace, first, None, {})


class Foreseen:
    """Goes through a trace once, learning, and collects what would be told to the pager, by name."""

    def __init__(self, study: Study) -> None:
        trace = self.trace = study.trace
        self.study = study
        self.first = study.first_held_back
        self.n = trace.n_tokens - self.first  # told only where misses are counted
        names = ["tokens", *(f"known {h}" for h in HORIZONS), *(f"perfect {h}" for h in HORIZONS)]
        if study.proposals is not None:
            names[1:1] = [f"draft {h}" for h in HORIZONS]
        shape = (self.n, 3, trace.n_layers, trace.n_experts)
        self.told: dict[str, Floats] = {name: np.zeros(shape, np.float32) for name in names}
        for told in self.told.values():
            told[:, 0, 0, 0] = -1
        self.reliability = {name: Reliability() for name in ("known", "drafted", "combined")}
        self.by_horizon = {f"{name} {j}": SignalStats() for name in ("known", "draft") for j in range(5)}
        self.by_layer = {name: [SignalStats() for _ in range(trace.n_layers)] for name in ("known", "draft")}
        self.by_kind: dict[str, dict[str, SignalStats]] = {"known": {}, "draft": {}}
        self.together = {(name, n): SignalStats() for name in ("known", "draft") for n in TOGETHER}
        self.acceptance = Acceptance()
        self.accepted = np.zeros((2, max(HORIZONS)), np.int64)
        self.estimator = TokenEstimator(trace.n_layers, trace.n_experts, trace.n_used)
        for t in range(trace.n_tokens):
            self.step(t)

    def step(self, t: int) -> None:
        trace, estimator = self.trace, self.estimator
        if t == 0 or trace.seq[t] != trace.seq[t - 1]:
            estimator.start_request()
            self.acceptance.begin()
        whole = bool((trace.ids[t] < trace.n_experts).all())
        token = int(trace.token_ids[t])
        if trace.phase[t] == 1 and t > 0 and trace.seq[t] == trace.seq[t - 1]:
            self.acceptance.saw(token)
        if trace.phase[t] == 1 and whole:
            if t >= self.first:
                self.tell(t, token)
            elif self.study.proposals is not None:
                proposal = self.study.proposals[t]
                if proposal is not None:
                    self.acceptance.expect(proposal)
        if whole:
            estimator.learn(trace.token_ids[t : t + 1], trace.ids[t : t + 1])
        else:
            estimator.start_request()

    def tell(self, t: int, token: int) -> None:
        trace, estimator = self.trace, self.estimator
        end = t + 1
        while end < trace.n_tokens and end <= t + max(HORIZONS) and trace.seq[end] == trace.seq[t]:
            end += 1
        came = trace.token_ids[t + 1 : end].tolist()
        known = estimator.probabilities([token, *came])
        perfect = np.zeros_like(known)
        np.put_along_axis(perfect, trace.ids[t:end].astype(np.int64), 1, 2)
        used = trace.ids[t].astype(np.int64)
        self.reliability["known"].add(known[0], used)
        self.count("known", t, known[0], used)
        self.unite("known", t, end, known)
        for j in range(min(5, len(known))):
            self.by_horizon[f"known {j}"].add(known[j], trace.ids[t + j].astype(np.int64))
        at = t - self.first
        nothing = known[:0]
        self.told["tokens"][at] = foresight(known[0], nothing)
        for h in HORIZONS:
            self.told[f"known {h}"][at] = foresight(known[0], known[1 : 1 + h])
            self.told[f"perfect {h}"][at] = foresight(perfect[0], perfect[1 : 1 + h])
        proposal = self.study.proposals[t] if self.study.proposals is not None else None
        if proposal is None:
            return
        chances = self.acceptance.chances(proposal)
        self.acceptance.expect(proposal)
        candidates = _candidates(proposal, chances, 0)
        p = estimator.of_candidates([[(token, 1.0)], *candidates])
        coming = p[1:] * np.array([sum(chance for _, chance in c) for c in candidates], np.float32)[:, None, None]
        for h in HORIZONS:
            self.told[f"draft {h}"][at] = foresight(p[0], coming[:h])
        for j in range(min(4, len(coming), len(came))):
            used = trace.ids[t + 1 + j].astype(np.int64)
            self.by_horizon[f"draft {j + 1}"].add(coming[j], used)
            self.reliability["drafted"].add(coming[j], used)
            if j == 0:
                self.count("draft", t + 1, coming[0], used)
        self.unite("draft", t, end, np.concatenate([p[:1], coming]))
        right = True
        for j, guess in enumerate(proposal.tokens[: len(came)]):
            right = right and guess == came[j]
            self.accepted[:, j] += right, 1

    def count(self, name: str, t: int, p: Floats, used: NDArray[np.int64]) -> None:
        """By layer, and by kind of prompt."""
        if self.study.kinds:
            self.by_kind[name].setdefault(self.study.kinds[int(self.trace.seq[t])], SignalStats()).add(p, used)
        for layer, stats in enumerate(self.by_layer[name]):
            stats.add(p[layer : layer + 1], used[layer : layer + 1])

    def unite(self, name: str, t: int, end: int, p: Floats) -> None:
        """Experts of some tokens together, of those that really came."""
        for n in TOGETHER:
            if min(len(p), end - t) >= n:
                ids = np.concatenate(list(self.trace.ids[t : t + n].astype(np.int64)), axis=1)
                used = np.zeros(p[0].shape, bool)
                np.put_along_axis(used, ids, True, 1)
                chance = 1 - np.prod(1 - p[:n], axis=0)
                stats = self.together[name, n]
                stats.predicted += int((chance >= 0.5).sum())
                stats.right += int(((chance >= 0.5) & used).sum())
                stats.used += int(used.sum())
                if n == COMBINED and (name == "draft" or self.study.proposals is None):
                    self.reliability["combined"].add(chance, ids)

    def misses(self) -> dict[str, list[float]]:
        """Misses for each routed expert over held-back tokens decoded one by one, by cache."""
        trace = self.trace
        rows: dict[str, list[float]] = {}
        starts = np.unique(trace.ubatch, return_index=True)[1]
        counted = (starts >= self.first) & (trace.phase[starts] == 1)
        whole = np.full((trace.n_tokens, 3, trace.n_layers, trace.n_experts), 0, np.float32)
        whole[:, 0, 0, 0] = -1
        runs: list[tuple[str, str, str, Floats | None]] = [("LRU", "lru", "layer", None), ("pager's own", "default", "global", None)]
        runs += [(name, "default", "global", told) for name, told in self.told.items()]
        for name, policy, quota, told in runs:
            if told is not None:
                whole[self.first :] = told
            rows[name] = []
            for cache in CACHES:
                result = replay(trace, parse_cache(cache, trace), policy, quota, foresight=whole if told is not None else None)
                rows[name].append(result.missed[counted].sum() / result.uses[counted].sum())
        return rows


def table(study: Study, say: list[str]) -> dict[str, Reliability]:
    """Adds the tables; returns how honest the probabilities were, by what the plot calls them."""
    trace = study.trace
    found = Foreseen(study)
    rows = found.misses()
    counted = int((trace.phase[study.first_held_back :] == 1).sum())
    say += [
        f"## {trace.meta.get('model', 'bundled model')}: {trace.n_layers} × {trace.n_experts}, top-{trace.n_used}; {counted} held-back tokens",
        "",
        "Misses for each routed expert, and against the pager's own policy; *captured*: the share of what perfect knowledge of as many tokens gives.",
        "",
        "| known | " + " | ".join(CACHES) + " | against the pager's own | captured |",
        "| --- | " + "--- | " * len(CACHES) + "--- | --- |",
    ]
    base = rows["pager's own"]
    for name, row in rows.items():
        change = " / ".join(f"{100 * (x / b - 1):+.1f} %" for x, b in zip(row, base, strict=True))
        captured = ""
        if name.split()[0] in ("known", "draft"):
            best = rows["perfect " + name.split()[1]]
            captured = " / ".join(f"{(b - x) / (b - p):.0%}" for x, b, p in zip(row, base, best, strict=True))
        say.append(f"| {name} | " + " | ".join(f"{x:.4f}" for x in row) + f" | {'' if row is base else change} | {captured} |")
    say += ["", "Precision and recall of experts with a probability of at least a half, by distance in tokens:", ""]
    say += ["| token | known: precision | recall | drafted: precision | recall |", "| --- | --- | --- | --- | --- |"]
    for j in range(5):
        say.append(f"| {'decoded next' if j == 0 else f'+{j}'} | {cells(found.by_horizon[f'known {j}'], found.by_horizon[f'draft {j}'])} |")
    for n in TOGETHER:
        say.append(f"| next {n} together | {cells(found.together['known', n], found.together['draft', n])} |")
    say += ["", "By layer, and by kind of prompt: the token decoded next; drafted, the one after it.", ""]
    say += ["| | next: precision | recall | drafted +1: precision | recall |", "| --- | --- | --- | --- | --- |"]
    for layer, both in enumerate(zip(*found.by_layer.values(), strict=True)):
        say.append(f"| layer {layer} | {cells(*both)} |")
    for kind, known in found.by_kind["known"].items():
        say.append(f"| {kind} | {cells(known, found.by_kind['draft'][kind])} |")
    if study.proposals is not None:
        say += [
            "",
            "Drafted tokens all right up to the N-th: "
            + ", ".join(f"{x:.2f}" for x in found.accepted[0] / np.maximum(1, found.accepted[1])),
        ]
    names = {"token decoded next": "known", "drafted tokens, their chance included": "drafted", f"next {COMBINED} together": "combined"}
    reliabilities = {name: found.reliability[of] for name, of in names.items()}
    for name, reliability in reliabilities.items():
        if reliability.bins():
            say += ["", f"Reliability, {name} (calibration error {reliability.error():.4f}): predicted → real: "
                    + ", ".join(f"{b.predicted:.2f} → {b.real:.2f}" for b in reliability.bins())]  # fmt: skip
    say.append("")
    return reliabilities


def draw(found: dict[str, dict[str, Reliability]], path: Path) -> None:
    """Predicted and real shares, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4.6), squeeze=False, layout="constrained")
    for axis, (model, reliabilities) in zip(axes[0], found.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.8")
        for name, reliability in reliabilities.items():
            bins = reliability.bins()
            if bins:
                axis.plot([b.predicted for b in bins], [b.real for b in bins], marker="o", label=f"{name} ({reliability.error():.3f})")
        axis.set(title=model, xlabel="predicted probability of use", ylabel="share really used", xlim=(0, 1), ylim=(0, 1))
        axis.legend(title="calibration error", fontsize="small")
    figure.savefig(path, dpi=110)


def cells(*stats: SignalStats) -> str:
    """Precision and recall of each."""
    return " | ".join(f"{x:.2f}" if x is not None else "" for s in stats for x in (s.precision, s.recall))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepseek", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "build/lookahead-study.md", help="where tables are written (%(default)s)")
    arguments = parser.parse_args()
    say = ["# Misses with lookahead", "", "Written by `scripts/lookahead_study.py`, which says what the rows are.", ""]
    found = {"the bundled model": table(record_demo(), say)}
    if arguments.deepseek:
        found["DeepSeek-V2-Lite"] = table(from_deepseek(arguments.deepseek), say)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(say).rstrip() + "\n")
    if plots.available():
        draw(found, arguments.out.with_suffix(".png"))
    print("\n".join(say))


if __name__ == "__main__":
    main()
