"""Contenders: what takes part in a benchmark, from its specification on the command line to its command and its figures.

A specification is `engine`, or `engine:option,option,...`; an option is a word or `name=value`. Engines are `stock` (the unpatched
llama.cpp), `spac`, and peers (`peers.py`). So each ablation is one word: `spac`, `spac:store=buffered`, `spac:repack=off`.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from spac.bench.prompt import Prompt
from spac.bench.suite import Row
from spac.bench.worker import DRAFTING, read_events
from spac.errors import OptionError, SpacError
from spac.host.limits import LimitedRun, Limits
from spac.stats import SIGNALS

ROOT: Final = Path(__file__).resolve().parents[2]
STOCK_FOLDER: Final = ROOT / "build" / "stock" / "lib"
STOCK_MODES: Final = ("mmap", "direct", "mlock", "none")
ARGUMENT_BYTES: Final = 120_000  # Linux takes 128 KiB in one argument
SIGNAL_SETS: Final = {"none": (), **{name: (name,) for name in SIGNALS}, "all": SIGNALS}
SHORT: Final = {"io_threads": "n_io_threads"}
TEXTS: Final = ("paging", "store")  # their "on" is a word
OWN: Final = ("memory", "model_path", "n_ctx", "n_ubatch", "n_threads", "n_threads_batch", "on_progress", "verbose")  # the row sets these


@dataclass(frozen=True)
class Task:
    """What is asked of a contender in one run; limits in force or not."""

    model: Path
    model_bytes: int
    row: Row
    limits: Limits
    threads: int
    prompts: tuple[Prompt, ...]
    loadgen_folder: str = ""  # LoadGen drives the engine and leaves its logs there; "": no LoadGen


@dataclass(frozen=True)
class Command:
    """A program to start, variables to add, and the prompts that it will read."""

    arguments: list[str]
    environment: dict[str, str]
    prompts: tuple[Prompt, ...]


TryRun = Callable[[Command], LimitedRun]


class Contender(ABC):
    """One engine with its options.

    Attributes:
        name: its specification, as records and tables show it.
        tokens: to generate, if not what the row says.
    """

    def __init__(self, name: str, tokens: int | None) -> None:
        self.name = name
        self.tokens = tokens

    @property
    def repacked(self) -> bool:
        """Whether the kernels for repacked weights compute: they round differently, so only like answers are alike to the bit."""
        return True

    @abstractmethod
    def files(self) -> dict[str, list[Path]]:
        """What computes, and what it was given besides the model: a record holds their digests."""

    def row_tokens(self, row: Row) -> int:
        """How many tokens to generate after the first."""
        return self.tokens if self.tokens is not None else row.tokens

    def skip(self, task: Task) -> str | None:
        """Why it cannot take part in this row, or None."""
        return None

    def prepare(self, task: Task, run: TryRun) -> dict[str, Any]:
        """Whatever it takes to be at its best in these limits, by trying; returns what was found, for the record."""
        return {}

    @abstractmethod
    def commands(self, task: Task) -> list[Command]:
        """Programs to run one after another."""

    @abstractmethod
    def figures(self, run: LimitedRun, command: Command) -> dict[str, Any]:
        """What a program's output says, also that of one that was killed: see `record.py` for the keys."""


@dataclass(frozen=True)
class Spec:
    """A specification, taken apart."""

    text: str
    engine: str
    words: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Takes a specification apart.

        Raises:
            OptionError: it is not one.
        """
        engine, _, rest = text.strip().partition(":")
        words, values = [], {}
        for part in filter(None, (part.strip() for part in rest.split(","))):
            name, equals, value = part.partition("=")
            if equals and not (name and value):
                raise OptionError(f"contender {text!r}: {part!r} is not name=value")
            if equals:
                values[name] = value
            else:
                words.append(part)
        if not engine:
            raise OptionError(f"contender {text!r} names no engine: write stock:mmap, spac, spac:store=buffered, or a peer's name")
        return cls(text.strip(), engine, tuple(words), values)

    def tokens(self) -> int | None:
        """The option `tokens`, which all contenders have.

        Raises:
            OptionError: it is no number.
        """
        text = self.values.get("tokens")
        if text is not None and not (text.isdigit() and int(text) > 0):
            raise OptionError(f"contender {self.text!r}: tokens is {text!r}, expected a number above 0")
        return int(text) if text else None

    def refuse_others(self, words: Sequence[str], values: Sequence[str]) -> None:
        """Complains of options that the engine does not have.

        Raises:
            OptionError: there is one.
        """
        wrong = [w for w in self.words if w not in words] + [v for v in self.values if v not in (*values, "tokens")]
        if wrong:
            known = ", ".join([*words, *(f"{v}=..." for v in (*values, "tokens"))])
            raise OptionError(f"contender {self.text!r}: {self.engine} has no option {wrong[0]!r}; it has {known}")


def parse_value(name: str, text: str) -> bool | int | float | str:
    """An argument's value: on and off, numbers, else a word."""
    if name not in TEXTS and text.lower() in ("on", "off", "true", "false"):
        return text.lower() in ("on", "true")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


