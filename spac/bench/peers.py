"""Peers: other engines, as binaries that somebody built, with their best settings, and what their output says.

Nothing of them is part of this repository. A peer reads one prompt in a process, so each prompt of a run is cold for it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from spac.bench.contender import Command, Contender, Spec, Task, TryRun
from spac.bench.record import decode_tokens_per_s
from spac.errors import OptionError, SpacError
from spac.gguf.check import ModelFacts, check_model
from spac.host.limits import LimitedRun
from spac.host.memory import MIB


class Peer(Contender):
    """A binary that reads one prompt.

    Raises:
        SpacError: the binary is missing, cannot be started, or is another program.
    """

    title = ""
    sign = ""  # in its help, and in nobody else's
    options: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def __init__(self, spec: Spec, binary: Path, arguments: Sequence[str]) -> None:
        spec.refuse_others(*self.options)
        super().__init__(spec.text, spec.tokens())
        self.binary = binary
        self.extra = list(arguments)
        check_binary(binary, self.title, self.sign)

    @property
    def repacked(self) -> bool:
        return False

    def files(self) -> dict[str, list[Path]]:
        return {"program": [self.binary]}

    def skip(self, task: Task) -> str | None:
        if task.row.warm:
            return "a peer cannot be timed warm: it leaves after one prompt"
        if task.row.tokens == 1:
            return "its output says too little of the first token"
        return None

    def commands(self, task: Task) -> list[Command]:
        return [Command(self.command(task, prompt.text), self.environment(), (prompt,)) for prompt in task.prompts]

    def environment(self) -> dict[str, str]:
        """Variables that it needs."""
        return {}

    def command(self, task: Task, text: str) -> list[str]:
        """Program and arguments for one prompt."""
        raise NotImplementedError

    def common(self, task: Task, text: str) -> list[str]:
        """Arguments that all of llama.cpp's kin know."""
        return [
            str(self.binary), "-m", str(task.model), "-p", text, "-n", str(self.row_tokens(task.row)), "-t", str(task.threads),
            "-c", str(task.row.ctx), "--temp", "0",
        ]  # fmt: skip


