"""One run of one contender, as a process of its own: loads, reads prompts, decodes greedily, prints one JSON object for each event.

The loop is the same for stock and spac; only what loads the model differs. Each token is printed when it is there, so that a run
that was killed says how far it came. `read_events` makes a record of such output.

    python -m spac.bench.worker '{"engine": "spac", "model": "MODEL.gguf", "prompts": [{"kind": "chat", "id": "1", "text": "Hello"}]}'
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from spac.bench.prompt import Prompt

DEFAULTS: Final[dict[str, Any]] = {
    "arguments": {}, "ctx": 1024, "ubatch": 64, "threads": 2, "tokens": 64, "warm": False, "loadgen_folder": "",
}  # fmt: skip
DRAFTING: Final = ("draft", "draft_max", "horizon")  # arguments of spac, besides what spac.Llama takes


def emit(event: str, **values: Any) -> None:
    """Print an event at once."""
    print(json.dumps({"event": event, **values}), flush=True)


# -- loading --


def load(config: dict[str, Any]) -> Any:
    """The engine: `llama_cpp.Llama` or `spac.Llama`, with the same settings."""
    arguments = {name: value for name, value in config["arguments"].items() if name not in DRAFTING}
    common = {
        "n_ctx": config["ctx"], "n_batch": max(512, config["ubatch"]), "n_ubatch": config["ubatch"], "n_threads": config["threads"],
        "n_threads_batch": config["threads"], "verbose": False,
    }  # fmt: skip
    if config["engine"] == "spac":
        import spac

        llama = spac.Llama(config["model"], **common, **arguments)
        llama.spac.keep_learned = False  # each run begins with what was there
        return llama
    import llama_cpp

    if not arguments["repack"]:
        _turn_repacking_off()
    _set_stock_modes(arguments["load_mode"])
    return llama_cpp.Llama(config["model"], **common)


def load_draft(config: dict[str, Any]) -> Any:
    """spac's drafts, loaded before the model, in the same limit; None if there is none."""
    arguments = config["arguments"]
    if not arguments.get("draft"):
        return None
    from spac.speculative import DraftLlama, ModelDraft, NgramDraft, Speculation

    if arguments["draft"] == "ngram":
        draft: Any = NgramDraft()
    else:
        options = {"memory": arguments["memory"], "n_ctx": config["ctx"], "n_threads": config["threads"]}
        draft = ModelDraft(DraftLlama(arguments["draft"], signals=(), verbose=False, **options))
    return Speculation(draft, arguments.get("draft_max", 0), horizon=arguments.get("horizon", "auto"))


def _turn_repacking_off() -> None:
    """As llama.cpp's --no-repack; llama-cpp-python has no argument for it."""
    import llama_cpp.llama_cpp as upstream

    stock_params = upstream.llama_model_default_params

    def params() -> Any:
        result = stock_params()
        result.use_extra_bufts = False
        return result

    upstream.llama_model_default_params = params


def _set_stock_modes(load_mode: str) -> None:
    """The load mode (llama.cpp's --load-mode), and its own choice of attention, as in spac.Llama: llama-cpp-python overwrites both."""
    import llama_cpp._internals as internals
    import llama_cpp.llama_cpp as upstream

    mode = {
        "mmap": upstream.LLAMA_LOAD_MODE_MMAP, "mlock": upstream.LLAMA_LOAD_MODE_MLOCK,
        "direct": upstream.LLAMA_LOAD_MODE_DIRECT_IO, "none": upstream.LLAMA_LOAD_MODE_NONE,
    }[load_mode]  # fmt: skip
    module: Any = internals
    make_model, make_context = module.LlamaModel, module.LlamaContext

    def model(*, params: Any, **others: Any) -> Any:
        params.load_mode = mode
        return make_model(params=params, **others)

    def context(*, params: Any, **others: Any) -> Any:
        params.flash_attn_type = upstream.LLAMA_FLASH_ATTN_TYPE_AUTO
        return make_context(params=params, **others)

    module.LlamaModel, module.LlamaContext = model, context


# -- decoding --


class Engine:
    """A loaded model, with clocks around its decodes."""

    def __init__(self, config: dict[str, Any]) -> None:
        from spac.host.limits import device_of

        self.config = config
        self.device = device_of(Path(config["model"]))
        self.speculation = load_draft(config)
        self.llama = load(config)
        self.eval_s = 0.0  # in llama_decode; the rest of a token's time is sampling and Python
        evaluate = self.llama.eval

        def timed(tokens: Sequence[int]) -> None:
            start = time.perf_counter()
            evaluate(tokens)
            self.eval_s += time.perf_counter() - start

        self.llama.eval = timed

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens."""
        tokens: list[int] = self.llama.tokenize(prompt.text.encode())
        need = len(tokens) + self.config["tokens"] + 1
        if need > self.config["ctx"]:
            raise ValueError(f"prompt {prompt.id!r} and its answer have {need} tokens, the context {self.config['ctx']}; raise --ctx")
        return tokens

    def forget(self) -> None:
        """Empty the context, so that no part of a prompt is reused."""
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()

    def tokens(self, prompt: list[int]) -> Iterator[int]:
        """The answer, greedily: one token and as many more as were asked for."""
        self.forget()
        if self.speculation is not None:
            return self._drafted(prompt)
        return itertools.islice(self.llama.generate(prompt, temp=0.0, top_k=1), self.config["tokens"] + 1)

    def _drafted(self, prompt: list[int]) -> Iterator[int]:
        from spac.generate import Sampling, make_sampler

        self.llama.eval(prompt)
        with (
            contextlib.closing(make_sampler(Sampling(temperature=0), self.llama)) as sampler,
            contextlib.closing(self.speculation.tokens(self.llama, prompt, sampler, self.config["tokens"] + 1)) as tokens,
        ):
            yield from itertools.islice(tokens, self.config["tokens"] + 1)

    def counters(self) -> dict[str, float]:
        """What has been counted since the load."""
        from spac.host.limits import device_read_bytes

        found: dict[str, float] = {"eval_s": self.eval_s, "cpu_s": time.process_time()}
        for name, value in (("device_read_bytes", device_read_bytes(self.device)), ("process_read_bytes", process_read_bytes())):
            if value is not None:
                found[name] = value
        stats = self.llama.spac.stats() if self.config["engine"] == "spac" else None
        if stats is not None:
            found.update({k: v for k, v in dataclasses.asdict(stats).items() if isinstance(v, int | float)})
        return found


def process_read_bytes() -> int | None:
    """What the kernel has read from disks for this process (proc(5), /proc/pid/io), page faults included."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(fields["read_bytes"])


