"""`spac chat`: whole transcripts, with a model that answers what the test wants; then the real one on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from spac.cli import chat as chat_module
from spac.cli import options as opt
from spac.errors import ExpertReadError
from tests.conftest import Result

Answer = str | BaseException


class FakeLlama:
    """A model with a context of 60 "tokens" (characters), which answers from a queue."""

    model_path = "fake.gguf"
    metadata: ClassVar = {"tokenizer.chat_template": "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}a:"}

    class Spac:
        plan = None

        def stats(self) -> None:
            return None

        def info(self) -> None:
            return None

        def cancel(self) -> None:
            pass

        def forget_cancel(self) -> None:
            pass

    def __init__(self, n_ctx: int = 60) -> None:
        self.spac = self.Spac()
        self._n_ctx = n_ctx
        self.closed = False

    def n_ctx(self) -> int:
        return self._n_ctx

    def token_eos(self) -> int:
        return -1

    token_bos = token_eos

    def tokenize(self, text: bytes, **_: object) -> list[int]:
        return list(text)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Result]) -> Callable[..., tuple[Result, list[str]]]:
    """`talk(stdin, answers)`: the transcript, and the prompts that the model was given."""

    def run(stdin: str, *answers: Answer, n_ctx: int = 60, options: Sequence[str] = ()) -> tuple[Result, list[str]]:
        llama, prompts, queue = FakeLlama(n_ctx), [], list(answers)
        from spac import generate

        def fake(_: object, prompt: list[int], *__: object) -> tuple[generate.Generation, Iterator[str]]:
            prompts.append(bytes(prompt).decode())
            result = generate.Generation(prompt_tokens=len(prompt))
            answer = queue.pop(0)

            def pieces() -> Iterator[str]:
                if isinstance(answer, BaseException):
                    raise answer
                result.finish = "stop"
                for word in answer.split(" "):
                    result.text += word if not result.text else " " + word
                    yield word if result.text == word else " " + word

            return result, pieces()

        monkeypatch.setattr(generate, "generate", fake)
        monkeypatch.setattr(opt, "load", lambda _: (llama, 0.5))
        monkeypatch.setattr(chat_module.opt, "load", lambda _: (llama, 0.5))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        result = cli("chat", "fake.gguf", *options)
        assert llama.closed
        assert not queue
        return result, prompts

    return run


def test_a_conversation(talk: Callable[..., Any]) -> None:
    """Answers go to stdout and nothing else; each prompt holds the turns before it."""
    result, prompts = talk("one\ntwo\n", "first answer", "second")
    assert result == Result(0, "first answer\nsecond\n", "")
    assert prompts == ["u:one|a:", "u:one|a:first answer|u:two|a:"]


def test_several_lines(talk: Callable[..., Any]) -> None:
    _, prompts = talk('"""a\nb\n"""\n"""c"""\n', "x", "y")
    assert prompts[0] == "u:a\nb|a:"
    assert prompts[1].endswith("u:c|a:")
    assert talk('"""/bye"""\n', "x")[1] == ["u:/bye|a:"]  # no command


def test_clear_forgets(talk: Callable[..., Any]) -> None:
    result, prompts = talk("one\n/clear\ntwo\n", "x", "y")
    assert prompts == ["u:one|a:", "u:two|a:"]
    assert result.err == "(forgot the conversation)\n"


def test_bye_ends_at_once(talk: Callable[..., Any]) -> None:
    result, prompts = talk("/bye\nnever read\n")
    assert result == Result(0, "", "")
    assert prompts == []


def test_commands_that_do_not_exist_and_help(talk: Callable[..., Any]) -> None:
    result, _ = talk("/dance\n/help\n/stats\n")
    assert result.out == ""
    assert "/dance is not a command" in result.err
    assert "/clear" in result.err
    assert "not paged" in result.err


def test_set(talk: Callable[..., Any]) -> None:
    """Options change; nonsense is refused with a line; /set alone shows them; a system prompt is sent."""
    result, prompts = talk("/set temp 0.1\n/set temp hot\n/set top-p 7\n/set speed 9\n/set max-tokens 0\n/set system Be brief.\n/set\nhi\n", "x")
    assert prompts == ["s:Be brief.|u:hi|a:"]
    lines = result.err.splitlines()
    assert "'hot' is not a value for temp" in lines[0]
    assert "top_p is 7" in lines[1]
    assert "speed cannot be set" in lines[2]
    assert "max-tokens is 0" in lines[3]
    assert any(line.split() == ["temp", "0.1"] for line in lines)
    assert any(line.split() == ["system", "Be", "brief."] for line in lines)


def test_a_full_context_forgets_the_oldest_turns_and_says_so(talk: Callable[..., Any]) -> None:
    result, prompts = talk("aaaaaaaaaa\nbbbbbbbbbb\ncccccccccc\n", "1111111111", "2222222222", "3")
    assert prompts[2] == "u:bbbbbbbbbb|a:2222222222|u:cccccccccc|a:" or prompts[2] == "u:cccccccccc|a:"
    assert "the context is full: forgot the oldest" in result.err


def test_a_message_longer_than_the_context(talk: Callable[..., Any]) -> None:
    """Is refused with a line, and the conversation goes on without it."""
    result, prompts = talk("x" * 100 + "\nhi\n", "y")
    assert prompts == ["u:hi|a:"]
    assert "shorten it or raise --ctx" in result.err
    _, prompts = talk("one\n" + "x" * 100 + "\ntwo\n", "y", "z")
    assert prompts == ["u:one|a:", "u:one|a:y|u:two|a:"]


def test_ctrl_c_before_the_answer_begins(talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a long history is read: that message is forgotten, the chat goes on."""
    tokenize = FakeLlama.tokenize

    def interrupted(self: FakeLlama, text: bytes, **options: object) -> list[int]:
        if b"two" in text:
            raise KeyboardInterrupt
        return tokenize(self, text, **options)

    monkeypatch.setattr(FakeLlama, "tokenize", interrupted)
    result, prompts = talk("one\ntwo\nthree\n", "x", "y")
    assert result.code == 0
    assert "(stopped)" in result.err
    assert prompts == ["u:one|a:", "u:one|a:x|u:three|a:"]


