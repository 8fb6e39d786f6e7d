"""Markdown tables from records. Figures are medians with the smallest and the largest run; ratios are formed inside one row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from spac.bench import record as records
from spac.bench.latency import Percentiles, summarise
from spac.bench.record import Record
from spac.host.memory import format_bytes

Groups = dict[str, dict[str, list[Record]]]  # row name -> contender -> runs


def group(found: Sequence[Record]) -> Groups:
    """Records by row and contender, in the order in which they came."""
    groups: Groups = {}
    for record in found:
        groups.setdefault(record["row"]["name"], {}).setdefault(record["contender"], []).append(record)
    return groups


def usable(runs: Sequence[Record]) -> list[Record]:
    """Those that count: not interrupted, not failed. One that was stopped by its time limit counts with what it did."""
    return [r for r in runs if not r.get("interrupted") and (r["complete"] or r.get("timed_out"))]


def median(runs: Sequence[Record], figure: Callable[[Record], float | None]) -> tuple[float, float, float] | None:
    """Median, smallest and largest of a figure over the runs that have it."""
    values = [v for r in usable(runs) if (v := figure(r)) is not None]
    return (statistics.median(values), min(values), max(values)) if values else None


def speed_of(row: dict[str, Any]) -> Callable[[Record], float | None]:
    """The figure that a row is about: reading the prompt if it generates one token, else decoding."""
    return records.prefill_tokens_per_s if row["tokens"] == 1 else records.decode_tokens_per_s


def baseline(contenders: dict[str, list[Record]]) -> float | None:
    """The fastest unpatched llama.cpp of a row, tokens/s."""
    speeds = [
        found[0] for name, runs in contenders.items()
        if name.partition(":")[0] == "stock" and (found := median(runs, speed_of(runs[0]["row"]))) is not None
    ]  # fmt: skip
    return max(speeds, default=None)


def equal_tokens(name: str, contenders: dict[str, list[Record]]) -> str:
    """Whether a contender's tokens are those of the others, prompt by prompt, as far as the shorter answer goes: "yes", "NO", or "".

    Only contenders with the same kernels (repacked weights or not) are alike to the bit; where there are none, those with others
    are compared, and a difference is "other kernels".
    """
    runs = contenders[name]
    others = [(other[0]["repacked"] == runs[0]["repacked"], other) for key, other in contenders.items() if key != name]
    alike = [same for like, other in others if like and (same := _same(runs, other)) is not None]
    if alike:
        return "yes" if all(alike) else "NO"
    unlike = [same for like, other in others if not like and (same := _same(runs, other)) is not None]
    return "" if not unlike else "yes" if all(unlike) else "other kernels"


def _same(a: Sequence[Record], b: Sequence[Record]) -> bool | None:
    """Whether two contenders' answers agree; None: no prompt that both answered in tokens."""
    mine, theirs = _answers(a), _answers(b)
    pairs = [(mine[key], theirs[key]) for key in mine if key in theirs]
    return all(x[: len(y)] == y[: len(x)] for x, y in pairs) if pairs else None


