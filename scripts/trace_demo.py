#!/usr/bin/env python3
"""Records the bundled model's routing on the benchmark's forty prompts, for `spac simulate`.

    .venv/bin/python scripts/trace_demo.py build/demo/trace.npz
    .venv/bin/spac simulate build/demo/trace.npz --cache 12%,25%,50%,75% --policy default,lru,min
    .venv/bin/python scripts/trace_demo.py build/demo/run.npz --as-run      # sampled as `spac run` does: for scripts/miss_curve.py

100 tokens after each prompt, at temperature 0.7 with a fixed seed: greedy text of so small a model soon goes round in a circle. `Llama.sample` draws the same random number for every token then, which keeps text out of
circles altogether; with --as-run it is drawn anew, and some answers do go round.
"""

from __future__ import annotations

import sys
from pathlib import Path

import spac
from spac.bench.prompt import load
from spac.generate import Sampling, make_sampler

MODEL = Path(__file__).resolve().parent.parent / "models/spac-demo-moe.gguf"
TOKENS, TEMPERATURE, SEED = 100, 0.7, 1


def main() -> None:
    as_run = "--as-run" in sys.argv
    llama = spac.Llama(MODEL, paging="off", n_ctx=1024, n_ubatch=64, seed=SEED, verbose=False, record_routing=True)
    for prompt in load(()):
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval(llama.tokenize(prompt.text.encode()))
        sampler = make_sampler(Sampling(0.8, 40, 0.95, 0.05, SEED))
        for _ in range(TOKENS):
            llama.eval([sampler.sample(llama._ctx, -1) if as_run else llama.sample(temp=TEMPERATURE)])
        sampler.close()
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    llama.spac.recorder.trace().save(out)
    llama.close()


if __name__ == "__main__":
    main()
