"""`spac trace`: what is in a trace of routing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from spac.cli import options as opt
from spac.cli.simulate import AsJson, Requests, Selection, TraceFile

if TYPE_CHECKING:
    from spac.trace.format import Array, Trace


def trace(
    trace: TraceFile,
    requests: Selection = Requests.all,
    as_json: AsJson = False,
    debug: opt.Debug = False,
) -> int:
    """Show what is in a trace: sizes, skew, repetition, and what caches could make of it."""
    from spac.trace.format import Trace

    report = describe(Trace.load(trace).of_requests(requests.value))
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    for name, value in rows(report):
        print(f"{name:<14}{value}")
    return 0


def describe(trace: Trace) -> dict[str, Any]:
    """What `--json` prints.

    `skew`: by layer, the share of uses that goes to the most used quarter of the experts. `repeated`: share of a token's
    experts that the token before it in the same request used too. `hit_rates`: by cache, LRU's and MIN's, one cache for
    each layer.
    """
    import numpy as np

    from spac.trace.format import PHASES
    from spac.trace.simulation import parse_cache, replay

    caches = [text for text in ("12.5%", "25%", "50%", "75%") if parse_cache(text, trace) >= trace.n_layers]
    return {
        "model": str(trace.meta.get("model", "not said")),
        "tokens": trace.n_tokens,
        "requests": len(trace.requests),
        "phases": {name: int(np.count_nonzero(trace.phase == i)) for i, name in enumerate(PHASES)},
        "ubatches": len(np.unique(trace.ubatch)),
        "layers": trace.n_layers,
        "experts": trace.n_experts,
        "experts_used": trace.n_used,
        "bundle_bytes": max(trace.bundle_bytes, default=None),
        "skew": skew(trace),
        "repeated": repeated(trace),
        "hit_rates": {
            text: {policy: replay(trace, parse_cache(text, trace), policy).hit_rate for policy in ("default", "lru", "min")}
            for text in caches
        },
    }


def skew(trace: Trace) -> list[float]:
    """By layer: the share of uses that goes to the most used quarter of the experts."""
    import numpy as np

    shares = []
    for layer in range(trace.n_layers):
        ids = trace.ids[:, layer].ravel()
        counts = np.sort(np.bincount(ids[ids < trace.n_experts], minlength=trace.n_experts))[::-1]
        shares.append(float(counts[: max(1, trace.n_experts // 4)].sum() / max(1, counts.sum())))
    return shares


def repeated(trace: Trace) -> float:
    """Share of a token's experts that the token before it in the same request used too."""
    import numpy as np

    now, before = trace.ids[1:], trace.ids[:-1]
    follows: Array = (np.diff(trace.seq) == 0)[:, None, None] & (now < trace.n_experts)
    again = np.zeros(now.shape, bool)
    for i in range(trace.n_used):
        again |= now == before[:, :, i : i + 1]
    return float((again & follows).sum() / max(1, follows.sum()))


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    from spac.host.memory import format_bytes

    phases = ", ".join(f"{n} {name}" for name, n in report["phases"].items() if n)
    table = [
        ("model", report["model"]),
        ("tokens", f"{report['tokens']} in {report['requests']} request(s): {phases}"),
        ("experts", f"{report['experts']} in each of {report['layers']} layers, {report['experts_used']} used for a token"),
        ("a bundle", format_bytes(report["bundle_bytes"]) if report["bundle_bytes"] else "size not said"),
        ("repeated", f"{report['repeated']:.1%} of a token's experts were the token before's too"),
        ("skew", "share of uses of the most used quarter of experts, by layer:"),
        ("", " ".join(f"{share:.0%}" for share in report["skew"])),
    ]
    for cache, rates in report["hit_rates"].items():
        by_layer = f"LRU {rates['lru']:.1%}, MIN {rates['min']:.1%}, one cache for each layer"
        table.append((f"hits at {cache}", f"{by_layer}; the pager's policy {rates['default']:.1%}, one for all"))
    return table
