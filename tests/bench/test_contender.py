"""Specifications of contenders, and the output of each kind of engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spac.bench import contender, peers, worker
from spac.bench.contender import Command, Spec, Task, make
from spac.bench.prompt import Prompt
from spac.bench.suite import Row
from spac.errors import OptionError, SpacError
from spac.gguf.check import check_model
from spac.host.limits import LimitedRun, Limits

MIB = 1 << 20
PROMPT = Prompt("chat", "1", "Hello")

Script = Callable[..., Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """A program that stands for a peer's binary: what it prints for --help, and its body."""

    def write(help_text: str, body: str = "") -> Path:
        path = tmp_path / "peer"
        path.write_text(f'#!/bin/sh\nif [ "$1" = --help ]; then echo "{help_text}"; exit 0; fi\n{body}\n')
        path.chmod(0o755)
        return path

    return write


def task(model: Path, memory: int | None, **row: object) -> Task:
    return Task(model, model.stat().st_size, Row("row", **row), Limits(memory_bytes=memory), 2, (PROMPT,))  # type: ignore[arg-type]


def config(command: Command) -> dict[str, object]:
    assert command.arguments[1:3] == ["-m", "spac.bench.worker"]
    found: dict[str, object] = json.loads(command.arguments[3])
    return found


@pytest.fixture
def stock_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if `make stock` had been run."""
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "libllama.so").touch()
    monkeypatch.setattr(contender, "STOCK_FOLDER", folder)
    return folder


def test_a_specification_is_taken_apart() -> None:
    spec = Spec.parse(" stock:mmap,repack=off,tokens=4 ")
    assert (spec.text, spec.engine, spec.words, spec.values) == (
        "stock:mmap,repack=off,tokens=4", "stock", ("mmap",), {"repack": "off", "tokens": "4"},
    )  # fmt: skip
    assert spec.tokens() == 4
    assert Spec.parse("spac") == Spec("spac", "spac")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (":mmap", "names no engine"),
        ("spac:store=", "not name=value"),
        ("spac:fast", "not name=value"),
        ("spac:memory=2G", "the row sets it"),
        ("spac:colour=red", "takes no 'colour'"),
        ("spac:signals=stars", "expected none, tokens, draft, all"),
        ("spac:draft=nowhere.gguf", "draft: there is no file nowhere.gguf"),
        ("spac:learned=nowhere.npz", "learned: there is no file nowhere.npz"),
        ("stock:quick", "no option 'quick'"),
        ("stock:mmap,direct", "one load mode only"),
        ("stock:mmap,tokens=none", "expected a number"),
        ("vllm", "use stock, spac, bigmoe"),
    ],
)
def test_a_contender_that_does_not_exist(stock_libraries: Path, text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make(text, {}, {})


def test_spac_takes_arguments_of_its_llama(model_path: Path) -> None:
    made = make("spac:paging=on,store=buffered,io_threads=2,repack=off,offload_kqv=off,tokens=5", {}, {})
    assert made is not None
    found = config(made.commands(task(model_path, 300 * MIB))[0])
    assert found["arguments"] == {
        "paging": "on", "store": "buffered", "n_io_threads": 2, "repack": False, "offload_kqv": False, "memory": 300 * MIB,
    }  # fmt: skip
    assert (found["tokens"], found["threads"]) == (5, 2)


def test_stock_has_its_own_libraries(stock_libraries: Path, model_path: Path) -> None:
    made = make("stock:direct,repack=off", {}, {})
    assert made is not None
    command = made.commands(task(model_path, None))[0]
    assert command.environment["LLAMA_CPP_LIB_PATH"] == str(stock_libraries)
    assert config(command)["arguments"] == {"load_mode": "direct", "repack": False}


def test_stock_that_would_not_fit_is_left_out(stock_libraries: Path, model_path: Path) -> None:
    for mode, fits in (("mmap", True), ("mlock", False), ("direct", False)):
        made = make(f"stock:{mode}", {}, {})
        assert made is not None
        assert (made.skip(task(model_path, 10 * MIB)) is None) == fits
        assert made.skip(task(model_path, None)) is None


def test_stock_that_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender, "STOCK_FOLDER", tmp_path / "none")
    with pytest.raises(SpacError, match="run `make stock`"):
        make("stock", {}, {})


def test_a_peer_without_a_path_is_none() -> None:
    assert make("bigmoe", {}, {}) is None


def test_peers_that_are_missing_or_something_else(script: Script, tmp_path: Path) -> None:
    with pytest.raises(SpacError, match="no such file"):
        make("bigmoe", {"bigmoe": tmp_path / "nothing"}, {})
    with pytest.raises(SpacError, match="does not name --moe-stream: not a BigMoeOnEdge binary"):
        make("bigmoe", {"bigmoe": script("usage: ls")}, {})
    text = tmp_path / "text"
    text.write_text("not a program")
    with pytest.raises(SpacError, match="cannot be started"):
        make("ik_llama", {"ik_llama": text}, {})
    text.chmod(0o755)
    with pytest.raises(SpacError, match="cannot be started"):
        make("ik_llama", {"ik_llama": text}, {})


def test_bigmoe_with_its_best_settings(script: Script, model_path: Path) -> None:
    binary = script("--moe-stream")
    made = make("bigmoe:predict,cache=1234,tokens=9", {"bigmoe": binary}, {"bigmoe": ["--more"]})
    assert made is not None
    command = made.commands(task(model_path, 100 * MIB, ubatch=512))[0]
    text = " ".join(command.arguments)
    assert text.startswith(f"{binary} -m {model_path} -p Hello -n 9 -t 2 -c 1024 --temp 0 --moe-stream --overlap --dense-weights anon")
    assert "--cache-mb 1234 --force-cache --ubatch 64" in text
    assert text.endswith("--predict-prefetch --more")
    assert command.environment == {"OMP_WAIT_POLICY": "passive"}


def test_ik_llama_and_the_pull_request(script: Script, model_path: Path) -> None:
    ik = make("ik_llama", {"ik_llama": script("--prefetch-experts")}, {})
    assert ik is not None
    assert "--prefetch-experts" in ik.commands(task(model_path, None))[0].arguments
    binary = script("--moe-stream-cache")
    pull = make("llama-pr25294:slots=12", {"llama-pr25294": binary}, {"llama-pr25294": ["--moe-stream-io-threads", "4"]})
    assert pull is not None
    text = " ".join(pull.commands(task(model_path, None))[0].arguments)
    assert text.endswith("--moe-stream-cache 12s --moe-stream-direct --moe-stream-io-threads 4")
    assert pull.prepare(task(model_path, None), lambda _: pytest.fail("nothing is searched for"))["cache_mib"] > 0
    buffered = make("llama-pr25294:slots=12,buffered", {"llama-pr25294": binary}, {})
    assert buffered is not None
    assert buffered.commands(task(model_path, None))[0].arguments[-1] == "12s"


def test_the_pull_request_takes_as_many_slots_as_fit(script: Script, model_path: Path) -> None:
    """A slot is an expert of each layer; fewer than three times a token's experts it refuses, and with all of them it does not stream."""
    pull = make("llama-pr25294", {"llama-pr25294": script("--moe-stream-cache")}, {})
    assert isinstance(pull, peers.LlamaPull25294)
    facts = check_model(str(model_path))
    slot = facts.expert_bytes // facts.n_experts
    for slots, found in ((31, 31), (20, 20), (12, 12), (11, None)):
        limit = facts.file_bytes - facts.expert_bytes + 200 * MIB + slots * slot
        sizes = pull.sizes(task(model_path, limit), facts)
        assert (sizes[0] if found else [n for n in sizes if n == slots]) == (found or [])
        assert all(3 * facts.n_experts_used <= n < facts.n_experts for n in sizes)
    assert pull.sizes(task(model_path, None), facts) == [facts.n_experts - 1]
    assert "no cache fits" in (pull.skip(task(model_path, 10 * MIB)) or "")