def locked_bytes() -> int:
    """What of this process cannot be paged out (proc(5), VmLck)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck:")), 0)


GAUGES: Final = ("budget_bytes", "used_bytes", "peak_bytes", "model_used_bytes", "granted_bytes")  # not counters: no differences of these


def answer(engine: Engine, index: int, prompt: Prompt, start: float | None = None) -> None:
    """Read a prompt and generate, printing each token with its time since the start."""
    begin = start if start is not None else time.perf_counter()
    tokens = engine.tokenize(prompt)
    emit("prompt", index=index, prompt_tokens=len(tokens))
    at_first: dict[str, float] = {}
    for token in engine.tokens(tokens):
        now = time.perf_counter() - begin
        emit("token", index=index, id=token, t=round(now, 6))
        at_first = at_first or engine.counters()
    difference = {k: v - at_first[k] for k, v in engine.counters().items() if k in at_first and k not in GAUGES}
    emit("answered", index=index, decode=difference)


def run(config: dict[str, Any]) -> None:
    """All prompts, one after another."""
    prompts = [Prompt(**prompt) for prompt in config["prompts"]]
    start = time.perf_counter()
    engine = Engine(config)
    loaded = time.perf_counter()
    emit("loaded", load_s=loaded - start)
    if config["warm"]:
        for prompt in prompts:
            for _ in engine.tokens(engine.tokenize(prompt)):
                pass
        loaded = time.perf_counter()
    if config["loadgen_folder"]:
        from spac.bench.loadgen import drive

        emit("loadgen", **drive(engine, prompts, Path(config["loadgen_folder"])))
    else:
        for index, prompt in enumerate(prompts):
            answer(engine, index, prompt, loaded if index == 0 else None)
    emit("end", **summary(engine))
    engine.llama.close()


def summary(engine: Engine) -> dict[str, Any]:
    """What is known at the end."""
    from spac.host.memory import peak_resident_bytes

    found: dict[str, Any] = {"peak_rss_bytes": peak_resident_bytes(), "process_read_bytes": process_read_bytes()}
    if engine.config["arguments"].get("load_mode") == "mlock":
        found["locked_bytes"] = locked_bytes()
    if engine.config["engine"] == "spac":
        handle = engine.llama.spac
        stats, info = handle.stats(), handle.info()
        found["paged"] = handle.paged
        if stats is not None and info is not None:
            found["expert"] = {**dataclasses.asdict(stats), "hit_rate": stats.hit_rate, "store": info.store}
            found["signals"] = {name: dataclasses.asdict(signal) for name, signal in handle.signals().items()}
            found["layers"] = [dataclasses.asdict(layer) for layer in handle.stats_by_layer()]
    return found


# -- the other end --


def read_events(output: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A record's figures from what a worker printed, as far as it came; see `record.py`."""
    found: dict[str, Any] = {"prompts": [], "complete": False}
    answers: dict[int, dict[str, Any]] = {}
    for line in output.splitlines():
        try:
            event = json.loads(line)
            kind = event.pop("event")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            continue  # a line that was cut off when the process was killed
        if kind == "prompt":
            prompt = prompts[event["index"]]
            answers[event["index"]] = {
                "kind": prompt.kind, "id": prompt.id, "prompt_tokens": event["prompt_tokens"], "times": [], "token_ids": [],
                "complete": False,
            }  # fmt: skip
        elif kind == "token":
            answers[event["index"]]["times"].append(event["t"])
            answers[event["index"]]["token_ids"].append(event["id"])
        elif kind == "answered":
            answers[event["index"]].update(decode=event["decode"], complete=True)
        elif kind == "end":
            found.update(event, complete=True)
        elif kind == "loadgen":
            found["loadgen"] = event
        else:  # loaded, error
            found.update(event)
    for index in sorted(answers):
        found["prompts"].append(times_of(answers[index]))
    return found


def times_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The time to the first token, and those between tokens, instead of times since the start."""
    times = answer.pop("times")
    answer["ttft_s"] = times[0] if times else None
    answer["token_s"] = [round(b - a, 6) for a, b in itertools.pairwise(times)]
    return answer


def main() -> int:
    try:
        run({**DEFAULTS, **json.loads(sys.argv[1])})
    except KeyboardInterrupt:
        return 130
    except Exception as e:  # whatever it is, the runner wants it in the record
        emit("error", error=f"{type(e).__name__}: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
