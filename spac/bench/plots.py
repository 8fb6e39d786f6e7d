"""Plots from records: needs matplotlib (the extra `bench`)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spac.bench import record as records
from spac.bench import suite
from spac.bench.record import Record, write_whole
from spac.bench.report import Groups, group, median, usable


def available() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def draw(found: Sequence[Record], folder: Path) -> list[Path]:
    """All plots for which there are figures, as PNG files; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    groups = group(found)
    drawn = []
    for name, function in (
        ("speed", speed), ("latency", latency), ("bytes", bytes_per_token), ("stalls", stalls), ("hits", hits),
    ):  # fmt: skip
        figure = function(groups)
        if figure is not None:
            image = io.BytesIO()  # so that a full disk leaves no part of one
            figure.savefig(image, dpi=110, format="png")
            path = folder / f"{name}.png"
            write_whole(path, image.getvalue())
            drawn.append(path)
    return drawn


def short(contender: str) -> str:
    """A contender's name without what differs between rows, how many tokens it makes and a peer's cache, and without folders."""
    name = re.sub(r",?\b(tokens=\d+|cache=\d+|learned=[^,]*)", "", contender)
    name = re.sub(r"draft=[^,]*/([^,/]+?)(\.gguf)?(?=,|$)", r"draft=\1", name)
    return name.rstrip(":").replace(":,", ":")


def _figure(width: float = 8, height: float = 4.5) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def speed(groups: Groups) -> Any | None:
    """Tokens/s by memory limit, a line for each contender and read limit, with the spread of its runs."""
    lines: dict[tuple[str, str], list[tuple[float, tuple[float, float, float]]]] = {}
    for contenders in groups.values():
        for name, runs in contenders.items():
            limit, value = runs[0]["limits"]["memory_bytes"], median(runs, records.decode_tokens_per_s)
            if limit and value and runs[0]["row"]["tokens"] > 1:
                share = 100 * limit / runs[0]["model"]["bytes"]
                lines.setdefault((short(name), suite.rate(runs[0]["limits"]["read_bytes_per_s"])), []).append((share, value))
    if not lines:
        return None
    figure, axes = _figure(width=11)
    names, rates = ([*dict.fromkeys(key[i] for key in lines)] for i in (0, 1))
    for (name, rate), points in lines.items():
        points.sort()
        look = {"color": f"C{names.index(name)}", "linestyle": ("-", "--", ":", "-.")[rates.index(rate) % 4]}
        middle = [v[0] for _, v in points]
        spread = [[v[0] - v[1] for _, v in points], [v[2] - v[0] for _, v in points]]
        axes.errorbar([s for s, _ in points], middle, yerr=spread, marker="o", capsize=3, label=f"{name}, {rate}", **look)
    axes.set(xlabel="memory limit, % of the model", ylabel="tokens/s", title="Decoding speed by memory budget", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def latency(groups: Groups) -> Any | None:
    """Time of each token, in the order in which they came: one run of each contender, a panel for each row."""
    panels = {
        row: {n: s for n, runs in contenders.items() if (s := [t for r in usable(runs)[:1] for p in r["prompts"] for t in p["token_s"]])}
        for row, contenders in groups.items()
    }  # fmt: skip
    panels = {row: series for row, series in panels.items() if any(len(s) > 1 for s in series.values())}
    if not panels:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    for axes, (row, series) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, values in series.items():
            axes.plot(range(1, len(values) + 1), [1000 * v for v in values], marker=".", linewidth=1, label=short(name))
        axes.set(title=row, xlabel="token", ylabel="ms", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def bytes_per_token(groups: Groups) -> Any | None:
    """What was read from the disk for each token while decoding."""
    bars = [
        (f"{row}\n{short(name)}", found) for row, contenders in groups.items() for name, runs in contenders.items()
        if (found := median(runs, records.bytes_per_token)) is not None
    ]  # fmt: skip
    if not bars:
        return None
    figure, axes = _figure(height=1.2 + 0.45 * len(bars))
    spread = [[(b[0] - b[1]) / 1e6 for _, b in bars], [(b[2] - b[0]) / 1e6 for _, b in bars]]
    axes.barh(range(len(bars)), [b[0] / 1e6 for _, b in bars], xerr=spread, capsize=2)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize="x-small")
    axes.invert_yaxis()
    axes.set(xlabel="MB read for each token", title="Bytes per token")
    if any(b[0] for _, b in bars):
        axes.set_xscale("log")
    axes.grid(alpha=0.3, axis="x")
    return figure


def stalls(groups: Groups) -> Any | None:
    """Where the time of a token goes: shares as stacked bars, and how long it is."""
    bars = []
    parts = ("compute_s", "wait_s", "other_s", "unknown_s")
    for row, contenders in groups.items():
        for name, runs in contenders.items():
            found = [(b, records.decode_tokens(r)) for r in usable(runs) if (b := records.breakdown(r)) is not None]
            tokens = sum(n for _, n in found)
            if tokens:
                bars.append((f"{row}\n{short(name)}", [1000 * sum(getattr(b, part) for b, _ in found) / tokens for part in parts]))
    if not bars:
        return None
    figure, axes = _figure(height=1.6 + 0.45 * len(bars))
    left = [0.0] * len(bars)
    labels = ("compute", "waiting for experts", "other (sampling, Python)", "compute and page faults, not told apart")
    for part, label in enumerate(labels):
        widths = [100 * values[part] / sum(values) for _, values in bars]
        if any(widths):
            axes.barh(range(len(bars)), widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, (_, values) in enumerate(bars):
        axes.text(101, y, f"{sum(values):.3g} ms", va="center", fontsize="x-small")
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize="x-small")
    axes.invert_yaxis()
    axes.set(xlabel="% of the time of a token", title="Where the time goes", xlim=(0, 115))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def hits(groups: Groups) -> Any | None:
    """Hit rate by layer, as a heat map."""
    lines: list[tuple[str, dict[int, float]]] = []
    for row, contenders in groups.items():
        for name, runs in contenders.items():
            counts: dict[int, tuple[int, int]] = {}
            for layer in (layer for r in usable(runs) for layer in r.get("layers", [])):
                h, m = counts.get(layer["layer"], (0, 0))
                counts[layer["layer"]] = (h + layer["hits"], m + layer["misses"])
            if any(h + m for h, m in counts.values()):
                lines.append((f"{row}\n{short(name)}", {n: h / max(h + m, 1) for n, (h, m) in counts.items()}))
    if not lines:
        return None
    layers = sorted({n for _, values in lines for n in values})
    figure, axes = _figure(height=1.6 + 0.45 * len(lines))
    image = axes.imshow([[values.get(n, float("nan")) for n in layers] for _, values in lines], vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize="x-small")
    axes.set_xticks(range(len(layers)), [str(n) for n in layers])
    axes.set(xlabel="layer", title="Hit rate by layer")
    figure.colorbar(image, ax=axes)
    return figure