def test_peers_sit_out_what_they_cannot_do(script: Script, model_path: Path) -> None:
    made = make("bigmoe", {"bigmoe": script("--moe-stream")}, {})
    assert made is not None
    assert "warm" in (made.skip(task(model_path, None, warm=True)) or "")
    assert "first token" in (made.skip(task(model_path, None, tokens=1)) or "")
    assert "no cache fits" in (made.skip(task(model_path, 10 * MIB)) or "")
    assert made.skip(task(model_path, 400 * MIB)) is None


@pytest.mark.parametrize(
    ("speeds", "best", "tried"),
    [
        ({200: 5.0, 140: 6.0, 100: 7.0, 300: 8.0, 400: 9.0}, 400, [200, 300, 400]),  # larger is better
        ({200: 5.0, 140: 6.0, 100: 7.0, 300: 0.0, 400: 9.0}, 100, [200, 300, 140, 100]),  # larger dies, smaller is better
        ({200: 5.0, 140: 4.0, 100: 7.0, 300: 4.0, 400: 9.0}, 200, [200, 300, 140]),
        ({200: 5.0}, 200, [200]),
        ({200: 0.0, 140: 0.0}, 140, [200, 140]),  # nothing lives: the smallest, and the record will say why
    ],
)
def test_the_search_for_the_best_cache(speeds: dict[int, float], best: int, tried: list[int]) -> None:
    asked: list[int] = []

    def speed(size: int) -> float:
        asked.append(size)
        return speeds[size]

    assert peers.best_cache(list(speeds), speed, lambda _: True) == best
    assert asked == tried


