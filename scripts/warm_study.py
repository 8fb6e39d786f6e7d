#!/usr/bin/env python3
"""What it is worth to read the experts that an earlier run used most before or while a prompt is read, from a cold cache.

    .venv/bin/python scripts/warm_study.py MODEL.gguf [--share 0.5] [--prompts 3]

The hot set is what decoding used most often in answers to other prompts, as much of it as the budget holds. Each run loads the model
anew; reads go past the page cache; one thread computes. Ways:

  cold    nothing is read before it is asked for
  before  the hot set is read, then the prompt begins; the first token's time counts from the reading's beginning
  typing  the same, but its time does not count: as if somebody typed meanwhile
  any     as typing, with as many experts drawn at random
  beside  the hot set is queued and the prompt begins at once
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

import spac
from spac import control
from spac.bench.prompt import load as load_prompts
from spac.generate import Sampling, generate, tokenize

EARLIER, TOKENS, TEMPERATURE, SEED = slice(30, 40), 64, 0.6, 1
WAYS = ("cold", "before", "typing", "any", "beside")
Bundles = Sequence[tuple[int, int]]


def open_model(path: str, share: float, record: bool = False) -> spac.Llama:
    llama = spac.Llama(path, paging="on", n_ctx=1024, n_ubatch=64, n_threads=1, signals=(), verbose=False, record_routing=record)
    llama.spac.cap_experts(int(share * llama.spac.info().expert_page_bytes))
    return llama


def hot_set(path: str, share: float) -> tuple[Bundles, Bundles]:
    """(block, expert) by uses while decoding, the most used first; and all, shuffled. As many as the budget holds."""
    llama = open_model(path, 0.9, record=True)
    for prompt in load_prompts(())[EARLIER]:
        for _ in generate(llama, tokenize(llama, prompt.text), Sampling(TEMPERATURE, seed=SEED), TOKENS)[1]:
            pass
    trace, info = llama.spac.recorder.trace(), llama.spac.info()
    llama.close()
    ids = trace.ids[trace.phase == 1].astype(np.int64)  # [tokens, layers, k]
    uses = np.stack([np.bincount(ids[:, i].ravel(), minlength=info.n_experts)[: info.n_experts] for i in range(trace.n_layers)])
    n = int(share * uses.size * 0.97)  # pages at borders

    def named(order: np.ndarray) -> Bundles:
        return [(trace.blocks[at // info.n_experts], int(at % info.n_experts)) for at in order[:n]]

    return named(np.argsort(-uses.ravel(), kind="stable")), named(np.random.default_rng(SEED).permutation(uses.size))


def queue(llama: spac.Llama, bundles: Bundles) -> int:
    array = (control.Bundle * len(bundles))(*(control.Bundle(layer, expert, i, 1.0) for i, (layer, expert) in enumerate(bundles)))
    return control.check(control.spac_model_prefetch(llama.spac.model_id, array, len(bundles)))


def wait(llama: spac.Llama, reads: int) -> float:
    """Until so many reads are done, or none has been for half a second; returns the seconds after the last one."""
    seen, since = -1, time.perf_counter()
    while seen < reads and time.perf_counter() - since < 0.5:
        now = llama.spac.stats().reads
        if now != seen:
            seen, since = now, time.perf_counter()
        time.sleep(0.005)
    return time.perf_counter() - since


def answer(path: str, share: float, way: str, hot: Bundles, anything: Bundles, text: str) -> list[float]:
    """Seconds to the first token and to the last; MB read before the prompt, for it and while decoding; misses while decoding."""
    llama = open_model(path, share)
    tokens = tokenize(llama, text)
    begin = time.perf_counter()
    if way != "cold":
        n = queue(llama, anything if way == "any" else hot)
        if way != "beside":
            begin += wait(llama, n)
    if way in ("typing", "any"):
        begin = time.perf_counter()
    counted = [llama.spac.stats()]
    _, pieces = generate(llama, tokens, Sampling(TEMPERATURE, seed=SEED), TOKENS)
    next(pieces)
    first_s = time.perf_counter() - begin
    counted.append(llama.spac.stats())
    for _ in pieces:
        pass
    last_s = time.perf_counter() - begin
    counted.append(llama.spac.stats())
    llama.close()
    read_mb = np.diff([0, *(stats.bytes_read / 1e6 for stats in counted)]).tolist()
    return [first_s, last_s, *read_mb, counted[2].misses - counted[1].misses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.5, help="budget, of all experts (%(default)s)")
    parser.add_argument("--prompts", type=int, default=10)
    arguments = parser.parse_args()
    hot, anything = hot_set(arguments.model, arguments.share)
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for prompt in load_prompts(())[: arguments.prompts]:
        for way in WAYS:
            found[way].append(answer(arguments.model, arguments.share, way, hot, anything, prompt.text))
    print("| way | first token, s | last, s | MB before | MB for the prompt | MB decoding | misses decoding |\n|" + " --- |" * 7)
    for way, rows in found.items():
        times, counts = np.median(rows, 0)[:2], np.mean(rows, 0)[2:]
        print(f"| {way} | " + " | ".join([*(f"{x:.2f}" for x in times), *(f"{x:.1f}" for x in counts)]) + " |")


if __name__ == "__main__":
    main()
