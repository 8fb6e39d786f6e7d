#!/usr/bin/env python3
"""The balancer beside decoding: what it takes of the processor, and what it does when things change in the middle of an answer.

    .venv/bin/python scripts/live_study.py cpu build/demo/spac-demo-1g.gguf --out docs/benchmarks/balancer-cpu.md
    .venv/bin/python scripts/live_study.py changes build/demo/spac-demo-1g.gguf --out docs/benchmarks/balancer-changes.md

cpu: 2,000 tokens, of all kinds of prompts, inside each device profile, with the draft. CPU seconds and bytes read for each token are
what stands in for energy.

changes: a control group's read limit falls from 1 GB/s to 100 MB/s; its memory limit and the model's are cut by a third; prompts
change from code to chat. Each twice, with plans as usual and with the first plan kept for good: what the change itself costs is in
both. Needs root, for control groups.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

from spac.bench import profile as profiles
from spac.bench import prompt as prompts
from spac.host import limits

MIB: Final = 1 << 20
DRAFT: Final = Path(__file__).resolve().parent.parent / "models" / "spac-demo-draft.gguf"
TOKENS: Final = 2000
BEFORE: Final = 64  # tokens before a change
AFTER: Final = 64
CHANGES: Final = ("disk", "memory", "prompts")
SHARE: Final = 0.3  # of the model, the memory limit
FAST, SLOW = 1_000_000_000, 100_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("cpu", "changes", "cpu-worker", "change-worker"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="35%", help="limit of the process, of the model's size, for cpu")
    parser.add_argument("--profiles", nargs="*", default=profiles.names())
    parser.add_argument("--repeats", type=int, default=3, help="runs of each change (%(default)s)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("rest", nargs="*")
    arguments = parser.parse_args()
    if arguments.part == "cpu-worker":
        return cpu_worker(arguments.model, int(arguments.rest[0]))
    if arguments.part == "change-worker":
        return change_worker(arguments.model, int(arguments.rest[0]), arguments.rest[1], arguments.rest[2] == "live")
    reason = limits.unavailable()
    if reason:
        raise SystemExit(reason)
    lines = cpu(arguments) if arguments.part == "cpu" else changes(arguments)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    return 0


def show(lines: list[str], *more: str) -> None:
    lines += more
    print(*more, sep="\n", flush=True)


def worker(part: str, model: Path, *rest: object, **limit: Any) -> tuple[dict[str, Any], limits.LimitedRun]:
    """What a worker printed last, in a group of its own."""
    command = [sys.executable, __file__, part, str(model), *map(str, rest)]
    run = limits.run_limited(command, measure=True, files=[model], **limit)
    if run.returncode != 0:
        raise SystemExit(f"{part} {rest}: {run.stderr.strip().splitlines()[-1:] or run.returncode}")
    return json.loads(run.stdout.splitlines()[-1]), run


def open_model(model: Path, memory_bytes: int, draft_max: Any = "auto") -> tuple[Any, Any]:
    import spac
    from spac.speculative import DraftLlama, ModelDraft, Speculation

    draft = ModelDraft(DraftLlama(DRAFT, memory=memory_bytes, n_ctx=1024, verbose=False))
    llama = spac.Llama(model, memory=memory_bytes, paging="on", n_ctx=1024, verbose=False)
    return llama, Speculation(draft, draft_max)


# -- what it takes of the processor --


def cpu(arguments: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    show(
        lines,
        "# The balancer's part of the processor", "",
        f"Written by `scripts/live_study.py cpu`: {TOKENS} tokens in each device profile, {arguments.memory} of {arguments.model.name} in memory, with",
        "the draft, in answers of at most 200 tokens. CPU seconds are of the whole process, all threads, while decoding; they and the bytes read stand in for energy.", "",
        "| profile | tokens/s | CPU s a token | MB a token | plans | late | balancer's CPU | of all | CPU s a plan |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )  # fmt: skip
    size = arguments.model.stat().st_size
    for name in arguments.profiles:
        limit = profiles.load(name).limits(size)
        memory = profiles.memory_bytes(arguments.memory, size) or size
        got, _ = worker(
            "cpu-worker", arguments.model, memory, memory_bytes=memory, read_bytes_per_s=limit.read_bytes_per_s,
            read_iops=limit.read_iops, cores=limit.cores, cpu_share=limit.cpu_share,
        )  # fmt: skip
        share = got["balancer_s"] / got["cpu_s"]
        show(lines, f"| `{name}` | {got['tokens'] / got['seconds']:.2f} | {got['cpu_s'] / got['tokens']:.4f} | {got['bytes'] / got['tokens'] / 1e6:.1f} | {got['plans']} | {got['late']} |"
             f" {got['balancer_s']:.3f} s | {share:.3%} | {got['balancer_s'] / max(1, got['plans']):.4f} |")  # fmt: skip
    return lines


def cpu_worker(model: Path, memory_bytes: int) -> int:
    from spac.generate import Sampling, generate, tokenize

    llama, speculation = open_model(model, memory_bytes)
    tokens, seconds, cpu_s, n_bytes = 0, 0.0, 0.0, 0
    all_prompts = prompts.load(())

    def used() -> tuple[float, int]:
        return time.process_time(), llama.spac.stats().bytes_read

    for i in range(10_000):
        if tokens >= TOKENS:
            break
        text = all_prompts[i % len(all_prompts)].text
        result, pieces = generate(llama, tokenize(llama, text), Sampling(temperature=0.8, seed=i), min(200, TOKENS - tokens), speculation)
        begun: tuple[float, int] | None = None
        for _ in pieces:
            begun = begun or used()  # the prompt is behind it
        ended = used()
        cpu_s += ended[0] - (begun or ended)[0]
        n_bytes += ended[1] - (begun or ended)[1]
        tokens, seconds = tokens + result.completion_tokens, seconds + result.decode_s
    balancer = llama.spac.balancer()
    llama.close()  # ends the thread: its time is complete
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_s": cpu_s, "bytes": n_bytes, "plans": balancer.plans, "late": balancer.late,
                      "balancer_s": balancer.cpu_s}))  # fmt: skip
    return 0


# -- changes --


def changes(arguments: argparse.Namespace) -> list[str]:
    size = arguments.model.stat().st_size
    memory = int(size * SHARE)
    lines: list[str] = []
    show(
        lines,
        "# Changes in the middle of an answer", "",
        f"Written by `scripts/live_study.py changes`: {arguments.model.name}, {SHARE:.0%} of it in memory, 1 GB/s, with the draft; the change comes after {BEFORE}",
        f"tokens, {AFTER} follow. *kept*: the first plan for good. {arguments.repeats} runs each, in turn; medians of them, of steps and peaks the largest. Times by",
        "token: median before; of each run the longest of the ten after the change, with its misses; median of the last 32. *peak*: of the group from the change on,",
        "of its limit then. Drafts are only sensed, none is verified: a batch rounds differently, and here texts have to be equal to the last token.", "",
        "| change | plans | steps to the first new plan | before | longest of ten | last | misses a token, last | peak, of limit | choice before → after | same text |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )  # fmt: skip
    for change in CHANGES:
        runs: dict[str, list[dict[str, Any]]] = {"live": [], "kept": []}
        for _ in range(arguments.repeats):
            for mode, of_mode in runs.items():
                got, run = worker("change-worker", arguments.model, memory, change, mode, memory_bytes=memory, read_bytes_per_s=FAST)
                assert not run.oom_killed
                of_mode.append(got)
        texts = {tuple(got["ids"]) for of_mode in runs.values() for got in of_mode}
        for mode, of_mode in runs.items():
            show(lines, change_row(change, mode, of_mode, "yes" if len(texts) == 1 else "no"))
    return lines


def change_row(change: str, mode: str, runs: list[dict[str, Any]], same: str) -> str:
    """`same`: whether all texts were, of both modes."""
    live = mode == "live"
    longest = [max((1e3 * got["token_s"][i], got["misses"][i]) for i in range(got["at"], got["at"] + 10)) for got in runs]
    before = statistics.median(1e3 * statistics.median(got["token_s"][8 : got["at"]]) for got in runs)
    last = statistics.median(1e3 * statistics.median(got["token_s"][-32:]) for got in runs)
    misses = statistics.median(statistics.fmean(got["misses"][-32:]) for got in runs)
    taken = [got["steps"] for got in runs]
    steps = "" if not live else "never" if None in taken else max(taken)
    fullest = max(runs, key=lambda got: got["peak"] / got["limit"])
    choices = "; ".join(sorted({f"{got['before']} → {got['after']}" for got in runs}))
    return (
        f"| {change}, {mode} | {statistics.median(got['plans'] for got in runs):.0f} | {steps} | {before:.0f} ms | {', '.join(f'{ms:.0f} ({missed})' for ms, missed in longest)}"
        f" ms | {last:.0f} ms | {misses:.1f} | {fullest['peak'] / MIB:.0f} of {fullest['limit'] / MIB:.0f} MiB"
        f" | {choices} | {'' if live else same} |"
    )


def group_file(controller: str, name: str) -> Path:
    """A file of the version-1 group that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path("/sys/fs/cgroup") / controller / path.lstrip("/") / name
    raise SystemExit(f"no control group of {controller}, version 1")