def _answers(runs: Sequence[Record]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for prompt in (p for r in runs for p in r["prompts"] if p.get("token_ids")):
        key = f"{prompt['kind']}/{prompt['id']}"
        found[key] = max(found.get(key, []), prompt["token_ids"], key=len)
    return found


def markdown(found: Sequence[Record]) -> str:
    """All tables."""
    groups = group(found)
    return "\n".join([heading(found), speed_table(groups), latency_table(groups), *loadgen_lines(groups), *remarks(found)])


def heading(found: Sequence[Record]) -> str:
    """What was measured on what."""
    in_turn = sorted(found, key=lambda record: record["time"])
    first, last = in_turn[0], in_turn[-1]
    commits = dict.fromkeys(record["commit"] or "unknown" for record in in_turn)
    machine, model = first["machine"], first["model"]
    board = f"{machine['board']}, " if machine.get("board") else ""
    profile = first.get("profile") or {}
    lines = [
        f"- model: {model['name']}, {format_bytes(model['bytes'])}; threads: {first['threads']}",
        f"- machine: {board}{machine['cpu']}, {machine['cores']} cores, {format_bytes(machine['memory_bytes'])}, Linux {machine['kernel']}",
        f"- spac {first['versions'].get('spac', '')}, commit {', '.join(commits)}; {first['time']} to {last['time']}",
    ]
    if profile.get("name"):
        lines.append(f"- profile: {profile['name']}, {profile['title']}")
    lines += [f"- command: `{command}`" for command in dict.fromkeys(record["bench_command"] for record in in_turn) if command]
    return "\n".join(lines) + "\n"


def speed_table(groups: Groups) -> str:
    """Speed, bytes and memory."""
    header = [
        "row", "contender", "tokens/s, median (min to max)", "× fastest stock", "prefill tokens/s", "load, s", "MB a token",
        "of it ahead / in vain", "GB read", "peak", "page cache", "limit for experts", "CPU s a token", "hits", "tokens equal", "runs",
        "remarks",
    ]  # fmt: skip
    has_energy = any("energy_j" in r.get("board", {}) for contenders in groups.values() for runs in contenders.values() for r in runs)
    header += ["J, whole run"] * has_energy
    lines = [_line(header), "|" + "---|" * len(header)]
    for row_name, contenders in groups.items():
        base = baseline(contenders)
        for name, runs in contenders.items():
            row = runs[0]["row"]
            own = median(runs, speed_of(row))
            cells = [
                row_label(row_name, runs), name, _spread(median(runs, records.decode_tokens_per_s)),
                f"{own[0] / base:.2f}" if own and base else "",
                _middle(median(runs, records.prefill_tokens_per_s), "{:.1f}"), _middle(median(runs, lambda r: r.get("load_s")), "{:.2f}"),
                _middle(median(runs, records.bytes_per_token), "{:.1f}", 1e-6),
                _ahead(runs), _middle(median(runs, lambda r: r.get("device_read_bytes")), "{:.2f}", 1e-9), _bytes(runs, "peak_bytes"),
                _bytes(runs, "page_cache_bytes"), _middle(median(runs, records.expert_share), "{:.1%}"),
                _middle(median(runs, lambda r: records.per_token(r, "cpu_s")), "{:.3f}"),
                _middle(median(runs, lambda r: r.get("expert", {}).get("hit_rate")), "{:.1%}"),
                equal_tokens(name, contenders), str(len(usable(runs))), remark(runs),
            ]  # fmt: skip
            if has_energy:
                cells.append(_middle(median(runs, lambda r: r.get("board", {}).get("energy_j")), "{:.1f}"))
            lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def row_label(name: str, runs: Sequence[Record]) -> str:
    """A row's name, with a loud word if its limits were not in force."""
    missing = runs[0]["not_enforced"]
    return f"{name} **UNLIMITED: {', '.join(missing)}**" if missing else name


def remark(runs: Sequence[Record]) -> str:
    """What a reader should know of these runs."""
    skipped = next((r["skipped"] for r in runs if "skipped" in r), None)
    if skipped:
        return f"left out: {skipped}"
    words = []
    left = len(runs) - len(usable(runs))
    if left:
        why = sorted({str(r.get("error") or "interrupted") for r in runs if r not in usable(runs)})
        words.append(f"{left} incomplete ({'; '.join(why)[:160]})")
    cut = sum(bool(r.get("timed_out")) for r in runs)
    if cut:
        words.append(f"{cut} stopped by the time limit, counted as far as they came")
    tuned = {r["tuning"]["cache_mib"] for r in runs if "cache_mib" in r.get("tuning", {})}
    if tuned:
        words.append(f"cache {', '.join(map(str, sorted(tuned)))} MiB")
    words += sorted({w for r in runs for w in r.get("warnings", [])})
    return "; ".join(words).replace("|", "/")


def latency_table(groups: Groups) -> str:
    """MLPerf's single-stream figures: one query at a time; percentiles over queries, and over single tokens."""
    header = [
        "row", "contender", "queries", "TTFT p50 / p90 / p99, s", "time per output token p50 / p90 / p99, ms", "single tokens",
        "single token p50 / p90 / p99, ms",
    ]  # fmt: skip
    lines = [_line(header), "|" + "---|" * len(header)]
    for row_name, contenders in groups.items():
        for name, runs in contenders.items():
            counted = usable(runs)
            prompts = [p for r in counted for p in r["prompts"]]
            ttft = summarise([p["ttft_s"] for p in prompts if p.get("ttft_s")])
            tpot = summarise([s for r in counted for s in records.tpot_s(r)])
            token = summarise([s for p in prompts for s in p["token_s"]])
            if ttft or tpot:
                cells = [
                    row_label(row_name, runs), name, str(len(prompts)), _three(ttft, 1, "{:.2f}"), _three(tpot, 1000, "{:.1f}"),
                    str(token.count) if token else "unknown", _three(token, 1000, "{:.1f}"),
                ]  # fmt: skip
                lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def loadgen_lines(groups: Groups) -> list[str]:
    """What LoadGen said beside our own clocks."""
    lines = []
    for row_name, contenders in groups.items():
        for name, runs in contenders.items():
            for check in (r["loadgen"] for r in runs if "loadgen" in r):
                lines.append(
                    f"- LoadGen, SingleStream, {row_name}, {name}: {check['queries']} queries, p50 {check['loadgen_s']['p50']:.4f} s"
                    f" by LoadGen and {check['own_s']['p50']:.4f} s by us, {check['p50_difference']:.2%} apart"
                )
    return [*lines, ""] if lines else []


def remarks(found: Sequence[Record]) -> list[str]:
    """What holds for all tables."""
    missing: dict[str, str] = {}
    for record in found:
        missing.update(record["not_enforced"])
    lines = [f"- **{name} was not limited**: {reason}" for name, reason in missing.items()]
    energy = {r["board"]["energy_source"] for r in found if "board" in r}
    lines += [f"- energy: {source}" for source in sorted(energy)]
    if any(not r["complete"] and "skipped" not in r for r in found):
        lines.append('- incomplete runs are kept in `runs/`, with `"complete": false`')
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(found: tuple[float, float, float] | None) -> str:
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})" if found else ""


def _middle(found: tuple[float, float, float] | None, form: str, scale: float = 1.0) -> str:
    return form.format(found[0] * scale) if found else ""


def _ahead(runs: Sequence[Record]) -> str:
    """MB a token that were read before they were asked for, and of these what nobody asked for."""
    ahead, vain = median(runs, lambda r: records.per_token(r, "ahead_bytes")), median(runs, lambda r: records.per_token(r, "wasted_bytes"))
    return f"{_middle(ahead, '{:.1f}', 1e-6)} / {_middle(vain, '{:.1f}', 1e-6)}" if ahead and vain and ahead[0] else ""


def _bytes(runs: Sequence[Record], key: str) -> str:
    found = median(runs, lambda r: r.get(key))
    return format_bytes(int(found[2])) if found else ""


def _three(found: Percentiles | None, scale: float, form: str) -> str:
    return " / ".join(form.format(v * scale) for v in (found.p50, found.p90, found.p99)) if found else ""
