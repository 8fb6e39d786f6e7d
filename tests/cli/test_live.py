"""The line below a streaming answer, on a made-up terminal; nothing here waits for time to pass."""

from __future__ import annotations

import io
import os
import random
import re
import unicodedata
from typing import Any

import pytest

from spac.cli import live as live_module
from spac.cli.live import BottomLine, LiveStats, column_after
from spac.generate import Generation
from spac.speculative import DraftStats
from spac.stats import ModelStats


class Screen(io.StringIO):
    """As much of a terminal as is needed: rows that scroll, a right edge that the cursor waits at, one saved cursor."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, rows
        self.scrolled: list[str] = []
        self.cells = [[""] * columns for _ in range(rows)]
        self.x = self.y = 0
        self.waits = False  # the next character goes to the next row
        self.saved = (0, 0)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[[0-9]*[A-Z]|\x1b.|.", text, re.DOTALL):
            self._do(part)
        return len(text)

    def _down(self) -> None:
        if self.y < self.rows - 1:
            self.y += 1
        else:
            self.scrolled.append("".join(self.cells.pop(0)).rstrip())
            self.cells.append([""] * self.columns)

    def _do(self, part: str) -> None:
        if part == "\x1b7":
            self.saved = self.x, self.y
        elif part == "\x1b8":
            (self.x, self.y), self.waits = self.saved, False
        elif part == "\x1bD":
            self._down()
            self.waits = False
        elif part == "\x1b[A":
            self.y, self.waits = max(0, self.y - 1), False
        elif part == "\x1b[B":
            self.y, self.waits = min(self.rows - 1, self.y + 1), False
        elif part in ("\x1b[K", "\x1b[J"):
            self.cells[self.y][self.x :] = [""] * (self.columns - self.x)
            if part == "\x1b[J":
                self.cells[self.y + 1 :] = [[""] * self.columns for _ in self.cells[self.y + 1 :]]
        elif part == "\r":
            self.x, self.waits = 0, False
        elif part == "\n":
            self._down()
            self.x, self.waits = 0, False
        elif part == "\t":
            self.x = min((self.x // 8 + 1) * 8, self.columns - 1)
        else:
            assert not part.startswith("\x1b"), part
            self._put(part)

    def _put(self, char: str) -> None:
        cells = 2 if unicodedata.east_asian_width(char) == "W" else 1
        if self.waits or self.x + cells > self.columns:
            self._down()
            self.x = 0
        self.cells[self.y][self.x] = char
        self.x += cells
        self.waits = self.x >= self.columns
        self.x = min(self.x, self.columns - 1)

    def text(self) -> str:
        return "\n".join([*self.scrolled, *("".join(row).rstrip() for row in self.cells)]).rstrip("\n")


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def on(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> BottomLine:
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((screen.columns, screen.rows)))
    monkeypatch.setattr(Screen, "fileno", lambda _: 2)
    return BottomLine(screen, screen)


@pytest.mark.parametrize("seed", range(20))
def test_the_text_is_as_without_a_line(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Long and wide text, on a narrow terminal that scrolls, with a line redrawn at any moment."""
    rng = random.Random(seed)
    pieces = ["".join(rng.choices("abc de漢\n", k=rng.randint(1, 9))) for _ in range(120)]
    columns, rows = rng.randint(8, 30), rng.randint(2, 8)
    plain, screen = Screen(columns, rows), Screen(columns, rows)
    bottom, shown = on(screen, monkeypatch), 0
    for i, piece in enumerate(pieces):
        plain.write(piece)
        bottom.write(piece)
        if rng.random() < 0.5:
            bottom.show(f"[{i} ({'x' * rng.randint(0, 40)})")
        shown += f"[{i}" in screen.text()
    bottom.show("")
    assert screen.text() == plain.text()
    assert shown > 30


def test_the_line_stands_below_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(20, 5)
    bottom = on(screen, monkeypatch)
    bottom.write("one\ntwo")
    bottom.show("figures that are longer than a row")
    bottom.write(" and")
    assert screen.text() == "one\ntwo and\nfigures that are lo"
    bottom.show("")
    assert screen.text() == "one\ntwo and"


