"""`spac run`: one prompt, one answer."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spac.cli import options as opt
from spac.cli import terminal
from spac.errors import Cancelled, SpacError

if TYPE_CHECKING:
    from spac.generate import Generation
    from spac.llama import Llama
    from spac.trace.recorder import Recorder


def run(
    model: opt.Model,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The text to continue.", show_default=False)] = None,
    file: Annotated[
        str | None, typer.Option("-f", "--file", metavar="FILE", help="Read the prompt from a file; -: from stdin.", show_default=False)
    ] = None,
    max_tokens: opt.MaxTokens = None,
    memory: opt.Memory = "auto",
    ctx: opt.Ctx = 4096,
    ubatch: opt.Ubatch = None,
    threads: opt.Threads = 0,
    temp: opt.Temp = 0.8,
    top_k: opt.TopK = 40,
    top_p: opt.TopP = 0.95,
    min_p: opt.MinP = 0.05,
    seed: opt.Seed = None,
    repeat_penalty: opt.RepeatPenalty = 1.0,
    frequency_penalty: opt.FrequencyPenalty = 0.0,
    presence_penalty: opt.PresencePenalty = 0.0,
    grammar: opt.Grammar = None,
    store: opt.StoreOption = "auto",
    paging: opt.PagingOption = opt.Paging.auto,
    repack: opt.Repack = True,
    draft: opt.Draft = "auto",
    draft_max: opt.DraftMax = "auto",
    horizon: opt.Horizon = "auto",
    signals: opt.Signals = "all",
    learned: opt.Learned = "auto",
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write which experts each token used, for `spac simulate`.", show_default=False)
    ] = None,
    stats: opt.Stats = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the answer.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Continue a prompt."""
    text = read_prompt(prompt, file)
    if trace is not None:
        check_writable(trace)
    options = opt.LoadOptions(model, memory, ctx, ubatch, threads, store, paging, repack, debug, signals, learned, trace is not None)
    llama, speculation, load_s = opt.load_with_draft(options, opt.DraftOptions(draft, draft_max, horizon))
    from spac.generate import Sampling, generate, tokenize

    sampling = Sampling(temp, top_k, top_p, min_p, seed, repeat_penalty, frequency_penalty, presence_penalty, grammar)
    tokens = tokenize(llama, text)
    generation, pieces = generate(llama, tokens, sampling, max_tokens, speculation)
    with terminal.Interrupts(llama.spac.cancel, speculation.cancel) as interrupts, contextlib.closing(pieces):
        try:
            for piece in pieces:
                if not as_json:
                    print(piece, end="", flush=True)
                if interrupts.hit:
                    break
        except Cancelled:
            pass
    if as_json:
        print(json.dumps(report(llama, generation, load_s), ensure_ascii=False))
    elif generation.text and not generation.text.endswith("\n"):
        print(flush=True)
    if generation.finish == "context" and not as_json:
        terminal.note(f"spac: the context of {llama.n_ctx()} tokens is full; raise --ctx for more")
    if trace is not None and llama.spac.recorder is not None:
        save_trace(llama.spac.recorder, trace)
    if stats:
        for line in terminal.stats_lines(llama, generation, load_s):
            terminal.note(line)
    llama.close()
    speculation.close()
    return 130 if interrupts.hit else 0


def check_writable(path: str) -> None:
    """Before anything long begins.

    Raises:
        SpacError: the trace cannot be written there.
    """
    folder = Path(path).parent
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise SpacError(f"{path}: cannot write the trace: {'is a directory' if Path(path).is_dir() else f'no writable folder {folder}'}")


def save_trace(recorder: Recorder, path: str) -> None:
    """Write what was recorded.

    Raises:
        SpacError: it cannot be written, or nothing was routed.
    """
    recorded = recorder.trace()
    if recorded.n_tokens == 0:
        raise SpacError(f"{path}: no trace written: nothing was routed to experts (a dense model, or no token was computed)")
    try:
        recorded.save(path)
    except OSError as e:
        raise SpacError(f"{path}: cannot write the trace: {e.strerror}") from None


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt that was given in one of two ways.

    Raises:
        typer.BadParameter: in both ways or none, or it is empty.
        SpacError: the file cannot be read.
    """
    if prompt is not None and file is not None:
        raise typer.BadParameter("give the prompt with -p or with -f, not both")
    if prompt is None and file is None:
        raise typer.BadParameter("no prompt: give it with -p, or with -f FILE (- for stdin)")
    if file is not None:
        try:
            raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        except OSError as e:
            raise SpacError(f"{file}: cannot read the prompt: {e.strerror}") from None
        try:
            prompt = raw.decode()
        except UnicodeDecodeError as e:
            raise SpacError(f"{file}: the prompt is not UTF-8 text (byte {e.start})") from None
    if not prompt:
        raise typer.BadParameter("the prompt is empty")
    return opt.utf8("the prompt", prompt)


def report(llama: Llama, generation: Generation, load_s: float) -> dict[str, Any]:
    """What `--json` prints. Times in seconds, memory in bytes; `expert` is null if nothing is paged, `draft` without a draft."""
    from spac.host.memory import peak_resident_bytes

    plan, stats, info = llama.spac.plan, llama.spac.stats(), llama.spac.info()
    expert = None
    if stats is not None and info is not None:
        expert = {
            "budget_bytes": stats.granted_bytes,
            "peak_bytes": stats.peak_bytes,
            "hits": stats.hits,
            "misses": stats.misses,
            "hit_rate": stats.hit_rate,
            "bytes_read": stats.bytes_read,
            "reads": stats.reads,
            "stall_s": stats.stall_s,
            "shortages": stats.shortages,
            "floor_bytes": info.floor_bytes,
            "store": info.store,
        }
    drafted, balancer = generation.draft, llama.spac.balancer()
    draft = None
    if drafted is not None:
        draft = {
            "proposed": drafted.proposed,
            "accepted": drafted.accepted,
            "acceptance_rate": drafted.acceptance_rate,
            "mean_accepted_tokens": drafted.mean_accepted_tokens,
            "given_back_bytes": drafted.given_back_bytes,
        }
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish": generation.finish or "interrupted",
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "load_s": load_s,
        "prefill_s": generation.prefill_s,
        "decode_s": generation.decode_s,
        "prefill_tokens_per_s": generation.prefill_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "memory_limit_bytes": plan.limit_bytes if plan is not None else None,
        "peak_rss_bytes": peak_resident_bytes(),
        "cpu_s": time.process_time(),
        "paging": "on" if llama.spac.paged else "off",
        "expert": expert,
        "draft": draft,
        "balancer": {
            "plans": balancer.plans,
            "late": balancer.late,
            "cpu_s": balancer.cpu_s,
            "choice": asdict(balancer.choice) if balancer.choice is not None else None,
        }
        if balancer is not None
        else None,
        "signals": {
            name: {
                "precision": signal.precision,
                "recall": signal.recall,
                "reads": stats.ahead_reads if stats is not None and name == "tokens" else 0,
                "wasted_bytes": stats.wasted_bytes if stats is not None and name == "tokens" else 0,
            }
            for name, signal in llama.spac.signals().items()
        },
    }
