#!/usr/bin/env python3
"""Whether the balancer's integer program earns its keep: its time, its plans beside simpler ones, and quotas by layer.

    .venv/bin/python scripts/balancer_study.py TRACE.npz… [--deepseek FOLDER] [--out FILE]
    .venv/bin/python scripts/balancer_study.py --states 60       # times alone

TRACE: as `spac trace` reads it (`scripts/trace_demo.py build/demo/trace.npz`). FOLDER: see scripts/estimator_study.py. Everything
that is learned is learned on the first half of a trace's requests; misses and costs are of the second half. Times of solving are
of made-up routing at three sizes; CPU time is given beside wall time, since other programs may run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lookahead_study import from_deepseek

from spac.balancer import Balancer, Cache, FastTier, Lookahead, MissCurve, Plan, StackDistances, State, merged
from spac.balancer.cost import MIB, Costs
from spac.balancer.heuristics import Filling, greedy, search, separate, uniform
from spac.balancer.program import GAP, Program, Solved, SolverError, solve
from spac.trace.format import Trace
from spac.trace.simulation import parse_cache, replay
from spac.trace.timing import Compute, Reads, decode_ubatches, limited, predict

ROOT = Path(__file__).resolve().parent.parent
READS = Reads.load(str(ROOT / "docs/benchmarks/reads.txt"))
SHARES = ("12%", "25%", "50%")
LIMITS = {"90 MB/s": 9e7, "500 MB/s": 5e8, "unthrottled": None}
DRAFTS = {"no draft": 0.0, "40 % right": 0.4, "80 % right": 0.8}  # of its tokens, given that those before are
# gpt-oss, DeepSeek: about 4.25 and 4.5 bits a weight; the bundled model's routing stands for the 4.2 GiB model, which has its
BUNDLE_BYTES = {"gpt-oss": 13_200_000, "DeepSeek": 4_900_000, "demo": 14_155_776}
MOST_VERIFIED = 4
KINDS = ("one cache", "by layer", "two sizes", "three sizes", "draft with experts", "fast tier")

# A token's compute on the 4.2 GiB model (docs/benchmarks/paging/table.md), and its growth by DraftLength's first guess.
TOKEN_S, SLOPE, DRAFT_S = 0.0174, 0.25, 0.001
SENSED = (0.0, 0.055, 0.072, 0.076, 0.079)  # docs/benchmarks/lookahead-misses.md, draft 1, 2, 4 at 25 %
AHEAD = (Lookahead(0.0, 1.0), Lookahead(0.5, 0.4))  # precision: docs/lookahead.md; recall of absent experts: a guess


@dataclass
class Timed:
    """Times of one method over several states, seconds: CPU and wall; and how many were not solved in time."""

    cpu_s: list[float]
    wall_s: list[float]
    build_s: list[float]
    solver_s: list[float]
    late: int = 0

    def cells(self) -> str:
        def ms(values: list[float], p: float) -> str:
            return f"{1e3 * float(np.percentile(values, p)):.1f}" if values else "-"

        late = f"{self.late} of {self.late + len(self.cpu_s)}" if self.late else ""
        build = f"{ms(self.build_s, 50)} / {ms(self.solver_s, 50)}" if self.build_s else ""
        return f"{ms(self.cpu_s, 50)} / {ms(self.cpu_s, 99)} | {ms(self.wall_s, 50)} / {ms(self.wall_s, 99)} | {build} | {late}"


def made_up(n_layers: int, n_experts: int, k: int, kind: str, seed: int) -> State:
    """Layers of different habit; kinds as in the table."""
    random = np.random.default_rng(seed)
    caches = []
    for layer in range(n_layers):
        share = random.dirichlet(20 * np.arange(1, n_experts + 1) ** -random.uniform(0.3, 1.6))
        misses = np.clip(k * (1 - np.concatenate([[0.0], np.cumsum(np.sort(share)[::-1])])), 0, None)
        sizes = {"two sizes": (4_100_000, 3_000_000, 3_000_000), "three sizes": (4_100_000, 3_000_000, 3_500_000)}
        size = sizes.get(kind, (3_000_000,) * 3)[layer % 3]
        caches.append(Cache(f"layer {layer}", size, MissCurve.through(misses)))
    if kind == "one cache":
        caches = [Cache("model", 3_000_000, merged([cache.curve for cache in caches]))]
    if kind == "draft with experts":
        caches += [replace(cache, name=f"draft's {cache.name}", bundle_bytes=600_000, of_draft=True) for cache in caches[: n_layers // 3]]
    total = sum(cache.bundle_bytes * cache.n_experts for cache in caches)
    fast = FastTier(total // 10, 1e-4) if kind == "fast tier" else None
    budget = int(total * random.uniform(0.1, 0.6))
    return make_state(tuple(caches), budget, READS, random.uniform(0.3, 0.9), [1 + 0.9 * i for i in range(9)], fast)


def make_state(
    caches: tuple[Cache, ...], budget_bytes: int, reads: Reads, right: float, growth: list[float], fast: FastTier | None = None
) -> State:
    n = len(growth) - 1
    return State(
        caches, budget_bytes, reads,
        decode_s=tuple(TOKEN_S * (1 + SLOPE * i) for i in range(n + 1)), growth=tuple(growth),
        accepted=tuple(right ** (i + 1) for i in range(n)), draft_s=DRAFT_S if right else None, sensed=SENSED, lookahead=AHEAD, fast=fast,
    )  # fmt: skip


def solver_always(state: State) -> Solved:
    """Even where marginal gains are proven to be the best."""
    begin = time.monotonic()
    costs = Costs(state)
    filling = Filling(state, costs)
    rows = tuple(np.argsort(filling.rough_bounds_s(), kind="stable")[:3].tolist())
    near = search(state, costs, filling).plan
    searched = time.monotonic()
    program = Program(state, costs, filling, rows, near, integral=True, relaxed=False)
    built = time.monotonic()
    program.run("auto", 0.5, GAP)
    return Solved(program.plan("program"), len(rows), searched - begin, built - searched, time.monotonic() - built)


METHODS: dict[str, Callable[[State], Solved]] = {
    "default": lambda state: solve(state, gap=0.01, deadline_s=0.05),
    "program": lambda state: solve(state, deadline_s=0.5),
    "solver": solver_always,
}


def solve_times(say: list[str], n_default: int, n_program: int) -> None:
    say += [
        "## Time of a plan", "",
        f"Milliseconds, p50 / p99, of {n_default} made-up states (the program: {n_program}), one thread. *Default*: marginal gains, and the program",
        "only where they are not proven to be within 1 %. *Program*: where they are not proven to be within 0.01 %, to that gap, within 0.5 s; *late*: no proof",
        "by then, left out of the times. *Solver*: the program in any case, of the three choices with the best rough bounds.",
        "*PuLP / HiGHS*: building the program in Python, and PuLP's handing over with the solver, p50, wall.", "",
        "| layers × experts | caches | method | CPU | wall | PuLP / HiGHS | late | greedy above its bound, at most |", "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    solve(made_up(2, 8, 2, "by layer", 0), gap=0)  # imports
    for layers, experts, k in ((16, 32, 4), (48, 128, 8), (60, 384, 8)):
        for kind in KINDS:
            gaps = []
            for method, n in (("default", n_default), ("program", n_program), ("solver", n_program)):
                timed = Timed([], [], [], [])
                for seed in range(n):
                    state = made_up(layers, experts, k, kind, seed)
                    cpu, wall = time.process_time(), time.monotonic()
                    try:
                        solved = METHODS[method](state)
                    except SolverError:
                        timed.late += 1
                        continue
                    timed.cpu_s.append(time.process_time() - cpu)
                    timed.wall_s.append(time.monotonic() - wall)
                    if solved.n_choices:
                        timed.build_s.append(solved.build_s)
                        timed.solver_s.append(solved.solve_s)
                    if method == "program":
                        costs = Costs(state)
                        found = search(state, costs, Filling(state, costs))
                        gaps.append(found.plan.seconds_per_token / found.bound_s - 1)
                gap = f"{max(gaps):.3%}" if gaps else ""
                say.append(f"| {layers} × {experts} | {kind} | {method} | {timed.cells()} | {gap} |")
                print(say[-1], flush=True)


def keeping_curves(say: list[str]) -> None:
    say += ["", "## Keeping curves", "", "CPU milliseconds, means: `StackDistances.observe` of a token; `merged(curves())`.", "",
            "| layers × experts | a token | merged curves |", "| --- | --- | --- |"]  # fmt: skip
    random = np.random.default_rng(0)
    for layers, experts, k in ((16, 32, 4), (48, 128, 8), (60, 384, 8)):
        distances = StackDistances(layers, experts)
        tokens = [np.argsort(random.random((1, layers, experts)), axis=2)[:, :, :k] for _ in range(200)]
        begin = time.process_time()
        for token in tokens:
            distances.observe(token)
        observed = time.process_time()
        for _ in range(10):
            merged(distances.curves())
        say.append(f"| {layers} × {experts} | {1e3 * (observed - begin) / 200:.2f} | {1e3 * (time.process_time() - observed) / 10:.1f} |")


def batches(trace: Trace, width: int) -> list[np.ndarray]:
    """Decoded tokens, so many neighbours of a request at a time."""
    whole = (trace.ids < trace.n_experts).all((1, 2)) & (trace.phase == 1)
    ids, seq = trace.ids[whole].astype(np.int64), trace.seq[whole]
    starts = [i for i in range(0, len(ids) - width + 1, width) if seq[i] == seq[i + width - 1]]
    return [ids[i : i + width] for i in starts]


def learned(trace: Trace, width: int = 1) -> StackDistances:
    distances = StackDistances(trace.n_layers, trace.n_experts, half_life_tokens=None)
    for batch in batches(trace, width):
        distances.observe(batch)
    return distances


def growth_of(trace: Trace, share: float) -> list[float]:
    """Misses of decodes of 1, 2 ... tokens, in those of one, at a part of the experts."""
    head = trace.head(8000)
    slots = max(trace.n_used, round(share * trace.n_experts))
    misses = [learned(head, width).misses()[:, slots].sum() for width in range(1, MOST_VERIFIED + 2)]
    return [float(m / misses[0]) for m in misses]


def quotas(say: list[str], traces: dict[str, Trace]) -> None:
    say += [
        "", "## Quotas by layer, or one order for all", "",
        "Misses of the pager's policy in the second half of the requests, cold, against one order for all layers without quotas. *Balancer*, *marginal gains*:",
        "slots by layer from the LRU miss curves of the first half; *hindsight*: of the same half. (Program and marginal gains differ in no slot, or in a few.)", "",
        "| trace | cache | no quotas, misses a token | equal quotas | balancer | marginal gains | hindsight | LRU, equal quotas |", "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, trace in traces.items():
        first, second = trace.of_requests("first-half"), trace.of_requests("second-half")
        curves = {"first": learned(first).curves(), "second": learned(second).curves()}
        for share in SHARES:
            n = parse_cache(share, second)

            def state(which: str, curves: dict[str, list[MissCurve]] = curves, n: int = n) -> State:
                caches = tuple(Cache(f"layer {i}", MIB, curve, 0) for i, curve in enumerate(curves[which]))
                return State(caches, n * MIB + MIB // 2, READS, (TOKEN_S,), in_flight=(1,))

            own = replay(second, n, "default", "global").misses
            slots = [solve(state("first"), gap=1e-6, deadline_s=5).plan.slots, greedy(state("first")).slots, greedy(state("second")).slots]
            rows = [replay(second, n, "default", "layer").misses]
            rows += [replay(second, n, "default", list(s) if sum(s) == n else _pad(s, n, trace.n_experts)).misses for s in slots]
            rows.append(replay(second, n, "lru", "layer").misses)
            n_visits = len(np.unique(second.ubatch))
            say.append(f"| {name} | {share} | {own / n_visits:.2f} | " + " | ".join(f"{m / own - 1:+.1%}" for m in rows) + " |")
            print(say[-1], flush=True)


def _pad(slots: tuple[int, ...], n: int, most: int) -> list[int]:
    """What a plan left over, to the first layers that take it."""
    out = list(slots)
    for i in range(len(out)):
        out[i] += min(most - out[i], n - sum(out))
    return out


def total_curve(say: list[str], traces: dict[str, Trace]) -> None:
    say += [
        "", "## One curve for a model", "",
        "Misses a decoded token of the pager's policy (one order for all layers) in the second half, against the merged LRU curve of the first half; and the",
        "same curve scaled so that it is right at 25 %, as the live counters of misses would.", "",
        "| trace | cache | pager | merged curve | scaled |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, trace in traces.items():
        first, second = trace.of_requests("first-half"), trace.of_requests("second-half")
        curve = merged(learned(first).curves())
        starts = np.unique(second.ubatch, return_index=True)[1]
        decoded = second.phase[starts] == 1
        found = {share: replay(second, parse_cache(share, second)).missed[decoded].sum() / decoded.sum() for share in SHARES}
        scaled = curve.scaled(found["25%"] / curve.at(parse_cache("25%", second)))
        for share in SHARES:
            told = [float(c.at(parse_cache(share, second))) / found[share] - 1 for c in (curve, scaled)]
            say.append(f"| {name} | {share} | {found[share]:.2f} | {told[0]:+.1%} | {told[1]:+.1%} |")


def plans(say: list[str], traces: dict[str, Trace]) -> None:
    say += [
        "", "## Plans on recorded routing", "",
        "Expected seconds for each accepted token above the best bound, over traces × 12, 25, 50 % of the experts × reads (90 MB/s, 500 MB/s, unthrottled)",
        "× drafts (none, 40 %, 80 % of its tokens right): geometric mean, and the worst. Slots by layer; growth of the misses with verified tokens measured on the trace.", "",
        "| method | mean above the bound | worst | slots and settings |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    methods: dict[str, tuple[str, Callable[[State], Plan]]] = {
        "program": ("together", lambda s: solve(s, gap=1e-4, deadline_s=2).plan),
        "marginal gains": ("together", greedy),
        "default": ("together", Balancer().solve),
        "LP and rounding": ("together, relaxed", lambda s: solve(s, relaxed=True, deadline_s=2).plan),
        "in turn": ("settings at equal parts, then slots", separate),
        "equal parts": ("equal parts, best settings for them", uniform),
        "slots only": ("nothing verified, sensed or read ahead; six reads", lambda s: fixed(s, 0, 0)),
        "verify two": ("two verified; six reads", lambda s: fixed(s, 2, 0)),
        "sense four": ("four drafted, none verified; six reads", lambda s: fixed(s, 0, 4)),
    }
    above: dict[str, list[float]] = {name: [] for name in methods}
    chosen: dict[str, int] = {}
    for name, trace in traces.items():
        first, second = trace.of_requests("first-half"), trace.of_requests("second-half")
        size = next((b for part, b in BUNDLE_BYTES.items() if part in name), next(iter(trace.bundle_bytes), 4_000_000))
        caches = tuple(Cache(f"layer {i}", size, curve) for i, curve in enumerate(learned(first).curves()))
        for share in SHARES:
            growth = growth_of(first, float(share[:-1]) / 100)
            for limit, rate in LIMITS.items():
                for draft, right in DRAFTS.items():
                    reads = limited(READS, rate) if rate else READS
                    state = make_state(caches, parse_cache(share, second) * size, reads, right, growth if right else [1.0])
                    costs = Costs(state)
                    bound = search(state, costs, Filling(state, costs)).bound_s
                    for method, (_, run) in methods.items():
                        try:
                            above[method].append(run(state).seconds_per_token / bound)
                        except SolverError:
                            print("late:", method, name, share, limit, draft)
                    choice = greedy(state).choice
                    key = f"{limit}, {draft}: {choice.verified} verified, {choice.drafted} drafted, {choice.depth} ahead, {choice.in_flight} reads"
                    chosen[key] = chosen.get(key, 0) + 1
        print(name, {method: f"{float(np.exp(np.log(x).mean())) - 1:.2%}" for method, x in above.items() if x}, flush=True)
    for method, values in above.items():
        how = methods[method][0]
        say.append(f"| {method} | {np.exp(np.log(values).mean()) - 1:.3%} | {max(values) - 1:.3%} | {how} |")
    say += ["", "Settings chosen (of the nine instances of each kind):", "", *(f"- {key} ({n})" for key, n in sorted(chosen.items()))]


def made_up_plans(say: list[str], n: int) -> None:
    say += [
        "", "## Plans for made-up states", "",
        f"Seconds for each accepted token above the bound, geometric mean and worst of {n} states of 48 × 128 experts.", "",
        "| caches | marginal gains | in turn | equal parts |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for kind in KINDS:
        above: list[list[float]] = [[], [], []]
        for seed in range(n):
            state = made_up(48, 128, 8, kind, seed)
            costs = Costs(state)
            bound = search(state, costs, Filling(state, costs)).bound_s
            for values, method in zip(above, (greedy, separate, uniform), strict=True):
                values.append(method(state).seconds_per_token / bound)
        say.append(f"| {kind} | " + " | ".join(f"{np.exp(np.log(x).mean()) - 1:.2%}, {max(x) - 1:.2%}" for x in above) + " |")


def fixed(state: State, verified: int, sensed: int) -> Plan:
    """Marginal gains with settings that are always the same; without a draft there is nothing to verify or sense."""
    drafted = max(verified, sensed) if state.draft_s is not None else 0
    verified = verified if drafted else 0
    costs = Costs(replace(state, in_flight=(6,)))
    filling = Filling(state, costs)
    i = next(i for i in range(len(costs)) if costs.verified[i] == verified and costs.drafted[i] == drafted and costs.depth[i] == 0)
    return costs.plan(state, i, *filling.fill_up(i, filling.floors, filling.fast_floors), "fixed")


def against_time_model(say: list[str]) -> None:
    say += [
        "", "## The cost against the time model", "",
        "Tokens/s of a recorded run (docs/benchmarks/paging/trace-native.npz) without speculation: the balancer's formula on the replay's misses, and spac/trace/timing.py.", "",
        "| cache | reads | balancer | time model | |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    trace = Trace.load(str(ROOT / "docs/benchmarks/paging/trace-native.npz"))
    compute, size = Compute.measured(trace), trace.bundle_bytes[0]
    decoded = decode_ubatches(trace)
    for share in SHARES:
        replayed = replay(trace, parse_cache(share, trace))
        missed = float(replayed.missed[decoded].sum() / decoded.sum())
        for name, rate in LIMITS.items():
            reads = limited(READS, rate) if rate else READS
            flat = Cache("model", size, MissCurve(np.array([0, trace.n_bundles]), np.array([missed, missed])), 0)
            state = State((flat,), 1 << 40, reads, (compute.token_s,), in_flight=(6,))
            ours, theirs = 1 / greedy(state).seconds_per_token, predict(trace, replayed, compute, reads).tokens_per_s
            say.append(f"| {share} | {name} | {ours:.2f} | {theirs:.2f} | {ours / theirs - 1:+.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument("--deepseek", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "build/balancer-study.md", help="where tables are written (%(default)s)")
    parser.add_argument(
        "--states", type=int, default=100, help="made-up states of each kind, of which the program gets a fifth (%(default)s)"
    )
    arguments = parser.parse_args()
    traces = {}
    for path in arguments.traces:
        trace = Trace.load(str(path))
        traces[str(trace.meta.get("model", path.stem)).split(" (")[0].split("/")[-1]] = trace
    if arguments.deepseek:
        traces["DeepSeek-V2-Lite"] = from_deepseek(arguments.deepseek).trace
    say = ["# The balancer, measured", "", "Written by `scripts/balancer_study.py`, which says what the tables are.", ""]
    solve_times(say, arguments.states, max(1, arguments.states // 5))
    keeping_curves(say)
    if traces:
        plans(say, traces)
        made_up_plans(say, max(1, arguments.states // 3))
        quotas(say, traces)
        total_curve(say, traces)
        against_time_model(say)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(say).rstrip() + "\n")
    print("\n".join(say))


if __name__ == "__main__":
    main()
