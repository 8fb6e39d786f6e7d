#!/usr/bin/env python3
"""Lets spac learn a model's routing from the benchmark's later prompts, so that the earlier ones can show what that is worth.

    .venv/bin/python scripts/learn_routing.py MODEL.gguf FILE [--memory 8G]

Answers the 11th to the 40th of the bundled prompts, 120 tokens each at temperature 0.6, with what memory there is, and leaves in FILE what
`spac run` leaves in the user's cache directory. `spac bench` takes the first prompts, one more for each repeat.
"""

from __future__ import annotations

import argparse

import spac
from spac.bench.prompt import load
from spac.generate import Sampling, generate, tokenize

FIRST, TOKENS, TEMPERATURE, SEED = 10, 120, 0.6, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--memory", default="auto")
    arguments = parser.parse_args()
    llama = spac.Llama(arguments.model, memory=arguments.memory, paging="on", n_ctx=1024, verbose=False, learned=arguments.file)
    info = llama.spac.info()
    llama.spac.cap_experts(int(0.9 * info.expert_page_bytes))  # where nothing is missed, nothing is learned
    for prompt in load(())[FIRST:]:
        _, pieces = generate(llama, tokenize(llama, prompt.text), Sampling(temperature=TEMPERATURE, seed=SEED), TOKENS)
        for _ in pieces:
            pass
    print({name: (signal.precision, signal.recall) for name, signal in llama.spac.signals().items()})
    llama.close()


if __name__ == "__main__":
    main()