class _Worker(Contender):
    """An engine that `worker.py` runs."""

    engine = ""

    def __init__(self, spec: Spec, arguments: dict[str, Any]) -> None:
        super().__init__(spec.text, spec.tokens())
        self.arguments = arguments
        self.environment: dict[str, str] = {}

    def commands(self, task: Task) -> list[Command]:
        row = task.row
        config = {
            "engine": self.engine, "model": str(task.model), "arguments": self.run_arguments(task), "ctx": row.ctx, "ubatch": row.ubatch,
            "threads": task.threads, "tokens": self.row_tokens(row), "warm": row.warm,
            "prompts": [vars(prompt) for prompt in task.prompts], "loadgen_folder": task.loadgen_folder,
        }  # fmt: skip
        text = json.dumps(config)
        if len(text.encode()) > ARGUMENT_BYTES:
            raise OptionError(f"{len(task.prompts)} prompts of {len(text)} bytes are too much for one run; give --prompts-per-run less")
        return [Command([sys.executable, "-m", "spac.bench.worker", text], self.environment, task.prompts)]

    def run_arguments(self, task: Task) -> dict[str, Any]:
        """Arguments of the engine, besides what the row says."""
        return dict(self.arguments)

    def figures(self, run: LimitedRun, command: Command) -> dict[str, Any]:
        return read_events(run.stdout, command.prompts)


class Stock(_Worker):
    """The unpatched llama.cpp of the same version, through llama-cpp-python; `mmap` (its default), `direct`, `mlock` or `none`."""

    engine = "stock"

    def __init__(self, spec: Spec) -> None:
        spec.refuse_others(STOCK_MODES, ("repack",))
        if len(spec.words) > 1:
            raise OptionError(f"contender {spec.text!r}: one load mode only: {', '.join(STOCK_MODES)}")
        self.mode = spec.words[0] if spec.words else "mmap"
        super().__init__(spec, {"load_mode": self.mode, "repack": parse_value("repack", spec.values.get("repack", "on"))})
        if not (STOCK_FOLDER / "libllama.so").exists():
            raise SpacError(f"the unpatched libraries are missing ({STOCK_FOLDER}): run `make stock`")
        self.environment = {"LLAMA_CPP_LIB_PATH": str(STOCK_FOLDER), "MTMD_CPP_LIB": str(STOCK_FOLDER / "libmtmd.so")}

    @property
    def repacked(self) -> bool:
        return bool(self.arguments["repack"])

    def files(self) -> dict[str, list[Path]]:
        return {"libraries": sorted(STOCK_FOLDER.glob("*.so"))}

    def skip(self, task: Task) -> str | None:
        limit = task.limits.memory_bytes
        if self.mode in ("mlock", "direct", "none") and limit is not None and limit < task.model_bytes:
            return "the model does not fit into the limit"
        return None


class Spac(_Worker):
    """spac, with any argument of `spac.Llama` as an option; `memory` is the row's. `draft` is a GGUF file or ngram.

    `learned` names a file that is read and not changed, so that each run knows the same.
    """

    engine = "spac"

    def __init__(self, spec: Spec) -> None:
        if spec.words:
            raise OptionError(f"contender {spec.text!r}: {spec.words[0]!r} is not name=value")
        arguments: dict[str, Any] = {}
        for name, value in spec.values.items():
            if name != "tokens":
                arguments[SHORT.get(name, name)] = parse_value(name, value)
        for name in ("draft", "learned"):  # the run's working directory is another one
            if arguments.get(name, "ngram") not in ("ngram", "auto"):
                file = Path(str(arguments[name])).resolve()
                if not file.is_file():
                    raise OptionError(f"contender {spec.text!r}: {name}: there is no file {arguments[name]}")
                arguments[name] = str(file)
        if "signals" in arguments:
            if arguments["signals"] not in SIGNAL_SETS:
                raise OptionError(f"contender {spec.text!r}: signals is {arguments['signals']!r}, expected {', '.join(SIGNAL_SETS)}")
            arguments["signals"] = SIGNAL_SETS[str(arguments["signals"])]
        known = (_llama_arguments() | set(DRAFTING)) - set(OWN)
        for name in arguments:
            if name not in known:
                raise OptionError(f"contender {spec.text!r}: spac.Llama takes no {name!r}, or the row sets it")
        super().__init__(spec, arguments)

    @property
    def repacked(self) -> bool:
        return bool(self.arguments.get("repack", True)) and self.arguments.get("store") != "mmap"

    def files(self) -> dict[str, list[Path]]:
        given = {name: Path(self.arguments[name]) for name in ("draft", "learned") if name in self.arguments}
        libraries = sorted(Path(os.environ["LLAMA_CPP_LIB_PATH"]).glob("*.so"))  # set by `import spac`
        return {"libraries": libraries, **{name: [path] for name, path in given.items() if path.is_file()}}

    def run_arguments(self, task: Task) -> dict[str, Any]:
        return {**self.arguments, "memory": task.limits.memory_bytes or "auto"}


def _llama_arguments() -> set[str]:
    """Names that spac.Llama takes."""
    from spac.llama import Llama

    signatures = [inspect.signature(cls) for cls in (Llama, Llama.__base__) if cls is not None]
    return {name for s in signatures for name, p in s.parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def make(text: str, peers: Mapping[str, Path], peer_arguments: Mapping[str, Sequence[str]]) -> Contender | None:
    """A contender for a specification; None for a peer whose path was not given.

    Raises:
        OptionError, SpacError: there is no such contender or option, or it is not built.
    """
    from spac.bench.peers import PEERS

    spec = Spec.parse(text)
    if spec.engine == "stock":
        return Stock(spec)
    if spec.engine == "spac":
        return Spac(spec)
    if spec.engine not in PEERS:
        raise OptionError(f"contender {text!r} does not exist: use stock, spac, {', '.join(PEERS)}")
    path = peers.get(spec.engine)
    return None if path is None else PEERS[spec.engine](spec, path, peer_arguments.get(spec.engine, ()))