@pytest.mark.parametrize("term", ["dumb", ""])
def test_no_line_where_the_cursor_cannot_be_moved(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setenv("TERM", term or "dumb")
    out, err = io.StringIO(), Screen(20, 5) if term else io.StringIO()
    bottom = BottomLine(out, err)
    bottom.write("text")
    bottom.show("line")
    assert not bottom.enabled
    assert out.getvalue() == "text"
    assert err.getvalue() == ""


def test_an_answer_that_goes_to_a_file_has_its_line_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, out = Screen(20, 5), io.StringIO()
    monkeypatch.setattr(Screen, "fileno", lambda _: 2)
    bottom = BottomLine(out, screen)
    bottom.show("line")
    bottom.write("x" * 20)
    assert out.getvalue() == "x" * 20
    assert screen.text() == "\nline"


@pytest.mark.parametrize(
    ("column", "text", "expected"),
    [(0, "", 0), (0, "abc", 3), (7, "abc", 10), (8, "abc", 1), (9, "漢", 2), (8, "漢", 10), (3, "a\nb", 1), (3, "\t", 8), (8, "\t", 9), (4, "e\u0301", 5)],
)
def test_column(column: int, text: str, expected: int) -> None:
    assert column_after(column, text, 10) == expected


# -- what the line says --


def counters(**values: Any) -> ModelStats:
    return ModelStats(**{name: values.get(name, 0) for name in ModelStats.__dataclass_fields__})


class FakeLlama:
    """With counters that the test sets."""

    def __init__(self, stats: ModelStats | None) -> None:
        self.spac = self
        self.now = stats

    def stats(self) -> ModelStats | None:
        return self.now


def live(llama: FakeLlama, generation: Generation, monkeypatch: pytest.MonkeyPatch) -> LiveStats:
    """Begun at 100 s."""
    monkeypatch.setattr(live_module.time, "perf_counter", lambda: 100.0)
    return LiveStats(llama, generation)  # type: ignore[arg-type]


def test_the_line_while_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits since the answer began, reads since the last samples; drafts only once one was verified."""
    llama = FakeLlama(counters(hits=1000, bytes_read=5_000_000))
    generation = Generation(prompt_tokens=7)
    shown = live(llama, generation, monkeypatch)
    assert shown.line(102.0) == "prompt of 7 tokens, 2 s | 0.0% hits | 0 MB/s read | 0 B of 0 B budget in use"
    generation.prefill_s, generation.token_ids = 3.0, [1]
    generation.draft = DraftStats()
    assert shown.line(103.0).startswith("0.0 tokens/s | 0.0% hits")
    llama.now = counters(hits=1003, misses=1, bytes_read=25_000_000, model_used_bytes=1 << 20, budget_bytes=4 << 20)
    generation.token_ids = [1, 2, 3]
    generation.draft = DraftStats(proposed=4, accepted=1, verifications=2)
    assert shown.line(104.0) == "2.0 tokens/s | 1 of 4 drafts accepted | 75.0% hits | 10 MB/s read | 1 MiB of 4 MiB budget in use"


def test_the_line_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(counters(bytes_read=1))
    generation = Generation(prompt_tokens=7)
    shown = live(llama, generation, monkeypatch)
    generation.token_ids, generation.prefill_s, generation.decode_s = [1, 2, 3], 3.0, 1.0
    llama.now = counters(hits=1, misses=1, bytes_read=40_000_001)
    assert shown.summary() == "2.0 tokens/s | 50.0% hits | 10 MB/s read | 0 B of 0 B budget in use"


def test_nothing_of_paging_where_nothing_is_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = Generation(prompt_tokens=7)
    shown = live(FakeLlama(None), generation, monkeypatch)
    generation.token_ids, generation.prefill_s = [1, 2, 3], 1.0
    assert shown.line(102.0) == "2.0 tokens/s"
    assert shown.summary() == "0.0 tokens/s"
