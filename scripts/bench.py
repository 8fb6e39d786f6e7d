#!/usr/bin/env python3
"""Measures spac against the unpatched llama.cpp of the same version, side by side, inside real limits.

    make stock                                              # once: the unpatched libraries
    .venv/bin/python scripts/inflate models/spac-demo-moe.gguf build/demo/4g.gguf --size 4G --type Q4_0
    .venv/bin/python scripts/bench.py build/demo/4g.gguf --out docs/benchmarks

Each row is a memory limit and a read limit; the contenders of a row run in turn (A B A B ...), cold, each in a control group
of that size, page cache included. Figures are medians with the smallest and largest run, and ratios are formed inside one row
only. Tokens must be equal, or the row says so. `--peer bigmoe=PATH` adds a built BigMoeOnEdge binary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spac import limits
from spac.gguf_check import check_model
from spac.memory import format_bytes

ROOT = Path(__file__).resolve().parent.parent
PROMPT = (
    "NAME\n       open, openat, creat - open and possibly create a file\n\nDESCRIPTION\n       The open() system call opens the "
    "file specified by pathname.  If the specified file does not exist, it may optionally be created by open().\n"
)
STOCK = {"LLAMA_CPP_LIB_PATH": str(ROOT / "build/stock/lib"), "MTMD_CPP_LIB": str(ROOT / "build/stock/lib/libmtmd.so")}


@dataclass(frozen=True)
class Row:
    """One comparison. Shares are of the model file; None: no limit."""

    name: str
    memory_share: float | None
    read_bytes_per_s: int | None
    prompt_tokens: int = 48
    tokens: int = 64
    stock_tokens: int = 8  # a thrashing contender takes minutes for each
    ubatch: int = 64  # of all contenders: large compute buffers would leave none of them a cache
    paging: str = "on"
    repack: bool = False
    warm: bool = False  # time the second of two passes: all that the text needs has been read


ROWS = [
    Row("half, 500 MB/s", 0.5, 500_000_000),
    Row("half, unthrottled", 0.5, None),
    Row("quarter, 500 MB/s", 0.25, 500_000_000, stock_tokens=4),
    Row("quarter, unthrottled", 0.25, None, stock_tokens=4),
    Row("prefill 512, quarter, 500 MB/s", 0.25, 500_000_000, prompt_tokens=512, tokens=1, stock_tokens=1, ubatch=512),
    Row("prefill 512, quarter, unthrottled", 0.25, None, prompt_tokens=512, tokens=1, stock_tokens=1, ubatch=512),
    Row("all resident, paging on", None, None, stock_tokens=64, warm=True),
    Row("all resident, auto, default stock", None, None, stock_tokens=64, paging="auto", repack=True, warm=True),
]


@dataclass
class Contender:
    """A name, its command for a row, and the variables it needs."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    pattern: dict[str, str] = field(default_factory=dict)  # of a peer's output: key -> regular expression


def contenders(model: Path, row: Row, memory: int | None, threads: int, peers: dict[str, Path], bigmoe_mib: int) -> list[Contender]:
    child = [sys.executable, str(ROOT / "scripts/bench_child.py")]
    common = ["--prompt", PROMPT, "--prompt-tokens", str(row.prompt_tokens), "--threads", str(threads), "--ubatch", str(row.ubatch)]
    common += ["--repack"] * row.repack + ["--warm"] * row.warm
    found = [
        Contender("stock mmap", [*child, "stock", str(model), *common, "--tokens", str(row.stock_tokens)], STOCK),
        Contender(
            "spac",
            [*child, "spac", str(model), *common, "--tokens", str(row.tokens), "--paging", row.paging, "--memory", str(memory or 0)],
        ),
    ]
    if "bigmoe" in peers and memory is not None and row.tokens > 1:
        found.append(bigmoe(peers["bigmoe"], model, row, memory, threads, bigmoe_mib))
    return found


def bigmoe(binary: Path, model: Path, row: Row, memory: int, threads: int, overhead_mib: int) -> Contender:
    """BigMoeOnEdge with its best settings; its cache is what the limit leaves after dense weights and `overhead_mib`."""
    facts = check_model(str(model))
    cache = (memory - (facts.file_bytes - facts.expert_bytes) - overhead_mib * 2**20) // 2**20
    return Contender(
        "BigMoeOnEdge",
        [str(binary), "-m", str(model), "-p", PROMPT, "-n", str(row.tokens), "-t", str(threads), "-c", "1024", "--temp", "0", "--moe-stream",
         "--overlap", "--dense-weights", "anon", "--io-threads", "8", "--cache-mb", str(cache), "--force-cache", "--ubatch", "64"],
        {"OMP_WAIT_POLICY": "passive"},  # else OpenMP's spinning starves its reading threads, and it is slower
        {"decode_tokens_per_s": r"^generation: \d+ tokens, [\d.]+ s/token \(([\d.]+) tok/s\)",
         "prefill_tokens_per_s": r"^prefill: \d+ tokens, [\d.]+ s \(([\d.]+) tok/s\)"},
    )  # fmt: skip


