#!/usr/bin/env python3
"""The bundled model's own text with its probabilities, for its draft to learn from.

    scripts/train_demo.py corpus WORK                      # first: what the model was trained on
    .venv/bin/python scripts/sample_demo.py WORK           # writes WORK/samples.npz, in about ten minutes of two cores

A draft is asked what the target will write, which is not quite what people wrote. Each sequence begins as a document or a question of the
training text does and goes on with the target's own words, half of them sampled at temperature 0.6, half at 0.8, never a token
with less than a twentieth of the best one's probability. Kept are the most likely tokens at every place, at temperature 1, those
of the beginning included.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import spac  # before llama_cpp: it says which library that loads
from spac.generate import tokenize

import llama_cpp.llama_cpp as upstream  # isort: skip

MODEL = Path(__file__).resolve().parent.parent / "models/spac-demo-moe.gguf"
SEQUENCES, LENGTH, PARALLEL, KEPT = 6144, 256, 64, 48
BEGINNINGS = (12, 80)  # tokens, shortest and longest
TEMPERATURES, MIN_P = (0.6, 0.8), 0.05
SEED = 20261126
Array = np.ndarray[Any, Any]


class Wide(spac.Llama):
    """A context of many sequences of equal length."""

    def _adjust_context(self, context_params: Any) -> None:
        super()._adjust_context(context_params)
        context_params.n_seq_max = PARALLEL
        context_params.kv_unified = False


def beginnings(llama: spac.Llama, work: Path) -> Iterator[list[int]]:
    """Of training documents, from the beginning of a word on, and of questions, with and without the chat template."""
    chance = random.Random(SEED)
    documents = (work / "train.txt").read_text(encoding="utf-8").split("\0")
    while True:
        text = chance.choice(documents)
        if text.startswith("<|im_start|>"):
            question = chance.choice(text.split("<|im_start|>user\n")[1:]).split("<|im_end|>")[0]
            text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" if chance.random() < 0.5 else question
            tokens = tokenize(llama, text)[: BEGINNINGS[1]]
        else:
            at = text.find(chance.choice("\n ."), chance.randrange(max(1, len(text) - 600))) + 1
            tokens = tokenize(llama, text[at : at + 600])[: chance.randint(*BEGINNINGS)]
        if tokens:
            yield tokens


def held_out(llama: spac.Llama, work: Path) -> Iterator[list[int]]:
    """Pieces of documents that neither model saw, whole sequences: nothing is sampled after them."""
    documents = (work / "held_out.txt").read_text(encoding="utf-8").split("\0")
    chance = random.Random(SEED)
    while True:
        tokens = tokenize(llama, chance.choice(documents)[:20_000])
        if len(tokens) >= LENGTH:
            at = chance.randrange(len(tokens) - LENGTH + 1)
            yield tokens[at : at + LENGTH]


class Writer:
    """Goes on with many beginnings at once."""

    def __init__(self, llama: spac.Llama) -> None:
        self.context, self.n_vocab = llama._ctx.ctx, llama.n_vocab()
        self.batch = upstream.llama_batch_init(PARALLEL, 0, 1)
        self.random = np.random.default_rng(SEED)
        self.temperatures = np.resize(np.array(TEMPERATURES), PARALLEL)[:, None]

    def write(self, given: list[list[int]]) -> tuple[Array, Array, Array]:
        """tokens [PARALLEL, LENGTH]; what may follow each, most of it: ids and chances [PARALLEL, LENGTH, KEPT]."""
        upstream.llama_memory_clear(upstream.llama_get_memory(self.context), False)
        tokens = np.zeros((PARALLEL, LENGTH), np.uint16)
        ids = np.zeros((PARALLEL, LENGTH, KEPT), np.uint16)
        chances = np.zeros((PARALLEL, LENGTH, KEPT), np.float16)
        current = np.array([begin[0] for begin in given])
        for place in range(LENGTH):
            logits = self.decode(current, place)
            best = np.argpartition(logits, -KEPT)[:, -KEPT:]
            of_best = np.take_along_axis(logits, best, 1)
            top = of_best.max(1, keepdims=True)
            tokens[:, place], ids[:, place] = current, best
            chances[:, place] = np.exp(of_best - top) / np.exp(logits - top).sum(1, keepdims=True)
            p = np.where(of_best - top >= np.log(MIN_P), np.exp((of_best - top) / self.temperatures), 0).cumsum(1)
            drawn = (p < self.random.random((PARALLEL, 1)) * p[:, -1:]).sum(1)
            sampled = best[np.arange(PARALLEL), drawn]
            current = np.array([begin[place + 1] if place + 1 < len(begin) else s for begin, s in zip(given, sampled, strict=True)])
        return tokens, ids, chances

    def decode(self, tokens: Array, place: int) -> Array:
        """Logits [PARALLEL, vocabulary] after one more token of each sequence."""
        batch = self.batch
        batch.n_tokens = PARALLEL
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, True
            batch.seq_id[i][0] = i
        if upstream.llama_decode(self.context, batch):
            sys.exit(f"{MODEL}: llama_decode failed")
        return np.ctypeslib.as_array(upstream.llama_get_logits(self.context), (PARALLEL, self.n_vocab))


def main() -> None:
    work = Path(sys.argv[1])
    llama = Wide(MODEL, paging="off", n_ctx=LENGTH * PARALLEL, n_batch=PARALLEL, n_ubatch=PARALLEL, verbose=False)
    writer, out = Writer(llama), {}
    for name, source, count in (("held_out", held_out(llama, work), PARALLEL), ("sampled", beginnings(llama, work), SEQUENCES)):
        parts = []
        began = time.monotonic()
        for first in range(0, count, PARALLEL):
            parts.append(writer.write([next(source) for _ in range(PARALLEL)]))
            done = first + PARALLEL
            print(f"{name}: {done} of {count} sequences, {done * LENGTH / (time.monotonic() - began):.0f} tokens/s", flush=True)
        for key, arrays in zip(("tokens", "ids", "chances"), zip(*parts, strict=True), strict=True):
            out[f"{name}_{key}"] = np.concatenate(arrays)
    llama.close()
    np.savez(work / "samples.npz", **out)


if __name__ == "__main__":
    main()
