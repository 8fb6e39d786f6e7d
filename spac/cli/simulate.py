"""`spac simulate`: a trace replayed through caches of some sizes and policies."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spac.cli import options as opt

if TYPE_CHECKING:
    from spac.trace.format import Trace
    from spac.trace.simulation import Replay
    from spac.trace.timing import Compute, Reads


class Quota(StrEnum):
    auto = "auto"
    all_layers = "global"
    layer = "layer"


class Requests(StrEnum):
    all = "all"
    first_half = "first-half"
    second_half = "second-half"
    even = "even"
    odd = "odd"


TraceFile = Annotated[str, typer.Argument(metavar="TRACE", help="A file that `spac run --trace` wrote.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Selection = Annotated[Requests, typer.Option(help="Replay only some requests, by the order in which they begin.")]


def simulate(
    trace: TraceFile,
    cache: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZES", help="Room: 25% of all bundles (what is simulated by default), or a count; several by commas."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="default (the pager's), lru, lfu, static, s3fifo, min (Belady's); several by commas."),
    ] = None,
    quota: Annotated[
        Quota, typer.Option(help="One cache for all layers, or one for each; auto: one for default, as in the pager, else one for each.")
    ] = Quota.auto,
    requests: Selection = Requests.all,
    tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Replay only the first N tokens.", show_default=False)] = None,
    bundle_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of a bundle, where the trace does not say: 13M.", show_default=False)
    ] = None,
    reads: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Measured reads (the file that spac tune keeps): predict tokens/s.", show_default=False),
    ] = None,
    read_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Reads are limited to so many bytes a second: 500M.", show_default=False)
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(metavar="TRACE", help="Compute times from this trace, all experts in memory; else TRACE.", show_default=False),
    ] = None,
    token_s: Annotated[
        float | None, typer.Option(min=1e-6, metavar="S", help="Seconds a token takes untraced, all in memory.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    debug: opt.Debug = False,
) -> int:
    """Replay a trace: how often would experts be in memory, by size and policy of the cache?"""
    from dataclasses import replace

    from spac.trace.format import Trace
    from spac.trace.simulation import parse_cache, replay
    from spac.trace.timing import Compute

    loaded = select(Trace.load(trace), requests, tokens, bundle_bytes)
    sizes = [(text, parse_cache(text, loaded)) for text in split(cache or ["25%"])]
    model = None
    if reads is not None:
        measured = load_reads(reads, read_limit)
        times = Compute.measured(Trace.load(compute if compute is not None else trace), token_s)
        model = (replace(times, contention_s=measured.contention_s, visit_s=measured.visit_s), measured)
    replays = [(text, replay(loaded, n, name, quota.value)) for text, n in sizes for name in split(policy or ["default,lru,min"])]
    results = [describe(loaded, text, replayed, model) for text, replayed in replays]
    if as_json:
        print(json.dumps({"trace": trace, "tokens": loaded.n_tokens, "requests": len(loaded.requests), "results": results}))
    else:
        show(loaded, results)
    return 0


def split(texts: list[str]) -> list[str]:
    """Values that were given by commas or by repeating the option."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def select(trace: Trace, requests: Requests, tokens: int | None, bundle_bytes: str | None) -> Trace:
    """The part of a trace that was asked for."""
    from dataclasses import replace

    part = trace.of_requests(requests.value)
    if tokens is not None and tokens < part.n_tokens:
        part = part.head(tokens)
    if bundle_bytes is not None:
        part = replace(part, bundle_bytes=(n_bytes("--bundle-bytes", bundle_bytes),) * part.n_layers)
    return part


def load_reads(path: str, limit: str | None) -> Reads:
    """Measured reads, behind a limit if one is given."""
    from spac.trace.timing import Reads, limited

    measured = Reads.load(path)
    return limited(measured, n_bytes("--read-limit", limit)) if limit is not None else measured


def n_bytes(option: str, text: str) -> int:
    """What an option says in bytes.

    Raises:
        OptionError: it has no meaning.
    """
    from spac.errors import OptionError
    from spac.host.memory import parse_memory

    try:
        found = None if text.strip().endswith("%") else parse_memory(text)
    except OptionError:
        found = None
    if found is None:
        raise OptionError(f"{option} {text!r} is not a size: write '13M'")
    return found


def describe(trace: Trace, cache: str, replayed: Replay, model: tuple[Compute, Reads] | None) -> dict[str, Any]:
    """One result of `--json`; `bytes` is null if the trace does not know a bundle's bytes."""
    result: dict[str, Any] = {
        "policy": replayed.policy,
        "cache": cache,
        "bundles": replayed.n_bundles,
        "quota": replayed.quota,
        "requests": replayed.requests,
        "hits": replayed.hits,
        "misses": replayed.misses,
        "hit_rate": replayed.hit_rate,
        "bytes": replayed.bytes,
    }
    if model is not None:
        from spac.trace.timing import predict

        prediction = predict(trace, replayed, *model)
        result["tokens_per_s"] = prediction.tokens_per_s
        result["bound_tokens_per_s"] = prediction.bound_tokens_per_s
    return result


def show(trace: Trace, results: list[dict[str, Any]]) -> None:
    """The same for people; misses are compared with LRU's of the same cache where that was replayed."""
    from rich.console import Console
    from rich.table import Table

    from spac.host.memory import format_bytes

    columns = ["cache", "policy", "caches", "hits", "misses", "to LRU"]
    timed = "tokens_per_s" in results[0] if results else False
    columns += (["bytes/token"] if trace.bundle_bytes else []) + (["tokens/s", "bound"] if timed else [])
    lru = {result["cache"]: result["misses"] for result in results if result["policy"] == "lru"}
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    for result in results:
        base = lru.get(result["cache"])
        row = [
            f"{result['cache']} ({result['bundles']})" if result["cache"].endswith("%") else result["cache"],
            result["policy"],
            "one" if result["quota"] == "global" else "by layer",
            f"{result['hit_rate']:.1%}",
            f"{result['misses']:,}",
            f"{result['misses'] / base - 1:+.1%}" if base else "",
        ]
        if trace.bundle_bytes:
            row.append(format_bytes(round(result["bytes"] / trace.n_tokens)))
        if timed:
            row += [f"{result['tokens_per_s']:.2f}", f"{result['bound_tokens_per_s']:.2f}"]
        table.add_row(*row)
    Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120).print(table)
