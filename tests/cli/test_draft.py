"""`--draft` and `--draft-max`: what is printed, what is refused, and that a draft stays within `--memory`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spac.gguf.inflate import inflate
from spac.host import memory
from tests.conftest import Result
from tests.speculative.test_draft import other_vocabulary

Cli = Callable[..., Result]

PROMPT = "The open() system call"
GREEDY = ("-p", PROMPT, "--temp", "0", "-n", "24", "--ctx", "512", "--threads", "1")
DRAFT_KEYS = {"proposed", "accepted", "acceptance_rate", "mean_accepted_tokens", "given_back_bytes"}


def run(cli: Cli, *arguments: object) -> dict[str, Any]:
    result = cli("run", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return dict(json.loads(result.out))


def test_a_draft_changes_no_token(cli: Cli, model_path: Path, dense_path: Path) -> None:
    plain = run(cli, model_path, *GREEDY)
    assert plain["draft"] is None
    for draft, draft_max in ((dense_path, "3"), (dense_path, "auto"), (dense_path, "0"), ("ngram", "3"), ("off", "3"), ("auto", "3")):
        report = run(cli, model_path, *GREEDY, "--draft", draft, "--draft-max", draft_max)
        assert report["token_ids"] == plain["token_ids"], draft
        if draft in ("off", "auto"):
            assert report["draft"] is None
        else:
            assert set(report["draft"]) == DRAFT_KEYS
    assert run(cli, model_path, *GREEDY, "--draft", dense_path, "--draft-max", "0")["draft"]["acceptance_rate"] is None


def test_what_is_said_about_a_draft(cli: Cli, model_path: Path, dense_path: Path) -> None:
    report = run(cli, model_path, *GREEDY, "--draft", dense_path, "--draft-max", "3")["draft"]
    assert 0 < report["accepted"] < report["proposed"]
    assert report["acceptance_rate"] == pytest.approx(report["accepted"] / report["proposed"])
    assert report["accepted"] / report["mean_accepted_tokens"] == pytest.approx(round(report["accepted"] / report["mean_accepted_tokens"]))
    result = cli("run", model_path, *GREEDY, "--draft", dense_path, "--draft-max", "3", "--stats")
    assert f"{report['accepted']} of {report['proposed']} tokens accepted" in result.err


def test_chat_with_a_draft(cli: Cli, model_path: Path, dense_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is ls?\nAnd cp?\n"))
    options = ("--temp", "0", "-n", "12", "--ctx", "512", "--threads", "1", "--stats")
    result = cli("chat", model_path, *options, "--draft", dense_path, "--draft-max", "2")
    assert result.code == 0
    assert "verifications" in result.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is ls?\nAnd cp?\n"))
    assert cli("chat", model_path, *options).out == result.out


# -- one memory limit for both --


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_draft_shares_the_memory(model_path: Path, dense_path: Path, tmp_path: Path, kind: str) -> None:
    """The target's experts get less with a draft; a draft's own experts come out of the same budget; the process stays within the limit."""
    big = tmp_path / "big.gguf"
    inflate(model_path, big, expert_type="Q4_0", factor=4)
    command = [sys.executable, "-m", "spac", "run", big, *GREEDY, "--memory", "150M", "--json"]
    draft = [dense_path, "--draft-max", "2"] if kind == "dense" else [model_path, "--draft-max", "2"]
    reports = []
    for options in ([], ["--draft", *draft]):
        process = subprocess.run(list(map(str, [*command, *options])), capture_output=True, text=True, timeout=120, check=True)
        reports.append(json.loads(process.stdout))
    plain, drafted = reports
    assert plain["paging"] == drafted["paging"] == "on"
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["expert"]["budget_bytes"] < plain["expert"]["budget_bytes"] - 4 * memory.MIB
    assert drafted["expert"]["peak_bytes"] <= plain["expert"]["budget_bytes"]
    assert drafted["peak_rss_bytes"] <= drafted["memory_limit_bytes"] == 150 * memory.MIB
    assert drafted["draft"]["accepted"] > 0


# -- bad input --


def test_a_draft_of_another_vocabulary(cli: Cli, model_path: Path, dense_path: Path, tmp_path: Path) -> None:
    line = cli("run", model_path, *GREEDY, "--draft", other_vocabulary(dense_path, tmp_path)).line
    assert "other.gguf: cannot draft for" in line
    assert "is 'QQQ', the model's is" in line


def test_a_draft_that_is_missing_or_none(cli: Cli, model_path: Path, tmp_path: Path) -> None:
    line = cli("run", model_path, *GREEDY, "--draft", tmp_path / "none.gguf").line
    assert "none.gguf" in line
    assert "No such file" in line
    (tmp_path / "text.gguf").write_text("this is no model, but it is long enough to be one")
    assert "not a GGUF" in cli("run", model_path, *GREEDY, "--draft", tmp_path / "text.gguf").line
    assert str(model_path) + "x" in cli("run", str(model_path) + "x", *GREEDY, "--draft", "ngram").line


def test_a_draft_larger_than_the_memory(cli: Cli, model_path: Path, dense_path: Path) -> None:
    """Alone, or with the model's least."""
    line = cli("run", model_path, *GREEDY, "--draft", dense_path, "--memory", "20M").line
    assert line.startswith(f"spac: {dense_path}: needs at least")
    limit = memory.resident_bytes() + 28 * memory.MIB
    line = cli("run", model_path, *GREEDY, "--draft", dense_path, "--memory", str(limit >> 10) + "K").line
    assert line.startswith(f"spac: {model_path}: needs at least")
    assert f"taken by the draft {dense_path}, see --draft off" in line


@pytest.mark.parametrize("value", ["lots", "-1", "65", "1.5", "", "²"])
@pytest.mark.parametrize("command", ["run", "chat"])
def test_draft_max_that_is_no_number(cli: Cli, model_path: Path, command: str, value: str) -> None:
    result = cli(command, model_path, f"--draft-max={value}")
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert "expected 0 to 64, or auto" in result.err


def test_a_recurrent_model_is_refused(cli: Cli, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp.llama_cpp as upstream

    monkeypatch.setattr(upstream, "llama_model_is_recurrent", lambda _: True)
    line = cli("run", model_path, *GREEDY, "--draft", "ngram").line
    assert "cannot take rejected tokens back" in line
    assert "--draft-max 0" in line