def test_a_failed_answer_is_taken_back(talk: Callable[..., Any]) -> None:
    result, prompts = talk("one\ntwo\n", ExpertReadError("fake.gguf", 4096, 10, 5), "y")
    assert prompts == ["u:one|a:", "u:two|a:"]
    assert "Input/output error" in result.err
    assert result.code == 0


def test_stats_without_a_terminal(talk: Callable[..., Any]) -> None:
    """A line after each answer, a failed one too, and all figures at the end; nothing moves a cursor."""
    result, _ = talk("one\ntwo\n", "first answer", ExpertReadError("fake.gguf", 4096, 10, 5), options=["--stats"])
    assert result.out == "first answer\n\n"
    lines = result.err.splitlines()
    assert lines[0] == "0.0 tokens/s"
    assert "Input/output error" in lines[2]
    assert lines[3] == "0.0 tokens/s"
    assert lines[-1] == "experts  not paged"
    assert "\x1b" not in result.err


# -- the real model, on a terminal --


class Terminal:
    """`spac chat` on a pseudo-terminal."""

    def __init__(self, *arguments: object, term: str = "dumb") -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spac", "chat", *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: os.login_tty(0) if hasattr(os, "login_tty") else _controlling_terminal(),
            env={**os.environ, "TERM": term},
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read_until(self, words: str, count: int = 1, timeout_s: float = 60) -> str:
        end = time.monotonic() + timeout_s
        while self.text.count(words) < count:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.text

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def _controlling_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(model_path: Path) -> Iterator[Terminal]:
    with contextlib.closing(Terminal(model_path, "--paging", "on", "--temp", "1", "--ctx", "2048", "--memory", "1G")) as result:
        yield result


def test_ctrl_c_stops_the_answer(model_path: Path) -> None:
    """Interrupted once it streams: tokens drawn evenly from the vocabulary go on for a thousand or so."""
    even = ("--temp", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "3")
    with contextlib.closing(Terminal(model_path, "--paging", "on", "--ctx", "2048", "--memory", "1G", *even)) as terminal:
        terminal.read_until(">>> ")
        terminal.send("hi\r")
        before = len(terminal.text)
        while len(terminal.text) < before + 100:
            terminal.text += os.read(terminal.master, 256).decode(errors="replace")
        terminal.send("\x03")
        terminal.read_until("(stopped)", timeout_s=20)
        terminal.text = terminal.text.rpartition("(stopped)")[2]
        terminal.read_until(">>> ", timeout_s=10)
        terminal.send("\x04")
        assert terminal.process.wait(10) == 0
        assert "Traceback" not in terminal.text


def test_stats_below_the_answer(model_path: Path) -> None:
    """The line is there while the answer streams, and gone when Ctrl-C has stopped it."""
    even = ("--temp", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "3", "--stats")
    with contextlib.closing(Terminal(model_path, "--paging", "on", "--ctx", "4096", "--memory", "1G", *even, term="xterm")) as terminal:
        terminal.read_until(">>> ")
        terminal.send("hi\r")
        terminal.read_until("MB/s read | ", count=3)
        terminal.send("\x03")
        terminal.read_until("(stopped)", timeout_s=20)
        erased, _, after = terminal.text.rpartition("\x1b8")
        assert erased
        assert "\x1b[J" in after
        terminal.text = terminal.text.rpartition("(stopped)")[2]
        terminal.read_until(">>> ", timeout_s=10)
        assert terminal.text.count("tokens/s |") == 1
        assert "\x1b" not in terminal.text.replace("\x1b[?2004h", "")
        terminal.send("\x04")
        assert terminal.process.wait(10) == 0
        assert "Traceback" not in terminal.text


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.read_until(">>> ")
    terminal.send("\x04")
    assert terminal.process.wait(20) == 0
    assert "Traceback" not in terminal.text


def test_ctrl_c_at_the_prompt_does_not_leave(terminal: Terminal) -> None:
    """Pressed again if nothing happens: input() misses one that comes after its prompt and before it waits for keys."""
    terminal.read_until(">>> ")
    terminal.send("\x03")
    try:
        terminal.read_until("Ctrl-D or /bye leaves", timeout_s=10)
    except AssertionError:
        terminal.send("\x03")
        terminal.read_until("Ctrl-D or /bye leaves")
    terminal.send("/bye\r")
    assert terminal.process.wait(20) == 0


def test_a_bar_shows_while_loading(terminal: Terminal) -> None:
    assert "loading spac-demo-moe.gguf [" in terminal.read_until(">>> ")
    terminal.process.send_signal(signal.SIGKILL)