def check_binary(binary: Path, title: str, sign: str) -> None:
    """Whether a binary can be started, and is what it should be.

    Raises:
        SpacError: it is not.
    """
    if not binary.is_file():
        raise SpacError(f"{binary}: no such file; give the path of a built {title} binary")
    try:
        result = subprocess.run([binary, "--help"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise SpacError(f"{binary}: --help does not come to an end: not a {title} binary") from None
    except OSError as e:
        raise SpacError(f"{binary}: cannot be started: {e.strerror or e}") from None
    if sign.encode() not in result.stdout + result.stderr:
        raise SpacError(f"{binary}: its help does not name {sign}: not a {title} binary, or too old a one")


TRIAL_TOKENS: Final = 16

# What the search has found in this process, by binary, model, limit and prefetching, and what it tried: one for all rows of a limit.
_Key = tuple[str, str, int, bool]
_found: dict[_Key, tuple[int, list[tuple[int, float]]]] = {}


class _Caching(Peer):
    """A peer with an expert cache of its own, whose size is given, or searched for once for each limit.

    Attributes:
        option: gives the size, in the peer's own unit.
        predict: with prefetching, which takes memory too.
    """

    option = ""
    unit = ""
    predict = False

    def __init__(self, spec: Spec, binary: Path, arguments: Sequence[str]) -> None:
        super().__init__(spec, binary, arguments)
        size = spec.values.get(self.option)
        if size is not None and not size.isdigit():
            raise OptionError(f"contender {spec.text!r}: {self.option} is {size!r}, expected a number of {self.unit}")
        self.given = int(size) if size is not None else None

    def unit_bytes(self, facts: ModelFacts) -> int:
        raise NotImplementedError

    def bounds(self, facts: ModelFacts) -> tuple[int, int]:
        """The smallest and the largest cache that make sense for a model."""
        raise NotImplementedError

    def sizes(self, task: Task, facts: ModelFacts) -> list[int]:
        """Cache sizes to try, the most promising first: what the limit leaves after dense weights and some more."""
        least, most = self.bounds(facts)
        if task.limits.memory_bytes is None:
            return [most]
        found = []
        for overhead_mib in (200, 140, 96, 64, 300, 450):
            left = task.limits.memory_bytes - (facts.file_bytes - facts.expert_bytes) - overhead_mib * MIB
            size = min(left // self.unit_bytes(facts), most)
            if size >= least and size not in found:
                found.append(size)
        return found

    def with_cache(self, task: Task, text: str, size: int) -> list[str]:
        """Program and arguments for one prompt."""
        raise NotImplementedError

    def skip(self, task: Task) -> str | None:
        if super().skip(task) is None and self.given is None and not self.sizes(task, check_model(str(task.model))):
            return "no cache fits into the limit"
        return super().skip(task)

    def prepare(self, task: Task, run: TryRun) -> dict[str, Any]:
        facts = check_model(str(task.model))
        mib = self.unit_bytes(facts) / MIB
        if self.given is not None:
            return {"cache_mib": round(self.given * mib)}
        key, plain = self._key(task, self.predict), self._key(task, False)
        if key not in _found:
            sizes = self.sizes(task, facts)
            if self.predict and plain in _found:  # what fits without prefetching is the most that may fit with it
                sizes = sorted({_found[plain][0], *(s for s in sizes if s < _found[plain][0])}, reverse=True)
            tried: list[tuple[int, float]] = []
            longest = max(task.prompts, key=lambda prompt: len(prompt.text))  # it takes most memory beside the cache

            def speed(size: int, *, short: bool = True) -> float:
                arguments = self.with_cache(task, longest.text, size)
                if short:
                    where = arguments.index("-n") + 1
                    arguments[where] = str(min(int(arguments[where]), TRIAL_TOKENS))
                command = Command(arguments, self.environment(), (longest,))
                figures = self.figures(run(command), command)
                tried.append((size, (decode_tokens_per_s(figures) or 0.0) if figures["complete"] else 0.0))
                return tried[-1][1]

            _found[key] = best_cache(sizes, speed, lambda size: speed(size, short=False) > 0), tried
        size, tried = _found[key]
        return {"cache_mib": round(size * mib), "tried_tokens_per_s": [(round(s * mib), speed) for s, speed in tried]}

    def _key(self, task: Task, predict: bool) -> _Key:
        return str(self.binary), str(task.model), task.limits.memory_bytes or 0, predict

    def command(self, task: Task, text: str) -> list[str]:
        return self.with_cache(task, text, self.given if self.given is not None else _found[self._key(task, self.predict)][0])


class BigMoe(_Caching):
    """BigMoeOnEdge: an expert cache in memory. `predict`: with `--predict-prefetch`; `cache=MIB`: instead of searching."""

    title = "BigMoeOnEdge"
    sign = "--moe-stream"
    options = (("predict",), ("cache",))
    option = "cache"
    unit = "MiB"

    def __init__(self, spec: Spec, binary: Path, arguments: Sequence[str]) -> None:
        super().__init__(spec, binary, arguments)
        self.predict = "predict" in spec.words

    def environment(self) -> dict[str, str]:
        return {"OMP_WAIT_POLICY": "passive"}  # else OpenMP's spinning starves its reading threads, and it is slower

    def unit_bytes(self, facts: ModelFacts) -> int:
        return MIB

    def bounds(self, facts: ModelFacts) -> tuple[int, int]:
        return 1, facts.expert_bytes // MIB + 1

    def with_cache(self, task: Task, text: str, size: int) -> list[str]:
        return [
            *self.common(task, text), "--moe-stream", "--overlap", "--dense-weights", "anon", "--io-threads", "8",
            "--cache-mb", str(size), "--force-cache", "--ubatch", str(min(64, task.row.ubatch)), "--progress",
            *(["--predict-prefetch"] if self.predict else []), *self.extra,
        ]  # fmt: skip

    def figures(self, run: LimitedRun, command: Command) -> dict[str, Any]:
        """From `--progress`: one JSON object for each token, with the time in `llama_decode`, stalls and bytes read."""
        steps = [json.loads(text) for text in re.findall(r"^BMOE_PROGRESS (\{.*\})$", run.stdout, re.MULTILINE)]
        prefill = re.findall(r"^prefill: (\d+) tokens, ([\d.]+) s", run.stdout, re.MULTILINE)
        load = re.findall(r"\| model load ([\d.]+) s", run.stdout)
        complete = bool(prefill) and run.returncode == 0
        prompt = command.prompts[0]
        answer = {
            "kind": prompt.kind, "id": prompt.id, "prompt_tokens": int(prefill[-1][0]) if prefill else None,
            "ttft_s": float(prefill[-1][1]) if prefill else None, "token_s": [step["wall_ms"] / 1000 for step in steps],
            "text": "".join(step["delta_text"] for step in steps), "complete": complete,
            "decode": {
                "eval_s": sum(step["wall_ms"] for step in steps) / 1000, "stall_s": sum(step["stall_ms"] for step in steps) / 1000,
                "cpu_s": sum(step["cpu_ms"] for step in steps) / 1000, "own_read_bytes": sum(step["read_mb"] for step in steps) * MIB,
            },
        }  # fmt: skip
        found: dict[str, Any] = {"prompts": [answer] if steps or prefill else [], "complete": complete}
        if load:
            found["load_s"] = float(load[-1])
        if steps:
            found["expert"] = {"hit_rate": steps[-1]["cache_hit_pct"] / 100}
        return found


def best_cache(sizes: Sequence[int], speed: Callable[[int], float], survives: Callable[[int], bool]) -> int:
    """The fastest size, walking from the first one up while that helps, else down; a size that dies has speed 0.

    A larger cache hits more often, until the process comes near its limit and thrashes or is killed, now and then only: so
    the best one must survive a longer run, or the next best is taken.
    """
    start = sizes[0]
    speeds = {start: speed(start)}
    best = start
    up, down = sorted(s for s in sizes if s > start), sorted((s for s in sizes if s < start), reverse=True)
    for walk in (up, down):
        for size in walk:
            speeds[size] = speed(size)
            if speeds[size] <= speeds[best]:
                break
            best = size
        if best != start:
            break
    for size in sorted(speeds, key=lambda s: -speeds[s]):
        if speeds[size] > 0 and survives(size):
            return size
    return min(speeds)


class _LlamaCli(Peer):
    """llama.cpp's kin that print `eval time = ... ms / ... tokens` at the end. Nothing is known of single tokens."""

    def common(self, task: Task, text: str) -> list[str]:
        return [
            *super().common(task, text), "-tb", str(task.threads), "-ub", str(task.row.ubatch), "-b", str(max(512, task.row.ubatch)),
            "--ignore-eos", "--no-display-prompt",
        ]  # fmt: skip

    def figures(self, run: LimitedRun, command: Command) -> dict[str, Any]:
        output = run.stdout + "\n" + run.stderr
        decode = re.findall(r"^[^:\n]*:\s+eval time =\s+([\d.]+) ms /\s+(\d+) (?:tokens|runs)", output, re.MULTILINE)
        prefill = re.findall(r"^[^:\n]*:\s+prompt eval time =\s+([\d.]+) ms /\s+(\d+) tokens", output, re.MULTILINE)
        complete = bool(decode) and run.returncode == 0
        if not decode:
            return {"prompts": [], "complete": False}
        prompt, (ms, n) = command.prompts[0], decode[-1]
        decode_s, tokens = float(ms) / 1000, int(n)
        answer: dict[str, Any] = {
            "kind": prompt.kind, "id": prompt.id, "prompt_tokens": int(prefill[-1][1]) if prefill else None,
            "ttft_s": float(prefill[-1][0]) / 1000 if prefill else None,
            "mean_token_s": decode_s / tokens if tokens else None, "tokens": tokens, "token_s": [], "complete": complete,
        }  # fmt: skip
        return {"prompts": [answer], "complete": complete}


class IkLlama(_LlamaCli):
    """ik_llama.cpp's `llama-cli`, with its read-ahead of the experts that a layer's router has chosen."""

    title = "ik_llama.cpp llama-cli"
    sign = "--prefetch-experts"

    def command(self, task: Task, text: str) -> list[str]:
        # without warming up: that would read every expert once, and all contenders start cold
        return [
            *self.common(task, text),
            "--prefetch-experts",
            "--no-warmup",
            *self.extra,
        ]


class LlamaPull25294(_LlamaCli, _Caching):
    """`llama-completion` of llama.cpp's pull request 25294: routed experts come from disk into a cache of so many slots for each layer.

    `slots=N`: instead of searching. It takes no fewer than three times the experts of a token, and with as many as a layer
    has it does not stream. `buffered`: through the page cache, which counts against the limit.
    """

    title = "llama-completion of llama.cpp's pull request 25294"
    sign = "--moe-stream-cache"
    options = (("buffered",), ("slots",))
    option = "slots"
    unit = "slots"

    def __init__(self, spec: Spec, binary: Path, arguments: Sequence[str]) -> None:
        super().__init__(spec, binary, arguments)
        self.buffered = "buffered" in spec.words

    def unit_bytes(self, facts: ModelFacts) -> int:
        return sum(layer.bundle_bytes for layer in facts.expert_layers)

    def bounds(self, facts: ModelFacts) -> tuple[int, int]:
        return 3 * facts.n_experts_used, facts.n_experts - 1

    def with_cache(self, task: Task, text: str, size: int) -> list[str]:
        return [
            *self.common(task, text), "-fit", "off", "-no-cnv", "-lv", "4", "--moe-stream-cache", f"{size}s",
            *([] if self.buffered else ["--moe-stream-direct"]), *self.extra,
        ]  # fmt: skip

    def figures(self, run: LimitedRun, command: Command) -> dict[str, Any]:
        """Besides, the cache's hit rate, which its log has."""
        found = super().figures(run, command)
        hits = re.findall(r"moe stream: .*hit rate = ([\d.]+)%", run.stderr)
        return found | ({"expert": {"hit_rate": float(hits[-1]) / 100}} if hits else {})


PEERS: Final[dict[str, Callable[[Spec, Path, Sequence[str]], Peer]]] = {
    "bigmoe": BigMoe,
    "ik_llama": IkLlama,
    "llama-pr25294": LlamaPull25294,
}
