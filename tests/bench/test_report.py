"""Figures, tables and plots from records."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spac.bench import loadgen, plots, record, report, runner
from spac.bench.latency import percentile, summarise
from spac.bench.prompt import Prompt
from spac.errors import OptionError, SpacError

Record = dict[str, Any]


def make(contender: str, speeds: list[float], *, repeat: int = 0, ids: list[int] | None = None, **others: Any) -> Record:
    """A canned record: one prompt, tokens that took 1/speed each."""
    answer: Record = {
        "kind": "chat", "id": "1", "prompt_tokens": 10, "ttft_s": 0.5, "token_s": [1 / s for s in speeds],
        "decode": {"eval_s": 0.9 * sum(1 / s for s in speeds), "device_read_bytes": 1_000_000 * len(speeds), "cpu_s": 0.1},
        "complete": True,
    }  # fmt: skip
    if ids is not None:
        answer["token_ids"] = ids
    return {
        "format": 1, "complete": True, "contender": contender, "repeat": repeat, "threads": 2,
        "row": {"name": "half", "tokens": 4, "warm": False}, "not_enforced": {}, "profile": None,
        "limits": {"memory_bytes": 1 << 29, "read_bytes_per_s": 500_000_000}, "prompts": [answer], "load_s": 0.25,
        "device_read_bytes": 2_000_000_000, "peak_bytes": 500 << 20, "page_cache_bytes": 10 << 20, "warnings": [], "repacked": True,
        "model": {"name": "m.gguf", "bytes": 1 << 30}, "versions": {"spac": "1"}, "commit": "abc", "time": "now", "bench_command": "spac bench",
        "machine": {"cpu": "c", "board": None, "cores": 2, "memory_bytes": 1 << 33, "kernel": "6"}, "board": {"energy_source": "none here"},
        **others,
    }  # fmt: skip


STOCK = [make("stock:mmap", [1.0, 1.0], ids=[1, 2, 3]), make("stock:mmap", [2.0, 2.0], repeat=1, ids=[1, 2, 3])]
SPAC = [make("spac", [s] * 4, repeat=i, ids=[1, 2, 3, 4, 5], expert={"hit_rate": 0.5}) for i, s in enumerate((8.0, 10.0, 9.0))]


def cells(table: str, contender: str) -> dict[str, str]:
    """A contender's line of the first table."""
    lines = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        if line[1] == contender:
            return dict(zip(lines[0], line, strict=False))
    raise AssertionError(f"{contender} is not in\n{table}")


def test_share_of_the_limit_that_experts_have() -> None:
    """spac says its budget, a peer's cache was searched for; the kernel's page cache is nobody's."""
    limit = {"memory_bytes": 400 << 20, "read_bytes_per_s": None}
    runs = [
        make("spac", [1.0], limits=limit, expert={"hit_rate": 0.5, "budget_bytes": 300 << 20}),
        make("bigmoe", [1.0], limits=limit, expert={"hit_rate": 0.5}, tuning={"cache_mib": 100}), make("stock:mmap", [1.0], limits=limit),
    ]  # fmt: skip
    table = report.markdown(runs)
    assert [cells(table, name)["limit for experts"] for name in ("spac", "bigmoe", "stock:mmap")] == ["75.0%", "25.0%", ""]
    assert record.expert_share(runs[0] | {"limits": {"memory_bytes": None}}) is None


def test_energy_where_it_can_be_read() -> None:
    assert "J, whole run" not in cells(report.markdown(SPAC), "spac")
    runs = [make("spac", [1.0], board={"energy_source": "RAPL, packages", "energy_j": 12.5}), make("stock:mmap", [1.0])]
    table = report.markdown(runs)
    assert [cells(table, name)["J, whole run"] for name in ("spac", "stock:mmap")] == ["12.5", ""]
    assert "- energy: RAPL, packages" in table