def test_a_cache_that_dies_now_and_then_is_not_the_best() -> None:
    """300 is the fastest, and is killed in a longer run."""
    assert peers.best_cache([200, 300, 400], {200: 5.0, 300: 6.0, 400: 0.0}.__getitem__, lambda size: size != 300) == 200


def test_the_search_is_made_once_for_a_limit(script: Script, model_path: Path, tmp_path: Path) -> None:
    made = make("bigmoe", {"bigmoe": script("--moe-stream")}, {})
    assert made is not None
    runs: list[str] = []

    def run(command: Command) -> LimitedRun:
        runs.append(command.arguments[command.arguments.index("--cache-mb") + 1])
        return LimitedRun(0, BIGMOE, "", 1.0, None, None)

    first = made.prepare(task(model_path, 400 * MIB), run)
    n = len(runs)
    assert n > 0
    assert str(first["cache_mib"]) in runs
    again = make("bigmoe", {"bigmoe": tmp_path / "peer"}, {})
    assert again is not None
    assert again.prepare(task(model_path, 400 * MIB), run) == first
    assert len(runs) == n
    predicting = make("bigmoe:predict", {"bigmoe": tmp_path / "peer"}, {})
    assert predicting is not None
    assert predicting.prepare(task(model_path, 400 * MIB), run)["cache_mib"] == first["cache_mib"]
    assert max(map(int, runs[n:])) == first["cache_mib"]  # prefetching needs more room: nothing larger is tried
    assert f"--cache-mb {first['cache_mib']} " in " ".join(made.commands(task(model_path, 400 * MIB))[0].arguments)


def test_the_search_reads_the_longest_prompt(script: Script, model_path: Path) -> None:
    """A longer prompt takes more memory, and would not survive in what is left for a short one."""
    made = make("bigmoe", {"bigmoe": script("--moe-stream")}, {})
    assert made is not None
    asked: set[tuple[str, int]] = set()

    def run(command: Command) -> LimitedRun:
        asked.add((command.arguments[command.arguments.index("-p") + 1], len(command.prompts)))
        return LimitedRun(0, BIGMOE, "", 1.0, None, None)

    long = dataclasses.replace(PROMPT, text=PROMPT.text * 2)
    made.prepare(dataclasses.replace(task(model_path, 300 * MIB), prompts=(PROMPT, long, PROMPT)), run)
    assert asked == {(long.text, 1)}


# the lines that matter, shortened
BIGMOE = """\
BMOE_LOAD {"mb":1.64,"ms":12.0}
BMOE_PROGRESS {"step":1,"wall_ms":40.0,"stall_ms":20.0,"read_mb":2.0,"cache_hit_pct":15.1,"cpu_ms":30.0,"delta_text":" the"}
BMOE_PROGRESS {"step":2,"wall_ms":60.0,"stall_ms":10.0,"read_mb":1.0,"cache_hit_pct":30.2,"cpu_ms":20.0,"delta_text":" file"}
=== perf ===
generation: 2 tokens, 0.050 s/token (20.0 tok/s)
prefill: 7 tokens, 0.5 s (14.0 tok/s) | model load 0.799 s | TTFT 1.3 s
"""


def figures(name: str, sign: str, script: Script, run: LimitedRun) -> dict[str, object]:
    made = make(name, {name: script(sign)}, {})
    assert made is not None
    return made.figures(run, Command([], {}, (PROMPT,)))


