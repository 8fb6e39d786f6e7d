#!/usr/bin/env python3
"""What `spac plan` foretells of models on boards that nobody here has: the table that docs/raspberry-pi.md and docs/jetson.md quote.

    for m in qwen3-30b-a3b gpt-oss-20b olmoe-1b-7b; do .venv/bin/python scripts/synth --like $m build/$m.gguf --header-only; done
    .venv/bin/spac tune build
    .venv/bin/python scripts/board_plans.py build/*.gguf > docs/benchmarks/boards.md

Only headers are read; a real file gives the same. Products are timed on this machine, so it should be idle: the load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from spac.host.memory import format_bytes

PROFILES = ("pi5-8g-nvme", "pi5-sd", "pi4-usb3", "jetson-orin-nano-nvme")


def plan(model: Path, profile: str) -> dict[str, Any]:
    """What `spac plan --json` says."""
    command = [sys.executable, "-m", "spac", "plan", str(model), "--device", profile, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}: {result.stderr.strip()}")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def row(model: Path, profile: str) -> str:
    """A line of the table."""
    found = plan(model, profile)
    budget = found["budget"]
    cells = [model.stem, format_bytes(model.stat().st_size), profile, format_bytes(budget["limit_bytes"])]
    if not found["fits"]:
        return f"| {' | '.join(cells)} | does not fit | | | |"
    low, high = found["decode_interval"]
    share = budget["expert_bytes"] / budget["all_expert_bytes"] if budget["all_expert_bytes"] else 1
    cells += [f"{min(share, 1):.0%}", f"{found['decode_tokens_per_s']:.2g}", f"{low:.2g} to {high:.2g}", f"{found['ttft_s']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    models = parser.parse_args().models
    print("# Predicted for boards\n")
    print("`spac plan MODEL --device PROFILE`, by scripts/board_plans.py. **Predicted, not measured**: memory, read limit and processors of the")
    print("profile (assumptions and their sources are in spac/bench/profiles/), products as this machine computes them.\n")
    print("| model | size | profile | memory | of the experts | tokens/s | interval | first token after, s (512 tokens) |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in models:
        for profile in PROFILES:
            print(row(model, profile), flush=True)
    load = os.getloadavg()[0]
    print(f"\nLoad of this machine's {os.cpu_count()} processors meanwhile: {load:.1f}.", end="")
    print(" Others computed, so products were timed too slow, most of all for prompts: run it again on an idle machine.\n" if load > 1.5 * (os.cpu_count() or 1) else "\n")


if __name__ == "__main__":
    main()