def change_worker(model: Path, memory_bytes: int, change: str, live: bool) -> int:
    """One run; the change is made between two tokens, the group's peak counted from there on."""
    from spac.generate import Sampling, generate, tokenize

    llama, speculation = open_model(model, memory_bytes, draft_max=0)
    balancer = llama.spac.balancer()
    token_s: list[float] = []
    misses: list[int] = []
    ids: list[int] = []
    plans_at, steps, before, limit = 0, None, None, memory_bytes

    def make_change() -> None:
        nonlocal limit
        group_file("memory", "memory.max_usage_in_bytes").write_text("0")
        if change == "disk":
            group_file("blkio", "blkio.throttle.read_bps_device").write_text(f"{limits.device_of(model)} {SLOW}")
        elif change == "memory":
            limit = memory_bytes * 2 // 3
            llama.spac.limit_memory(limit)  # the kernel refuses a limit below what is in use
            group_file("memory", "memory.limit_in_bytes").write_text(str(limit))
            group_file("memory", "memory.max_usage_in_bytes").write_text("0")

    def run(text: str, n: int, change_after: int | None) -> None:
        nonlocal plans_at, steps, before
        result, pieces = generate(llama, tokenize(llama, text), Sampling(temperature=0.8, seed=1), n, speculation)
        last, seen = None, 0
        for _ in pieces:
            now, missed = time.perf_counter(), llama.spac.stats().misses
            new = len(result.token_ids) - seen
            seen += new
            if last is not None:
                token_s.append((now - last[0]) / max(1, new))
                misses.append(missed - last[1])
            if before is not None and steps is None and balancer.plans > plans_at:
                steps = len(token_s) - at
            if not live and balancer.choice is not None:
                balancer.ask = lambda: None
            if change_after is not None and seen >= change_after and before is None:
                before, plans_at = balancer.choice, balancer.plans
                note_change()
            last = time.perf_counter(), llama.spac.stats().misses
        ids.extend(result.token_ids)

    at = 0

    def note_change() -> None:
        nonlocal at
        at = len(token_s)
        make_change()

    code, chat = prompts.load(("code",)), prompts.load(("chat",))
    if change == "prompts":
        run(code[0].text, BEFORE, None)
        before, plans_at = balancer.choice, balancer.plans
        note_change()
        run(chat[0].text, AFTER, None)
    else:
        run(code[0].text, BEFORE + AFTER, BEFORE)
    peak = int(group_file("memory", "memory.max_usage_in_bytes").read_text())
    plans, after = balancer.plans, balancer.choice

    def words(choice: Any) -> str:
        return (
            f"{choice.drafted} drafted, {choice.verified} verified, {'read' if choice.depth else 'not read'} ahead"
            if choice
            else "none yet"
        )

    print(json.dumps({"token_s": token_s, "misses": misses, "ids": ids, "at": at, "plans": plans, "steps": steps, "peak": peak, "limit": limit,
                      "before": words(before), "after": words(after)}))  # fmt: skip
    llama.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