def test_what_bigmoe_prints(script: Script) -> None:
    found = figures("bigmoe", "--moe-stream", script, LimitedRun(0, BIGMOE, "", 1.0, None, None))
    assert found["complete"] is True
    assert found["load_s"] == 0.799
    (answer,) = found["prompts"]  # type: ignore[misc]
    assert answer["token_s"] == [0.04, 0.06]
    assert (answer["prompt_tokens"], answer["ttft_s"], answer["text"]) == (7, 0.5, " the file")
    assert answer["decode"] == pytest.approx({"eval_s": 0.1, "stall_s": 0.03, "cpu_s": 0.05, "own_read_bytes": 3 * MIB})


def test_bigmoe_that_has_nothing_to_say(script: Script) -> None:
    """The model ended its answer at once: the time to the first token counts all the same."""
    found = figures("bigmoe", "--moe-stream", script, LimitedRun(0, BIGMOE.partition("===")[2], "", 1.0, None, None))
    assert found["complete"] is True
    assert [(p["ttft_s"], p["token_s"]) for p in found["prompts"]] == [(0.5, [])]  # type: ignore[attr-defined]


def test_bigmoe_that_was_killed(script: Script) -> None:
    found = figures("bigmoe", "--moe-stream", script, LimitedRun(-9, BIGMOE.partition("===")[0], "", 1.0, None, None))
    assert found["complete"] is False
    assert found["prompts"][0]["token_s"] == [0.04, 0.06]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "sign", "output"),
    [
        (
            "ik_llama", "--prefetch-experts",
            "main: prompt eval time =      20.0 ms /     7 tokens (    2.38 ms per token,   419.64 tokens per second)\n"
            "main:        eval time =      50.0 ms /    10 tokens (    2.48 ms per token,   403.33 tokens per second)\n",
        ),
        (
            "llama-pr25294", "--moe-stream-cache",
            "1.28.904.322 I common_perf_print: prompt eval time =      20.0 ms /     7 tokens (  2 ms per token)\n"
            "1.28.904.328 I common_perf_print:        eval time =      50.0 ms /    10 runs   (  5 ms per token)\n",
        ),
    ],
)  # fmt: skip
def test_what_llama_cli_prints(script: Script, name: str, sign: str, output: str) -> None:
    found = figures(name, sign, script, LimitedRun(0, "", output, 1.0, None, None))
    (answer,) = found["prompts"]  # type: ignore[misc]
    assert (answer["tokens"], answer["mean_token_s"], answer["ttft_s"], answer["prompt_tokens"]) == (10, 0.005, 0.02, 7)
    assert figures(name, sign, script, LimitedRun(1, "", "error", 1.0, None, None)) == {"prompts": [], "complete": False}


def test_the_pull_request_says_how_often_its_cache_hit(script: Script) -> None:
    output = (
        "1.28.904.328 I common_perf_print:        eval time =      50.0 ms /    10 runs   (  5 ms per token)\n"
        "1.28.904.333 I print_stats: moe stream: remap calls = 320, expert hits = 942, misses = 553 (297 cold), hit rate = 63.01%\n"
    )
    found = figures("llama-pr25294", "--moe-stream-cache", script, LimitedRun(0, "", output, 1.0, None, None))
    assert found["expert"] == {"hit_rate": pytest.approx(0.6301)}


def test_events_of_a_worker_that_was_killed() -> None:
    """Its last line is cut off; the tokens before it count."""
    lines = [
        {"event": "loaded", "load_s": 0.5}, {"event": "prompt", "index": 0, "prompt_tokens": 3},
        {"event": "token", "index": 0, "id": 7, "t": 0.25}, {"event": "token", "index": 0, "id": 8, "t": 0.5},
        {"event": "token", "index": 0, "id": 9, "t": 1.0},
    ]  # fmt: skip
    output = "a word of the library\n" + "\n".join(map(json.dumps, lines)) + '\n{"event": "tok'
    found = worker.read_events(output, [PROMPT])
    assert found == {
        "complete": False, "load_s": 0.5,
        "prompts": [{
            "kind": "chat", "id": "1", "prompt_tokens": 3, "token_ids": [7, 8, 9], "complete": False, "ttft_s": 0.25, "token_s": [0.25, 0.5],
        }],
    }  # fmt: skip