def test_all_commands_are_named() -> None:
    table = report.markdown(
        [make("spac", [1.0], bench_command=c, time=t) for t, c in (("2", "spac bench b"), ("1", "spac bench a"), ("3", "spac bench b"))]
    )
    assert [line for line in table.splitlines() if line.startswith("- command")] == [
        "- command: `spac bench a`",
        "- command: `spac bench b`",
    ]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"expert": {"bytes_read": 3_000_000_000}}, "reads came from a cache"),
        ({"process_read_bytes": 1_000_000_000}, "others read 1.00 GB from the disk meanwhile"),
        ({"locked_bytes": 1 << 29}, "only 536870912 bytes are locked"),
        ({"cached_before_bytes": 1 << 28}, "not cold"),
        ({"peak_bytes": (1 << 29) + (1 << 20)}, "exceeds the limit"),
        ({"peak_bytes": 1 << 30, "not_enforced": {"memory_bytes": "no groups"}}, ""),
        ({}, ""),
    ],
)
def test_what_makes_a_record_doubtful(changed: Record, word: str) -> None:
    found = runner.warnings(make("spac", [1.0], **changed))
    assert found == [] if not word else len(found) == 1 and word in found[0]


def test_percentiles_are_loadgens() -> None:
    """Index floor(n p / 100) of the sorted values, no interpolation."""
    assert [percentile([3, 1, 2, 4], p) for p in (0, 50, 90, 99, 100)] == [1, 3, 4, 4, 4]
    assert percentile(list(range(100)), 90) == 90
    found = summarise([5.0])
    assert found is not None
    assert (found.count, found.p50, found.p99) == (1, 5.0, 5.0)
    assert summarise([]) is None
    with pytest.raises(ValueError):
        percentile([], 50)


def test_the_table_is_of_medians_and_ratios() -> None:
    line = cells(report.markdown([*STOCK, *SPAC]), "spac")
    assert line["tokens/s, median (min to max)"] == "9.00 (8.00 to 10.00)"
    assert line["× fastest stock"] == "6.00"  # 9 by the median of 1 and 2
    assert line["tokens equal"] == "yes"
    assert (line["MB a token"], line["GB read"], line["hits"], line["runs"]) == ("1.0", "2.00", "50.0%", "3")
    assert line["prefill tokens/s"] == "20.0"


def test_different_tokens_are_said() -> None:
    other = make("spac", [9.0], ids=[1, 7, 3])
    assert cells(report.markdown([*STOCK, other]), "spac")["tokens equal"] == "NO"
    longer = make("spac", [9.0], ids=[1, 2, 3, 4, 99])
    assert cells(report.markdown([*STOCK, longer]), "spac")["tokens equal"] == "yes"
    elsewhere = copy.deepcopy(other)
    elsewhere["prompts"][0]["id"] = "2"
    assert cells(report.markdown([*STOCK, elsewhere]), "spac")["tokens equal"] == ""


def test_other_kernels_may_differ() -> None:
    """Repacked weights are computed by kernels that round differently: like is compared with like, where there is like."""
    plain = make("spac:repack=off", [9.0], ids=[1, 7, 3], repacked=False)
    text = report.markdown([*STOCK, *SPAC, plain])
    assert [cells(text, name)["tokens equal"] for name in ("stock:mmap", "spac", "spac:repack=off")] == ["yes", "yes", "other kernels"]


def test_incomplete_runs_do_not_count_but_show() -> None:
    broken = make("spac", [100.0], repeat=3, complete=False, interrupted=True)
    failed = make("spac", [100.0], repeat=4, complete=False, error="killed at the memory limit")
    text = report.markdown([*STOCK, *SPAC, broken, failed])
    line = cells(text, "spac")
    assert line["tokens/s, median (min to max)"] == "9.00 (8.00 to 10.00)"
    assert "2 incomplete (interrupted; killed at the memory limit)" in line["remarks"]
    assert '"complete": false' in text


def test_a_run_that_was_stopped_counts_as_far_as_it_came() -> None:
    line = cells(report.markdown([make("stock:mmap", [1.0, 1.0], complete=False, timed_out=True)]), "stock:mmap")
    assert line["tokens/s, median (min to max)"].startswith("1.00")
    assert "stopped by the time limit" in line["remarks"]


def test_missing_limits_are_loud() -> None:
    text = report.markdown([make("spac", [9.0], not_enforced={"memory_bytes": "no permission"})])
    assert "half **UNLIMITED: memory_bytes**" in text
    assert "**memory_bytes was not limited**: no permission" in text


def test_what_was_left_out_has_its_reason() -> None:
    left = {**make("stock:mlock", []), "prompts": [], "complete": False, "skipped": "does not fit"}
    assert cells(report.markdown([left]), "stock:mlock")["remarks"] == "left out: does not fit"


