"""`spac chat`: turns with a model, streamed."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spac.cli import options as opt
from spac.cli import terminal
from spac.cli.live import LiveStats
from spac.cli.terminal import note
from spac.errors import Cancelled, ModelChangedError, OptionError, SpacError

if TYPE_CHECKING:
    from spac.cli.conversation import Conversation
    from spac.generate import Generation, Sampling
    from spac.llama import Llama
    from spac.speculative import Speculation

HELP = """\
/bye            leave (also Ctrl-D)
/clear          forget the conversation
/stats          timings, and what paging did
/set NAME VALUE change temp, top-k, top-p, min-p, seed, a penalty, max-tokens or system; /set alone shows them
/help           this list
\"\"\"             begins and ends a message of several lines
Ctrl-C          stops the answer"""

# of /set: attributes of Sampling
SETTINGS = {
    "temp": "temperature", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "seed": "seed", "repeat-penalty": "repeat_penalty",
    "frequency-penalty": "frequency_penalty", "presence-penalty": "presence_penalty",
}  # fmt: skip


def chat(
    model: opt.Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.", show_default=False)] = None,
    max_tokens: opt.MaxTokens = None,
    memory: opt.Memory = "auto",
    ctx: opt.Ctx = 4096,
    ubatch: opt.Ubatch = None,
    threads: opt.Threads = 0,
    temp: opt.Temp = 0.8,
    top_k: opt.TopK = 40,
    top_p: opt.TopP = 0.95,
    min_p: opt.MinP = 0.05,
    seed: opt.Seed = None,
    repeat_penalty: opt.RepeatPenalty = 1.0,
    frequency_penalty: opt.FrequencyPenalty = 0.0,
    presence_penalty: opt.PresencePenalty = 0.0,
    grammar: opt.Grammar = None,
    store: opt.StoreOption = "auto",
    paging: opt.PagingOption = opt.Paging.auto,
    repack: opt.Repack = True,
    draft: opt.Draft = "auto",
    draft_max: opt.DraftMax = "auto",
    horizon: opt.Horizon = "auto",
    signals: opt.Signals = "all",
    learned: opt.Learned = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Show on stderr how each answer goes; at the end, timings and paging.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Chat with a model. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    if system is not None:
        opt.utf8("the system prompt", system)
    options = opt.LoadOptions(model, memory, ctx, ubatch, threads, store, paging, repack, debug, signals, learned)
    llama, speculation, load_s = opt.load_with_draft(options, opt.DraftOptions(draft, draft_max, horizon))
    from spac.cli.conversation import Conversation
    from spac.generate import Sampling

    with contextlib.closing(speculation), contextlib.closing(llama):
        sampling = Sampling(temp, top_k, top_p, min_p, seed, repeat_penalty, frequency_penalty, presence_penalty, grammar)
        session = Session(llama, Conversation(llama, system), sampling, max_tokens, load_s, speculation, stats)
        while session.step():
            pass
        if stats:
            session.show_stats()
    return 0


class Session:
    """One chat: reads lines, obeys commands, streams answers."""

    def __init__(
        self,
        llama: Llama,
        conversation: Conversation,
        sampling: Sampling,
        max_tokens: int | None,
        load_s: float,
        speculation: Speculation,
        stats: bool,
    ) -> None:
        """`stats`: show how each answer goes."""
        self.llama = llama
        self.conversation = conversation
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.load_s = load_s
        self.speculation = speculation
        self.stats = stats
        self.last: Generation | None = None
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - makes input() edit lines
            note("Ctrl-C stops an answer, /help lists commands, Ctrl-D leaves.")

    def step(self) -> bool:
        """One message or command; False at the end."""
        try:
            line = self.read_line(">>> ")
            message = self.read_message(line) if line is not None else None
        except KeyboardInterrupt:
            note("\nCtrl-D or /bye leaves.")
            return True
        if line is None or message is None:
            if self.interactive:
                note("")
            return False
        if line.startswith("/"):
            return self.command(line)
        try:
            if message.strip():
                self.answer(message)
        except KeyboardInterrupt:  # before the first token or after the last one
            self.conversation.take_back()
            note("\n(stopped)")
        return True

    # -- input --

    def read_line(self, prompt: str) -> str | None:
        """A line without its end; None at the end of the input."""
        if self.interactive:
            try:
                return input(prompt)
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def read_message(self, line: str) -> str | None:
        """The message that begins with this line; None if the input ends in it."""
        if not line.lstrip().startswith('"""'):
            return line
        text = line.lstrip()[3:]
        lines = []
        while not text.rstrip().endswith('"""'):
            lines.append(text)
            more = self.read_line("... ")
            if more is None:
                return None
            text = more
        lines.append(text.rstrip()[:-3])
        return "\n".join(lines).strip("\n")

    # -- answers --

    def answer(self, message: str) -> None:
        """Stream the answer to a message; a failure leaves the conversation as it was."""
        from spac.generate import generate

        try:
            tokens, dropped = self.conversation.ask(message, self.max_tokens)
        except SpacError as e:
            note(f"spac: {e}")
            return
        if dropped:
            note(f"(the context is full: forgot the oldest {'turn' if dropped == 1 else f'{dropped} turns'})")
        self.llama.spac.forget_cancel()
        self.speculation.forget_cancel()
        self.last, pieces = generate(self.llama, tokens, self.sampling, self.max_tokens, self.speculation)
        live = LiveStats(self.llama, self.last, shown=self.stats)
        interrupted = False
        with terminal.Interrupts(self.llama.spac.cancel, self.speculation.cancel) as interrupts:
            try:
                with live, contextlib.closing(pieces):
                    for piece in pieces:
                        live.write(piece)
                        if interrupts.hit:
                            break
            except Cancelled:
                pass
            except ModelChangedError:
                raise
            except SpacError as e:
                note(f"\nspac: {e}")
            interrupted = interrupts.hit
        self.finish_answer(self.last, interrupted)
        if self.stats:
            note(live.summary())

    def finish_answer(self, generation: Generation, interrupted: bool) -> None:
        if generation.text:
            self.conversation.answered(generation.text)
        elif generation.finish != "stop":
            self.conversation.take_back()
        else:
            self.conversation.answered("")
        print(flush=True)
        if interrupted:
            note("(stopped)")
        elif generation.finish == "context":
            note(f"(the context of {self.llama.n_ctx()} tokens is full: the answer is cut)")
        elif generation.finish == "length":
            note(f"(cut after {generation.completion_tokens} tokens)")

    # -- commands --

    def command(self, line: str) -> bool:
        name, _, rest = line.strip().partition(" ")
        if name in ("/bye", "/exit", "/quit"):
            return False
        if name == "/clear":
            self.conversation.clear()
            note("(forgot the conversation)")
        elif name == "/stats":
            self.show_stats()
        elif name == "/set":
            self.set_option(rest.strip())
        elif name in ("/help", "/?"):
            note(HELP)
        else:
            note(f"{name} is not a command; /help lists them")
        return True

    def show_stats(self) -> None:
        for line in terminal.stats_lines(self.llama, self.last, self.load_s):
            note(line)

    def set_option(self, text: str) -> None:
        """`/set`: show or change an option."""
        name, _, value = text.partition(" ")
        value = value.strip()
        try:
            if not name:
                shown = {option: getattr(self.sampling, attribute) for option, attribute in SETTINGS.items()}
                shown |= {"max-tokens": self.max_tokens, "system": self.conversation.system}
                note("\n".join(f"{option:<18}{'-' if current is None else current}" for option, current in shown.items()))
            elif name == "system":
                self.conversation.system = value or None
            elif name == "max-tokens":
                self.max_tokens = self._positive(value)
            elif name in SETTINGS:
                number: Any = int(value) if name in ("top-k", "seed") else float(value)
                self.sampling = dataclasses.replace(self.sampling, **{SETTINGS[name]: number})
            else:
                note(f"{name} cannot be set; /help lists what can")
        except OptionError as e:
            note(f"spac: {e}")
        except ValueError:
            note(f"spac: {value!r} is not a value for {name}")

    @staticmethod
    def _positive(value: str) -> int | None:
        if value in ("", "-"):
            return None
        if int(value) < 1:
            raise OptionError(f"max-tokens is {value}, expected 1 or more")
        return int(value)
