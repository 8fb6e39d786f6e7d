"""How much of perfect knowledge the estimator's predictions are worth in the eviction order, on recorded routing.

    scripts/estimator_study.py TRACE.npz… [--deepseek FOLDER] [--out FILE]

A trace is an .npz with `tokens` int [n], `ids` int [n, layers, k] and `seq` int [n] (request). FOLDER holds the .csv files of the public
repository ngavhane/moe-beyond (`training_data_eamc`), which has no licence: measure with it, copy nothing of it. Traces without tokens
are named and left out.

Two moments at which a victim is chosen are simulated, one cache for each layer:
  demand  when the miss happens, as the pager must: what the running token uses stays, and only later tokens that a draft foresees are known
  after   when the token has run and the next has been sampled: whatever is worth least goes, the running token's experts included
Known tokens end with their request. Tables "saved" were learned on the first half of the requests, "cold" start from nothing; both go on
learning in the second half, where misses are counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import spac  # noqa: F401  # isort: skip - before numpy: it says how many threads OpenBLAS has
import numpy as np

from spac.estimator import Reliability, TokenEstimator, load, save
from spac.estimator.foresight import foresight

HALF_LIFE_TOKENS = 16.0  # of the pager's score, spac/native/policy.h
DECAY = 2.0 ** (-1 / HALF_LIFE_TOKENS)
RATE = 1 - DECAY  # turns a decayed count into uses per token
HORIZONS = (1, 2, 4, 8)
DISCOUNT = 0.8
CAPACITIES = (0.16, 0.25, 0.5)


@dataclass
class Trace:
    name: str
    tokens: np.ndarray  # int32 [n]
    ids: np.ndarray  # uint8 [n, layers, k]
    seq: np.ndarray  # int32 [n]
    n_experts: int


class NaiveTable:
    """Counts by token pair where the pair was seen, else by token: the table to beat."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self.shape = n_layers, n_experts
        self.rows: dict[tuple[int, ...], np.ndarray] = {}
        self.seen: dict[tuple[int, ...], int] = {}
        self.previous = -1

    def start_request(self) -> None:
        self.previous = -1

    def probabilities(self, tokens: list[int]) -> np.ndarray:
        out = np.zeros((len(tokens), *self.shape), np.float32)
        for i, (before, token) in enumerate(zip([self.previous, *tokens], tokens, strict=False)):
            for key in ((before, token), (token,)):
                if key in self.rows:
                    np.divide(self.rows[key], self.seen[key], out=out[i], casting="unsafe")
                    break
        return out

    def learn(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        for token, chosen in zip(tokens.tolist(), experts, strict=True):
            for key in ((token,), (self.previous, token)):
                row = self.rows.setdefault(key, np.zeros(self.shape, np.uint16))
                np.put_along_axis(row, chosen.astype(np.int64), np.take_along_axis(row, chosen.astype(np.int64), 1) + 1, 1)
                self.seen[key] = self.seen.get(key, 0) + 1
            self.previous = token


@dataclass
class Caches:
    """Caches of several policies at several sizes, one for each layer. `names` are (policy, capacity)."""

    policies: list[str]
    capacities: list[int]
    n_layers: int
    n_experts: int
    after: bool
    resident: np.ndarray = field(init=False)
    misses: np.ndarray = field(init=False)
    routed: int = 0

    def __post_init__(self) -> None:
        self.resident = np.zeros((len(self.policies), len(self.capacities), self.n_layers, self.n_experts), bool)
        self.misses = np.zeros((len(self.policies), len(self.capacities)), np.int64)

    def step(self, chosen: np.ndarray, values: np.ndarray) -> None:
        """One token: `chosen` [layers, k], `values` [policies, layers, experts], what keeping each is worth."""
        k = chosen.shape[1]
        used = np.zeros((self.n_layers, self.n_experts), bool)
        np.put_along_axis(used, chosen.astype(np.int64), True, 1)
        self.misses += (used & ~self.resident).sum((2, 3))
        self.routed += chosen.size
        self.resident |= used
        worth = np.where(self.resident if self.after else self.resident & ~used, values[:, None], np.inf)
        excess = self.resident.sum(3) - np.array(self.capacities)[None, :, None]
        lowest = np.argpartition(worth, k - 1, axis=3)[..., :k]
        order = np.argsort(np.take_along_axis(worth, lowest, 3), axis=3)
        victims = np.take_along_axis(lowest, order, 3)
        stays = np.arange(k) >= excess[..., None]
        np.put_along_axis(self.resident, victims, np.take_along_axis(self.resident, victims, 3) & stays, 3)

    def table(self) -> dict[str, list[float]]:
        return {name: (self.misses[i] / self.routed).tolist() for i, name in enumerate(self.policies)}


def replay(
    trace: Trace, positions: np.ndarray, predictors: dict[str, object], *, after: bool, accepted: float = 1.0,
    horizons: tuple[int, ...] = HORIZONS, reliability: Reliability | None = None, seed: int = 0,
) -> dict[str, list[float]]:  # fmt: skip
    """Misses for each routed expert, by policy and capacity. `accepted`: chance that a drafted token is right, until the first miss;
    a wrong one is drawn from the trace's tokens. Weights of drafted tokens are DISCOUNT^(j-1) × accepted^j."""
    n_layers, n_experts = trace.ids.shape[1], trace.n_experts
    names = ["LRU", "decayed", *(f"{name} {h}" for name in [*predictors, "perfect"] for h in horizons)]
    caches = Caches(names, [round(c * n_experts) for c in CAPACITIES], n_layers, n_experts, after)
    rng = np.random.default_rng(seed)
    frequency = np.zeros((n_layers, n_experts))
    last = np.full((n_layers, n_experts), -1.0)
    longest = max(horizons)
    previous = -1
    for step, t in enumerate(positions.tolist()):
        chosen = trace.ids[t].astype(np.int64)
        if previous < 0 or trace.seq[t] != trace.seq[previous] or t != previous + 1:
            for predictor in predictors.values():
                predictor.start_request()
        previous = t
        if after:
            for predictor in predictors.values():
                predictor.learn(trace.tokens[t : t + 1], trace.ids[t : t + 1])
        end = t + 1
        while end < len(trace.seq) and end <= t + longest and trace.seq[end] == trace.seq[t]:
            end += 1
        drafted = trace.tokens[t + 1 : end].copy()
        wrong = np.flatnonzero(rng.random(len(drafted)) >= accepted)
        if wrong.size:
            drafted[wrong[0] :] = rng.choice(trace.tokens, len(drafted) - wrong[0])
        frequency *= DECAY
        np.put_along_axis(frequency, chosen, np.take_along_axis(frequency, chosen, 1) + 1, 1)
        np.put_along_axis(last, chosen, float(step), 1)
        values = [last, frequency]
        perfect = np.zeros((len(drafted), n_layers, n_experts), np.float32)
        for j in range(len(drafted)):
            np.put_along_axis(perfect[j], trace.ids[t + 1 + j].astype(np.int64), 1.0, 1)
        base = RATE * frequency
        for predictor in [*predictors.values(), None]:
            if predictor is None:
                p, sure = perfect, 1.0
            else:
                known = drafted.tolist() if after else [int(trace.tokens[t]), *drafted.tolist()]
                sure = accepted
                p = predictor.probabilities(known) if known else np.zeros((0, n_layers, n_experts), np.float32)
                p = p if after else p[1:]
            weights = np.array([sure ** (j + 1) * DISCOUNT**j for j in range(len(drafted))])
            for h in horizons:
                values.append(base + np.tensordot(weights[:h], p[:h], 1) if len(drafted) else base)
        caches.step(chosen, np.stack(values))
        if not after:
            if reliability is not None:
                reliability.add(next(iter(predictors.values())).probabilities([int(trace.tokens[t])])[0], trace.ids[t])
            for predictor in predictors.values():
                predictor.learn(trace.tokens[t : t + 1], trace.ids[t : t + 1])
    return caches.table()


def learn_all(predictor, trace: Trace, positions: np.ndarray):
    """Learns whole requests, one after the other."""
    for request in np.unique(trace.seq[positions]):
        of_request = positions[trace.seq[positions] == request]
        predictor.start_request()
        predictor.learn(trace.tokens[of_request], trace.ids[of_request])
    return predictor


def read_deepseek(folder: Path) -> Trace:
    """The .csv files of one folder, in the order of their numbers: rows by layer, then token."""
    files = sorted(folder.glob("prompt_*_data.csv"), key=lambda path: int(path.stem.split("_")[1]))
    if not files:
        raise SystemExit(f"{folder}: no prompt_*_data.csv; give the folder training_data_eamc of ngavhane/moe-beyond")
    vocabulary: dict[str, int] = {}
    tokens, ids, seq = [], [], []
    for number, path in enumerate(files):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        n = len(rows) // len({row[0] for row in rows})
        tokens += [vocabulary.setdefault(row[2], len(vocabulary)) for row in rows[:n]]
        ids.append(np.array([json.loads(row[3]) for row in rows], np.uint8).reshape(-1, n, 6).transpose(1, 0, 2))
        seq += [number] * n
    return Trace("DeepSeek-V2-Lite", np.array(tokens, np.int32), np.concatenate(ids), np.array(seq, np.int32), 64)


def read_npz(path: Path) -> Trace | None:
    with np.load(path) as file:
        if "tokens" not in file:
            print(f"{path}: no token ids, left out", file=sys.stderr)
            return None
        ids = file["ids"]
        return Trace(path.stem, file["tokens"].astype(np.int32), ids, file["seq"].astype(np.int32), int(ids.max()) + 1)


def captured(table: dict[str, list[float]], policy: str, horizon: int) -> list[float]:
    """The share of what perfect knowledge of the same tokens gives against the demand policy."""
    return [
        (base - got) / (base - best)
        for base, got, best in zip(table["decayed"], table[f"{policy} {horizon}"], table[f"perfect {horizon}"], strict=True)
    ]


class Report:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def misses(self, title: str, table: dict[str, list[float]]) -> None:
        self(f"\n{title}\n")
        self("| policy, tokens known | " + " | ".join(f"{c:.0%}" for c in CAPACITIES) + " | captured |")
        self("| --- | " + "--- | " * (len(CAPACITIES) + 1))
        for name, row in table.items():
            policy, _, horizon = name.rpartition(" ")
            share = (
                ""
                if not horizon.isdigit() or policy == "perfect"
                else " / ".join(f"{x:.0%}" for x in captured(table, policy, int(horizon)))
            )
            self(f"| {name} | " + " | ".join(f"{x:.3f}" for x in row) + f" | {share} |")


def study(trace: Trace, report: Report, limit: int | None, sections: set[str]) -> None:
    n_layers, k = trace.ids.shape[1:]
    half = len(np.unique(trace.seq)) // 2
    first, second = np.flatnonzero(trace.seq < half), np.flatnonzero(trace.seq >= half)
    held = second[:limit]
    report(
        f"\n# {trace.name}: {len(trace.tokens)} tokens, {n_layers} × {trace.n_experts}, top-{k}; {len(held)} of {len(second)} held-back tokens"
    )

    if "issue" in sections:
        table = replay(trace, np.arange(len(trace.tokens))[:limit], {"naive": NaiveTable(n_layers, trace.n_experts)}, after=True)
        report.misses("All requests from the first on, learned online, victims chosen after the token", table)

    if sections & {"held", "drafts", "parts"}:
        start = time.process_time()
        taught = learn_all(TokenEstimator(n_layers, trace.n_experts, k), trace, first)
        report(f"\nlearning {len(first)} tokens: {(time.process_time() - start) / len(first) * 1e3:.2f} ms of CPU each")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tables.npz"
            save(taught, path, trace.name)
            del taught

            def saved() -> TokenEstimator:
                estimator = TokenEstimator(n_layers, trace.n_experts, k)
                if not load(estimator, path, trace.name):
                    raise SystemExit("the saved tables were not taken")
                return estimator

            if "held" in sections:
                for after in (False, True):
                    reliability = Reliability()
                    predictors: dict[str, object] = {
                        "saved": saved(),
                        "cold": TokenEstimator(n_layers, trace.n_experts, k),
                        "naive saved": learn_all(NaiveTable(n_layers, trace.n_experts), trace, first),
                        "naive cold": NaiveTable(n_layers, trace.n_experts),
                    }
                    table = replay(trace, held, predictors, after=after, reliability=reliability)
                    report.misses(f"Held-back requests, victims chosen {'after the token' if after else 'on demand'}", table)
                    if not after:
                        report(f"\nReliability of the next token's probabilities (saved), calibration error {reliability.error():.4f}\n")
                        report("| predicted | real | predictions |\n| --- | --- | --- |")
                        for b in reliability.bins():
                            report(f"| {b.predicted:.3f} | {b.real:.3f} | {b.count} |")
            if "drafts" in sections:
                for accepted in (0.5, 0.65, 0.8, 1.0):
                    table = replay(trace, held, {"saved": saved()}, after=False, accepted=accepted, horizons=(4,))
                    report.misses(f"Held-back requests, on demand, each drafted token right with probability {accepted}", table)
            if "parts" in sections:
                bare = saved()
                bare.links_out[:] = 0
                bare._learn_links = lambda *_: None  # type: ignore[method-assign]
                table = replay(trace, held, {"saved": saved(), "no links": bare}, after=False, horizons=(4,))
                report.misses("Held-back requests, on demand, without links", table)


def cost(report: Report) -> None:
    """CPU time of one cycle, memory, and the time to load, on made-up routing at 48 × 128, top-8, with many tokens known."""
    rng = np.random.default_rng(0)
    n_layers, n_experts, k = 48, 128, 8
    tracemalloc.start()
    estimator = TokenEstimator(n_layers, n_experts, k)
    n = 2 * estimator.memory.capacity
    tokens = np.where(rng.random(n) < 0.5, rng.zipf(1.2, n) % 150_000, rng.integers(0, 150_000, n))
    routing = rng.integers(0, n_experts, (512, n_layers, k)).astype(np.uint8)
    previous = before = -1
    for i, token in enumerate(tokens.tolist()):
        estimator.memory.add(token, previous, before, 0, routing[i % 512])
        before, previous = previous, token
    held_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for i in range(20):
        estimator.learn(tokens[i : i + 1], routing[i : i + 1])
    report(f"\n# Cost at {n_layers} × {n_experts}, top-{k}: {len(estimator.memory)} observations, {held_bytes / 2**20:.1f} MiB held\n")

    def milliseconds(call, rounds: int = 200) -> str:
        times = []
        for i in range(rounds):
            start = time.process_time()
            call(i)
            times.append((time.process_time() - start) * 1e3)
        return f"{np.median(times):.2f} (fastest {min(times):.2f})"

    report("| call | ms of CPU, median |\n| --- | --- |")
    for count in (1, 5, 9):
        report(f"| predict, {count} tokens | {milliseconds(lambda i, c=count: estimator.predict(tokens[i : i + c].tolist()))} |")
    others = tokens[rng.integers(0, n, (210, 5))].tolist()

    def cycle(i: int, n_others: int) -> None:
        drafted = [
            [(token, 0.6), *((other, 0.3 / n_others) for other in others[i + j][:n_others])]
            for j, token in enumerate(tokens[i + 1 : i + 5].tolist())
        ]
        p = estimator.of_candidates([[(int(tokens[i]), 1.0)], *drafted])
        foresight(p[0], p[1:])

    for n_others in (2, 5):  # the bundled draft has 1.9 on average that are likely enough to be looked up
        cycles = milliseconds(lambda i, n=n_others: cycle(i, n))
        report(f"| a decode: 1 token and 4 drafted ones, each with {n_others} others; what the pager is told | {cycles} |")
    report(f"| learn, 1 token | {milliseconds(lambda i: estimator.learn(tokens[i : i + 1], routing[i : i + 1]))} |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tables.npz"
        save(estimator, path, "made up")
        fresh = [TokenEstimator(n_layers, n_experts, k) for _ in range(5)]
        report(f"| load, {path.stat().st_size / 2**20:.0f} MiB | {milliseconds(lambda i: load(fresh[i], path, 'made up'), 5)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE.npz")
    parser.add_argument("--deepseek", type=Path, metavar="FOLDER")
    parser.add_argument("--tokens", type=int, help="count misses over so many tokens only")
    parser.add_argument("--sections", default="issue,held,drafts,parts,cost", help="which tables, of: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/estimator-study.md"), help="where the tables are written (%(default)s)")
    arguments = parser.parse_args()
    sections, report = set(arguments.sections.split(",")), Report()
    traces = [trace for path in arguments.traces if (trace := read_npz(path)) is not None]
    if arguments.deepseek:
        traces.append(read_deepseek(arguments.deepseek))
    for trace in traces:
        study(trace, report, arguments.tokens, sections)
    if "cost" in sections:
        cost(report)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(report.lines) + "\n")


if __name__ == "__main__":
    main()