def test_rows_about_prefill_compare_prefill() -> None:
    slow, fast = make("stock:mmap", [1.0]), make("spac", [1.0])
    for made in (slow, fast):
        made["row"] = {"name": "prefill", "tokens": 1, "warm": False}
    fast["prompts"][0]["ttft_s"] = 0.25
    assert cells(report.markdown([slow, fast]), "spac")["× fastest stock"] == "2.00"


def test_the_breakdown() -> None:
    full = make("spac", [10.0, 10.0])
    full["prompts"][0]["decode"]["stall_s"] = 0.05
    found = record.breakdown(full)
    assert found is not None
    assert (found.compute_s, found.wait_s, found.other_s, found.unknown_s) == pytest.approx((0.13, 0.05, 0.02, 0))
    faults = record.breakdown(make("stock", [10.0, 10.0]))
    assert faults is not None
    assert (faults.unknown_s, faults.other_s) == pytest.approx((0.18, 0.02))


def test_a_peer_that_gives_means_only() -> None:
    made = make("ik_llama", [])
    made["prompts"] = [{"kind": "chat", "id": "1", "prompt_tokens": 7, "ttft_s": 0.1, "mean_token_s": 0.5, "tokens": 4, "token_s": []}]
    assert record.decode_tokens_per_s(made) == 2.0
    assert record.tpot_s(made) == [0.5]
    assert "unknown" in report.markdown([made])


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = copy.deepcopy([*STOCK, *SPAC])
    for r in found[2:]:
        r["layers"] = [{"layer": n, "hits": n, "misses": 1} for n in range(4)]
    drawn = plots.draw(found, tmp_path)
    assert {path.name for path in drawn} == {"speed.png", "latency.png", "bytes.png", "stalls.png", "hits.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stock:mmap,repack=off,tokens=4", "stock:mmap,repack=off"),
        ("ik_llama:tokens=8", "ik_llama"),
        ("spac:tokens=3,store=mmap", "spac:store=mmap"),
        ("bigmoe:cache=627", "bigmoe"),
        ("spac:draft=models/small.gguf,learned=build/l.npz", "spac:draft=small"),
    ],
)
def test_a_contenders_short_name(name: str, expected: str) -> None:
    assert plots.short(name) == expected


def test_records_are_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "001-x-0.json"
    record.write(path, {**make("spac", [1.0]), "commands": ["/home/me/spac/.venv/bin/python"]}, {"/home/me/spac/": "", "/home/me": "HOME"})
    (read,) = record.read_folder(tmp_path)
    assert read["commands"] == [".venv/bin/python"]
    (tmp_path / "runs" / "002-y-0.json").write_text("{}")
    with pytest.raises(OptionError, match="not a record"):
        record.read_folder(tmp_path)
    with pytest.raises(OptionError, match="no records"):
        record.read_folder(tmp_path / "none")


def test_a_record_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SpacError, match=r"x\.json: cannot be written: No space left"):
        record.write(tmp_path / "x.json", {}, {})
    assert list(tmp_path.iterdir()) == []


def test_loadgen_asks_and_both_clocks_agree(tmp_path: Path) -> None:
    pytest.importorskip("mlperf_loadgen")

    class Engine:
        def tokenize(self, prompt: Prompt) -> list[int]:
            return [1]

        def tokens(self, prompt: list[int]) -> Iterator[int]:
            for token in range(3):
                time.sleep(0.004)
                yield token

    found = loadgen.drive(Engine(), [Prompt("chat", "1", "x")], tmp_path)  # type: ignore[arg-type]
    assert found["queries"] == loadgen.QUERIES
    assert 0.012 <= found["own_s"]["p50"] < 1
    assert found["p50_difference"] < 0.5


def test_loadgens_summary() -> None:
    log = "50.00 percentile latency (ns)          : 1000000000\n90.00 percentile latency (ns)   : 2000000000\n99.00 percentile latency (ns) : 3000000000\n"
    found = loadgen.compare(log, [0.8, 0.8, 0.8])
    assert found["loadgen_s"] == {"p50": 1.0, "p90": 2.0, "p99": 3.0}
    assert found["p50_difference"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no percentiles"):
        loadgen.compare("INVALID", [1.0])
