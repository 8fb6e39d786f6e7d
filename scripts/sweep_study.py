#!/usr/bin/env python3
"""The balancer's decisions against every setting there is, by device profile and kind of prompt, in the simulator.

    .venv/bin/python scripts/sweep_study.py --out docs/benchmarks/sweep.md

The bundled model answers the benchmark's forty prompts, with `spac run`'s sampling. At each of its tokens the bundled draft is
asked for eight more, and the model really evaluates the first of them, right or wrong: so what a decode of any number of drafted
tokens uses was recorded, and any setting can be replayed. A replay is of one kind of prompt, from an empty cache; the settings:

  verified  drafted tokens in each decode; what came next says how many were right, and where the next decode begins
  sensed    drafted tokens beyond these that the pager is told of: by the tables' predictions, learned from the tokens so far
  ahead     layers that are read ahead while the disk is idle, where the tables are sure; that takes bandwidth, and places
  slots     one order for all layers, equal quotas, or quotas by marginal gain

Times are those of the time model (spac/trace/timing.py), of a decode of that width, on what this machine does within the
limits of a profile; the experts are those of the 4.2 GiB model, whose routing is the bundled model's. Misses and times are counted
in the second half of a kind's requests.

Beside the settings, what the engine decides by itself: spac/balancer/live.py and spac/speculative/draft_length.py go through the
same requests decode by decode, with nothing told but what they measure while decoding, from the first decode of the first half on.
Plans come between decodes, of which eight are looked at together where nothing is verified.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import spac
from spac import control, device
from spac.balancer import Cache, StackDistances, State
from spac.balancer.heuristics import greedy
from spac.balancer.live import Decode, LiveBalancer, Model
from spac.bench import profile
from spac.bench.prompt import KINDS
from spac.bench.prompt import load as load_prompts
from spac.engine import IDLE_TOKENS, READ_FROM, _candidates
from spac.estimator import TokenEstimator
from spac.estimator.foresight import foresight
from spac.generate import Sampling, make_sampler, tokenize
from spac.gguf.check import check_model
from spac.gguf.reader import read_gguf
from spac.plan.forecast import OPS_PER_LAYER, TOKEN_S, LayerWork, Machine, Work
from spac.speculative import Acceptance, DraftLlama, ModelDraft, Proposal
from spac.speculative.draft_length import DraftLength
from spac.trace.format import Trace
from spac.trace.simulation import Ahead, Replay, parse_cache, replay
from spac.trace.timing import PARTS, READS_IN_FLIGHT, Compute, Reads, layer_s

ROOT = Path(__file__).resolve().parent.parent
MODEL, DRAFT = ROOT / "models/spac-demo-moe.gguf", ROOT / "models/spac-demo-draft.gguf"
PROFILES = ("pi5-8g-nvme", "pi5-sd", "pi4-usb3", "jetson-orin-nano-nvme", "laptop-16g-nvme", "native")
SHARES = ("25%", "50%", "75%", "100%")
TOKENS, SEED, ASKED = 150, 1, 7
VERIFIED, SENSED, DEPTHS = range(4), range(5), (0, 2, 10)
SLOTS = ("one order", "equal", "gains")
NEVER_AHEAD = np.float32(READ_FROM - 0.01)  # a probability from which nothing is read ahead
AT_ONCE = 8  # decodes that a replay goes on by, where none of them hangs on what the one before took
TURNS, WIDTHS = 60, (1, 2, 3, 4, 16)  # measuring: turns; tokens of a product
BUNDLE_WEIGHTS, BUNDLE_BYTES = 25_165_824, 14_155_776  # of the 4.2 GiB model's experts, Q4_0: scripts/inflate
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Setting(NamedTuple):
    """Of a run, as `Choice` has them, but `sensed` are the drafted tokens beyond the verified ones."""

    verified: int
    sensed: int
    depth: int
    slots: str

    def __str__(self) -> str:
        return f"{self.verified} verified, {self.sensed} sensed, {self.depth} ahead, {self.slots}"


SETTINGS = [Setting(*s) for s in itertools.product(VERIFIED, SENSED, DEPTHS, SLOTS)]


@dataclass
class Answer:
    """One request. For each decoded token: what it and the drafted ones after it use, and what the draft proposed."""

    kind: str
    prompt: Trace
    tokens: list[int]
    routed: list[Ints]  # [1 + drafted, layers, k]
    proposals: list[Proposal]

    def prompts(self) -> list[Ints]:
        """The prompt by ubatch: [tokens, layers, k]."""
        return [self.prompt.ids[self.prompt.ubatch == u] for u in np.unique(self.prompt.ubatch)]

    def right(self, i: int) -> int:
        """How many of the drafted tokens after the i-th one came."""
        came = self.tokens[i + 1 :]
        pairs = zip(self.proposals[i].tokens, came, strict=False)
        return next((n for n, (guess, token) in enumerate(pairs) if guess != token), min(len(came), len(self.proposals[i].tokens)))

    def cycles(self, verified: int) -> Iterator[tuple[int, int, int]]:
        """Of each decode: where it begins, how many drafted tokens are in it, how many tokens it gives."""
        i = 0
        while i < len(self.tokens):
            n = min(verified, len(self.routed[i]) - 1)
            given = 1 + min(self.right(i), n)
            yield i, n, given
            i += given


@dataclass
class Recorded:
    answers: list[Answer]
    draft_s: float  # of a drafted token


def record(tokens: int = TOKENS) -> Recorded:
    import llama_cpp.llama_cpp as upstream  # spac names the library that it loads

    llama = spac.Llama(
        MODEL, paging="off", n_ctx=1024, n_ubatch=64, n_threads=1, n_threads_batch=1, seed=SEED, verbose=False, record_routing=True
    )
    draft = ModelDraft(DraftLlama(DRAFT, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False))
    recorder = llama.spac.recorder
    answers, times = [], []
    for prompt in load_prompts(()):
        llama.reset()
        llama._ctx.kv_cache_clear()
        recorder.clear()
        recorder.phase = "prefill"
        sequence = list(tokenize(llama, prompt.text))
        llama.eval(sequence)
        answer = Answer(prompt.kind, recorder.trace(), [], [], [])
        recorder.phase = "verify"
        sampler, drafted = make_sampler(Sampling(seed=SEED), llama), []
        for _ in range(tokens):
            token = int(sampler.sample(llama._ctx, -1 - len(drafted)))
            if upstream.llama_vocab_is_eog(llama._model.vocab, token):
                break
            sequence.append(token)
            begin = time.process_time()
            proposal = draft.propose(sequence, ASKED)
            times.append((time.process_time() - begin) / ASKED)
            drafted = proposal.tokens[: max(VERIFIED)]
            recorder.clear()
            llama.eval_all([token, *drafted])
            llama.n_tokens -= len(drafted)
            answer.tokens.append(token)
            answer.routed.append(recorder.trace().ids.astype(np.int64))
            answer.proposals.append(proposal)
        sampler.close()
        answers.append(answer)
    draft.close()
    llama.close()
    return Recorded(answers, float(np.median(times)))


@dataclass
class Told:
    """What the pager would be told: of answer a before its i-th token, by (verified, sensed)."""

    foresight: dict[tuple[int, int], list[Floats]]  # [answers][tokens, 3, layers, experts]
    chances: list[list[list[float]]]  # [answers][tokens][drafted], calibrated: that it and those before it come
    seconds: float  # of a token: tables and what is made of them


def tell(recorded: Recorded, n_experts: int) -> Told:
    """As the engine does, over all answers in turn; tables and acceptance learn as they go."""
    _, n_layers, n_used = recorded.answers[0].routed[0].shape
    estimator, acceptance = TokenEstimator(n_layers, n_experts, n_used), Acceptance()
    told: dict[tuple[int, int], list[Floats]] = {key: [] for key in itertools.product(VERIFIED, SENSED)}
    times, calibrated = [], []
    for answer in recorded.answers:
        estimator.start_request()
        acceptance.begin()
        calibrated.append([])
        for key in told:
            told[key].append(np.full((len(answer.tokens), 3, n_layers, n_experts), -1, np.float32))
        for i, (token, proposal) in enumerate(zip(answer.tokens, answer.proposals, strict=True)):
            acceptance.saw(token)
            chances = acceptance.chances(proposal)
            calibrated[-1].append(chances)
            acceptance.expect(proposal)
            for verified in VERIFIED if estimator.tokens_learned else ():
                known = [[(t, 1.0)] for t in [token, *proposal.tokens[:verified]]]
                drafts = _candidates(proposal, chances, len(known) - 1)[: max(SENSED)]
                begin = time.process_time()
                p = estimator.of_candidates([*known, *drafts])
                masses = np.array([sum(chance for _, chance in c) for c in drafts], np.float32)
                coming = p[len(known) :] * masses[:, None, None]
                now = 1 - np.prod(1 - p[: len(known)], axis=0)
                for sensed in SENSED:
                    told[verified, sensed][-1][i] = foresight(now, coming[:sensed])
                times.append(time.process_time() - begin)
            estimator.learn([token], answer.routed[i][:1])
    return Told(told, calibrated, float(np.median(times)))


# -- devices --


@dataclass(frozen=True)
class Timing:
    """What decodes take on a machine."""

    machine: Machine
    work: Work
    draft_s: float  # a drafted token, here
    tell_s: float  # telling the pager of drafted tokens, here

    @cached_property
    def share(self) -> float:
        return self.machine.limits.cpu_share or 1.0

    @cached_property
    def slower(self) -> float:
        """One thread of this machine against one of ours."""
        return 1 / self.share

    def dense_s(self, width: int) -> float:
        """Of all that is no expert's product."""
        ops_s = self.work.n_layers * OPS_PER_LAYER * self.machine.device.op_s
        return self.machine.compute_s(self.work.dense, width) + ops_s + TOKEN_S

    def use_s(self, tokens: float) -> float:
        """Of one expert with so many tokens."""
        return self.machine.compute_s(self.work.layers[0].weights, tokens)

    def layers_s(self, width: int, used: NDArray[np.float64], missed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of layers that use so many experts, of which so many must be read, parts of one included."""
        table = self._tables[width]
        whole = np.minimum(missed.astype(np.int64), used)
        more = np.minimum(whole + 1, used)
        return table[used, whole] + (missed - whole) * (table[used, more] - table[used, whole])

    @cached_property
    def _tables(self) -> dict[int, NDArray[np.float64]]:
        layer, slice_s, k = self.work.layers[0], self.machine.slice_s(self.work.layers[0]), self.work.n_used
        tables = {}
        for width in range(1, max(VERIFIED) + 2):
            table = tables[width] = np.zeros((width * k + 1, width * k + 1))
            for used, missed in itertools.combinations_with_replacement(range(width * k + 1), 2):
                compute = Compute(0.0, self.use_s(width * k / max(missed, 1)), slice_s, self.machine.contention_s(layer))
                table[missed, used] = layer_s(missed, used, layer.bundle_bytes, compute, self.machine.reads())
        return tables

    def rate(self, in_flight: int) -> float:
        """Of reading, bytes/s."""
        reads = self.machine.reads()
        rate = reads.bytes_per_s(BUNDLE_BYTES / PARTS, in_flight)
        return min(rate, reads.limit_bytes_per_s or rate)

    def ahead(self, depth: int, verified: int, used: float) -> Ahead | None:
        rate = self.rate(2) if depth else 0.0
        width = verified + 1
        idle = rate * self.dense_s(width) / self.share / len(self.work.layers)
        return Ahead(depth, idle, rate * self.use_s(width * self.work.n_used / used) / self.share) if depth else None

    def decode_s(self, width: Ints, found: Replay, rows: Ints, before_s: float) -> NDArray[np.float64]:
        """Of some ubatches, of so many tokens each, and of what goes before each of them."""
        out = np.zeros(len(rows))
        limit = self.machine.limits.read_bytes_per_s
        for w in np.unique(width).tolist():
            of_width = rows[width == w]
            used, wait = found.uses[of_width].astype(np.int64), found.wait_bytes[of_width]
            waiting = before_s + self.dense_s(w) + self.layers_s(w, used, wait / BUNDLE_BYTES).sum(1)
            read = (wait + found.ahead_bytes[of_width]).sum(1)
            out[width == w] = np.maximum(np.maximum(waiting, before_s + self.busy_s(w, used)), read / limit if limit else 0.0)
        return out

    def busy_s(self, width: int, used: Ints) -> NDArray[np.float64]:
        """Of decodes that miss nothing; used [decodes, layers]."""
        return (self.dense_s(width) + self._uses_s[width][used].sum(1)) / self.share

    @cached_property
    def _uses_s(self) -> dict[int, NDArray[np.float64]]:
        """By number of tokens and of experts that they use."""
        k = self.work.n_used
        return {w: np.array([0.0] + [n * self.use_s(w * k / n) for n in range(1, w * k + 1)]) for w in range(1, max(VERIFIED) + 2)}

    def speculation_s(self, drafted: int, tells: bool) -> float:
        """Of a cycle: drafting, and telling the pager."""
        return (drafted * self.draft_s + tells * self.tell_s) * self.slower


# -- replays --


@dataclass
class Run:
    """Answers of a kind with so many tokens verified: what is decoded together. Arrays are by ubatch; of a prompt's `width` is 0."""

    trace: Trace
    width: Ints
    given: Ints
    answer: Ints
    begins: list[tuple[int, int, int]]  # of decodes: row in the trace, answer, token

    def foresight(self, told: list[Floats]) -> Floats:
        out = np.full((self.trace.n_tokens, *told[0].shape[1:]), -1, np.float32)
        for row, answer, i in self.begins:
            out[row] = told[answer][i]
        return out


def trace_of(ids: NDArray[np.uint16], ubatch: NDArray[np.int32], n_experts: int) -> Trace:
    """ids [tokens, layers, k]; ubatch [tokens], numbers."""
    n_tokens, n_layers, _ = ids.shape
    zeros = np.zeros(n_tokens, np.int32)
    return Trace(
        ids=ids, weights=np.zeros(ids.shape, np.float16), seq=zeros, pos=zeros, phase=zeros.astype(np.uint8), token_ids=zeros,
        ubatch=ubatch, ubatch_s=np.zeros(0, np.float32), expert_s=np.zeros((0, n_layers), np.float32), n_experts=n_experts,
        blocks=tuple(range(n_layers)), bundle_bytes=(BUNDLE_BYTES,) * n_layers, meta={},
    )  # fmt: skip


def run_of(answers: dict[int, Answer], verified: int, n_experts: int) -> Run:
    ids, rows = [], []
    begins, n_rows = [], 0
    for number, answer in answers.items():
        for prompt in answer.prompts():
            ids.append(prompt)
            rows.append((0, 0, number))
            n_rows += len(prompt)
        for i, n, given in answer.cycles(verified):
            begins.append((n_rows, number, i))
            ids.append(answer.routed[i][: n + 1])
            rows.append((n + 1, given, number))
            n_rows += n + 1
    ubatch = np.repeat(np.arange(len(ids)), [len(x) for x in ids]).astype(np.int32)
    width, given, of_answer = np.array(rows, np.int64).T
    return Run(trace_of(np.concatenate(ids).astype(np.uint16), ubatch, n_experts), width, given, of_answer, begins)


class Kind:
    """Prompts of one kind, with one cache size. The first half of them is the past."""

    def __init__(self, kind: str, share: str, recorded: Recorded, told: Told, n_experts: int) -> None:
        self.first = len(recorded.answers) // 2
        self.answers = {i: answer for i, answer in enumerate(recorded.answers) if answer.kind == kind}
        self.told, self.draft_s = told, recorded.draft_s
        self.runs = {n: run_of(self.answers, n, n_experts) for n in VERIFIED}
        self.n_experts = n_experts
        self.n_bundles = parse_cache(share, self.runs[0].trace)
        distances = StackDistances(self.runs[0].trace.n_layers, n_experts, half_life_tokens=None)
        for answer in recorded.answers[: self.first]:
            for routed in answer.routed:
                distances.observe(routed[:1])
        caches = tuple(Cache(f"layer {i}", 1, curve, 0) for i, curve in enumerate(distances.curves()))
        state = State(caches, self.n_bundles + 1, Reads({(1, 1): 1.0}), (1.0,), in_flight=(1,))  # no times: quotas hang on none
        rest = self.n_bundles - sum(slots := list(greedy(state).slots))
        for i in range(len(slots)):
            slots[i] += (more := min(rest, n_experts - slots[i]))
            rest -= more
        self.quotas: dict[str, str | list[int]] = {"one order": "global", "equal": "layer", "gains": slots}
        self.used = {n: self._used(run) for n, run in self.runs.items()}

    def _used(self, run: Run) -> float:
        """Experts of a layer in a decode, of the past."""
        trace = run.trace
        past = np.flatnonzero((run.width > 0) & (run.answer < self.first))[:200]
        return float(
            np.mean([len(np.unique(trace.ids[trace.ubatch == u, layer])) for u in past[::4] for layer in (0, trace.n_layers // 2)])
        )

    @cache  # noqa: B019
    def foresight(self, verified: int, sensed: int) -> Floats:
        return self.runs[verified].foresight(self.told.foresight[verified, sensed])

    def replay(self, setting: Setting, ahead: Ahead | None = None) -> Replay:
        tells = setting.sensed > 0 or ahead is not None
        foreseen = self.foresight(setting.verified, setting.sensed) if tells else None
        return replay(self.runs[setting.verified].trace, self.n_bundles, "default", self.quotas[setting.slots], foreseen, ahead)

    def seconds(self, setting: Setting, found: Replay, timing: Timing) -> float:
        """For each token of the second half."""
        run = self.runs[setting.verified]
        rows = np.flatnonzero((run.width > 0) & (run.answer >= self.first))
        before_s = timing.speculation_s(setting.verified + setting.sensed, setting.sensed > 0 or setting.depth > 0)
        return float(timing.decode_s(run.width[rows], found, rows, before_s).sum() / run.given[rows].sum())


# -- what the engine decides --


class _Balancer(LiveBalancer):
    """Plans at once."""

    def have_planned(self, state: State) -> None:
        self.plan(state)


@dataclass
class Cycle:
    """A decode, as the engine decided on it. `before_s`: of drafting and telling the pager; `draft_s`: of drafting."""

    answer: int
    given: int
    verified: int
    drafted: int
    ahead: bool
    before_s: float
    draft_s: float
    visit: int  # which ubatch it is


class Live:
    """spac/engine.py and spac/speculative/loop.py with the model, the draft and the pager replaced by what was recorded of them."""

    def __init__(self, kind: Kind, timing: Timing) -> None:
        self.kind, self.timing = kind, timing
        trace = kind.runs[0].trace
        self.n_layers = trace.n_layers
        room = sum(len(a.prompt.ids) + (1 + max(VERIFIED)) * len(a.tokens) for a in kind.answers.values())
        self.ids, self.ubatch = np.zeros((room, *trace.ids.shape[1:]), np.uint16), np.zeros(room, np.int32)
        self.foresight = np.full((room, 3, self.n_layers, kind.n_experts), -1, np.float32)
        self.n_tokens, self.n_visits = 0, 0
        self.balancer = _Balancer(
            Model(trace.n_used * self.n_layers, self.n_layers * kind.n_experts, 2, BUNDLE_BYTES, lambda share: 1 - share)
        )
        self.length = DraftLength()
        self.calm_tokens = 0
        self.cycles: list[Cycle] = []
        self.seconds: list[float] = []  # of cycles that have been looked at
        for number, answer in kind.answers.items():
            self.answer(number, answer)

    def seconds_per_token(self) -> float:
        """Of the second half."""
        counted = [i for i, cycle in enumerate(self.cycles) if cycle.answer >= self.kind.first]
        return sum(self.seconds[i] for i in counted) / sum(self.cycles[i].given for i in counted)

    def means(self) -> tuple[float, float, float]:
        """Of the second half: tokens verified, tokens drafted, part of the decodes that could read ahead."""
        counted = [c for c in self.cycles if c.answer >= self.kind.first]
        return tuple(float(np.mean([x(c) for c in counted])) for x in (lambda c: c.verified, lambda c: c.drafted, lambda c: c.ahead))

    def add(self, ids: Ints) -> None:
        """A ubatch."""
        end = self.n_tokens + len(ids)
        self.ids[self.n_tokens : end], self.ubatch[self.n_tokens : end] = ids, self.n_visits
        self.n_tokens, self.n_visits = end, self.n_visits + 1

    def answer(self, number: int, answer: Answer) -> None:
        for prompt in answer.prompts():
            self.add(prompt)
        self.balancer.begin()
        i = 0
        while i < len(answer.tokens):
            cycle = self.cycle(number, answer, i)
            self.cycles.append(cycle)
            i += cycle.given
            verifies = cycle.drafted and self.balancer.most_verified
            if verifies or i >= len(answer.tokens) or len(self.cycles) - len(self.seconds) == AT_ONCE:
                self.look()

    def cycle(self, number: int, answer: Answer, i: int) -> Cycle:
        """Draft, decide, and tell the pager."""
        balancer, choice, calm = self.balancer, self.balancer.choice, self.calm_tokens >= IDLE_TOKENS
        sensed = 0 if calm else balancer.horizon
        most = min(balancer.most_verified, max(VERIFIED))
        asked = min(max(sensed, min(self.length.wanted, most)), ASKED)
        whole, draft_s = answer.proposals[i], asked * self.timing.draft_s * self.timing.slower
        proposal = Proposal(whole.tokens[:asked], whole.chances[:asked], whole.others[:asked])
        chances = self.kind.told.chances[number][i][: len(proposal.tokens)]
        n = min(self.length.choose(chances, asked, draft_s), most, len(answer.routed[i]) - 1, len(chances))
        of_first = 1 / (1 + len(chances))  # what is looked up anyway
        known = [sum(chance for _, chance in candidates) for candidates in _candidates(proposal, chances, 0)]
        balancer.drafted(chances, known, draft_s + (1 - of_first) * self.timing.tell_s * self.timing.slower)
        ahead = choice is not None and choice.depth > 0
        drafts = min(len(chances) - n, max(SENSED))
        tells = not calm and (drafts > 0 or ahead)
        if tells:
            row = self.foresight[self.n_tokens]
            row[:] = self.kind.told.foresight[n, drafts][number][i]
            if not ahead:
                np.minimum(row[0], NEVER_AHEAD, out=row[0])
        self.add(answer.routed[i][: n + 1])
        given = 1 + min(answer.right(i), n)
        return Cycle(number, given, n, asked, ahead and tells, self.timing.speculation_s(asked, tells), draft_s, self.n_visits - 1)

    def look(self) -> None:
        """What the last cycles took, and what the engine learns from it."""
        kind, timing = self.kind, self.timing
        trace = trace_of(self.ids[: self.n_tokens], self.ubatch[: self.n_tokens], kind.n_experts)
        found = replay(
            trace, kind.n_bundles, "default", "global", self.foresight[: self.n_tokens], timing.ahead(max(DEPTHS), 0, kind.used[0])
        )
        for cycle in self.cycles[len(self.seconds) :]:
            at, width = np.array([cycle.visit]), cycle.verified + 1
            seconds = float(timing.decode_s(np.array([width]), found, at, cycle.before_s)[0])
            ahead, wasted = float(found.ahead_bytes[cycle.visit].sum()), float(found.wasted_bytes[cycle.visit].sum())
            misses = int(found.missed[cycle.visit].sum())
            self.seconds.append(seconds)
            self.calm_tokens = 0 if misses else self.calm_tokens + 1
            decode_s = seconds - cycle.draft_s
            stall_s = max(0.0, seconds - cycle.before_s - float(timing.busy_s(width, found.uses[at].astype(np.int64))[0]))
            read = int(found.wait_bytes[cycle.visit].sum() + ahead)
            self.length.measured(cycle.verified, decode_s)
            self.balancer.decoded(
                Decode(cycle.verified, decode_s, stall_s, misses, read, int(ahead), int(wasted), kind.n_bundles * BUNDLE_BYTES)
            )


def work_of_demo() -> Work:
    """Of the 4.2 GiB model: the bundled model's, with larger experts."""
    facts, file = check_model(MODEL), read_gguf(MODEL)
    layer = LayerWork(facts.expert_layers[0].n_experts, BUNDLE_BYTES, BUNDLE_BYTES + PARTS * 4096, (("Q4_0", BUNDLE_WEIGHTS),))
    work = Work.of(facts, file.tensors)
    return replace(work, layers=(layer,) * len(work.layers))


# -- the sweep --


@dataclass
class Cell:
    """`live_s`: a token as the engine decides; `means`: of what it decided."""

    profile: str
    kind: str
    share: str
    seconds: dict[Setting, float]
    live_s: float
    means: tuple[float, float, float]

    @property
    def automatic(self) -> str:
        verified, drafted, ahead = self.means
        return f"{verified:.2f} verified, {drafted - verified:.1f} sensed, ahead in {ahead:.0%}"

    @property
    def best(self) -> Setting:
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def off(self) -> float:
        return self.live_s / self.seconds[self.best] - 1


def cells_of(kind: Kind, name: str, share: str, timings: dict[str, Timing]) -> list[Cell]:
    on_demand = {s: kind.replay(s) for s in SETTINGS if not s.depth}
    cells = []
    for machine, timing in timings.items():
        seconds = {s: kind.seconds(s, found, timing) for s, found in on_demand.items()}
        for s in SETTINGS:
            if s.depth:
                seconds[s] = kind.seconds(s, kind.replay(s, timing.ahead(s.depth, s.verified, kind.used[s.verified])), timing)
        live = Live(kind, timing)
        cells.append(Cell(machine, name, share, seconds, live.seconds_per_token(), live.means()))
        print(f"{machine}, {name}, {share}: {cells[-1].automatic}, off by {cells[-1].off:.1%}; best: {cells[-1].best}", flush=True)
    return cells


def geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def report(cells: list[Cell], timings: dict[str, Timing], recorded: Recorded, device_: device.Device) -> list[str]:
    automatic = geometric([c.live_s for c in cells])
    best = geometric([c.seconds[c.best] for c in cells])
    fixed = sorted((geometric([c.seconds[s] for c in cells]), s) for s in SETTINGS)
    far = [c for c in cells if c.off > 0.05]
    say = [
        "## In all", "",
        f"{len(cells)} cells (profile × kind × part of the experts in memory), {len(SETTINGS)} settings each. Seconds for each accepted token,",
        "geometric means, against the best setting of each cell.", "",
        "| decided | s a token | above the best |", "| --- | --- | --- |",
        f"| best of each cell, in hindsight | {best:.4f} | |", f"| automatically | {automatic:.4f} | {automatic / best - 1:+.2%} |",
    ]  # fmt: skip
    ranks = [0, 1, 2, 3, 4, len(fixed) // 4, len(fixed) // 2, len(fixed) - 1]
    say += [f"| always {fixed[i][1]} (place {i + 1}) | {fixed[i][0]:.4f} | {fixed[i][0] / best - 1:+.2%} |" for i in ranks]
    better = sum(seconds < automatic for seconds, _ in fixed)
    say += [
        "", f"{len(cells) - len(far)} of {len(cells)} cells are within 5 % of the best, the worst {max(c.off for c in cells):.1%} above;",
        f"{better} of {len(fixed)} fixed settings are better than deciding automatically.", "",
        "## By part in memory", "", "| in memory | automatic, above the best | worst | best fixed setting | above the best | worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for shares in (*((share,) for share in SHARES), SHARES[:-1]):
        of = [c for c in cells if c.share in shares]
        one = min(SETTINGS, key=lambda s: geometric([c.seconds[s] for c in of]))
        above = [c.seconds[one] / c.seconds[c.best] for c in of]
        say.append(
            f"| {', '.join(shares)} | {geometric([1 + c.off for c in of]) - 1:.2%} | {max(c.off for c in of):.1%} |"
            f" {one} | {geometric(above) - 1:.2%} | {max(above) - 1:.1%} |"
        )
    say += ["", "## By setting", "", "What one of them gives where the others are as in the best setting: the best fixed value against choosing it in each cell.", "",
            "| | best fixed value | above choosing |", "| --- | --- | --- |"]  # fmt: skip
    for i, (what, values) in enumerate(zip(("verified", "sensed", "ahead", "slots"), (VERIFIED, SENSED, DEPTHS, SLOTS), strict=True)):
        of_value = {v: geometric([min(s for k, s in c.seconds.items() if k[i] == v) for c in cells]) for v in values}
        value = min(of_value, key=of_value.__getitem__)
        say.append(f"| {what} | {value} | {of_value[value] / best - 1:.2%} |")
    say += ["", "## Cells", "", "| profile | kind | in memory | best | s a token | automatic, means | off by | nothing drafted nor ahead |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for c in cells:
        plain = c.seconds[Setting(0, 0, 0, "one order")]
        say.append(
            f"| {c.profile} | {c.kind} | {c.share} | {c.best} | {c.seconds[c.best]:.4f} | {c.automatic} | {c.off:.1%} | {plain / c.seconds[c.best] - 1:.1%} |"
        )
    say += ["", "## What went in", "", f"Device: {device_.cpu}, {device_.threads} threads, measured {device_.measured}; ms, MB/s:", "",
            "| profile | decode of 1, 2, 3, 4 tokens without a common expert, all in memory | reads | a drafted token | telling the pager |",
            "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, t in timings.items():
        times = [float(t.busy_s(w, np.full((1, t.work.n_layers), w * t.work.n_used))[0]) for w in range(1, max(VERIFIED) + 2)]
        decodes = ", ".join(f"{1e3 * s:.1f}" for s in times)
        say.append(
            f"| {name} | {decodes} | {t.rate(READS_IN_FLIGHT) / 1e6:.0f} | {1e3 * t.draft_s * t.slower:.2f} | {1e3 * t.tell_s * t.slower:.2f} |"
        )
    say += ["", "Drafted tokens that came, up to the first, second and third, by request; the second half counts.", "",
            "| kind | first half | second half |", "| --- | --- | --- |"]  # fmt: skip
    half = len(recorded.answers) // 2
    for kind in KINDS:
        halves = []
        for answers in (recorded.answers[:half], recorded.answers[half:]):
            right = [np.array([a.right(i) for i in range(len(a.tokens))]) for a in answers if a.kind == kind and a.tokens]
            halves.append("; ".join(", ".join(f"{(of >= n).mean():.2f}" for n in VERIFIED if n) for of in right))
        say.append(f"| {kind} | {' | '.join(halves)} |")
    return say


def measured(work: Work) -> device.Device:
    """What `spac tune` measures, of what this model needs; of each figure the best of many turns, since other programs may run."""
    folder = ROOT / "build/demo"
    folder.mkdir(parents=True, exist_ok=True)
    products: dict[tuple[str, int], float] = {}
    repack: dict[str, float] = {}
    reads: dict[int, device.ReadRow] = {}
    op_s, wakeup_s, memory, contention_s = [], [], [], []
    size = BUNDLE_BYTES // PARTS // 4096 * 4096
    with device.readable(folder, device.SCRATCH_BYTES) as file:
        for _ in range(TURNS):
            for name in work.main_types:
                rows: list[device.ProductRow] = []
                rates: dict[str, float] = {}
                device.measure_type(name, WIDTHS, 2, rows, rates, 0.02)
                for row in rows:
                    products[name, row.n_tokens] = max(row.weights_per_s, products.get((name, row.n_tokens), 0.0))
                repack |= {k: max(v, repack.get(k, 0.0)) for k, v in rates.items()}
            for row in device.read_rows(file, "direct", [size], (1, 2, 4, 6), 0.02):
                reads[row.depth] = min(row, reads.get(row.depth, row), key=lambda r: r.seconds)
            beside = device.beside_reads(file, "direct", "Q4_0", 2, 0.1)
            contention_s += [] if beside is None else [beside.contention_s]
            op_s.append(device.measure_op(2))
            wakeup_s.append(control.wakeup_measure(20))
            memory.append(control.bandwidth_measure(64 << 20, 2))
    return device.Device(
        **device.identity(folder), threads=2, reads=tuple(reads.values()), repack=repack, op_s=min(op_s), wakeup_s=min(wakeup_s),
        products=tuple(device.ProductRow(*key, rate) for key, rate in products.items()), memory_bytes_per_s=max(memory),
        contention_s=statistics.median(contention_s or [0.0]), measured=time.strftime("%Y-%m-%d %H:%M:%S"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=Path, help="what an earlier run measured (default: measure this machine)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/sweep-study.md", help="where tables are written (%(default)s)")
    arguments = parser.parse_args()
    work = work_of_demo()
    found = device.parse(arguments.device.read_text()) if arguments.device else measured(work)
    device.save(found, arguments.out.with_suffix(".json"))
    recorded = record(arguments.tokens)
    say = sweep(recorded, tell(recorded, work.layers[0].n_experts), work, found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(say).rstrip() + "\n")
    print("\n".join(say))


def sweep(recorded: Recorded, told: Told, work: Work, found: device.Device) -> list[str]:
    limits = {name: profile.load(name).limits(1 << 32) for name in PROFILES}
    timings = {name: Timing(Machine(found, limit), work, recorded.draft_s, told.seconds) for name, limit in limits.items()}

    global cells_of_part  # a name that a forked process finds, with all that was recorded

    def cells_of_part(part: tuple[str, str]) -> list[Cell]:
        share, name = part
        return cells_of(Kind(name, share, recorded, told, work.layers[0].n_experts), name, share, timings)

    with multiprocessing.get_context("fork").Pool() as pool:
        cells = [cell for part in pool.imap(_run_part, itertools.product(SHARES, KINDS)) for cell in part]
    head = ["# The balancer against every setting", "", "Written by `scripts/sweep_study.py`, which says what is compared and how.", ""]
    return head + report(cells, timings, recorded, found)


def _run_part(part: tuple[str, str]) -> list[Cell]:
    return cells_of_part(part)


if __name__ == "__main__":
    main()
