#!/usr/bin/env python3
"""Runs synthetic models at true scale, each in a process of its own, and writes docs/benchmarks/synth.md.

    make synth
    .venv/bin/python scripts/synth_study.py --like qwen3-30b-a3b --full-below 20G

What is looked at: does it load, how long do header, sizes, loading and closing take, does the process stay below its limit, how many
mappings does it make, are logits finite, do experts come and go. Logits of a model that is written in full, and fits into memory, are
compared bit for bit with those of an unpaged run. Tokens/s are not looked at: holes cost no reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from spac.errors import SpacError
from spac.gguf.structures import STRUCTURES
from spac.gguf.synth import Content, synthesise
from spac.host.memory import MIB, available_bytes, format_bytes, parse_memory

N_CTX, N_PROMPT, N_DECODED = 512, 64, 12
T = TypeVar("T")
# what a small board would give each: less than the model, more than its dense weights
MEMORY = {"granite-3.1-3b-a800m": "1G", "olmoe-1b-7b": "1G", "deepseek-v2-lite": "3G"}
OTHER_MEMORY = "4G"


def timed(call: Callable[[], T]) -> tuple[float, T]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def run_one(path: Path, memory: str, unpaged: bool) -> dict[str, Any]:
    """Run the model in this process."""
    import numpy as np

    import spac
    from spac.gguf.check import check_model
    from spac.host.memory import peak_resident_bytes
    from spac.plan.sizes import measure_default_sizes

    header_s, facts = timed(lambda: check_model(path))
    sizes_s, sizes = timed(lambda: measure_default_sizes(str(path), facts, n_ctx=N_CTX, n_ubatch=512, n_threads=2))
    options: dict[str, Any] = {"n_ctx": N_CTX, "n_ubatch": 64, "verbose": False, "n_threads": 2}
    paging: dict[str, Any] = {"paging": "off"} if unpaged else {"paging": "on", "memory": memory}
    load_s, llama = timed(lambda: spac.Llama(path, **paging, **options))

    tokens = np.random.default_rng(5).integers(300, 4000, N_PROMPT).tolist()
    bits, finite, differing = hashlib.sha256(), True, True
    for _ in range(N_DECODED + 1):
        llama.eval(tokens)
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        finite, differing = finite and bool(np.isfinite(logits).all()), differing and bool(logits.min() < logits.max())
        bits.update(logits.tobytes())  # nothing is kept: this process is measured
        tokens = [int(np.argmax(logits))]
    info, stats = llama.spac.info(), llama.spac.stats()
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    peak = peak_resident_bytes()
    close_s, _ = timed(llama.close)
    result = {
        "architecture": facts.architecture, "file_bytes": facts.file_bytes, "dense_bytes": sizes.dense_bytes, "expert_bytes": sizes.expert_bytes,
        "layers": len(facts.expert_layers), "experts": facts.n_experts, "bundle_bytes": facts.max_bundle_bytes, "floor_bytes": facts.floor_bytes,
        "header_s": header_s, "sizes_s": sizes_s, "load_s": load_s, "close_s": close_s, "mappings": mappings, "peak_bytes": peak,
        "most_mappings": int(Path("/proc/sys/vm/max_map_count").read_text()),
        "memory_bytes": parse_memory(memory), "finite": finite, "differing": differing, "bits": bits.hexdigest(),
    }  # fmt: skip
    if info is not None and stats is not None:
        result |= {
            "bundles": info.n_bundles, "evictions": stats.evictions, "rereads": stats.rereads, "used_bytes": stats.used_bytes,
            "budget_bytes": stats.budget_bytes,
        }  # fmt: skip
    return result


def in_a_process(path: Path, memory: str, *, unpaged: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(path), "--memory", memory] + (["--unpaged"] if unpaged else [])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"synth_study: {path.name} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def study(like: str, content: Content, folder: Path, memory: str | None) -> dict[str, Any]:
    memory = memory or MEMORY.get(like, OTHER_MEMORY)
    path = folder / f"{like}.gguf"
    try:
        write_s, written = timed(lambda: synthesise(like, path, content=content))
        result = {"like": like, "content": content, "disk_bytes": written.disk_bytes, "write_s": write_s} | in_a_process(path, memory)
        result["equal"] = None
        if content == "full" and 1.2 * written.file_bytes < available_bytes():
            result["equal"] = in_a_process(path, memory, unpaged=True)["bits"] == result["bits"]
        return result
    finally:
        path.unlink(missing_ok=True)


def faults(row: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    checks = {
        "logits are not finite": row["finite"], "logits are all the same": row["differing"], "nothing was evicted": row["evictions"] > 0,
        "above its limit": row["peak_bytes"] <= row["memory_bytes"], "experts above their budget": row["used_bytes"] <= row["budget_bytes"],
        "differs from an unpaged run": row["equal"] is not False, "too many mappings": row["mappings"] < row["most_mappings"] * 3 // 4,
    }  # fmt: skip
    return [what for what, fine in checks.items() if not fine]


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Synthetic models at true scale",
        "",
        "Written by `make synth` (`scripts/synth_study.py`). *sparse*: the routed experts are a hole in the file, zeros when they are read.",
        f"Each runs in a process of its own, paged: {N_PROMPT} tokens of a prompt, then {N_DECODED} greedy ones. Times include whatever else the machine was doing.",
        "",
        "| model | architecture | file | on disk | dense | experts | a bundle | floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sizes = [format_bytes(row[key]) for key in ("file_bytes", "disk_bytes", "dense_bytes")]
        experts = f"{row['layers']} × {row['experts']}, {format_bytes(row['expert_bytes'])}"
        lines.append(
            f"| {row['like']}, {row['content']} | {row['architecture']} | {' | '.join(sizes)} | {experts} | "
            f"{format_bytes(row['bundle_bytes'])} | {format_bytes(row['floor_bytes'])} |"
        )
    lines += [
        "",
        "| model | header | sizes | load | close | mappings | peak of limit | evictions | re-reads | bit-equal unpaged | faults |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = [f"{row[key]:.2f} s" for key in ("header_s", "sizes_s", "load_s", "close_s")]
        equal = {None: "not tried", True: "yes", False: "NO"}[row["equal"]]
        lines.append(
            f"| {row['like']}, {row['content']} | {' | '.join(times)} | {row['mappings']} | {row['peak_bytes'] // MIB} of {row['memory_bytes'] // MIB} MiB | "
            f"{row['evictions']} | {row['rereads']} | {equal} | {', '.join(faults(row)) or 'none'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", nargs="*", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--full-below", default="5G", help="models below this size are written in full if the disk has room, larger ones sparse")
    parser.add_argument("--memory", help="limit of the process; default: by model")
    parser.add_argument("--folder", type=Path, help="where the models are written; default: a temporary folder in build/")
    parser.add_argument("--out", type=Path, help="the report; default: stdout")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--unpaged", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.memory, options.unpaged)))
        return 0
    place = options.folder or Path("build")
    place.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        full_below = parse_memory(options.full_below) or 0
        with tempfile.TemporaryDirectory(dir=place, prefix="synth-") as folder:
            for like in options.like:
                header = synthesise(like, Path(folder, "header.gguf"), content="header")
                full = header.file_bytes < min(full_below, shutil.disk_usage(folder).free // 2)
                rows.append(study(like, "full" if full else "sparse", Path(folder), options.memory))
                print(f"{like}: {', '.join(faults(rows[-1])) or 'fine'}", file=sys.stderr)
    except SpacError as error:
        print(f"synth_study: {error}", file=sys.stderr)
        return 1
    if options.out:
        options.out.write_text(report(rows))
    else:
        print(report(rows), end="")
    return 1 if not rows or any(faults(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
