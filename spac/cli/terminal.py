"""What needs a terminal or a signal: a loading bar, Ctrl-C while native code runs, lines of statistics."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from spac.host.memory import format_bytes

if TYPE_CHECKING:
    from spac.generate import Generation
    from spac.llama import Llama
    from spac.speculative import DraftStats


def note(text: str) -> None:
    """A line for the user that is not part of the answer."""
    print(text, file=sys.stderr, flush=True)


class LoadingBar:
    """A line on stderr that shows how far a load is; nothing where stderr is not a terminal."""

    WIDTH = 24

    def __init__(self, model: str) -> None:
        self._name = Path(model).name
        self._shown = -1
        self._enabled = sys.stderr.isatty()

    def __enter__(self) -> LoadingBar:
        self.show(0.0)
        return self

    def show(self, progress: float) -> None:
        """progress: 0.0 to 1.0."""
        percent = int(progress * 100)
        if self._enabled and percent != self._shown:
            self._shown = percent
            done = int(progress * self.WIDTH)
            bar = "#" * done + "." * (self.WIDTH - done)
            print(f"\rloading {self._name} [{bar}] {percent:3d}%", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Interrupts:
    """While active, Ctrl-C sets `hit` and calls each of `on_hit` at once instead of raising KeyboardInterrupt.

    Python runs signal handlers only between bytecodes of the main thread, which may be inside llama.cpp for seconds. So the
    C-level handler's wake-up byte is read by a thread of ours, which calls them. Only for the main thread.
    """

    def __init__(self, *on_hit: Callable[[], None]) -> None:
        self.hit = False
        self._on_hit = on_hit

    def __enter__(self) -> Interrupts:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._old_handler: Any = signal.signal(signal.SIGINT, self._on_signal)
        self._watcher = threading.Thread(target=self._watch, name="spac-interrupts", daemon=True)
        self._watcher.start()
        return self

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        self.hit = True

    def _watch(self) -> None:
        while True:
            signals = self._read.recv(64)
            if not signals or 0 in signals:
                return
            if signal.SIGINT in signals:
                self.hit = True
                for call in self._on_hit:
                    call()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._old_fd)
        signal.signal(signal.SIGINT, self._old_handler)
        self._write.send(b"\0")
        self._watcher.join()
        self._read.close()
        self._write.close()


def draft_line(stats: DraftStats) -> str:
    """What became of drafted tokens."""
    if stats.given_back_bytes:
        return f"draft    closed: its {format_bytes(stats.given_back_bytes)} are worth more to experts"
    if not stats.verifications:
        return "draft    verified nothing"
    return (
        f"draft    {stats.accepted} of {stats.proposed} tokens accepted ({stats.acceptance_rate:.0%}),"
        f" {stats.mean_accepted_tokens:.2f} in each of {stats.verifications} verifications"
    )


def stats_lines(llama: Llama, generation: Generation | None, load_s: float) -> list[str]:
    """What `--stats` and `/stats` show."""
    from spac.host.memory import peak_resident_bytes

    lines = [f"load     {load_s:.2f} s"]
    if generation is not None:
        new = generation.prompt_tokens - generation.reused_tokens
        lines += [
            f"prefill  {new} tokens in {generation.prefill_s:.2f} s, {generation.prefill_tokens_per_s:.1f} tokens/s"
            + (f" ({generation.reused_tokens} reused)" if generation.reused_tokens else ""),
            f"decode   {generation.completion_tokens} tokens in {generation.decode_s:.2f} s,"
            f" {generation.decode_tokens_per_s:.1f} tokens/s",
        ]
        if generation.draft is not None:
            lines.append(draft_line(generation.draft))
    plan = llama.spac.plan
    limit = f" of {format_bytes(plan.limit_bytes)}" if plan else ""
    lines.append(f"memory   peak {format_bytes(peak_resident_bytes())}{limit}")
    stats, info = llama.spac.stats(), llama.spac.info()
    if stats is None or info is None:
        return [*lines, "experts  not paged"]
    if stats.shortages:
        now = f", which leave {format_bytes(stats.budget_bytes)} now" if stats.budget_bytes < stats.granted_bytes else ""
        lines.append(f"memory   was short {stats.shortages} times: other programs needed it{now}")
    return [
        *lines,
        f"experts  {format_bytes(stats.model_used_bytes)} of {format_bytes(info.expert_page_bytes)} in memory,"
        f" budget {format_bytes(stats.granted_bytes)} (store: {info.store})",
        f"paging   {stats.hit_rate:.1%} hits, {format_bytes(stats.bytes_read)} read in {stats.reads} reads,"
        f" {stats.stall_s:.2f} s stalled",
    ]
