#!/usr/bin/env python3
"""Lookahead end to end: what the engine decides by itself, beside nothing foreseen and beside fixed settings, by device profile and
kind of prompt.

    .venv/bin/python scripts/learn_routing.py build/demo/4g.gguf build/demo/learned.npz --memory 10G
    .venv/bin/python scripts/cells_study.py build/demo/4g.gguf --learned build/demo/learned.npz --out docs/benchmarks/cells
    .venv/bin/python scripts/cells_study.py --report docs/benchmarks/cells                        # the table again
    .venv/bin/python scripts/cells_study.py --report docs/benchmarks/cells build/demo/4g.gguf     # and where answers part

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

import numpy as np

from spac.bench import record as records
from spac.bench import report
from spac.bench.prompt import load

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
    gains: list[float] = []
    against: list[list[float]] = []  # in each cell, of each fixed setting
    for _, cell in found:
        groups = list(report.group(cell).values())
        runs = dict(zip(names, groups[0].values(), strict=False))
        if len(groups) != 1 or len(runs) < len(names):
            raise SystemExit(f"{cell[0]['profile']['name']}: the cell is not complete; run it again")
        medians = {name: report.median(of, records.decode_tokens_per_s) for name, of in runs.items()}
        speed = {name: value[0] if value else math.nan for name, value in medians.items()}
        gains.append(speed[AUTOMATIC] / speed[NOTHING])
        against.append([speed[AUTOMATIC] / speed[name] for name in FIXED])
        equal = {report.equal_tokens(name, groups[0]) for name in groups[0]}
        lines.append(
            f"| {cell[0]['profile']['name']} | {cell[0]['prompts'][0]['kind']} | {len(report.usable(runs[AUTOMATIC]))} |"
            f" {' | '.join(f'{speed[name]:.2f}' for name in names)} | {gains[-1]:.2f} | {min(against[-1]):.2f} |"
            f" {both(runs, 'device_read_bytes', 1e6, 0)} | {both(runs, 'cpu_s', 1, 3)} | {' '.join(sorted(equal))} |"
        )
    losses = [min(ratios) for ratios in against]
    enough = sum(gain >= 1.2 for gain in gains)
    lines += ["", f"Against nothing foreseen: geometric mean {statistics.geometric_mean(gains):.2f}, lowest {min(gains):.2f}, 1.2 and more in {enough} of"
              f" {len(gains)}. Against the best fixed setting of each cell: geometric mean {statistics.geometric_mean(losses):.2f}, lowest {min(losses):.2f};"
              f" against each of them in all cells: {'; '.join(f'{name}: {statistics.geometric_mean(ratios):.2f}' for name, ratios in zip(FIXED, zip(*against, strict=True), strict=True))}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def both(runs: dict[str, list[records.Record]], figure: str, scale: float, digits: int) -> str:
    """A counter of decoding for each token, without and with foresight."""
    values = [statistics.median(records.per_token(run, figure) or 0.0 for run in runs[name]) / scale for name in (NOTHING, AUTOMATIC)]
    return " / ".join(f"{value:.{digits}f}" for value in values)


def partings(folder: Path, model: Path) -> str:
    """Where an answer parts from that with nothing foreseen: both tokens' logits, and what kernels' rounding makes of them.

    The model's logits there are computed token by token, as the answer was, and in one batch: what these differ by is the noise.
    """
    import spac

    lines = [
        "## Where answers part\n",
        "Logits of both tokens, computed token by token; *noise*: by how much logits there differ, at most, if computed in batches of 64. A near-tie: nearer than twice the noise.\n",
        "| profile | prompts | contender | token | logits | apart by | noise | |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    llama = spac.Llama(model, memory="10G", paging="on", n_ctx=1024, n_ubatch=64, n_threads=2, verbose=False)

    def logits(texts: list[list[int]]) -> np.ndarray:
        llama.reset()
        llama._ctx.kv_cache_clear()
        for tokens in texts:
            llama.eval(tokens)
        return np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), (llama.n_vocab(),)).copy()

    names = {text: name for name, text in contenders(Path("build/demo/learned.npz")).items()}
    for cell in (records.read_folder(path.parent) for path in sorted(folder.glob("*/runs"))):
        plain = {run["repeat"]: run["prompts"][0] for run in report.usable(cell) if "signals=none" in run["contender"]}
        for run in report.usable(cell):
            prompt, answer = plain[run["repeat"]], run["prompts"][0]["token_ids"]
            at = next((i for i, (a, b) in enumerate(zip(prompt["token_ids"], answer, strict=False)) if a != b), None)
            if at is None:
                continue
            text = next(p.text for p in load((prompt["kind"],)) if p.id == prompt["id"])
            begin, before = llama.tokenize(text.encode()), prompt["token_ids"][:at]
            assert len(begin) == prompt["prompt_tokens"]
            alone, together = logits([begin, *([token] for token in before)]), logits([begin + before])
            a, b = float(alone[prompt["token_ids"][at]]), float(alone[answer[at]])
            noise = float(np.abs(alone - together).max())
            lines.append(
                f"| {run['profile']['name']} | {prompt['kind']}, {prompt['id']} | {names.get(run['contender'], run['contender'])} | {at + 1} | {a:.3f}, {b:.3f} | {abs(a - b):.3f} | {noise:.3f}"
                f" | {'near-tie' if abs(a - b) <= 2 * noise else 'NO near-tie'} |"
            )
    llama.close()
    return "\n".join(lines) + "\n" if len(lines) > 4 else "All answers are equal, token by token.\n"


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
    if options.report is not None and options.model is not None:
        text += "\n" + partings(folder, options.model)
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
