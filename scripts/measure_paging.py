#!/usr/bin/env python3
"""Real paged runs against a bare reader, the time model and the bound: docs/benchmarks/paging/table.md.

    make build build/demo/4g.gguf
    .venv/bin/python scripts/measure_paging.py build/demo/4g.gguf --out docs/benchmarks/paging
    .venv/bin/python scripts/measure_paging.py --report docs/benchmarks/paging        # the tables again

Each run decodes greedily in a control group. After its last token the bare reader (spac_reads_measure, in a process of its own), in the
same group and so behind the same limits, reads the slices that the run had missed, token by token. Not between tokens: that costs the
run some milliseconds of each.

- `speed`: the reader takes each token's slices as one stream, six in flight: what the disk alone would need. Once without looking at
  what it read, once touching every line of it, as whoever needs it must. At the end some random slices at once, touched: the time
  model's table of reads.
- `misses`: with each layer's times (spac's recorder), the reader takes a token's slices layer by layer, with the token's other time slept
  between them: into huge pages, the same and touched, and into small pages from all over memory.
- `reference`: everything in memory, with a profile's processors: the trace and the compute times that the model starts from.

What a layer waits besides its reads, and what computing loses to reading, is what `spac tune` measures, measured at the start.

The group gets `ROOM_BYTES` more than spac is told, for the reader. Runs that are there already are kept, and those that others
disturbed are named: delete them to have them again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from spac.bench import profile as profiles
from spac.bench import record as records
from spac.bench import worker
from spac.bench.prompt import of_length
from spac.bench.runner import FIXED
from spac.gguf.check import EXPERT_PATTERN
from spac.host import limits as cgroups
from spac.host.cores import allowed_cores
from spac.trace.format import Trace
from spac.trace.simulation import replay
from spac.trace.timing import READS_IN_FLIGHT, Compute, Reads, limited, pieces_of, predict

ROOM_BYTES: Final = 112 << 20  # Python, and memory for six reads
BLOCK: Final = 4096
DEPTHS: Final = (1, 2, 3, 6)
STREAMS: Final = ("huge", "touched")  # what the reader reads into, of a token's slices
PAGES: Final = ("huge", "touched", "small")  # of a layer's
SAMPLES: Final = 12  # of each depth
PROMPT_TOKENS: Final = 48
WAITS: Final = "waits.json"
DISTURBED: Final = 0.05  # processor time of others, by processor time that there was
# kind of run, profile, memory, read limit ("": the profile's)
CELLS: Final = (
    *(("speed", "native", memory, read) for memory in ("12%", "25%", "50%") for read in ("500M", "none")),
    *(("speed", name, memory, "") for name in ("pi5-8g-nvme", "pi5-sd", "pi4-usb3", "laptop-16g-nvme") for memory in ("25%", "50%")),
    *(("misses", "native", memory, read) for memory in ("25%", "50%") for read in ("500M", "none")),
)


# -- in the group --


class BareReader:
    """`serve_reads`, running: whole blocks by O_DIRECT, from threads that pread."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, __file__, "--reader", model]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, slices: list[tuple[int, int]], depth: int, pages: str) -> float:
        """What reading these (offset, length) takes, in pieces as the pager does; pages: a name of `PAGES`."""
        if not slices:
            return 0.0
        pieces = [piece for offset, length in slices for piece in pieces_of(offset, length)]
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps([depth, pages, pieces]) + "\n")
        stdin.flush()
        return float(stdout.readline())

    def close(self) -> None:
        """End it, so that its processor time counts as ours."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve_reads(model: str) -> None:
    """Reads what stdin says, a line at a time, and prints the seconds that a line took."""
    from spac import control

    size = os.stat(model).st_size  # noqa: PTH116
    for line in sys.stdin:
        depth, pages, slices = json.loads(line)
        offsets = [offset // BLOCK * BLOCK for offset, _ in slices]
        ends = [min(size, -(-(offset + length) // BLOCK) * BLOCK) for offset, length in slices]
        lengths = [end - offset for offset, end in zip(offsets, ends, strict=True)]
        print(control.reads_measure(model, offsets, lengths, depth=depth, store="direct", pages=pages), flush=True)


def expert_slices(model: str) -> dict[int, list[list[tuple[int, int]]]]:
    """Offset and length by layer, tensor (in the order in which they are computed) and expert."""
    from spac.gguf.reader import read_gguf

    order = ("up", "gate", "gate_up", "down")
    found: dict[int, list[tuple[int, list[tuple[int, int]]]]] = {}
    for tensor in read_gguf(model).tensors:
        if re.search(EXPERT_PATTERN, tensor.name):
            n = tensor.shape[2]
            size = tensor.n_bytes // n
            kind = tensor.name.split("ffn_")[1].split("_")[0]
            slices = [(tensor.offset + expert * size, size) for expert in range(n)]
            found.setdefault(int(tensor.name.split(".")[1]), []).append((order.index(kind), slices))
    return {layer: [slices for _, slices in sorted(tensors)] for layer, tensors in found.items()}


def run_worker(config: dict[str, Any]) -> None:
    """A run, as a process of its own: prints one JSON object."""
    reader, kind = BareReader(config["model"]), config["kind"]
    engine = worker.Engine({**worker.DEFAULTS, **config})
    handle, slices = engine.llama.spac, expert_slices(config["model"])
    prompt = engine.tokenize(of_length(FIXED, PROMPT_TOKENS, lambda text: len(engine.llama.tokenize(text.encode()))))
    if kind == "reference":
        for _ in engine.tokens(prompt):  # after this all that the text needs is in memory
            pass
    tokens = engine.tokens(prompt)
    ids, rows, missed = [next(tokens)], [], []
    for _ in range(config["tokens"]):
        before = handle.stats()
        begin = time.perf_counter()
        ids.append(next(tokens))
        wall_s = time.perf_counter() - begin
        after = handle.stats()
        row = {"wall_s": wall_s, "stall_s": after.stall_s - before.stall_s, **{name: getattr(after, name) - getattr(before, name) for name in ("misses", "reads", "bytes_read")}}
        absent = {event.layer: [e for e, hit in zip(event.experts, event.hits, strict=True) if not hit] for event in handle.events(before.events)}
        missed.append({layer: [tensor[e] for tensor in slices[layer] for e in experts] for layer, experts in absent.items()})
        rows.append(row)
    samples = []
    if kind == "misses":
        for i, (row, visits, expert_s) in enumerate(zip(rows, missed, handle.recorder.trace().expert_s[-len(rows) :], strict=True)):
            for pages in PAGES if i % 2 else PAGES[::-1]:
                row[pages] = replay_visits(reader, pages, visits, row["wall_s"], expert_s, len(slices[min(slices)]))
    if kind == "speed":
        for i, (row, visits) in enumerate(zip(rows, missed, strict=True)):
            row |= read_bare(reader, [s for visit in visits.values() for s in visit], i)
        every = [s for tensors in slices.values() for tensor in tensors for s in tensor]
        shuffle = random.Random(1)
        for i in range(SAMPLES * len(DEPTHS)):
            chosen = shuffle.sample(every, DEPTHS[i % len(DEPTHS)])
            samples.append((len(chosen), sum(length for _, length in chosen), reader.seconds(chosen, len(chosen), "touched")))
    if kind == "reference" and config["trace"]:
        handle.recorder.trace().save(config["trace"])
    stats = handle.stats()
    print(json.dumps({"token_ids": ids, "tokens": rows, "samples": samples, "budget_bytes": stats.budget_bytes, "rereads": stats.rereads}))
    engine.llama.close()
    reader.close()


def read_bare(reader: BareReader, slices: list[tuple[int, int]], turn: int) -> dict[str, float]:
    """Seconds of a token's slices as one stream, by `STREAMS`."""
    return {f"{pages}_s": reader.seconds(slices, READS_IN_FLIGHT, pages) for pages in (STREAMS if turn % 2 else STREAMS[::-1])}


