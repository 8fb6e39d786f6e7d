#!/usr/bin/env python3
"""Lookahead end to end: what the engine decides by itself, beside nothing foreseen and beside fixed settings, by device profile and
kind of prompt.

    .venv/bin/python scripts/learn_routing.py build/demo/4g.gguf build/demo/learned.npz --memory 10G
    .venv/bin/python scripts/cells_study.py build/demo/4g.gguf --learned build/demo/learned.npz --out docs/benchmarks/cells
    .venv/bin/python scripts/cells_study.py --report docs/benchmarks/cells      # the table again

A cell is a run of `spac bench` in a folder of its own, its contenders in turn and each from a cold start; cells that are there are kept.
What the tables learned is of other text, the same for all. Needs root, for control groups.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Final

from spac.bench import record as records
from spac.bench import report

DRAFT: Final = "models/spac-demo-draft.gguf"
PROFILES: Final = ("pi5-8g-nvme", "jetson-orin-nano-nvme", "laptop-16g-nvme")
KINDS: Final = ("code", "chat", "summary")
NOTHING: Final = "nothing foreseen"
AUTOMATIC: Final = "automatic"
FIXED: Final = {  # verified and sensed tokens; reading ahead is the engine's own in all
    "0 verified, 2 sensed": "draft_max=0,horizon=2",
    "0 verified, 4 sensed": "draft_max=0,horizon=4",
    "1 verified, 2 sensed": "draft_max=1,horizon=2",
}


def contenders(learned: Path) -> dict[str, str]:
    """By name: as `spac bench --contender` takes them."""
    drafting = f"spac:draft={DRAFT},learned={learned}"
    return {NOTHING: "spac:signals=none", AUTOMATIC: drafting, **{name: f"{drafting},{options}" for name, options in FIXED.items()}}


def cell_table(folder: Path) -> str:
    """Of all cells in a folder."""
    names = (NOTHING, AUTOMATIC, *FIXED)
    found = sorted((path.parent.name, records.read_folder(path.parent)) for path in folder.glob("*/runs"))
    first, times = found[0][1][0], [run["time"] for _, cell in found for run in cell]
    lines = [
        "# The engine's own decisions, cell by cell\n",
        "Written by `scripts/cells_study.py`, which says how; tokens/s of decoding, medians.\n",
        f"- model: {first['model']['name']}, {first['row']['memory']} of it as memory; {first['row']['tokens']} tokens a prompt",
        f"- machine: {first['machine']['cpu']}, {first['machine']['cores']} cores; {min(times)} to {max(times)}\n",
        f"| profile | prompts | runs | {' | '.join(names)} | automatic / nothing | / best fixed | MB a token, nothing / automatic | CPU s a token | tokens equal |",
        "|---|---|---|" + "---|" * (len(names) + 5),
    ]
    gains, losses = [], []
    for _, cell in found:
        groups = list(report.group(cell).values())
        runs = dict(zip(names, groups[0].values(), strict=False))
        if len(groups) != 1 or len(runs) < len(names):
            raise SystemExit(f"{cell[0]['profile']['name']}: the cell is not complete; run it again")
        medians = {name: report.median(of, records.decode_tokens_per_s) for name, of in runs.items()}
        speed = {name: value[0] if value else math.nan for name, value in medians.items()}
        gains.append(speed[AUTOMATIC] / speed[NOTHING])
        losses.append(speed[AUTOMATIC] / max(speed[name] for name in FIXED))
        equal = {report.equal_tokens(name, groups[0]) for name in groups[0]}
        lines.append(
            f"| {cell[0]['profile']['name']} | {cell[0]['prompts'][0]['kind']} | {len(report.usable(runs[AUTOMATIC]))} |"
            f" {' | '.join(f'{speed[name]:.2f}' for name in names)} | {gains[-1]:.2f} | {losses[-1]:.2f} |"
            f" {both(runs, 'device_read_bytes', 1e6, 0)} | {both(runs, 'cpu_s', 1, 3)} | {' '.join(sorted(equal))} |"
        )
    enough = sum(gain >= 1.2 for gain in gains)
    lines += ["", f"Against nothing foreseen: geometric mean {statistics.geometric_mean(gains):.2f}, lowest {min(gains):.2f}, 1.2 and more in {enough} of"
              f" {len(gains)}. Against the best fixed setting of each cell: geometric mean {statistics.geometric_mean(losses):.2f}, lowest {min(losses):.2f}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def both(runs: dict[str, list[records.Record]], figure: str, scale: float, digits: int) -> str:
    """A counter of decoding for each token, without and with foresight."""
    values = [statistics.median(records.per_token(run, figure) or 0.0 for run in runs[name]) / scale for name in (NOTHING, AUTOMATIC)]
    return " / ".join(f"{value:.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine's own decisions, cell by cell")
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--learned", type=Path, help="tables, by scripts/learn_routing.py")
    parser.add_argument("--out", type=Path, default=Path("build/bench/cells"))
    parser.add_argument("--profile", action="append", help="only these; repeat it")
    parser.add_argument("--kind", action="append", help="only these; repeat it")
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--report", type=Path, help="only make the table again")
    options = parser.parse_args()
    folder = options.report or options.out
    if options.report is None:
        if options.model is None or options.learned is None:
            parser.error("a model and --learned are needed")
        for profile, kind in itertools.product(options.profile or PROFILES, options.kind or KINDS):
            command = [sys.executable, "-m", "spac", "bench", str(options.model), "--profile", profile, "--memory", options.memory, "--kind", kind,
                       "--tokens", str(options.tokens), "--ubatch", "64", "--repeats", str(options.repeats), "--threads", "2", "--resume",
                       "--out", str(folder), "--name", f"{profile}-{kind}"]  # fmt: skip
            for text in contenders(options.learned).values():
                command += ["--contender", text]
            subprocess.run(command, check=True)
    text = cell_table(folder)
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
