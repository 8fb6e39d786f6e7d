#!/usr/bin/env python3
"""Records the bundled model's routing on the benchmark's forty prompts, for `spac simulate`.

    .venv/bin/python scripts/trace_demo.py build/demo/trace.npz
    .venv/bin/spac simulate build/demo/trace.npz --cache 12%,25%,50%,75% --policy default,lru,min
    .venv/bin/python scripts/trace_demo.py build/demo/trace.npz --as-run    # sampled as `spac run` does
    .venv/bin/python scripts/trace_demo.py build/demo/run.npz --penalty     # sampled as in scripts/plan_study.py: for scripts/miss_curve.py

100 tokens after each prompt, at temperature 0.7 with a fixed seed: greedy text of so small a model soon goes round in a circle. `Llama.sample` draws the same random number for every token then, which keeps text out of
circles altogether; with --as-run it is drawn anew, and some answers do go round; with --penalty one on repetition keeps them from it.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from plan_study import penalising_sampler

import spac
from spac.bench.prompt import load
from spac.generate import Sampling, make_sampler

MODEL = Path(__file__).resolve().parent.parent / "models/spac-demo-moe.gguf"
TOKENS, TEMPERATURE, SEED = 100, 0.7, 1


def main() -> None:
    anew = "--as-run" in sys.argv or "--penalty" in sys.argv
    llama = spac.Llama(MODEL, paging="off", n_ctx=1024, n_ubatch=64, seed=SEED, verbose=False, record_routing=True)
    for prompt in load(()):
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval(llama.tokenize(prompt.text.encode()))
        made = penalising_sampler(llama, SEED) if "--penalty" in sys.argv else make_sampler(Sampling(0.8, 40, 0.95, 0.05, SEED), llama)
        with contextlib.closing(made) as sampler:
            for _ in range(TOKENS):
                llama.eval([sampler.sample(llama._ctx, -1) if anew else llama.sample(temp=TEMPERATURE)])
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    llama.spac.recorder.trace().save(out)
    llama.close()


if __name__ == "__main__":
    main()