def replay_visits(
    reader: BareReader, pages: str, visits: dict[int, list[tuple[int, int]]], wall_s: float, expert_s: Any, parts: int
) -> list[tuple[int, float, float]]:
    """Missed bundles, the experts' seconds and the bare reader's, of each layer."""
    other_s = max(0.0, wall_s - float(expert_s.sum())) / len(visits)
    found, pause_s = [], 0.0
    for (_, slices), seconds in zip(sorted(visits.items()), expert_s, strict=True):
        pause_s += other_s
        bare_s = 0.0
        if slices:
            time.sleep(pause_s)
            bare_s, pause_s = reader.seconds(slices, READS_IN_FLIGHT, pages), 0.0
        else:
            pause_s += float(seconds)
        found.append((len(slices) // parts, round(float(seconds), 6), bare_s))
    return found


# -- outside --


def waits_of(model: Path) -> dict[str, float]:
    """`Compute`'s `slice_s`, `contention_s` and `visit_s`, as `spac tune` measures them."""
    from spac import device
    from spac.gguf.check import check_model
    from spac.gguf.reader import read_gguf
    from spac.plan.forecast import Machine, Work

    machine = Machine(device.measure(model, n_threads=allowed_cores()), cgroups.Limits())
    layer = Work.of(check_model(model), read_gguf(str(model)).tensors).layers[0]
    return {"slice_s": machine.slice_s(layer), "contention_s": machine.contention_s(layer), "visit_s": machine.device.visit_s}


def measure(model: Path, cell: tuple[str, str, str, str], tokens: int, repeat: int, out: Path) -> dict[str, Any]:
    """One run's record; a reference's trace is written beside it."""
    kind, name, memory, read = cell
    profile = profiles.load(name)
    if read:
        profile = dataclasses.replace(profile, read_bytes_per_s=None if read == "none" else int(read.removesuffix("M")) * 10**6)
    if kind == "reference":
        profile = dataclasses.replace(profile, read_bytes_per_s=None, read_iops=None)
    size = model.stat().st_size
    limits = dataclasses.replace(profile, memory=None if kind == "reference" else memory).limits(size)
    record_routing = kind == "misses" or (kind == "reference" and memory == "traced")
    trace = str(out / f"trace-{name}.npz") if record_routing and kind == "reference" else ""
    config = {
        "kind": kind, "engine": "spac", "model": str(model), "tokens": tokens,
        "threads": limits.cores or allowed_cores(), "trace": trace,
        "arguments": {"paging": "on", "memory": limits.memory_bytes or 2 * size, "record_routing": record_routing},
    }  # fmt: skip
    record: dict[str, Any] = {
        "kind": kind, "profile": name, "memory": memory, "read": read, "repeat": repeat, "limits": dataclasses.asdict(limits),
        "not_enforced": cgroups.unenforceable(limits, [model]), "machine": records.machine(), "versions": records.versions(),
        "commit": records.commit(), "model": records.model_facts([model]), "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "threads": config["threads"],
    }  # fmt: skip
    enforced = {key: value for key, value in dataclasses.asdict(limits).items() if key not in record["not_enforced"]}
    if enforced["memory_bytes"]:
        enforced["memory_bytes"] += ROOM_BYTES
    cgroups.make_memory_present(enforced["memory_bytes"] or size)
    busy_s, begin = machine_busy_s(), time.monotonic()
    run = cgroups.run_limited([sys.executable, __file__, "--worker", json.dumps(config)], **enforced, measure=True, files=[model])
    if run.returncode != 0:
        raise SystemExit(f"{cell}: exit code {run.returncode}{' (killed at the memory limit)' if run.oom_killed else ''}\n{run.stderr[-2000:]}")
    others = (machine_busy_s() - busy_s - run.cpu_s) / (time.monotonic() - begin) / (os.cpu_count() or 1)
    return {**record, **json.loads(run.stdout.splitlines()[-1]), "device_read_bytes": run.device_read_bytes, "peak_bytes": run.peak_bytes, "others_share": others}


def machine_busy_s() -> float:
    """Seconds that all processors have computed for programs, since the machine's start (proc_stat(5))."""
    fields = [int(text) for text in Path("/proc/stat").read_text().split(maxsplit=5)[1:5]]
    return (fields[0] + fields[1] + fields[2]) / os.sysconf("SC_CLK_TCK")


def file_name(cell: tuple[str, str, str, str], repeat: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(cell).lower()).strip("-") + f"-{repeat}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="paged runs against a bare reader, the time model and the bound")
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/bench/paging"))
    parser.add_argument("--only", default="", help="runs whose file name holds this")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--report", type=Path, help="only make the tables again")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(json.loads(options.worker))
        return
    if options.reader:
        serve_reads(options.reader)
        return
    if options.report is None:
        if options.model is None:
            parser.error("no model")
        used = sorted({cell[1] for cell in CELLS if cell[0] == "speed"})
        cells = [("reference", name, how, "") for name in used for how in ("plain", "traced")] + list(CELLS)
        (options.out / "runs").mkdir(parents=True, exist_ok=True)
        if not (options.out / WAITS).exists():
            (options.out / WAITS).write_text(json.dumps(waits_of(options.model.resolve()), indent=1) + "\n")
        for repeat in range(options.repeats):
            for cell in cells:
                path = options.out / "runs" / file_name(cell, repeat)
                if options.only not in path.name or path.exists() or (cell[2] == "traced" and repeat):
                    continue
                record = measure(options.model.resolve(), cell, options.tokens, repeat, options.out)
                path.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")
                seconds = sum(row["wall_s"] for row in record["tokens"])
                print(f"{path.name}: {len(record['tokens']) / seconds:.2f} tokens/s", file=sys.stderr)
    folder = options.report or options.out
    text = report(folder)
    (folder / "table.md").write_text(text)
    print(text)


# -- tables --


def report(folder: Path) -> str:
    runs = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    runs.sort(key=lambda r: (list(CELLS).index(cell_of(r)) if cell_of(r) in CELLS else -1, r["repeat"]))
    return "\n".join([heading(runs), *models(runs, folder), "", *bounds(runs, folder), "", *misses(runs)]) + "\n"


def cell_of(run: dict[str, Any]) -> tuple[str, str, str, str]:
    return run["kind"], run["profile"], run["memory"], run["read"]


def heading(runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    times = sorted(run["time"] for run in runs)
    loose = sorted({name for run in runs for name in run["not_enforced"]})
    return "\n".join(
        [
            "# Paged runs, the time model and the bound\n",
            f"- model: {first['model']['name']}, {first['model']['bytes'] / 2**30:.2f} GiB; {PROMPT_TOKENS} prompt tokens, {len(first['tokens'])} decoded",
            f"- machine: {first['machine']['cpu']}, {first['machine']['allowed_cores']} cores; commit {first['commit']}; {times[0]} to {times[-1]}",
            "- command: `.venv/bin/python scripts/measure_paging.py`, which says how; tables again: `--report`",
            *(f"- disturbed: {file_name(cell_of(run), run['repeat'])}, others had {run['others_share']:.0%} of the processors" for run in runs if run.get("others_share", 0) > DISTURBED),
            *([f"- **NOT LIMITED: {', '.join(loose)}**"] if loose else []),
        ]
    ) + "\n"


def label(run: dict[str, Any]) -> str:
    read = run["limits"]["read_bytes_per_s"]
    rate = f"{read / 1e6:.0f} MB/s" if read else "unthrottled"
    return f"{run['profile']} | {run['memory'].removesuffix('%')} % | {rate}"


def speed(run: dict[str, Any]) -> float:
    return len(run["tokens"]) / sum(row["wall_s"] for row in run["tokens"])


def compute_of(runs: list[dict[str, Any]], profile: str, folder: Path) -> tuple[Compute, Trace, list[int]]:
    """Compute times with a profile's processors, and the routing."""
    plain = [row["wall_s"] for r in runs if r["kind"] == "reference" and r["profile"] == profile and r["memory"] == "plain" for row in r["tokens"]]
    traced = next(r for r in runs if r["kind"] == "reference" and r["profile"] == profile and r["memory"] == "traced")
    trace = last_request(Trace.load(folder / f"trace-{profile}.npz"))
    return Compute.measured(trace, statistics.fmean(plain)), trace, traced["token_ids"]


def last_request(trace: Trace) -> Trace:
    """The second of the reference's two passes, times included."""
    last = trace.seq == trace.seq.max()
    chosen = trace.select(last)
    kept = [int(u) for u in dict.fromkeys(trace.ubatch[last])]
    return dataclasses.replace(chosen, ubatch=chosen.ubatch - kept[0], ubatch_s=trace.ubatch_s[kept], expert_s=trace.expert_s[kept])


def reads_of(run: dict[str, Any], runs: list[dict[str, Any]], slice_bytes: int) -> Reads:
    """The bare reader's samples of this run; behind a limit that is below what the disk does, those of the unlimited runs, limited.

    A throttled group reads faster for a while after a pause, so short samples in it say little.
    """
    free = table([sample for other in runs if other["kind"] == "speed" and not other["limits"]["read_bytes_per_s"] for sample in other["samples"]], slice_bytes)
    limit = run["limits"]["read_bytes_per_s"]
    if limit and limit < free.bytes_per_s(slice_bytes, READS_IN_FLIGHT):
        return limited(free, limit)
    return table(run["samples"], slice_bytes)


def table(samples: list[tuple[int, int, float]], slice_bytes: int) -> Reads:
    rates: dict[int, list[tuple[int, float]]] = {}
    for depth, n_bytes, seconds in samples:
        rates.setdefault(depth, []).append((n_bytes, seconds))
    return Reads({(slice_bytes, depth): sum(b for b, _ in found) / sum(s for _, s in found) for depth, found in rates.items()})


def models(runs: list[dict[str, Any]], folder: Path) -> list[str]:
    """Predicted against measured, run by run."""
    lines = [
        "## Time model\n", "tokens/s, run by run. *Misses*: of the run, and of the replay of the trace in as many bundles. *Reads*: MB/s of the bare reader, touching what it read, three and six at once, or \"limited\".\n",
        "| profile | memory | reads limited to | reads | misses, run / replay | measured | predicted | off by | tokens |", "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    errors = []
    waits = json.loads((folder / WAITS).read_text()) if (folder / WAITS).exists() else {}
    for run in runs:
        if run["kind"] != "speed":
            continue
        compute, trace, ids = compute_of(runs, run["profile"], folder)
        compute = dataclasses.replace(compute, **waits)
        bundle_bytes = max(trace.bundle_bytes)
        replayed = replay(trace, slots_of(run, trace))
        reads = reads_of(run, runs, bundle_bytes // 3)
        predicted = predict(trace, replayed, compute, reads).tokens_per_s
        error = predicted / speed(run) - 1
        errors.append(abs(error))
        n = sum(row["misses"] for row in run["tokens"])
        simulated = int(replayed.missed[-len(run["tokens"]) :].sum())
        rates = "limited" if reads.limit_bytes_per_s else " / ".join(f"{reads.bytes_per_s(bundle_bytes / 3, depth) / 1e6:.0f}" for depth in (3, 6))
        same = "equal" if run["token_ids"] == ids else "NOT EQUAL"
        lines.append(f"| {label(run)} | {rates} | {n} / {simulated} | {speed(run):.2f} | {predicted:.2f} | {error:+.1%} | {same} |")
    return [*lines, "", f"Largest error: {max(errors, default=0):.1%}."]


def slots_of(run: dict[str, Any], trace: Trace) -> int:
    """Bundles that a run had memory for, in whole pages: three slices that share pages with their neighbours."""
    return int(run["budget_bytes"] // (max(trace.bundle_bytes) + 3 * mmap.PAGESIZE))


def bounds(runs: list[dict[str, Any]], folder: Path) -> list[str]:
    """Decoding as a share of max(resident compute time, the missed bytes in the bare reader's time)."""
    lines = [
        "## Share of the bound\n", "Bound: the longer of computing with everything in memory and of reading what the run missed, by the bare reader in the same run, six slices in flight.",
        "*Touched*: a bare reader that touches every line of what it read, once, as whoever computes with it must. *Both in turn*: the sum of computing and of reading, touched.",
        "*On demand*: what paging on demand would take if reading took nothing from computing and nobody had to be woken: a layer's reads, at the bare reader's rate, begin when its router has chosen; what is in memory is computed meanwhile, and each slice that was missed when it has come (`layer_s` in spac/trace/timing.py, without `spac tune`'s waits).",
        "*Least MB a token*: what Belady's MIN, over the prompt and the answer, would have read for the answer in as many slots, bundles fetched on demand; *its bound*: the longer of computing and of that, at the bare reader's rate.\n",
        "| profile | memory | reads limited to | MB a token | ms a token | computing, ms | bare reading, ms | touched, ms | share of the bound | of the bound, touched | of both in turn | on demand, ms | share of it | least MB a token | its bound, ms |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in runs:
        if run["kind"] == "speed":
            resident, trace, _ = compute_of(runs, run["profile"], folder)
            n = len(run["tokens"])
            wall, bare, touched = (sum(row[key] for row in run["tokens"]) / n for key in ("wall_s", "huge_s", "touched_s"))
            compute = resident.token_s
            n_bytes = sum(row["bytes_read"] for row in run["tokens"]) / n
            rate = Reads({(max(trace.bundle_bytes), READS_IN_FLIGHT): n_bytes / bare})
            on_demand = 1 / predict(trace, replay(trace, slots_of(run, trace)), resident, rate).tokens_per_s
            least = int(replay(trace, slots_of(run, trace), "min", "global").missed[-n:].sum()) * max(trace.bundle_bytes) / n
            lines.append(
                f"| {label(run)} | {n_bytes / 1e6:.1f} | {wall * 1e3:.1f} | {compute * 1e3:.1f} | {bare * 1e3:.1f} | {touched * 1e3:.1f}"
                f" | {max(compute, bare) / wall:.1%} | {max(compute, touched) / wall:.1%} | {(compute + touched) / wall:.1%}"
                f" | {on_demand * 1e3:.1f} | {on_demand / wall:.1%} | {least / 1e6:.1f} | {max(compute, bare * least / max(n_bytes, 1)) * 1e3:.1f} |"
            )
    return lines


def misses(runs: list[dict[str, Any]]) -> list[str]:
    """A layer's time where something was missed against the bare reader's for the same slices."""
    lines = [
        "## Cost of a miss\n",
        "A layer's time from its router's end to its experts' last product, less the last slice's product, against the bare reader's for the layer's missing slices, six in flight:",
        "*huge*, *touched*, *small*: into huge pages, the same and then touching every line of it, into small pages from all over memory. Sums over all such layers of a run; in brackets: where 1 / 2 / 3 / 4 of the layer's four bundles were missing.\n",
        "| profile | memory | reads limited to | layers | ms, paged | ms, huge | ms, touched | ms, small | paged / huge | paged / touched |", "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in runs:
        if run["kind"] == "misses":
            visits = {pages: [tuple(visit) for row in run["tokens"] for visit in row[pages]] for pages in PAGES}
            hits = [seconds for n, seconds, _ in visits["huge"] if n == 0]
            product_s = (statistics.median(hits) if hits else 0.0) / 12  # of four experts' three slices
            found = {pages: [(n, seconds - product_s, bare) for n, seconds, bare in visits[pages] if n > 0] for pages in PAGES}
            n = len(found["huge"])
            seconds = [[v[1] for v in found["huge"]], *([v[2] for v in found[pages]] for pages in PAGES)]
            columns = [f"{sum(values) / n * 1e3:.2f}" for values in seconds]
            lines.append(f"| {label(run)} | {n} | {' | '.join(columns)} | {ratios(found['huge'])} | {ratios(found['touched'])} |")
    return lines


def ratios(visits: list[tuple[int, float, float]]) -> str:
    """Paged by bare seconds, of all and by the number of missing bundles."""

    def of(chosen: list[tuple[int, float, float]]) -> str:
        return f"{sum(v[1] for v in chosen) / sum(v[2] for v in chosen):.2f}" if chosen else "none"

    return f"{of(visits)} ({' / '.join(of([v for v in visits if v[0] == n]) for n in (1, 2, 3, 4))})"


if __name__ == "__main__":
    main()
