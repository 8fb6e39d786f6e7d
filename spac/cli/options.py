"""Options that `run` and `chat` share, and loading a model as they say."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spac.cli import terminal
from spac.errors import BudgetError, Cancelled, SpacError
from spac.gguf.check import MAX_CTX
from spac.host.memory import MIB, check_address_space, format_bytes, resident_bytes
from spac.stats import SIGNALS

if TYPE_CHECKING:
    from spac.llama import Llama
    from spac.speculative import Speculation


# address space that Python's and our libraries take
IMPORT_BYTES = 320 * MIB
MOST_VERIFIED, MOST_SENSED = 64, 8  # as in spac.speculative, which is not imported for --help


class Paging(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"


STORES = ("auto", "direct", "buffered", "mmap", "mock")  # mock is for tests and not shown


def utf8(what: str, text: str) -> str:
    """The same text: an argument of the command line may hold bytes that are none.

    Raises:
        SpacError: it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise SpacError(f"{what} is not UTF-8 text (character {e.start})") from None
    return text


def _check_store(store: str) -> str:
    if store not in STORES:
        raise typer.BadParameter(f"store {store!r} does not exist: use {', '.join(STORES[:-1])}")
    return store


Count = int | Literal["auto"]


def _count(name: str, text: str, most: int) -> Count:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit() or int(text) > most:
        raise typer.BadParameter(f"{name} is {text!r}, expected 0 to {most}, or auto")
    return int(text)


def _draft_max(text: str) -> Count:
    return _count("draft-max", text, MOST_VERIFIED)


def _horizon(text: str) -> Count:
    return _count("horizon", text, MOST_SENSED)


