#!/usr/bin/env python3
"""One run of one contender, for scripts/bench.py: loads, reads a prompt, decodes greedily, prints one JSON object.

The loop is the same for all; only what loads the model differs. `stock` is llama_cpp.Llama on the libraries that
LLAMA_CPP_LIB_PATH names; `spac` is spac.Llama.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from typing import Any


def load(options: argparse.Namespace) -> Any:
    arguments = {"n_ctx": options.ctx, "n_batch": 512, "n_ubatch": options.ubatch, "n_threads": options.threads,
                 "n_threads_batch": options.threads, "verbose": False}  # fmt: skip
    if options.engine == "spac":
        import spac

        spac_arguments = {"memory": options.memory or "auto", "paging": options.paging, "store": options.store}
        llama: Any = spac.Llama
    else:
        import llama_cpp

        spac_arguments = {"use_mmap": not options.no_mmap, "flash_attn": False}
        llama = llama_cpp.Llama
    if not options.repack:
        import llama_cpp.llama_cpp as upstream

        stock_params = upstream.llama_model_default_params

        def params() -> Any:
            result = stock_params()
            result.use_extra_bufts = False
            return result

        upstream.llama_model_default_params = params
    if options.engine == "stock":
        # as spac.Llama does: llama.cpp's own choice of attention, not llama-cpp-python's
        import llama_cpp._internals as internals

        context = internals.LlamaContext

        def make_context(*, model: Any, params: Any, verbose: bool) -> Any:
            params.flash_attn_type = -1
            return context(model=model, params=params, verbose=verbose)

        internals.LlamaContext = make_context
    return llama(options.model, **arguments, **spac_arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["stock", "spac"])
    parser.add_argument("model")
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--paging", default="auto")
    parser.add_argument("--store", default="auto")
    parser.add_argument("--no-mmap", action="store_true")
    parser.add_argument("--repack", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--prompt", required=True, help="text; its first --prompt-tokens tokens are used, repeated if need be")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warm", action="store_true", help="do it twice and time the second: everything has been read")
    options = parser.parse_args()

    start = time.perf_counter()
    llama = load(options)
    loaded = time.perf_counter()
    tokens = llama.tokenize(options.prompt.encode(), add_bos=False)
    tokens = (tokens * (options.prompt_tokens // len(tokens) + 1))[: options.prompt_tokens]
    for _ in range(1 + options.warm):
        llama.reset()
        llama._ctx.kv_cache_clear()
        begin = time.perf_counter() if options.warm else loaded
        produced: list[int] = []
        times: list[float] = []
        for token in llama.generate(tokens, temp=0.0, top_k=1):
            times.append(time.perf_counter())
            produced.append(token)
            if len(produced) > options.tokens:
                break
    result: dict[str, Any] = {
        "engine": options.engine,
        "load_s": loaded - start,
        "prefill_s": times[0] - begin,
        "decode_s": times[-1] - times[0],
        "prefill_tokens_per_s": len(tokens) / (times[0] - begin),
        "decode_tokens_per_s": (len(times) - 1) / (times[-1] - times[0]),
        "token_s": [round(b - a, 6) for a, b in itertools.pairwise(times)],
        "token_ids": produced,
        "cpu_s": time.process_time(),
    }
    if options.engine == "spac":
        stats = llama.spac.stats()
        if stats is not None:
            result["expert"] = {
                "budget_bytes": stats.budget_bytes, "peak_bytes": stats.peak_bytes, "hit_rate": stats.hit_rate,
                "bytes_read": stats.bytes_read, "reads": stats.reads, "stall_s": stats.stall_s,
            }  # fmt: skip
    llama.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
