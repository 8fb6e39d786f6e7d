"""`spac run --trace`, `spac trace`, `spac simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spac import device
from tests.cli.test_run import GREEDY, PROMPT, Cli
from tests.devices import make_device


@pytest.fixture
def trace_path(cli: Cli, model_path: Path, tmp_path: Path) -> Path:
    path = tmp_path / "demo.npz"
    result = cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "off", "--trace", path)
    assert (result.code, result.err) == (0, "")
    assert result.out == cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "off").out
    return path


def test_a_trace_is_shown(cli: Cli, trace_path: Path) -> None:
    report = json.loads(cli("trace", trace_path, "--json").out)
    assert (report["layers"], report["experts"], report["experts_used"], report["requests"]) == (10, 32, 4, 1)
    assert report["tokens"] == report["phases"]["prefill"] + report["phases"]["decode"]
    assert report["phases"]["decode"] == 11
    assert len(report["skew"]) == 10
    assert 0 < report["repeated"] < 1
    for rates in report["hit_rates"].values():
        assert 0 <= rates["lru"] <= rates["min"] <= 1
    text = cli("trace", trace_path).out
    for word in ("spac demo target", "32 in each of 10 layers", "11 decode", "hits at 25%"):
        assert word in text


def test_verified_tokens_are_marked(cli: Cli, model_path: Path, dense_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    options = (
        "-p",
        "The open() system call",
        "--temp",
        "0",
        "-n",
        "12",
        "--ctx",
        "512",
        "--draft",
        dense_path,
        "--draft-max",
        "2",
        "--json",
    )
    draft = json.loads(cli("run", model_path, *options, "--trace", path).out)["draft"]
    phases = json.loads(cli("trace", path, "--json").out)["phases"]
    assert phases["verify"] > draft["proposed"] > 0  # each verification holds a token that is known, too
    assert phases["draft"] == 0  # the draft has experts of its own, or none


def test_a_replay_prints_one_object(cli: Cli, trace_path: Path) -> None:
    report = json.loads(cli("simulate", trace_path, "--cache", "25%", "--cache", "200,50%", "--policy", "default,lru,min", "--json").out)
    assert [(r["cache"], r["policy"]) for r in report["results"]] == [
        (c, p) for c in ("25%", "200", "50%") for p in ("default", "lru", "min")
    ]
    for result in report["results"]:
        assert result["requests"] == result["hits"] + result["misses"] > 0
        assert result["bytes"] == result["misses"] * 110592
    assert report["results"][0]["bundles"] == 80


def test_a_replay_prints_a_table(cli: Cli, trace_path: Path) -> None:
    lines = cli("simulate", trace_path, "--cache", "25%", "--policy", "lru,s3fifo").out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["25%", "(80)", "lru"], ["25%", "(80)", "s3fifo"]]


def test_speed_is_predicted_from_what_tune_keeps(cli: Cli, trace_path: Path, tmp_path: Path) -> None:
    kept = tmp_path / "device.json"
    arguments = ("simulate", trace_path, "--cache", "10%", "--reads", kept, "--token-s", "0.01", "--json")
    device.save(make_device(), kept)
    result = json.loads(cli(*arguments).out)["results"][0]
    assert 0 < result["tokens_per_s"] <= 100
    for slower in (make_device(contention_s=1e-6), make_device(visit_s=1e-3)):
        device.save(slower, kept)
        predicted = json.loads(cli(*arguments).out)["results"][0]
        assert predicted["tokens_per_s"] < result["tokens_per_s"]
        assert predicted["bound_tokens_per_s"] == result["bound_tokens_per_s"]
    kept.write_text(kept.read_text()[:-9])
    assert "damaged; run spac tune" in cli("simulate", trace_path, "--reads", kept).line


def test_speed_is_predicted(cli: Cli, trace_path: Path, tmp_path: Path) -> None:
    reads = tmp_path / "reads.txt"
    reads.write_text("  1024  1  1000\n 1024  6  1000\n")
    arguments = ("simulate", trace_path, "--cache", "10%", "--reads", reads, "--token-s", "0.01", "--json")
    fast = json.loads(cli(*arguments).out)["results"]
    slow = json.loads(cli(*arguments, "--read-limit", "1M").out)["results"]
    for a, b in zip(fast, slow, strict=True):
        assert 0 < b["tokens_per_s"] < a["tokens_per_s"] <= 100
        assert b["tokens_per_s"] <= b["bound_tokens_per_s"]


@pytest.mark.parametrize("command", ["trace", "simulate"])
@pytest.mark.parametrize("name", ["missing", "folder", "text", "foreign", "empty"])
def test_files_that_are_no_traces(cli: Cli, tmp_path: Path, command: str, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "foreign":
        with path.open("wb") as file:
            np.savez(file, x=np.arange(3))
    elif name != "missing":
        path.write_text("" if name == "empty" else "not a trace")
    assert str(path) in cli(command, path).line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--policy", "magic"),
        ("--cache", "none"),
        ("--cache", "0"),
        ("--bundle-bytes", "huge"),
        ("--bundle-bytes", "auto"),
        ("--bundle-bytes", "1M", "--reads", __file__.replace("test_trace.py", "missing"), "--read-limit", "auto"),
        ("--reads", "/nowhere"),
        ("--requests", "odd"),
    ],
)
def test_options_without_meaning(cli: Cli, trace_path: Path, arguments: tuple[str, ...]) -> None:
    """Among them: the one request is even, so none is odd."""
    assert cli("simulate", trace_path, *arguments).line


def test_a_trace_that_cannot_be_written(cli: Cli, model_path: Path, dense_path: Path, tmp_path: Path) -> None:
    assert "cannot write the trace" in cli("run", model_path, "-p", PROMPT, *GREEDY, "--trace", tmp_path / "no" / "x.npz").line
    assert "is a directory" in cli("run", model_path, "-p", PROMPT, *GREEDY, "--trace", tmp_path).line
    result = cli("run", dense_path, "-p", PROMPT, *GREEDY, "--trace", tmp_path / "x.npz")
    assert result.code == 1
    assert "nothing was routed" in result.err
