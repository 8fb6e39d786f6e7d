"""`spac run` and `spac inspect`: what is printed where, and with which exit code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spac import control
from spac.gguf.reader import read_gguf
from tests.conftest import Result

Cli = Callable[..., Result]

PROMPT = "The open() system call"
GREEDY = ("--temp", "0", "-n", "12", "--ctx", "512")
JSON_KEYS = {
    "text", "token_ids", "prompt_tokens", "completion_tokens", "load_s", "prefill_s", "decode_s", "prefill_tokens_per_s",
    "decode_tokens_per_s", "memory_limit_bytes", "peak_rss_bytes", "cpu_s", "paging", "expert", "finish", "draft", "signals", "balancer",
}  # fmt: skip
EXPERT_KEYS = {
    "budget_bytes", "peak_bytes", "hits", "misses", "hit_rate", "bytes_read", "reads", "stall_s", "shortages", "floor_bytes", "store",
}  # fmt: skip


def test_stdout_carries_the_answer_only(cli: Cli, model_path: Path) -> None:
    result = cli("run", model_path, "-p", PROMPT, *GREEDY)
    assert result.code == 0
    assert result.out.strip()
    assert result.err == ""
    with_stats = cli("run", model_path, "-p", PROMPT, *GREEDY, "--stats")
    assert with_stats.out == result.out
    assert "decode" in with_stats.err
    assert "peak" in with_stats.err


@pytest.mark.parametrize("paging", ["on", "off"])
def test_weights_that_compute_no_numbers(cli: Cli, model_path: Path, tmp_path: Path, paging: str) -> None:
    damaged = tmp_path / "damaged.gguf"
    shutil.copy(model_path, damaged)
    tensor = next(tensor for tensor in read_gguf(damaged).tensors if tensor.name == "blk.3.ffn_down_exps.weight")
    with damaged.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff" * tensor.n_bytes)
    result = cli("run", damaged, "-p", PROMPT, *GREEDY, "--paging", paging)
    assert result.code == 1
    assert result.out.strip() == ""
    assert result.err.count("\n") == 1
    assert "damaged.gguf: what its weights compute is no number" in result.err


def test_a_limit_that_is_not_kept_to_is_named(cli: Cli, model_path: Path) -> None:
    result = cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "off", "--memory", "1M")
    assert result.code == 0
    assert result.err == "spac: --paging off loads as stock llama.cpp does, --memory 1M is not kept to\n"


def test_json_is_one_object_and_text_the_completion(cli: Cli, model_path: Path) -> None:
    plain = cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "on")
    result = cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "on", "--json")
    report = json.loads(result.out)
    assert result.err == ""
    assert set(report) == JSON_KEYS
    assert set(report["expert"]) == EXPERT_KEYS
    assert set(report["signals"]) == {"tokens", "draft"}
    assert set(report["signals"]["tokens"]) == {"precision", "recall", "reads", "wasted_bytes"}
    assert report["paging"] == "on"
    assert report["text"].strip() == plain.out.strip()
    assert PROMPT not in report["text"]
    assert len(report["token_ids"]) == report["completion_tokens"]
    assert report["expert"]["peak_bytes"] <= report["expert"]["budget_bytes"]
    assert report["peak_rss_bytes"] > 0
    assert report["cpu_s"] > 0


def test_paging_does_not_change_the_answer(cli: Cli, model_path: Path) -> None:
    """Nor does the store, nor where the prompt comes from."""
    answers = {
        cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "on", "--store", store, "--threads", "2").out
        for store in ("auto", "direct", "buffered", "mmap")
    }
    assert len(answers) == 1


def test_prompts_from_a_file_and_from_stdin(cli: Cli, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    expected = cli("run", model_path, "-p", PROMPT, *GREEDY).out
    assert cli("run", model_path, "-f", file, *GREEDY).out == expected
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli("run", model_path, "-f", "-", *GREEDY).out == expected


def test_a_seed_repeats_an_answer(cli: Cli, model_path: Path) -> None:
    options = ("-n", "12", "--ctx", "512", "--temp", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0")
    first, second, other = (cli("run", model_path, "-p", PROMPT, *options, "--seed", seed).out for seed in (7, 7, 8))
    assert first == second != other


def test_a_grammar_and_penalties(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "yes-or-no.gbnf"
    file.write_text('root ::= "yes" | "no"')
    assert cli("run", model_path, "-p", PROMPT, *GREEDY, "--grammar", file).out in ("yes\n", "no\n")
    file.write_text("root ::= (")
    assert "the grammar has an error" in cli("run", model_path, "-p", PROMPT, *GREEDY, "--grammar", file).err.splitlines()[-1]
    assert "cannot read the grammar: No such file" in cli("run", model_path, "-p", PROMPT, *GREEDY, "--grammar", tmp_path / "none").line
    plain = cli("run", model_path, "-p", PROMPT, *GREEDY, "-n", "40").out
    assert cli("run", model_path, "-p", PROMPT, *GREEDY, "-n", "40", "--repeat-penalty", "1.5").out != plain
    file.write_text(" ")
    assert "the grammar has an error" in cli("run", model_path, "-p", PROMPT, *GREEDY, "--grammar", file).line


def test_a_dense_model_runs(cli: Cli, dense_path: Path) -> None:
    report = json.loads(cli("run", dense_path, "-p", PROMPT, *GREEDY, "--json").out)
    assert report["paging"] == "off"
    assert report["expert"] is None


def test_a_full_context_is_said(cli: Cli, model_path: Path) -> None:
    result = cli("run", model_path, "-p", PROMPT, "--temp", "0.9", "--seed", "1", "--ctx", "256", "-n", "100000")
    assert result.code == 0
    assert result.err == "" or "the context of 256 tokens is full; raise --ctx" in result.err


def test_inspect(cli: Cli, model_path: Path) -> None:
    report = json.loads(cli("inspect", model_path, "--json").out)
    assert report["architecture"] == "qwen3moe"
    assert (report["layers"], report["experts"], report["experts_used"]) == (10, 32, 4)
    assert report["expert_bytes"] == 10 * 32 * 3 * 256 * 256 * 18 // 32
    assert report["bundle_bytes"] * 320 == report["expert_bytes"]
    assert report["dense_bytes"] + report["expert_bytes"] < report["file_bytes"] == model_path.stat().st_size
    text = cli("inspect", model_path).out
    for word in ("qwen3moe", "32 in each of 10 layers, 4 used", "floor"):
        assert word in text


def test_inspect_a_dense_model(cli: Cli, dense_path: Path) -> None:
    assert "nothing can be paged" in cli("inspect", dense_path).out
    assert json.loads(cli("inspect", dense_path, "--json").out)["experts"] == 0


# -- bad input --


@pytest.mark.parametrize(
    "arguments",
    [["-p", "x", "--memory"], ["-p", "x", "--threads", "-1"], ["-p", "x", "--temp", "hot"], ["-p", "x", "--paging", "maybe"],
     ["-p", "x", "--store", "tape"], ["-p", "x", "-f", "y"], [], ["-p", ""], ["-p", "x", "--max-tokens", "0"], ["-p", "x", "--nonsense"],
     ["-p", "x", "--top-p", "2"], ["-p", "x", "--ubatch", "0"]],
)  # fmt: skip
def test_usage_errors(cli: Cli, model_path: Path, arguments: list[str]) -> None:
    """Exit code 2 and one line."""
    result = cli("run", model_path, *arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("spac: ")
    assert "--help" in result.err


def test_help_and_nothing(cli: Cli) -> None:
    assert cli("--help").code == 0
    assert "MODEL" in cli("run", "--help").out
    assert cli().code == 2
    assert cli("dance").code == 2
    assert cli("--version").out.strip().count(".") == 2


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["chat"], ["inspect"]])
@pytest.mark.parametrize(
    ("name", "words"),
    [("missing", "No such file"), ("folder", "is a directory"), ("empty", "is empty"), ("text", "not a GGUF"), ("cut", "incomplete")],
)
def test_files_that_are_no_models(cli: Cli, model_path: Path, tmp_path: Path, command: list[str], name: str, words: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "cut":
        path.write_bytes(model_path.read_bytes()[:-4096])
    elif name != "missing":
        path.write_text("" if name == "empty" else "this is no model, but it is long enough to be one")
    line = cli(command[0], path, *command[1:]).line
    assert words in line
    assert str(path) in line


@pytest.mark.parametrize("memory", ["lots", "4X", "-1G", "0", "101%"])
def test_memory_that_is_no_size(cli: Cli, model_path: Path, memory: str) -> None:
    assert "memory" in cli("run", model_path, "-p", "x", f"--memory={memory}").line


def test_a_budget_below_the_floor(cli: Cli, model_path: Path) -> None:
    """Says what is needed, for what, and what to do."""
    line = cli("run", model_path, "-p", "x", "--memory", "20M", "--ctx", "2048").line
    for words in ("needs at least", "20 MiB given", "dense weights", "context of 2048 tokens", "compute", "expert floor", "raise --memory"):
        assert words in line


def test_a_prompt_that_does_not_fit(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 5000)
    assert "raise --ctx" in cli("run", model_path, "-f", file, "--ctx", "256").line
    file.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in cli("run", model_path, "-f", file).line
    assert "No such file" in cli("run", model_path, "-f", tmp_path / "none").line


def test_direct_reads_refused(cli: Cli, model_path: Path) -> None:
    """On tmpfs, which has no O_DIRECT before Linux 6.6, auto falls back and direct says so; where it has, both work."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm")
    path = folder / f"spac-test-{os.getpid()}.gguf"
    shutil.copy(model_path, path)
    try:
        fallen_back = json.loads(cli("run", path, "-p", PROMPT, *GREEDY, "--paging", "on", "--json").out)
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            assert fallen_back["expert"]["store"] == "buffered"
            assert "refuses direct I/O" in cli("run", path, "-p", PROMPT, *GREEDY, "--paging", "on", "--store", "direct").line
        assert (
            fallen_back["token_ids"]
            == json.loads(cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "on", "--json").out)["token_ids"]
        )
    finally:
        path.unlink()