def run(contender: Contender, row: Row, memory: int | None, model: Path) -> dict[str, Any]:
    result = limits.run_limited(
        contender.command, memory_bytes=memory, read_bytes_per_s=row.read_bytes_per_s,
        files=[Path(p) for p in check_model(str(model)).parts], environment=contender.environment, timeout_s=900,
    )  # fmt: skip
    record: dict[str, Any] = {
        "contender": contender.name, "returncode": result.returncode, "wall_s": result.wall_s,
        "cgroup_peak_bytes": result.peak_bytes, "device_read_bytes": result.device_read_bytes,
    }  # fmt: skip
    if result.returncode != 0:
        record["error"] = result.stderr.strip().splitlines()[-1:] or ["timed out or killed"]
    elif contender.pattern:
        for key, pattern in contender.pattern.items():
            match = re.findall(pattern, result.stdout + result.stderr, re.MULTILINE)
            record[key] = float(match[-1]) if match else None
    else:
        record.update(json.loads(result.stdout.strip().splitlines()[-1]))
    return record


def summary(records: list[dict[str, Any]], key: str) -> tuple[float, float, float] | None:
    values = [r[key] for r in records if r.get(key)]
    return (statistics.median(values), min(values), max(values)) if values else None


def same_tokens(runs: dict[str, list[dict[str, Any]]]) -> bool | None:
    """Whether all contenders that say their tokens produced the same ones, as far as the shortest goes."""
    produced = [r["token_ids"] for records in runs.values() for r in records if "token_ids" in r]
    shortest = min((len(p) for p in produced), default=0)
    return None if len(produced) < 2 else len({tuple(p[:shortest]) for p in produced}) == 1


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| row | contender | tok/s, median (min to max) | prefill tok/s | GB read | peak | × stock | tokens equal |", "|---|---|---|---|---|---|---|---|"]
    for result in results:
        key = "prefill_tokens_per_s" if result["row"]["tokens"] == 1 else "decode_tokens_per_s"
        base = summary(result["runs"].get("stock mmap", []), key)
        for name, records in result["runs"].items():
            decode, prefill = summary(records, "decode_tokens_per_s"), summary(records, "prefill_tokens_per_s")
            read, peak, own = summary(records, "device_read_bytes"), summary(records, "cgroup_peak_bytes"), summary(records, key)
            cells = [
                result["row"]["name"], name, f"{decode[0]:.2f} ({decode[1]:.2f} to {decode[2]:.2f})" if decode else "failed",
                f"{prefill[0]:.1f}" if prefill else "", f"{read[0] / 1e9:.2f}" if read else "", format_bytes(int(peak[2])) if peak else "",
                f"{own[0] / base[0]:.2f}" if own and base else "", {True: "yes", False: "NO", None: ""}[result["tokens_equal"] if any("token_ids" in r for r in records) else None],
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench", help="folder for the JSON and the table")
    parser.add_argument("--name", default="speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--bigmoe-mib", type=int, default=45, help="what BigMoeOnEdge takes besides cache and dense weights; tune it to just fit")
    options = parser.parse_args()
    reason = limits.unavailable()
    if reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 1
    if not (ROOT / "build/stock/lib/libllama.so").exists():
        print("bench: the unpatched libraries are missing: run `make stock`", file=sys.stderr)
        return 1
    peers = {name: Path(path) for name, _, path in (p.partition("=") for p in options.peer)}
    size = sum(Path(p).stat().st_size for p in check_model(str(options.model)).parts)
    results: list[dict[str, Any]] = []
    for row in (r for r in ROWS if options.rows in r.name):
        memory = int(size * row.memory_share) if row.memory_share else None
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.repeats):
            for contender in contenders(options.model, row, memory, options.threads, peers, options.bigmoe_mib):
                record = run(contender, row, memory, options.model)
                runs.setdefault(contender.name, []).append(record)
                shown = record.get("decode_tokens_per_s") or record.get("error")
                print(f"{row.name}: {contender.name}: {shown}", file=sys.stderr, flush=True)
        results.append({"row": vars(row), "memory_bytes": memory, "runs": runs, "tokens_equal": same_tokens(runs)})
        report = {
            "command": " ".join(["scripts/bench.py", *sys.argv[1:]]), "time": time.strftime("%Y-%m-%d %H:%M:%S"), "model_bytes": size,
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "kernel": platform.release()}, "commit": commit(), "results": results,
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.name}.json").write_text(json.dumps(report, indent=1))
        (options.out / f"{options.name}.md").write_text(table(results))
    print(table(results))
    return 0


def cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1) if match else platform.machine()


def commit() -> str:
    result = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
