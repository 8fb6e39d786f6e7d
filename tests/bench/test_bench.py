"""`spac bench` from end to end: the demo model, fake peers, no permission, interrupted and failed runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spac.bench import plots
from spac.bench.suite import Row
from spac.cli.bench import contenders_of
from spac.errors import OptionError
from spac.host import limits
from tests.bench.test_contender import BIGMOE
from tests.conftest import Result

Cli = Callable[..., Result]
Bench = Callable[..., Result]


@pytest.fixture
def bench(cli: Cli, model_path: Path, tmp_path: Path) -> Bench:
    """`spac bench` on the demo model, results in tmp_path/t."""

    def call(*arguments: object) -> Result:
        return cli("bench", model_path, "--out", tmp_path, "--name", "t", "--threads", 1, "--tokens", 4, *arguments)

    return call


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "t" / "runs").glob("*.json"))]


@pytest.fixture
def fake_peer(tmp_path: Path) -> Callable[[str], Path]:
    """A program that takes itself for BigMoeOnEdge."""

    def write(body: str) -> Path:
        path, said = tmp_path / "bmoe", tmp_path / "said"
        said.write_text(BIGMOE)
        path.write_text(f'#!/bin/sh\nif [ "$1" = --help ]; then echo --moe-stream; exit 0; fi\n{body.format(said=said)}\n')
        path.chmod(0o755)
        return path

    return write


def test_the_demo_model(bench: Bench, tmp_path: Path) -> None:
    """Two ablations of spac in turn, three repeats of prompts of two kinds: records, equal tokens, tables."""
    specs = ["spac:paging=on", "spac:paging=on,store=buffered,io_threads=2,repack=off"]
    result = bench("--contender", specs[0], "--contender", specs[1], "--repeats", 2, "--kind", "code,maths", "--memory", "none")
    assert result.code == 0, result.err
    found = records(tmp_path)
    assert [(r["contender"], r["repeat"]) for r in found] == [(specs[0], 0), (specs[1], 0), (specs[0], 1), (specs[1], 1)]
    assert [r["prompts"][0]["kind"] for r in found] == ["code", "code", "maths", "maths"]
    for r in found:
        assert r["complete"]
        assert len(r["prompts"][0]["token_s"]) == 4
        assert len(r["prompts"][0]["token_ids"]) == 5
        assert len(r["layers"]) == 10
        assert r["expert"]["store"] == ("buffered" if "buffered" in r["contender"] else "direct")
        assert r["commands"][0][1:3] == ["-m", "spac.bench.worker"]
        assert r["cpu_s"] > 0
        assert {"cpu", "kernel"} <= set(r["machine"])
    assert found[0]["prompts"][0]["token_ids"] == found[1]["prompts"][0]["token_ids"]
    assert result.out.count("| yes |") == 2
    assert result.out == (tmp_path / "t" / "table.md").read_text() + "\n"
    assert (tmp_path / "t" / "hits.png").exists() == plots.available()


def test_limits_are_enforced_and_recorded(bench: Bench, tmp_path: Path) -> None:
    reason = limits.unavailable()
    if reason:
        pytest.skip(reason)
    result = bench("--contender", "spac:paging=on", "--repeats", 1, "--memory", "150M")
    assert result.code == 0, result.err
    (record,) = records(tmp_path)
    assert record["not_enforced"] == {}
    assert record["limits"]["memory_bytes"] == 150 << 20
    assert 0 < record["peak_bytes"] <= 150 << 20
    assert record["expert"]["bytes_read"] > 0
    if record["device_read_bytes"] is not None:
        assert record["device_read_bytes"] >= record["expert"]["bytes_read"]
    assert not any("came from a cache" in warning or "exceeds the limit" in warning for warning in record["warnings"])


def test_a_draft_that_is_only_sensed(bench: Bench, dense_path: Path, tmp_path: Path) -> None:
    """Tokens are those without it, what it foresaw is in the record, and it is within the limit."""
    specs = ["spac:paging=on", f"spac:paging=on,draft={dense_path},horizon=2"]
    result = bench("--contender", specs[0], "--contender", specs[1], "--repeats", 1, "--memory", "150M", "--tokens", 12)
    assert result.code == 0, result.err
    alone, drafted = records(tmp_path)
    assert drafted["prompts"][0]["token_ids"] == alone["prompts"][0]["token_ids"]
    assert drafted["signals"]["draft"]["used"] > 0 == alone["signals"]["draft"]["used"]
    assert drafted["expert"]["budget_bytes"] < alone["expert"]["budget_bytes"]
    if limits.unavailable() is None:
        assert 0 < drafted["peak_bytes"] <= 150 << 20


def test_without_permission_it_says_so_and_runs_unlimited(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_ROOT", tmp_path / "no" / "groups")
    result = bench("--contender", "spac", "--repeats", 1, "--memory", "200M")
    assert result.code == 0, result.err
    assert "memory_bytes is NOT limited" in result.err
    assert "**UNLIMITED: memory_bytes**" in result.out
    (record,) = records(tmp_path)
    assert set(record["not_enforced"]) == {"memory_bytes"}


def test_a_peer(bench: Bench, tmp_path: Path, fake_peer: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    peer = fake_peer("cat {said}")
    pauses: list[float] = []
    sleep = time.sleep  # others wait for their processes with it
    monkeypatch.setattr("spac.bench.runner.time.sleep", lambda seconds: (pauses.append(seconds), sleep(min(seconds, 0.02))))
    result = bench("--contender", "bigmoe:cache=50", "--peer", f"bigmoe={peer}", "--repeats", 2, "--prompts-per-run", 3, "--pause", 20)
    assert result.code == 0, result.err
    assert pauses.count(20) == 2
    found = records(tmp_path)
    assert len(found) == 2
    assert len(found[0]["commands"]) == 3  # a process for each prompt
    assert len(found[0]["prompts"]) == 3
    assert "20.00 (20.00 to 20.00)" in result.out


def test_all_are_given_the_same_text(bench: Bench, tmp_path: Path, fake_peer: Callable[[str], Path]) -> None:
    """Of the length that was asked for; and a record says what computed."""
    peer = fake_peer("cat {said}")
    contenders = ("--contender", "spac", "--contender", "bigmoe:cache=50", "--peer", f"bigmoe={peer}")
    result = bench(*contenders, "--repeats", 1, "--prompt-tokens", 9)
    assert result.code == 0, result.err
    ours, theirs = records(tmp_path)
    command = theirs["commands"][0]
    assert json.loads(ours["commands"][0][3])["prompts"][0]["text"] == command[command.index("-p") + 1]
    assert ours["prompts"][0]["prompt_tokens"] == 9
    assert (set(ours["sha256"]), set(theirs["sha256"])) == ({"libraries"}, {"program"})
    assert (ours["repacked"], theirs["repacked"]) == (True, False)


def test_an_interrupted_run_keeps_what_there_is(bench: Bench, tmp_path: Path, fake_peer: Callable[[str], Path]) -> None:
    """The second of two contenders interrupts us in its third token; --resume does the rest."""
    peer = fake_peer("head -n 3 {said}; sleep 1; kill -INT $PPID; exec sleep 60")  # by then we wait for it
    options = ("--contender", "spac", "--contender", "bigmoe:cache=50", "--peer", f"bigmoe={peer}", "--repeats", 1)
    result = bench(*options)
    assert result.code == 130
    assert "interrupted" in result.err
    first, second = records(tmp_path)
    assert first["complete"]
    assert (second["complete"], second["interrupted"]) == (False, True)
    assert second["prompts"][0]["token_s"] == [0.04, 0.06]
    assert "1 incomplete" in result.out

    fake_peer("cat {said}")
    assert "there are results already" in bench(*options).line
    again = bench(*options, "--resume")
    assert again.code == 0, again.err
    assert [r["complete"] for r in records(tmp_path)] == [True, True]
    assert records(tmp_path)[0]["time"] == first["time"]


def test_a_contender_that_fails_does_not_stop_the_others(bench: Bench, tmp_path: Path, fake_peer: Callable[[str], Path]) -> None:
    peer = fake_peer("echo loading >&2; echo out of luck >&2; exit 7")
    result = bench("--contender", "bigmoe:cache=50", "--contender", "spac", "--peer", f"bigmoe={peer}", "--repeats", 1)
    assert result.code == 0
    failed, fine = records(tmp_path)
    assert (failed["complete"], failed["returncode"], failed["error"]) == (False, 7, "out of luck")
    assert fine["complete"]
    assert "1 incomplete (out of luck)" in result.out


def test_contenders_beside_those_of_a_suite() -> None:
    """A peer that only the suite names is left out, one that was asked for is not; nobody takes part twice."""
    row = Row(name="a row", contenders=("spac", "bigmoe"))

    def names(given: list[str] | None, also: list[str] | None) -> list[str]:
        return [contender.name for contender in contenders_of(row, given, also, {}, {}, from_suite=True)]

    assert names(None, None) == ["spac"]
    assert names(None, ["spac:store=buffered", "spac"]) == ["spac", "spac:store=buffered"]
    assert names(["spac:repack=off"], ["spac"]) == ["spac:repack=off", "spac"]
    with pytest.raises(OptionError, match="--peer bigmoe=PATH"):
        names(None, ["bigmoe"])


def test_a_run_that_takes_too_long(bench: Bench, tmp_path: Path, fake_peer: Callable[[str], Path]) -> None:
    peer = fake_peer("head -n 3 {said}; exec sleep 60")
    result = bench("--contender", "bigmoe:cache=50", "--peer", f"bigmoe={peer}", "--repeats", 1, "--timeout", 1)
    assert result.code == 0
    (record,) = records(tmp_path)
    assert (record["complete"], record["timed_out"]) == (False, True)
    assert "stopped by the time limit" in result.out


def test_what_the_engine_says_is_in_the_record(bench: Bench, tmp_path: Path) -> None:
    result = bench("--contender", "spac:paging=on", "--memory", "10M", "--repeats", 1)
    assert result.code == 0
    (record,) = records(tmp_path)
    assert not record["complete"]
    assert "memory" in record["error"]


def test_plots_need_matplotlib_and_tables_do_not(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    result = bench("--contender", "spac", "--repeats", 1)
    assert result.code == 0
    assert "no plots: matplotlib is not installed" in result.err
    assert (tmp_path / "t" / "table.md").exists()
    assert not list((tmp_path / "t").glob("*.png"))


def test_bad_input_is_one_line(bench: Bench, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give its binary with --peer bigmoe=PATH" in bench("--contender", "bigmoe").line
    assert "no such file" in bench("--contender", "bigmoe", "--peer", "bigmoe=/nowhere/bmoe").line
    assert "not a BigMoeOnEdge binary" in bench("--contender", "bigmoe", "--peer", "bigmoe=/bin/true").line
    assert "peer 'vllm' does not exist" in bench("--peer", "vllm=/bin/true").line
    assert "profile 'pi6' does not exist" in bench("--profile", "pi6").line
    assert "suite 'slow' does not exist" in bench("--suite", "slow").line
    assert "no row whose name holds 'x!'" in bench("--suite", "quick", "--rows", "x!").line
    assert "not a rate" in bench("--read", "fast").line
    assert "not a size" in bench("--memory", "much").line
    assert "cannot be read" in bench("--contender", "spac", "--prompts", tmp_path / "none.jsonl").line
    assert "no records" in cli("bench", "--report", tmp_path).line
    from spac.bench import loadgen

    monkeypatch.setattr(loadgen, "available", lambda: False)
    assert "pip install mlcommons-loadgen" in bench("--contender", "spac", "--loadgen").line
    assert cli("bench").code == 2
    assert bench("--suite", "quick", "--memory", "1G").code == 2
    assert bench("--peer", "bigmoe").code == 2
    assert bench("--pause", "-1").code == 2
    assert not (tmp_path / "t").exists()


def test_the_list(cli: Cli) -> None:
    result = cli("bench", "--list")
    assert result.code == 0
    for word in ("pi5-8g-nvme", "full", "stock:mmap", "bigmoe"):
        assert word in result.out