def test_a_read_that_fails(cli: Cli, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with file, offset and reason; nothing computed from absent weights is printed."""
    from spac import seam

    check = control.check

    def check_and_fail(code: int) -> int:
        if code > 0:
            control.spac_mock_fail_reads(code, 3, 1000, 5)  # one of a guess would be tried again
        return check(code)

    monkeypatch.setattr(seam.control, "check", check_and_fail)
    line = cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "on", "--store", "mock").line
    assert "Input/output error" in line
    assert "offset" in line
    assert str(model_path) in line


@pytest.mark.parametrize("command", [("run", "-p"), ("chat", "--system")])
def test_text_that_is_not_utf8(cli: Cli, model_path: Path, command: tuple[str, str]) -> None:
    assert "is not UTF-8 text" in cli(command[0], model_path, command[1], os.fsdecode(b"caf\xe9")).line


def test_a_name_that_is_not_utf8(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    name.symlink_to(model_path)
    assert "its name is not UTF-8" in cli("run", name, "-p", "x").line


def test_a_chat_template_that_cannot_be_read(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    whole = model_path.read_bytes()
    assert whole.count(b"{%- for") + whole.count(b"{% for") > 0
    damaged.write_bytes(whole.replace(b"{%- for", b"{%- fur", 1).replace(b"{% for", b"{% fur", 1))
    assert "damaged.gguf: its chat template cannot be read" in cli("run", damaged, "-p", "x", *GREEDY).line


def test_without_a_home_nothing_is_kept(cli: Cli, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    result = cli("run", model_path, "-p", PROMPT, *GREEDY, "--paging", "on")
    assert result.code == 0
    assert result.out.strip()
    assert "set XDG_CACHE_HOME" in cli("tune").line


# -- limits and signals: in processes of their own --


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spac", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_few_files_may_be_open(model_path: Path) -> None:
    process = spawn("run", model_path, "-p", PROMPT, *GREEDY, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5)))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert "open files" in err.lower()


def test_little_address_space(model_path: Path) -> None:
    """At every amount: an answer, or one line. Never a traceback or a crash."""
    seen = set()
    for mib in (100, 300, 450, 700, 2000):
        n_bytes = mib << 20
        process = spawn(
            "run", model_path, "-p", PROMPT, *GREEDY, "--paging", "on", "--memory", "1G",
            preexec_fn=lambda n=n_bytes: resource.setrlimit(resource.RLIMIT_AS, (n, n)),
        )  # fmt: skip
        _, err = process.communicate(timeout=120)
        seen.add(process.returncode)
        assert process.returncode in (0, 1), (mib, err)
        assert (len(err.splitlines()) == 1) == (process.returncode == 1), (mib, err)
        assert "Traceback" not in err
    assert seen == {0, 1}


@pytest.mark.parametrize("delay_s", [0.02, 0.1, 0.25, 0.5, 0.8, 1.1, 1.5, 2.5])
def test_interrupted_at_any_moment(model_path: Path, delay_s: float) -> None:
    """Ctrl-C while Python starts, loads, reads the prompt or answers: exit code 130, or by the signal itself, and no traceback."""
    process = spawn("run", model_path, "-p", "all of it again " * 100, "-n", "100000", "--ctx", "2048", "--temp", "0", "--paging", "on",
                    "--memory", "120M")  # fmt: skip
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    if delay_s >= 0.5:  # before, Python itself may not be up
        # a fast machine may be done by then: 0, or the signal itself while Python leaves
        assert process.returncode in (130, 0, -signal.SIGINT), err
        assert "Traceback" not in err, err


def test_a_reader_that_leaves(model_path: Path) -> None:
    """`spac run ... | head -c1`: no complaint."""
    process = spawn("run", model_path, "-p", PROMPT, "-n", "200", "--temp", "0")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) in (0, 1)
    assert process.stderr.read() == ""


def test_streams_that_are_closed_or_narrow(model_path: Path) -> None:
    """`spac run >&-`, and an encoding that has no place for the answer."""
    command = ["run", model_path, "-p", "\u2603 is a snowman. \u2603", *GREEDY]
    _, err = spawn(*command, "--stats", preexec_fn=lambda: os.close(1)).communicate(timeout=60)
    assert "decode" in err
    assert "Traceback" not in err
    for arguments in (command, [*command, "--json"], ["inspect", model_path]):
        process = spawn(*arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_below_stdout(model_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "spac", "inspect", str(model_path)], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--signals", "stars", "signal 'stars' does not exist: use tokens, draft, all or none"),
        ("--horizon", "9", "horizon is '9', expected 0 to 8, or auto"),
        ("--horizon", "-1", "horizon is '-1', expected 0 to 8, or auto"),
    ],
)
def test_lookahead_options_without_meaning(cli: Cli, model_path: Path, option: str, value: str, complaint: str) -> None:
    result = cli("run", model_path, "-p", PROMPT, f"{option}={value}")
    assert result.code == 2
    assert complaint in result.err
    assert len(result.err.splitlines()) == 1


def test_what_was_learned_is_kept_and_changes_no_answer(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "learned.npz"
    options = ("run", model_path, "-p", PROMPT, "-n", "60", "--temp", "0", "--paging", "on", "--memory", "400M")
    plain = cli(*options, "--signals", "none", "--learned", "off")
    assert plain.err == ""
    first, second = cli(*options, "--learned", file), cli(*options, "--learned", file)
    assert file.is_file()
    assert plain.code == 0
    assert plain.out == first.out == second.out
    assert second.err == ""
    file.write_text("broken")
    broken = cli(*options, "--learned", file)
    assert broken.out == plain.out
    assert broken.code == 0
