"""The data files: profiles with sources, suites, prompts; and complaints about those of others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spac.bench import profile, prompt, suite
from spac.errors import OptionError

PROFILES = {"native", "pi5-8g-nvme", "pi5-sd", "pi4-usb3", "jetson-orin-nano-nvme", "laptop-16g-nvme"}


def test_every_profile_parses_and_names_its_sources() -> None:
    assert set(profile.names()) == PROFILES
    for name in profile.names():
        found = profile.load(name)
        assert found.title
        limits = found.limits(8 << 30)
        assert (limits.names() == []) == (name == "native")
        figures = {key for key in profile.LIMITED if getattr(found, key) is not None}
        assert figures == set(found.sources)


def test_fewer_cores_get_a_larger_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores at 0.8 stand for four at 0.4; no share exceeds 1."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    limits = profile.load("pi5-8g-nvme").limits(1 << 30)
    assert (limits.cores, limits.cpu_share) == (2, 0.8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    limits = profile.load("pi5-8g-nvme").limits(1 << 30)
    assert (limits.cores, limits.cpu_share) == (1, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('memory = "8G"', "no source is named for memory"),
        ("speed = 3", "speed: no such setting"),
        ("cores = 0\n[sources]\ncores = 'x'", "cores is 0"),
        ("cpu_share = 2\n[sources]\ncpu_share = 'x'", "cpu_share is 2"),
        ('memory = "lots"\n[sources]\nmemory = "x"', "not a size"),
        ("memory = 8000000000\n[sources]\nmemory = 'x'", "memory is 8000000000, expected a text"),
        ("cpu_share = 'x'\n[sources]\ncpu_share = 'x'", "cpu_share is 'x'"),
        ("memory = ", "not a TOML file"),
    ],
)
def test_a_profile_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=words):
        profile.load(str(path))


def test_profiles_that_do_not_exist() -> None:
    with pytest.raises(OptionError, match="use jetson-orin-nano-nvme"):
        profile.load("pi6")
    with pytest.raises(OptionError, match="does not exist"):
        profile.load("missing.toml")


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("none", None), ("25%", 250), ("2G", 2 << 30), ("150%", 1500)])
def test_memory_is_a_share_of_the_model_or_absolute(text: str | None, expected: int | None) -> None:
    assert profile.memory_bytes(text, 1000) == expected


@pytest.mark.parametrize("text", ["x%", "0%", "-3%", "auto", "lots"])
def test_memory_that_has_no_meaning(text: str) -> None:
    with pytest.raises(OptionError):
        profile.memory_bytes(text, 1000)


@pytest.mark.parametrize(("n_tokens", "text"), [(2, "one two "), (3, "one two three "), (5, "one two three one two ")])
def test_a_prompt_of_a_length(n_tokens: int, text: str) -> None:
    """Cut or repeated; tokens are words here."""
    found = prompt.of_length(prompt.Prompt("chat", "1", "one two three "), n_tokens, lambda text: len(text.split()))
    assert (found.kind, found.id, found.text) == ("chat", "1", text)


def test_every_suite_parses() -> None:
    assert {"speed", "full", "quick", "stock", "latency"} <= set(suite.names())
    for name in suite.names():
        rows = suite.load(name)
        assert len({row.name for row in rows}) == len(rows)
        assert all(row.contenders for row in rows)


def test_the_full_suite_has_all_cells() -> None:
    cells = {(row.memory, row.read_bytes_per_s) for row in suite.load("full")}
    assert cells == {(f"{share}%", read) for share in (12, 25, 37, 50, 75, 100) for read in (500_000_000, None)}


def test_rows_of_a_profile_are_all_combinations() -> None:
    rows = suite.of_profile(profile.load("pi5-sd"), ["25%", "2G"], ["500000000", "none"], suite.Row(name=""))
    assert [(r.memory, r.read_bytes_per_s) for r in rows] == [("25%", 500_000_000), ("25%", None), ("2G", 500_000_000), ("2G", None)]
    assert {r.read_iops for r in rows} == {5000}
    own = suite.of_profile(profile.load("pi5-sd"), [], [], suite.Row(name=""))
    assert [(r.memory, r.read_bytes_per_s) for r in own] == [("7G", 90_000_000)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title = 'x'", "no rows"),
        ("[[row]]\nmemory = '50%'", "needs a name"),
        ("[[row]]\nname = 'x'\nspeed = 1", "no setting speed"),
        ("[[row]]\nname = 'x'\ntokens = 0", "tokens is 0"),
        ("[[row]]\nname = 'x'\nmemory = 'much'", "not a size"),
        ("[[row]]\nname = 'x'\nmemory = 8", "memory is 8, expected a text"),
        ("[[row]]\nname = 'x'\ncores = 0", "cores is 0"),
    ],
)
def test_a_suite_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=words):
        suite.load(str(path))


def test_the_prompts_that_come_with_spac() -> None:
    found = prompt.load([])
    assert {p.kind for p in found} == set(prompt.KINDS)
    assert len(found) == 40
    assert [p.kind for p in found[:5]] == list(prompt.KINDS)  # the first few are of all kinds
    assert len({p.text for p in found}) == 40
    assert [p.kind for p in prompt.load(["maths"])] == ["maths"] * 8
    with pytest.raises(OptionError, match="use code, maths"):
        prompt.load(["poetry"])


def test_prompts_of_others(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "category": "x", "id": 7}\n\n{"prompt": "b"}\n')
    assert prompt.load([], path) == [prompt.Prompt("x", "7", "a"), prompt.Prompt("set", "3", "b")]
    with pytest.raises(OptionError, match="no prompts of kind y"):
        prompt.load(["y"], path)


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', '"a"', '{"prompt": ""}', '{"prompt": 3}'])
def test_prompts_that_are_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(OptionError, match=r"set\.jsonl, line 2"):
        prompt.load([], path)
    with pytest.raises(OptionError, match="cannot be read"):
        prompt.load([], tmp_path / "missing.jsonl")