def _signals(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return SIGNALS if text == "all" else ()
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SIGNALS:
            raise typer.BadParameter(f"signal {name!r} does not exist: use {', '.join(SIGNALS)}, all or none")
    return names


def _grammar(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SpacError(f"{file}: cannot read the grammar: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}") from None


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file; the first part of a split model.", show_default=False)]
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Limit of the whole process: 4G, 512M, 50%, or auto. K, M and G count in 1024s.")]
Ctx = Annotated[int, typer.Option(min=0, max=MAX_CTX, metavar="TOKENS", help="Length of the context; 0: what the model was trained with.")]
Ubatch = Annotated[
    int | None,
    typer.Option(
        min=1, max=65536, metavar="TOKENS", help="Tokens computed at a time while reading the prompt; else 512, or what memory allows.",
        show_default=False,
    ),
]  # fmt: skip
Threads = Annotated[int, typer.Option(min=0, max=1024, metavar="N", help="Compute threads; 0: one for each physical core.")]
MaxTokens = Annotated[
    int | None, typer.Option("-n", "--max-tokens", min=1, metavar="N", help="Answer at most so many tokens.", show_default=False)
]
Temp = Annotated[float, typer.Option(min=0, max=100, metavar="T", help="Temperature; 0: always the most likely token.")]
TopK = Annotated[int, typer.Option(min=0, metavar="K", help="Choose among the K most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, metavar="P", help="Choose among the most likely with probability P together.")]
MinP = Annotated[float, typer.Option(min=0, max=1, metavar="P", help="Leave out what is less likely than P times the best.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 2, metavar="N", help="Of the random numbers; else drawn.", show_default=False)]
RepeatPenalty = Annotated[
    float, typer.Option(min=0.01, max=100, metavar="R", help="Tokens of the answer's last 64 get less likely by this factor; 1: none.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(min=-100, max=100, metavar="F", help="The same, taken from their logits for each time they came.")
]
PresencePenalty = Annotated[float, typer.Option(min=-100, max=100, metavar="F", help="The same, taken once.")]
Grammar = Annotated[
    Any,
    typer.Option(metavar="FILE", parser=_grammar, help="The answer must be a sentence of this grammar (GBNF).", show_default=False),
]
StoreOption = Annotated[
    str,
    typer.Option(
        metavar="direct|buffered|mmap|auto",
        callback=_check_store,
        help="How experts are read; auto: direct, or buffered where that is refused.",
    ),
]
PagingOption = Annotated[Paging, typer.Option(help="Page experts: if the model does not fit, always, or never (no limit then).")]
Repack = Annotated[
    bool, typer.Option("--repack/--no-repack", help="Rearrange weights for the CPU's faster kernels, as llama.cpp does by default.")
]
Draft = Annotated[
    str,
    typer.Option(
        metavar="MODEL|ngram|off|auto",
        help="What guesses tokens ahead: a small GGUF of the same vocabulary, or the text so far; auto: off.",
    ),
]
DraftMax = Annotated[
    Any,
    typer.Option(metavar="N|auto", parser=_draft_max, help="Verify at most so many guessed tokens at a time; auto: what pays, 0: none."),
]
Horizon = Annotated[
    Any,
    typer.Option(
        metavar="N|auto", parser=_horizon,
        help="Guess at least so many tokens to know which experts to keep, verified or not; auto: what pays.",
    ),
]  # fmt: skip
Signals = Annotated[
    Any,
    typer.Option(
        metavar="NAMES|none", parser=_signals,
        help="What foresees experts: tokens (those decoded next), draft (those guessed after them), both: all.",
    ),
]  # fmt: skip
Learned = Annotated[
    str,
    typer.Option(
        metavar="FILE|auto|off", help="Where what was learned of this model's experts is kept; auto: in the user's cache directory."
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Show timings and what paging did, on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the logs of spac and llama.cpp, and tracebacks.")]


@dataclass(frozen=True)
class LoadOptions:
    """What a user asked for about loading."""

    model: str
    memory: str
    ctx: int
    ubatch: int | None
    threads: int
    store: str
    paging: Paging
    repack: bool
    debug: bool
    signals: tuple[str, ...] = SIGNALS
    learned: str = "auto"
    record_routing: bool = False


@dataclass(frozen=True)
class DraftOptions:
    """What a user asked for about drafting."""

    draft: str
    draft_max: Count
    horizon: Count


def load(options: LoadOptions) -> tuple[Llama, float]:
    """Load a model, with a bar on a terminal; returns it and the seconds it took.

    Raises:
        SpacError: it cannot be loaded.
        KeyboardInterrupt: Ctrl-C came meanwhile.
    """
    from spac.gguf.check import check_model

    # before anything heavy is imported
    check_model(options.model)
    if options.paging is Paging.off and options.memory != "auto":
        terminal.note(f"spac: --paging off loads as stock llama.cpp does, --memory {options.memory} is not kept to")
    check_address_space(IMPORT_BYTES)
    begin = time.perf_counter()
    from spac.llama import Llama

    llama = _show_loading(options.model, lambda on_progress: Llama(**_arguments(options), on_progress=on_progress))
    return llama, time.perf_counter() - begin


def load_with_draft(options: LoadOptions, drafting: DraftOptions) -> tuple[Llama, Speculation, float]:
    """Load a model and its draft into one memory limit; returns them and the seconds it took.

    Raises:
        SpacError: one of them cannot be loaded, or the draft cannot serve the model.
        KeyboardInterrupt: Ctrl-C came meanwhile.
    """
    draft = drafting.draft
    if draft in ("off", "auto", "ngram"):
        llama, load_s = load(options)
        from spac.speculative import NgramDraft, Speculation

        speculation = Speculation(NgramDraft() if draft == "ngram" else None, drafting.draft_max, horizon=drafting.horizon)
        with _closed_if_refused(llama):
            speculation.check(llama)
        return llama, speculation, load_s
    from spac.gguf.check import check_model

    facts, draft_facts = check_model(options.model), check_model(draft)
    check_address_space(IMPORT_BYTES)
    begin = time.perf_counter()
    from spac.speculative import DRAFT_UBATCH, DraftLlama, ModelDraft, Speculation

    if draft_facts.expert_bytes and options.paging is Paging.auto:
        options = replace(options, paging=Paging.on)  # experts of both share one budget
    small = replace(options, model=draft, ctx=options.ctx or facts.n_ctx_train, ubatch=DRAFT_UBATCH)
    small = replace(small, signals=(), learned="off", record_routing=False)
    before = resident_bytes()
    draft_llama = _show_loading(draft, lambda on_progress: DraftLlama(**_arguments(small), on_progress=on_progress))
    with _closed_if_refused(draft_llama):
        speculation = Speculation(ModelDraft(draft_llama), drafting.draft_max, horizon=drafting.horizon)
        taken_bytes = resident_bytes() - before
        try:
            llama, _ = load(options)
        except BudgetError as e:
            raise BudgetError(f"{e}; {format_bytes(taken_bytes)} are taken by the draft {draft}, see --draft off") from None
        with _closed_if_refused(llama):
            speculation.check(llama)
    return llama, speculation, time.perf_counter() - begin


@contextlib.contextmanager
def _closed_if_refused(llama: Llama) -> Iterator[None]:
    try:
        yield
    except BaseException:
        llama.close()
        raise


def _arguments(options: LoadOptions) -> dict[str, Any]:
    """Of `spac.Llama`."""
    return {
        "model_path": options.model,
        "memory": options.memory,
        "paging": options.paging.value,
        "store": options.store,
        "repack": options.repack,
        "signals": options.signals,
        "learned": None if options.learned == "off" else options.learned,
        "n_ctx": options.ctx,
        "n_batch": max(512, options.ubatch or 0),
        "n_ubatch": options.ubatch,
        "n_threads": options.threads or None,
        "record_routing": options.record_routing,
        "verbose": options.debug,
    }


def _show_loading(name: str, make: Callable[[Callable[[float], bool]], Llama]) -> Llama:
    """Load with a bar; Ctrl-C stops it."""
    with terminal.Interrupts() as interrupts, terminal.LoadingBar(name) as bar:

        def on_progress(progress: float) -> bool:
            bar.show(progress)
            return not interrupts.hit

        try:
            llama = make(on_progress)
        except Cancelled:
            raise KeyboardInterrupt from None
        if interrupts.hit:
            llama.close()
            raise KeyboardInterrupt
    return llama
