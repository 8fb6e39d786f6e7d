#!/usr/bin/env python3
"""`spac plan` against real runs in control groups: docs/benchmarks/plan/again/table.md.

    make build build/demo/4g.gguf && .venv/bin/spac tune build/demo
    .venv/bin/python scripts/plan_study.py build/demo/4g.gguf build/demo/spac-demo-1g.gguf --out docs/benchmarks/plan/again
    .venv/bin/python scripts/plan_study.py --report docs/benchmarks/plan/again  # the table again
    .venv/bin/python scripts/plan_study.py MODEL... --report docs/benchmarks/plan --predict-again   # and what is predicted, now
    .venv/bin/python scripts/plan_study.py --time-model docs/benchmarks/paging/present --repack 4.67 --contention 280   # again/time-model.md

Each answer, to one of the benchmark's prompts of each kind, is a process of its own in a profile's limits, sampled with a penalty on
repetition. Predicted as `spac plan` would: by the header, the limit, what `spac tune` measured and how fast the disk is now; just before the answer and
just after it, since a disk changes meanwhile. Runs that are there already are kept.

`--time-model` tries the time model alone: runs of scripts/measure_paging.py, with the misses that they had instead of those of the curve,
and with their own reads and compute times; `--repack` is what `spac tune` says of Q4_0 (billions of weights a second), `--contention` what it says of
computing while reading (ms for each GB).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spac.bench import profile as profiles
from spac.bench import prompt as prompts
from spac.bench import record as records
from spac.cli import plan as plans
from spac.gguf.check import check_model
from spac.host import limits as cgroups

if TYPE_CHECKING:
    import spac

PROFILES: Final = ("native-500M", "pi5-8g-nvme", "pi5-sd", "pi4-usb3", "jetson-orin-nano-nvme", "laptop-16g-nvme", "native")
MEMORIES: Final = (12, 25, 50)
TOKENS: Final = 64
RUN_S: Final = 50  # about; a slow cell decodes fewer tokens
LEAST_TOKENS: Final = 16
KINDS: Final = 5  # prompts of a cell
CTX: Final = 4096
REPEAT_PENALTY: Final = 1.2  # without it, text of so small a model soon goes round in a circle, which misses nothing
AIM: Final = 0.15
DISTURBED: Final = 0.1


def penalising_sampler(llama: spac.Llama, seed: int) -> Any:
    """At temperature 0.8, with a penalty on what was sampled before."""
    from spac.generate import Sampling, make_sampler

    return make_sampler(Sampling(top_p=1, min_p=0, seed=seed, repeat_penalty=REPEAT_PENALTY), llama)


def run_worker(config: dict[str, Any]) -> None:
    """A run, as a process of its own: prints one JSON object."""
    import spac

    llama = spac.Llama(config["model"], memory=config["memory"], n_ctx=CTX, n_batch=512, n_threads=config["threads"], verbose=False)
    tokens = llama.tokenize(config["prompt"].encode())
    begin = time.perf_counter()
    llama.eval(tokens)
    answer: dict[str, Any] = {"prompt_tokens": len(tokens), "ttft_s": time.perf_counter() - begin, "paged": llama.spac.paged}
    before = llama.spac.stats()
    with contextlib.closing(penalising_sampler(llama, config["seed"])) as sampler:
        begin = time.perf_counter()
        for _ in range(config["tokens"]):
            llama.eval([sampler.sample(llama._ctx, -1)])
        answer["tokens_per_s"] = config["tokens"] / (time.perf_counter() - begin)
    after = llama.spac.stats()
    if before is not None and after is not None:
        uses = after.hits + after.misses - before.hits - before.misses
        answer |= {"miss_rate": (after.misses - before.misses) / uses, "budget_bytes": after.budget_bytes}
        answer["read_bytes_per_token"] = (after.bytes_read - before.bytes_read) / config["tokens"]
    print(json.dumps(answer))
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
    found["read_bytes_per_token"] = answer.speed.read_bytes_per_token if answer.speed else None
    return found


def cell(model: Path, name: str, memory: int, repeat: int) -> tuple[list[str], cgroups.Limits]:
    """A run's prompts, one of each kind, and its limits."""
    every = prompts.load(())
    chosen = [every[(repeat * KINDS + i) % len(every)].text for i in range(KINDS)]
    size = model.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        limits = profiles.load(profile_file(name, Path(folder))).limits(size)
    return chosen, dataclasses.replace(limits, memory_bytes=size * memory // 100)


def ask(model: Path, name: str, memory: int, repeat: int) -> dict[str, Any]:
    """What is predicted of a run."""
    chosen, limits = cell(model, name, memory, repeat)
    assert limits.memory_bytes is not None
    with tempfile.TemporaryDirectory() as folder:
        return predict(model, profile_file(name, Path(folder)), limits.memory_bytes, sum(len(text) for text in chosen) // KINDS // 4)


def ask_apart(model: Path, name: str, memory: int, repeat: int) -> dict[str, Any]:
    """What is predicted, by a process of its own: what it holds in memory counts against the run that follows it."""
    command = [sys.executable, __file__, "--ask", json.dumps([str(model), name, memory, repeat])]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found


def measure(model: Path, name: str, memory: int, repeat: int) -> dict[str, Any]:
    chosen, limits = cell(model, name, memory, repeat)
    predicted = ask_apart(model, name, memory, repeat)
    record: dict[str, Any] = {
        "model": model.name, "profile": name, "memory": memory, "repeat": repeat, "predicted": predicted,
        "limits": dataclasses.asdict(limits), "not_enforced": cgroups.unenforceable(limits, [model]), "machine": records.machine(),
        "commit": records.commit(), "time": time.strftime("%Y-%m-%d %H:%M:%S"), "load": os.getloadavg()[0],
    }  # fmt: skip
    tokens = TOKENS
    if predicted["decode_tokens_per_s"]:
        tokens = min(TOKENS, max(LEAST_TOKENS, int(RUN_S * predicted["decode_tokens_per_s"] / KINDS)))
    config = {"model": str(model), "memory": limits.memory_bytes, "tokens": tokens, "seed": repeat, "threads": limits.cores}
    enforced = {key: value for key, value in dataclasses.asdict(limits).items() if key not in record["not_enforced"]}
    others_s, wall_s = 0.0, 0.0
    record |= {"tokens": tokens, "answers": []}
    for prompt in chosen:
        command = [sys.executable, __file__, "--worker", json.dumps({**config, "prompt": prompt})]
        busy_s, begin = machine_busy_s(), time.monotonic()
        run = cgroups.run_limited(command, **enforced, measure=True, files=[model])
        others_s += machine_busy_s() - busy_s - run.cpu_s
        wall_s += time.monotonic() - begin
        if run.returncode != 0:
            lines = run.stderr.strip().splitlines() or ["killed at the memory limit" if run.oom_killed else "no message"]
            return {**record, "error": lines[-1]}
        before, predicted = predicted, ask_apart(model, name, memory, repeat)
        record["answers"].append({**json.loads(run.stdout.splitlines()[-1]), "predicted": before, "after": predicted})
    return {**record, "others_share": round(others_s / wall_s / record["machine"]["cores"], 3)}


def machine_busy_s() -> float:
    """Seconds that all processors have computed for programs, since the machine's start (proc_stat(5))."""
    fields = [int(text) for text in Path("/proc/stat").read_text().split(maxsplit=5)[1:5]]
    return (fields[0] + fields[1] + fields[2]) / os.sysconf("SC_CLK_TCK")


def around(answer: dict[str, Any]) -> dict[str, Any]:
    """What was predicted of an answer, before it and after it: of two speeds that of the mean time."""
    before: dict[str, Any] = answer["predicted"]
    after: dict[str, Any] = answer["after"]
    if not (before["fits"] and after["fits"]):
        return {**before, "fits": False}
    interval = [statistics.harmonic_mean(ends) for ends in zip(before["decode_interval"], after["decode_interval"], strict=True)]
    rate = statistics.harmonic_mean([before["decode_tokens_per_s"], after["decode_tokens_per_s"]])
    return {**before, "decode_tokens_per_s": rate, "decode_interval": interval}


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
        "- measured: median of cold answers, each to another prompt; *inside*: answers within the predicted interval; misses: for each routed expert",
        "- predicted: for each answer just before it and just after it, the mean time of both; *before only*: off by so much without the later one",
        f"- *others*: processor time that other programs took, of all there was; above {DISTURBED:.0%} a row does not count: delete its runs to have them again\n",
        "| model | profile | memory | answers | measured, tokens/s | predicted | interval | off by | before only | inside | misses, run / predicted | MB a token, run / predicted | first token, s, run / predicted | others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    errors, inside, total, wrong = [], 0, 0, 0
    for (model, profile, memory), found in sorted(cells.items(), key=lambda item: (item[0][0], PROFILES.index(item[0][1]), item[0][2])):
        every = [(answer, around(answer)) for run in found for answer in run.get("answers", [])]
        answers = [(answer, predicted) for answer, predicted in every if predicted["fits"]]
        label = f"| {model} | {profile} | {memory} % | {len(answers)} |"
        if not answers:
            fits = found[0]["predicted"]["fits"]
            wrong += bool(every) or fits
            lines.append(
                f"{label} {'runs' if every else 'does not fit'} | {'fits' if fits else 'does not fit'} | | {'WRONG' if every or fits else ''} | | | | | | |"
            )
            continue
        wrong += len(every) - len(answers)
        rate = statistics.median(answer["tokens_per_s"] for answer, _ in answers)
        expected = statistics.median(p["decode_tokens_per_s"] for _, p in answers)
        earlier = statistics.median(answer["predicted"]["decode_tokens_per_s"] for answer, _ in answers)
        low, high = (statistics.median(p["decode_interval"][i] for _, p in answers) for i in (0, 1))
        within = sum(p["decode_interval"][0] <= answer["tokens_per_s"] <= p["decode_interval"][1] for answer, p in answers)
        others = statistics.median(run["others_share"] for run in found)
        if profile != "native" and others <= DISTURBED:  # without a limit the disk is shared, and what is measured is also who else reads
            errors.append(abs(expected / rate - 1))
            inside, total = inside + within, total + len(answers)
        misses = n_bytes = ""
        if "miss_rate" in answers[0][0]:
            missed = statistics.median(answer["miss_rate"] for answer, _ in answers)
            misses = f"{missed:.3f} / {statistics.median(p['miss_rate'] for _, p in answers):.3f}"
            run_bytes = statistics.median(answer["read_bytes_per_token"] for answer, _ in answers)
            n_bytes = f"{run_bytes / 1e6:.1f} / {statistics.median(p['read_bytes_per_token'] for _, p in answers) / 1e6:.1f}"
        ttft_s = statistics.median(answer["ttft_s"] for answer, _ in answers)
        first_s = f"{ttft_s:.2f} / {statistics.median(p['ttft_s'] for _, p in answers):.2f}"
        lines.append(
            f"{label} {rate:.2f} | {expected:.2f} | {low:.2f} to {high:.2f} | {expected / rate - 1:+.1%} | {earlier / rate - 1:+.1%} | {within} of {len(answers)} | {misses} | {n_bytes} | {first_s} | {others:.0%} |"
        )
    if errors:
        lines += [
            "", f"With limited reads, undisturbed: within {AIM:.0%} in {sum(e <= AIM for e in errors)} of {len(errors)} cells, largest error {max(errors):.1%};"
            f" {inside} of {total} answers inside the interval. Wrong about fitting: {wrong}.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def time_model(folder: Path, repack_per_s: float, contention_s: float) -> str:
    """Decoding as `forecast.decode_s` has it, against runs whose misses are known."""
    import measure_paging as paging

    from spac.device import Device, ProductRow, ReadRow
    from spac.plan.forecast import LayerWork, Machine, Work, decode_s

    runs = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    lines = [
        "# The time model with known misses\n",
        f"`.venv/bin/python scripts/plan_study.py --time-model {folder} --repack {repack_per_s / 1e9:g} --contention {contention_s * 1e12:g}`: how each expert missing independently with a run's own rate compares with the run.\n",
        "| profile | memory | reads limited to | misses | measured, tokens/s | predicted | off by |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    errors = []
    for run in sorted((run for run in runs if run["kind"] == "speed"), key=lambda run: (run["profile"], run["memory"], run["read"])):
        compute, trace, _ = paging.compute_of(runs, run["profile"], folder)
        bundle, n = max(trace.bundle_bytes), trace.n_layers * trace.n_used
        weights = bundle * 32 // 18  # Q4_0
        reads = paging.reads_of(run, runs, bundle // 3)
        limits = cgroups.Limits(
            **{**run["limits"], "memory_bytes": None, "read_bytes_per_s": int(reads.limit_bytes_per_s) if reads.limit_bytes_per_s else None}
        )
        rows = tuple(ReadRow("direct", size, depth, *[size * depth / rate] * 3) for (size, depth), rate in reads.by_size_and_depth.items())
        # measured with the profile's processors: neither fewer cores nor a share is to be counted again
        limits = dataclasses.replace(limits, cores=None, cpu_share=None)
        threads = run["threads"]
        device = Device(
            "",
            threads,
            "",
            "",
            threads,
            rows,
            (ProductRow("Q4_0", 1, weights / compute.expert_token_s),),
            {"Q4_0": repack_per_s},
            1e-12,
            5e-6,
            1e12,
            contention_s=contention_s,
        )
        layer = LayerWork(trace.n_experts, bundle, bundle, (("Q4_0", weights),))
        dense = max(0, int((compute.token_s - n * compute.expert_token_s) * weights / compute.expert_token_s))
        work = Work("", trace.n_used, trace.n_layers, (layer,) * trace.n_layers, (("Q4_0", dense),), 256)
        machine = Machine(device, limits)
        miss = sum(row["misses"] for row in run["tokens"]) / len(run["tokens"]) / n
        rate, predicted = paging.speed(run), 1 / decode_s(work, machine, miss, machine.reads())
        errors.append(abs(predicted / rate - 1))
        memory, read = paging.label(run).split(" | ")[1:]
        lines.append(f"| {run['profile']} | {memory} | {read} | {miss:.3f} | {rate:.2f} | {predicted:.2f} | {predicted / rate - 1:+.1%} |")
    return (
        "\n".join([*lines, "", f"Largest error: {max(errors):.1%}; {sum(e <= AIM for e in errors)} of {len(errors)} within {AIM:.0%}."])
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="spac plan against real runs")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/bench/plan"))
    parser.add_argument("--profile", action="append", choices=PROFILES, help="only these; repeat it")
    parser.add_argument("--memory", action="append", type=int, choices=MEMORIES, help="only these, %% of the model; repeat it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", type=Path, help="only make the table again")
    parser.add_argument("--predict-again", action="store_true", help="with --report: what was measured stays, predictions are made anew")
    parser.add_argument("--time-model", type=Path, metavar="FOLDER", help="only try the time model on runs of measure_paging.py")
    parser.add_argument("--repack", type=float, default=0, metavar="N", help="billions of Q4_0 weights that a thread rearranges a second")
    parser.add_argument("--contention", type=float, default=0, metavar="N", help="ms of computing lost for each GB that is read meanwhile")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        path, *of = json.loads(options.ask)
        print(json.dumps(ask(Path(path), *of)))
        return
    if options.worker:
        run_worker(json.loads(options.worker))
        return
    if options.time_model:
        print(time_model(options.time_model, options.repack * 1e9, options.contention / 1e12), end="")
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
                        said = (
                            record.get("error") or ", ".join(f"{answer['tokens_per_s']:.2f}" for answer in record["answers"]) + " tokens/s"
                        )
                        print(f"{path.name}: {said}, predicted {record['predicted']['decode_tokens_per_s']}", file=sys.stderr)
    elif options.predict_again:
        for path in (folder / "runs").glob("*.json"):
            run = json.loads(path.read_text())
            model = next((model.resolve() for model in options.models if model.name == run["model"]), None)
            if model is None:
                parser.error(f"{path}: its model, {run['model']}, was not given")
            run["predicted"] = ask_apart(model, run["profile"], run["memory"], run["repeat"])
            for answer in run.get("answers", []):
                answer["predicted"] = answer["after"] = run["predicted"]
            path.write_text(json.dumps(run, separators=(",", ":")) + "\n")
    text = report(folder)
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
