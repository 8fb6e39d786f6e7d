#!/usr/bin/env python3
"""`make demo`: the bundled model, inflated to about 1 GB, answers a prompt in a quarter of its size.

Where the system allows it the answer is made inside a real memory control group of just that size, so that the limit is the
kernel's word and not only ours. Nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spac.errors import SpacError
from spac.gguf.inflate import inflate
from spac.host import limits
from spac.host.memory import format_bytes

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "models" / "spac-demo-moe.gguf"
BIG = ROOT / "build" / "demo" / "spac-demo-1g.gguf"
PROMPT = "The open() system call opens the file specified by pathname. If the specified file does not exist,"
BAR_WIDTH = 48


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rinflating the demo model: {done * 100 // total:3d} %", end="" if done < total else "\n", file=sys.stderr)


def bar(label: str, value: int, of: int, note: str = "") -> str:
    filled = round(BAR_WIDTH * min(value, of) / of)
    return f"{label:>14} |{'█' * filled}{'·' * (BAR_WIDTH - filled)}| {format_bytes(value)}{note}"


def main() -> int:
    BIG.parent.mkdir(parents=True, exist_ok=True)
    if not BIG.exists():
        inflate(SMALL, BIG, expert_type="Q4_0", size_bytes=10**9, progress=show_progress)
    size = BIG.stat().st_size
    memory = size // 4
    command = [sys.executable, "-m", "spac", "run", str(BIG), "-p", PROMPT, "-n", "64", "--temp", "0", "--ctx", "1024",
               "--memory", str(memory), "--stats", "--json"]  # fmt: skip
    reason = limits.unavailable()
    print(f"model   {BIG.relative_to(ROOT)}, {format_bytes(size)}")
    print(f"memory  {format_bytes(memory)}, " + (f"not enforced by the kernel: {reason}" if reason else "enforced by a control group"))
    print(f"prompt  {PROMPT}\n")
    run = limits.run_limited(command, memory_bytes=None if reason else memory, files=[BIG])
    if run.returncode != 0:
        print(run.stderr, end="", file=sys.stderr)
        return run.returncode if run.returncode > 0 else 1
    result = json.loads(run.stdout)
    print(f"... {result['text'].strip()}\n")
    print(run.stderr)
    expert = result["expert"]
    print(bar("model", size, size))
    print(bar("memory limit", memory, size))
    print(bar("process peak", run.peak_bytes or result["peak_rss_bytes"], size, "  (page cache included)" if run.peak_bytes else ""))
    print(bar("expert budget", expert["budget_bytes"], size))
    print(bar("expert peak", expert["peak_bytes"], size))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpacError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
