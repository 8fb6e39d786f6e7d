#!/usr/bin/env python3
"""`spac plan` against real runs in control groups: docs/benchmarks/plan/table.md.

    make build build/demo/4g.gguf && .venv/bin/spac tune build/demo
    .venv/bin/python scripts/plan_study.py build/demo/4g.gguf build/demo/spac-demo-1g.gguf --out docs/benchmarks/plan
    .venv/bin/python scripts/plan_study.py --report docs/benchmarks/plan        # the table again

Each run is a process of its own in a profile's limits: cold, one of the benchmark's prompts, then sampled text with `spac run`'s settings
(greedy text of so small a model goes round in a circle). Predicted by the header, the limit and what `spac tune` measured. Runs that are
there already are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from spac import limits as cgroups
from spac.bench import profile as profiles
from spac.bench import prompt as prompts
from spac.bench import record as records
from spac.cli import plan as plans
from spac.gguf_check import check_model

PROFILES: Final = ("native-500M", "pi5-8g-nvme", "pi5-sd", "native")
MEMORIES: Final = (12, 25, 50)
TOKENS: Final = 64
RUN_S: Final = 60  # about; a slow cell decodes fewer tokens
LEAST_TOKENS: Final = 12
CTX: Final = 4096
AIM: Final = 0.15


def run_worker(config: dict[str, Any]) -> None:
    """A run, as a process of its own: prints one JSON object."""
    import spac
    from spac.generate import Sampling, make_sampler

    llama = spac.Llama(config["model"], memory=config["memory"], n_ctx=CTX, n_batch=512, n_threads=config["threads"], verbose=False)
    tokens = llama.tokenize(config["prompt"].encode())
    begin = time.perf_counter()
    llama.eval(tokens)
    ttft_s = time.perf_counter() - begin
    before = llama.spac.stats()
    sampler = make_sampler(Sampling(0.8, 40, 0.95, 0.05, config["seed"]))
    begin = time.perf_counter()
    for _ in range(config["tokens"]):
        llama.eval([sampler.sample(llama._ctx, -1)])
    decode_s = time.perf_counter() - begin
    after = llama.spac.stats()
    result: dict[str, Any] = {"prompt_tokens": len(tokens), "ttft_s": ttft_s, "tokens_per_s": config["tokens"] / decode_s, "paged": llama.spac.paged}
    if after is not None:
        uses = after.hits + after.misses - before.hits - before.misses
        result |= {"miss_rate": (after.misses - before.misses) / uses, "budget_bytes": after.budget_bytes}
    print(json.dumps(result))
    llama.close()


def profile_file(name: str, folder: Path) -> str:
    """A profile's name, or a file that limits this machine's reads."""
    if name != "native-500M":
        return name
    path = folder / "native-500M.toml"
    path.write_text('read_bytes_per_s = 500_000_000\n[sources]\nread_bytes_per_s = "a round figure"\n')
    return str(path)


def predict(model: Path, profile: str, memory: int, prompt_tokens: int) -> dict[str, Any]:
    facts = check_model(model)
    question, device, limit = plans.ask(facts.parts, facts, profile, str(memory), CTX, None, prompt_tokens)
    answer = question.answer(limit)
    found = plans.describe(answer, [])
    found["quick"] = device.quick
    found["miss_rate"] = answer.speed.miss_rate if answer.speed else None
    return found


def measure(model: Path, name: str, memory: int, repeat: int) -> dict[str, Any]:
    every = prompts.load(())
    prompt = every[repeat % len(every)]
    size = model.stat().st_size
    limit = size * memory // 100
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_file(name, Path(folder))
        limits = dataclasses.replace(profiles.load(profile).limits(size), memory_bytes=limit)
        predicted = predict(model, profile, limit, len(prompt.text) // 4)
    record: dict[str, Any] = {
        "model": model.name, "profile": name, "memory": memory, "repeat": repeat, "prompt": prompt.id, "predicted": predicted,
        "limits": dataclasses.asdict(limits), "not_enforced": cgroups.unenforceable(limits, [model]), "machine": records.machine(),
        "commit": records.commit(), "time": time.strftime("%Y-%m-%d %H:%M:%S"), "load": os.getloadavg()[0],
    }  # fmt: skip
    tokens = TOKENS
    if predicted["decode_tokens_per_s"]:
        tokens = min(TOKENS, max(LEAST_TOKENS, int(RUN_S * predicted["decode_tokens_per_s"])))
    config = {"model": str(model), "memory": limit, "prompt": prompt.text, "tokens": tokens, "seed": repeat, "threads": limits.cores}
    enforced = {key: value for key, value in dataclasses.asdict(limits).items() if key not in record["not_enforced"]}
    run = cgroups.run_limited([sys.executable, __file__, "--worker", json.dumps(config)], **enforced, measure=True, files=[model])
    record["tokens"] = tokens
    if run.returncode == 0:
        return {**record, **json.loads(run.stdout.splitlines()[-1])}
    lines = run.stderr.strip().splitlines() or ["killed at the memory limit" if run.oom_killed else "no message"]
    return {**record, "error": lines[-1]}


def report(folder: Path) -> str:
    runs = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    cells: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["model"], run["profile"], run["memory"]), []).append(run)
    first = runs[0]
    lines = [
        "# `spac plan` against real runs\n",
        f"- machine: {first['machine']['cpu']}, {first['machine']['cores']} cores; {min(r['time'] for r in runs)} to {max(r['time'] for r in runs)}",
        "- command: `.venv/bin/python scripts/plan_study.py`, which says how; the table again: `--report`",
        "- measured: median of single runs, each with another prompt; *inside*: runs within the predicted interval; misses: for each routed expert\n",
        "| model | profile | memory | runs | measured, tokens/s | predicted | interval | off by | inside | misses, run / predicted | experts, MiB, run / predicted |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    errors, inside, total, wrong = [], 0, 0, 0
    for (model, profile, memory), found in sorted(cells.items(), key=lambda item: (item[0][0], PROFILES.index(item[0][1]), item[0][2])):
        done = [run for run in found if "error" not in run]
        predicted = found[0]["predicted"]
        label = f"| {model} | {profile} | {memory} % | {len(found)} |"
        if not done or not predicted["fits"]:
            agree = not done and not predicted["fits"]
            wrong += not agree
            lines.append(f"{label} {'runs' if done else 'does not fit'} | {'fits' if predicted['fits'] else 'does not fit'} | | {'' if agree else 'WRONG'} | | | |")
            continue
        rate = statistics.median(run["tokens_per_s"] for run in done)
        expected = statistics.median(run["predicted"]["decode_tokens_per_s"] for run in done)
        low, high = (statistics.median(run["predicted"]["decode_interval"][i] for run in done) for i in (0, 1))
        within = sum(run["predicted"]["decode_interval"][0] <= run["tokens_per_s"] <= run["predicted"]["decode_interval"][1] for run in done)
        if profile != "native":  # without a limit the disk is shared, and what is measured is also who else reads
            errors.append(abs(expected / rate - 1))
            inside, total = inside + within, total + len(done)
        misses = experts = ""
        if done[0]["paged"]:
            missed = statistics.median(run["miss_rate"] for run in done)
            misses = f"{missed:.3f} / {statistics.median(run['predicted']['miss_rate'] for run in done):.3f}"
            experts = f"{statistics.median(run['budget_bytes'] for run in done) / 2**20:.0f} / {predicted['budget']['expert_bytes'] / 2**20:.0f}"
        lines.append(f"{label} {rate:.2f} | {expected:.2f} | {low:.2f} to {high:.2f} | {expected / rate - 1:+.1%} | {within} of {len(done)} | {misses} | {experts} |")
    if errors:
        lines += [
            "", f"With limited reads: within {AIM:.0%} in {sum(e <= AIM for e in errors)} of {len(errors)} cells, largest error {max(errors):.1%};"
            f" {inside} of {total} runs inside the interval. Wrong about fitting: {wrong}.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="spac plan against real runs")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/bench/plan"))
    parser.add_argument("--profile", action="append", choices=PROFILES, help="only these; repeat it")
    parser.add_argument("--memory", action="append", type=int, choices=MEMORIES, help="only these, %% of the model; repeat it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", type=Path, help="only make the table again")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(json.loads(options.worker))
        return
    folder = options.report or options.out
    if options.report is None:
        if not options.models:
            parser.error("no models")
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        for repeat in range(options.repeats):
            for model in options.models:
                for name in options.profile or PROFILES:
                    for memory in options.memory or MEMORIES:
                        slug = re.sub(r"[^a-z0-9]+", "-", f"{model.stem}-{name}-{memory}-{repeat}".lower())
                        path = folder / "runs" / f"{slug}.json"
                        if path.exists():
                            continue
                        record = measure(model.resolve(), name, memory, repeat)
                        path.write_text(json.dumps(record, separators=(",", ":")) + "\n")
                        said = record.get("error") or f"{record['tokens_per_s']:.2f} tokens/s"
                        print(f"{path.name}: {said}, predicted {record['predicted']['decode_tokens_per_s']}", file=sys.stderr)
    text = report(folder)
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
