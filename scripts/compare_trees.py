#!/usr/bin/env python3
"""Whether a change is faster: `spac run` from two trees in turn, each built by `make build`, on one model at several memory limits.

    .venv/bin/python scripts/compare_trees.py --shares 20 30 50 --out docs/benchmarks/slots.md -- ../before . /dev/shm/model.gguf

With the model in a tmpfs nothing is waited for but the processor and memory, so a change of the pager's own cost is seen; on a disk it
is as large as the disk leaves it. What follows the model, behind `--`, are options of `spac run`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any, Final

PROMPT: Final = "The history of the mountain village begins with"
ALONE: Final = ("--draft", "off", "--signals", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shares", type=int, nargs="+", default=[20, 30, 50], help="of the model, the process's memory, %%")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", default=ALONE, help=f"of spac run (default: {' '.join(ALONE)})")
    arguments = parser.parse_args()
    trees = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    lines = [
        "# Two trees side by side\n",
        f"Written by `scripts/compare_trees.py`: `spac run {' '.join(arguments.options)}`, {arguments.tokens} tokens, {arguments.repeats} runs of each"
        " in turn, medians.\n",
        *(f"- {name}: commit {commit_of(tree)}" for name, tree in trees.items()),
        f"- model: {arguments.model.name}, on {file_system_of(arguments.model)}; what is for each token counts the prompt's work, too\n",
        "| memory | tokens/s before (all) | after (all) | after / before | prompt, s | CPU s a token | stall s a token | MB a token | same tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for share in arguments.shares:
        limit = arguments.model.stat().st_size * share // 100
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for _ in range(arguments.repeats):
            for name, tree in trees.items():
                runs[name].append(run(tree, arguments.model.resolve(), limit, arguments.tokens, arguments.prompt, arguments.options))
        lines.append(row(share, runs))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


def run(tree: Path, model: Path, limit: int, tokens: int, prompt: str, options: list[str]) -> dict[str, Any]:
    command = [str(tree / ".venv/bin/spac"), "run", str(model), "--memory", str(limit), "--json", "-n", str(tokens), "-p", prompt, "--seed", "3"]
    done = subprocess.run([*command, *options], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{tree}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(share: int, runs: dict[str, list[dict[str, Any]]]) -> str:
    speeds = {name: [run["decode_tokens_per_s"] for run in of] for name, of in runs.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}

    def both(figure: str, scale: float, digits: int) -> str:
        values = [
            statistics.median((run["expert"] if figure in run["expert"] else run)[figure] / len(run["token_ids"]) for run in of)
            for of in runs.values()
        ]
        return " / ".join(f"{value / scale:.{digits}f}" for value in values)

    cells = " | ".join(f"{medians[name]:.1f} ({' '.join(f'{value:.1f}' for value in speeds[name])})" for name in runs)
    prompt = " / ".join(f"{statistics.median(run['prefill_s'] for run in of):.2f}" for of in runs.values())
    same = len({tuple(run["token_ids"]) for of in runs.values() for run in of}) == 1
    return (
        f"| {share} % | {cells} | {medians['after'] / medians['before']:.2f} | {prompt} | {both('cpu_s', 1, 4)} | {both('stall_s', 1, 4)} |"
        f" {both('bytes_read', 1e6, 1)} | {'yes' if same else 'no'} |"
    )


def commit_of(tree: Path) -> str:
    return subprocess.run(["git", "-C", str(tree), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()


def file_system_of(path: Path) -> str:
    return subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
