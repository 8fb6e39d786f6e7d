"""A check of our own clocks: MLPerf's LoadGen drives the engine once, in its SingleStream scenario, and both figures are compared.

Needs `mlcommons-loadgen` (the extra `bench`). LoadGen decides which prompt comes next; its logs stay beside the record.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spac.bench.latency import percentile
from spac.bench.prompt import Prompt

if TYPE_CHECKING:
    from spac.bench.worker import Engine

QUERIES = 32  # a prompt is asked again if there are fewer


def available() -> bool:
    """Whether LoadGen is installed."""
    import importlib.util

    return importlib.util.find_spec("mlperf_loadgen") is not None


def drive(engine: Engine, prompts: Sequence[Prompt], folder: Path) -> dict[str, Any]:
    """Answer prompts as LoadGen asks for them; returns its latencies of a query and ours, seconds."""
    import mlperf_loadgen as lg

    tokens = [engine.tokenize(prompt) for prompt in prompts]
    own: list[float] = []

    def issue(samples: Any) -> None:
        for sample in samples:
            start, n = time.perf_counter(), 0
            for _ in engine.tokens(tokens[sample.index]):
                n += 1
                if n == 1:
                    lg.FirstTokenComplete([lg.QuerySampleResponse(sample.id, 0, 0, 1)])
            own.append(time.perf_counter() - start)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0, n)])

    settings = lg.TestSettings()
    settings.scenario, settings.mode = lg.TestScenario.SingleStream, lg.TestMode.PerformanceOnly
    settings.min_query_count = settings.max_query_count = max(len(prompts), QUERIES)
    settings.min_duration_ms = 0
    settings.use_token_latencies = True
    folder.mkdir(parents=True, exist_ok=True)
    log = lg.LogSettings()
    log.log_output.outdir = str(folder)
    log.enable_trace = False  # megabytes
    sut = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(len(prompts), len(prompts), lambda _: None, lambda _: None)
    try:
        lg.StartTestWithLogSettings(sut, library, settings, log)
    finally:
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
    return compare((folder / "mlperf_log_summary.txt").read_text(), own)


def compare(log: str, own: Sequence[float]) -> dict[str, Any]:
    """LoadGen's summary beside our own clocks.

    Raises:
        ValueError: the log names no percentiles.
    """
    found = re.findall(r"^([\d.]+) percentile latency \(ns\)\s*:\s*(\d+)", log, re.MULTILINE)
    theirs = {f"p{float(percent):.0f}": int(ns) / 1e9 for percent, ns in found}
    if "p50" not in theirs:
        raise ValueError("LoadGen's summary names no percentiles of latency")
    ours = {f"p{p}": percentile(own, p) for p in (50, 90, 99)}
    return {
        "queries": len(own), "loadgen_s": theirs, "own_s": ours,
        "p50_difference": abs(theirs["p50"] - ours["p50"]) / ours["p50"],
    }  # fmt: skip
