"""Figures of an answer while it streams: one line below the text, on stderr, gone when the answer ends.

Nothing is set in the terminal that would have to be undone, so a process that is killed leaves at most the line itself.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, TextIO

from spac.host.memory import format_bytes

if TYPE_CHECKING:
    from spac.generate import Generation
    from spac.llama import Llama
    from spac.stats import ModelStats

INTERVAL_S: Final = 0.25
_WINDOW: Final = 8  # samples that the rate of reading is taken over

# Index (down a row in the same column, scrolling where that is the last), up, save the cursor, down, to the left; and back.
_BELOW, _BACK = "\x1bD\x1b[A\x1b7\x1b[B\r", "\x1b[K\x1b8"
_ERASE_BELOW = "\x1b[J"


class BottomLine:
    """A line of a terminal that stays below text which is streamed piece by piece. Thread safe.

    Between calls the cursor stands at the end of the text; `out` and `err` may be the same terminal or not.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self._enabled = err.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._together = self._enabled and out.isatty()
        self._lock = threading.Lock()
        self._column = 0
        self._line = ""
        self._drawn = False

    @property
    def enabled(self) -> bool:
        """Whether lines are shown: `err` is a terminal that can move its cursor."""
        return self._enabled

    def write(self, piece: str) -> None:
        """A piece of the text."""
        with self._lock:
            self._erase()
            self._out.write(piece)
            self._out.flush()
            if self._together:
                self._column = column_after(self._column, piece, self._width())
            self._draw()

    def show(self, line: str) -> None:
        """Replace the line; what does not fit into the terminal's width is cut. "": no line."""
        with self._lock:
            self._erase()
            self._line = line if self._enabled else ""
            self._draw()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._err.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _erase(self) -> None:
        if self._drawn:
            self._err.write(_ERASE_BELOW)
            self._err.flush()
            self._drawn = False

    def _draw(self) -> None:
        width = self._width() if self._line else 0
        # At the right edge the next character is to go to the next row; moving the cursor would make the terminal forget that.
        if self._line and self._column < width:
            self._err.write(f"{_BELOW}{self._line[: width - 1]}{_BACK}")
            self._err.flush()
            self._drawn = True


def column_after(column: int, text: str, width: int) -> int:
    """Where a terminal's cursor stands after a text; `width`: at the right edge, with the next character going to the next row."""
    for char in text:
        if char in "\r\n":
            column = 0
        elif char == "\t":
            column = min((column // 8 + 1) * 8, width - 1)
        else:
            cells = _cells(char)
            column = column + cells if column + cells <= width else cells
    return column


def _cells(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Cc", "Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


class LiveStats:
    """Streams an answer, and shows below it, while active, how it goes; a few times a second, from a thread of its own.

    On a stderr that is no terminal nothing is shown.
    """

    def __init__(self, llama: Llama, generation: Generation, *, shown: bool = True) -> None:
        """`shown`: False streams only."""
        self._llama, self._generation = llama, generation
        self._bottom = BottomLine(sys.stdout, sys.stderr)
        self._shown = shown and self._bottom.enabled
        self._before = llama.spac.stats() if shown else None
        self._begin_s = time.perf_counter()
        self._read: deque[tuple[float, int]] = deque(maxlen=_WINDOW)  # when, bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spac-live-stats", daemon=True)

    def __enter__(self) -> LiveStats:
        if self._shown:
            self._thread.start()
        return self

    def write(self, piece: str) -> None:
        """A piece of the answer, to stdout."""
        self._bottom.write(piece)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._shown:
            self._thread.join()
            self._bottom.show("")

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._bottom.show(self.line(time.perf_counter()))

    def line(self, now_s: float) -> str:
        """The answer so far; `now_s`: of time.perf_counter(). Reads are those of the last two seconds, the rest is of the whole answer."""
        generation, stats = self._generation, self._llama.spac.stats()
        made, elapsed_s = len(generation.token_ids), now_s - self._begin_s
        if made == 0:
            speed = f"prompt of {generation.prompt_tokens} tokens, {elapsed_s:.0f} s"
        else:
            decode_s = elapsed_s - generation.prefill_s
            speed = f"{(made - 1) / decode_s if decode_s > 0 else 0.0:.1f} tokens/s"
        if stats is not None:
            self._read.append((now_s, stats.bytes_read))
        return self._composed(speed, stats, _rate(self._read))

    def summary(self) -> str:
        """The whole answer, once it has ended."""
        generation, stats = self._generation, self._llama.spac.stats()
        read_bytes = stats.bytes_read - self._before.bytes_read if stats is not None and self._before is not None else 0
        rate = _rate([(0.0, 0), (generation.prefill_s + generation.decode_s, read_bytes)])
        return self._composed(f"{generation.decode_tokens_per_s:.1f} tokens/s", stats, rate)

    def _composed(self, speed: str, stats: ModelStats | None, read_bytes_per_s: float) -> str:
        parts, before, draft = [speed], self._before, self._generation.draft
        if draft is not None and draft.verifications:
            parts.append(f"{draft.accepted} of {draft.proposed} drafts accepted")
        if stats is not None and before is not None:
            hits, misses = stats.hits - before.hits, stats.misses - before.misses
            parts += [
                f"{hits / max(1, hits + misses):.1%} hits",
                f"{read_bytes_per_s / 1e6:.0f} MB/s read",
                f"{format_bytes(stats.model_used_bytes)} of {format_bytes(stats.budget_bytes)} budget in use",
            ]
        return " | ".join(parts)


def _rate(samples: Sequence[tuple[float, int]]) -> float:
    """Bytes a second from the first sample to the last."""
    if not samples or samples[-1][0] <= samples[0][0]:
        return 0.0
    (first_s, first), (last_s, last) = samples[0], samples[-1]
    return (last - first) / (last_s - first_s)
