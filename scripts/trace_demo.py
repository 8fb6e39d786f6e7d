#!/usr/bin/env python3
"""Records the bundled model's routing on the benchmark's forty prompts, for `spac simulate`.

    .venv/bin/python scripts/trace_demo.py build/demo/trace.npz
    .venv/bin/spac simulate build/demo/trace.npz --cache 12%,25%,50%,75% --policy default,lru,min

100 tokens after each prompt, at temperature 0.7 with a fixed seed: greedy text of so small a model soon goes round in a circle.
"""

from __future__ import annotations

import sys
from pathlib import Path

import spac
from spac.bench.prompt import load

MODEL = Path(__file__).resolve().parent.parent / "models/spac-demo-moe.gguf"
TOKENS, TEMPERATURE, SEED = 100, 0.7, 1


def main() -> None:
    llama = spac.Llama(MODEL, paging="off", n_ctx=1024, n_ubatch=64, seed=SEED, verbose=False, record_routing=True)
    for prompt in load(()):
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval(llama.tokenize(prompt.text.encode()))
        for _ in range(TOKENS):
            llama.eval([llama.sample(temp=TEMPERATURE)])
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    llama.spac.recorder.trace().save(out)
    llama.close()


if __name__ == "__main__":
    main()
