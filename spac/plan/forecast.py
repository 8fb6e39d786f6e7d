"""How fast a model will be before it has run: its header, a memory plan and a measured device, put through the time model.

docs/plan.md says where each term comes from, and how far off it was. Pure arithmetic; nothing here measures.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spac.device import Device, bits
from spac.errors import BudgetError
from spac.gguf.check import PAGE_BYTES, ModelFacts, expert_layer_of, in_layers
from spac.gguf.reader import Tensor
from spac.host.memory import GIB, MIB
from spac.plan.fit import MIN_UBATCH, Plan, Sizes, fit, least_limit_bytes, whole_limit_bytes
from spac.plan.miss_curve import Misses, misses
from spac.trace.timing import PARTS, PIECE_BYTES, READS_IN_FLIGHT, Compute, Reads, layer_s

if TYPE_CHECKING:
    from spac.host.limits import Limits

OPS_PER_LAYER: Final = 45  # of a graph that compute next to nothing, beside the products: norms, rope, views, the router's top k
TOKEN_S: Final = 0.5e-3  # sampling and Python, for each token
PAGED_TOKEN_S: Final = 0.5e-3  # asking the pager what it did, for each token
COMPUTE_SPREAD: Final = 1.15  # either way: other programs, clocks, shapes of matrices
READ_SPREAD: Final = 1.1  # a token's reads against the disk's mean
LIMIT_SPREAD: Final = 1.05  # either way: what is said of a disk's speed is a round figure
GROWTH_BYTES: Final = 12 * MIB  # of the process between planning and decoding: heap, stacks, what reads arrive in, what the signals learn
READING_SPEED: Final = 5.0  # tokens/s: as fast as people read
LEAST_BITS: Final = 4.0  # below, quality falls quickly
CANDIDATES: Final = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
CURVE_POINTS: Final = 10


# -- what a model computes and reads --


@dataclass(frozen=True)
class LayerWork:
    """A layer's experts: how many, one's bytes (in the file, in pages), and one's weights by type."""

    n_experts: int
    bundle_bytes: int
    page_bytes: int
    weights: tuple[tuple[str, int], ...]

    @property
    def read_bytes(self) -> int:
        """That the disk gives for one: a slice begins and ends somewhere in a block."""
        return self.bundle_bytes + PARTS * PAGE_BYTES


@dataclass(frozen=True)
class Work:
    """What a token takes.

    Attributes:
        layers: those with experts.
        dense: weights of other matrices that every token is multiplied with, by type.
        n_layers: all of them.
        columns: greatest common divisor of the rows' lengths: a type's blocks must divide it.
    """

    architecture: str
    n_used: int
    n_layers: int
    layers: tuple[LayerWork, ...]
    dense: tuple[tuple[str, int], ...]
    columns: int

    @classmethod
    def of(cls, facts: ModelFacts, tensors: Iterable[Tensor]) -> Work:
        """From the tables of tensors of all files."""
        experts: dict[int, Counter[str]] = defaultdict(Counter)
        dense: Counter[str] = Counter()
        columns = 0
        names = set()
        embedding: Tensor | None = None
        for tensor in tensors:
            if not in_layers(tensor.name, facts.n_layers):
                continue
            names.add(tensor.name)
            n_weights = math.prod(tensor.shape)
            layer = expert_layer_of(tensor.name) if facts.expert_layers else None
            if layer is not None:
                experts[layer][tensor.type_name] += n_weights // tensor.shape[2]
                columns = math.gcd(columns, tensor.shape[0])
            elif tensor.name == "token_embd.weight":
                embedding = tensor
            elif len(tensor.shape) > 1 and tensor.name.endswith(".weight"):
                dense[tensor.type_name] += n_weights
        if embedding is not None and "output.weight" not in names:
            dense[embedding.type_name] += math.prod(embedding.shape)
        layers = tuple(
            LayerWork(layer.n_experts, layer.bundle_bytes, layer.bundle_page_bytes, tuple(sorted(experts[layer.layer].items())))
            for layer in facts.expert_layers
        )
        return cls(facts.architecture, facts.n_experts_used, facts.n_layers, layers, tuple(sorted(dense.items())), columns)

    @property
    def n_bundles(self) -> int:
        return sum(layer.n_experts for layer in self.layers)

    @property
    def main_types(self) -> list[str]:
        """Each of a twentieth at least of the weights that a token is multiplied with; the commonest first."""
        used: Counter[str] = Counter(dict(self.dense))
        for layer in self.layers:
            used.update({name: n * self.n_used for name, n in layer.weights})
        return [name for name, n in used.most_common() if 20 * n >= used.total()]

    def quantised(self, type_name: str) -> Work:
        """The same model with experts and other matrices of this type."""

        def of_type(weights: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
            return ((type_name, sum(n for _, n in weights)),)

        def scaled(layer: LayerWork) -> LayerWork:
            n_bytes = weight_bytes(of_type(layer.weights))
            return LayerWork(layer.n_experts, n_bytes, n_bytes + PARTS * PAGE_BYTES, of_type(layer.weights))

        return dataclasses.replace(self, layers=tuple(scaled(layer) for layer in self.layers), dense=of_type(self.dense))


def weight_bytes(weights: tuple[tuple[str, int], ...]) -> int:
    """Bytes of weights by type."""
    return int(sum(n * bits(name) / 8 for name, n in weights))


def scaled_sizes(sizes: Sizes, old: Work, new: Work) -> Sizes:
    """Upstream's sizes, for the same tensors of other types."""
    experts_old = sum(layer.n_experts * layer.bundle_bytes for layer in old.layers)
    experts_new = sum(layer.n_experts * layer.bundle_bytes for layer in new.layers)
    difference = weight_bytes(new.dense) - weight_bytes(old.dense)
    return dataclasses.replace(
        sizes,
        dense_bytes=sizes.dense_bytes + difference,
        expert_bytes=sizes.expert_bytes + experts_new - experts_old,
        file_bytes=sizes.file_bytes + difference + experts_new - experts_old,
        floor_bytes=2 * max((layer.page_bytes for layer in new.layers), default=0),
    )


# -- speed --


@dataclass(frozen=True)
class Machine:
    """A device within limits.

    Attributes:
        limits: reads by second, cores and their share; memory is the plan's.
    """

    device: Device
    limits: Limits

    def compute_s(self, weights: tuple[tuple[str, int], ...], n_tokens: float = 1) -> float:
        """Seconds of n tokens' products with these weights, all threads."""
        seconds = sum(n * n_tokens / self.device.weights_per_s(name, n_tokens) for name, n in weights)
        return seconds * self._fewer_cores

    @property
    def _fewer_cores(self) -> float:
        return max(1.0, self.device.threads / self.limits.cores) if self.limits.cores else 1.0

    def repack_s(self, layer: LayerWork) -> float:
        """Rearranging a slice, while the other reading threads rearrange theirs."""
        cores = min(self.limits.cores or self.device.cores, READS_IN_FLIGHT)
        repacking = sum(n / rate for name, n in layer.weights if (rate := self.device.rearranged_per_s(name)) is not None) / PARTS
        return repacking * READS_IN_FLIGHT / cores / (self.limits.cpu_share or 1.0)

    def slice_s(self, layer: LayerWork) -> float:
        """What a slice costs once it has been read: its last piece is rearranged; the pieces before it were, while others were read."""
        return self.device.wakeup_s + self.repack_s(layer) / math.ceil(layer.read_bytes / PARTS / PIECE_BYTES)

    def contention_s(self, layer: LayerWork) -> float:
        """What computing loses for each byte that is read and rearranged meanwhile."""
        rearranging_s = self.repack_s(layer) / READS_IN_FLIGHT * PARTS / layer.read_bytes
        return self.device.contention_s * self._fewer_cores + rearranging_s

    def reads(self, which: str = "seconds") -> Reads:
        """Bandwidth of the disk, behind the limit if there is one."""
        return dataclasses.replace(self.device.read_table(which), limit_bytes_per_s=self.limits.read_bytes_per_s)


@dataclass(frozen=True)
class Speed:
    """Expected, and an interval. Tokens by second; a prompt's from a cold start, experts read included."""

    decode_tokens_per_s: float
    low_tokens_per_s: float
    high_tokens_per_s: float
    prefill_tokens_per_s: float
    ttft_s: float
    read_bytes_per_token: float
    miss_rate: float


def speed(work: Work, plan: Plan, machine: Machine, *, n_ctx: int, n_ubatch: int, prompt_tokens: int) -> Speed:
    """Of a model in a memory plan."""
    known = min(1.0, prompt_tokens / n_ctx) if n_ctx else 0.0
    attention_s = plan.sizes.context_bytes * known / machine.device.memory_bytes_per_s
    expected = _misses(work, _while_decoding(plan, n_ubatch, prompt_tokens))

    def decode(miss: float, compute: float, which: str, limit: float) -> float:
        reads = machine.reads(which)
        limited = dataclasses.replace(reads, limit_bytes_per_s=reads.limit_bytes_per_s and reads.limit_bytes_per_s * limit)
        return 1 / decode_s(work, machine, miss, limited, attention_s=attention_s, slower=compute)

    prefill = prefill_s(work, plan, machine, n_ubatch, prompt_tokens)
    return Speed(
        decode_tokens_per_s=decode(expected.median, 1.0, "seconds", 1.0),
        low_tokens_per_s=decode(min(1.0, expected.high * READ_SPREAD), COMPUTE_SPREAD, "slow_s", 1 / LIMIT_SPREAD),
        high_tokens_per_s=decode(expected.low / READ_SPREAD, 1 / COMPUTE_SPREAD, "fast_s", LIMIT_SPREAD),
        prefill_tokens_per_s=prompt_tokens / prefill,
        ttft_s=prefill,
        read_bytes_per_token=expected.median * work.n_used * sum(layer.read_bytes for layer in work.layers),
        miss_rate=expected.median,
    )


def _while_decoding(plan: Plan, n_ubatch: int, prompt_tokens: int) -> Plan:
    """With what the governor gives to experts of the compute buffers: what a short prompt left, after a longer one all but a token's."""
    longest = min(prompt_tokens, n_ubatch)
    touched = longest if longest <= MIN_UBATCH else 1
    untouched = int(plan.sizes.compute_bytes * (1 - touched / n_ubatch))
    return dataclasses.replace(plan, expert_budget_bytes=min(plan.expert_budget_bytes + untouched, plan.sizes.expert_bytes))


def _misses(work: Work, plan: Plan) -> Misses:
    if not plan.paged:
        return Misses(0.0, 0.0, 0.0)
    floor = min(0.9, plan.sizes.floor_bytes / plan.sizes.expert_bytes)  # what is computed and what is read: nothing is kept there
    share = max(0.0, (resident_share(work, plan) - floor) / (1 - floor))
    return misses(share, work.architecture, max(layer.n_experts for layer in work.layers), work.n_used)


def resident_share(work: Work, plan: Plan) -> float:
    """The part of all bundles that memory holds."""
    return min(1.0, plan.expert_budget_bytes / sum(layer.n_experts * layer.page_bytes for layer in work.layers))


def decode_s(work: Work, machine: Machine, miss: float, reads: Reads, *, attention_s: float = 0.0, slower: float = 1.0) -> float:
    """Seconds of a token of which each expert is missing with probability `miss`, one independent of another.

    Args:
        slower: computing takes so many times as long.
    """
    device = machine.device
    ops_s = work.n_layers * OPS_PER_LAYER * device.op_s
    signals_s = PAGED_TOKEN_S + device.signals_s + work.n_bundles * device.signals_expert_s if miss else 0.0
    dense_s = slower * (machine.compute_s(work.dense) + ops_s + attention_s + TOKEN_S + signals_s)
    busy_s, waiting_s = dense_s, dense_s
    for layer, n in Counter(work.layers).items():
        expert_s = slower * machine.compute_s(layer.weights)
        compute = Compute(0.0, expert_s, machine.slice_s(layer), machine.contention_s(layer), device.visit_s)
        busy_s += n * work.n_used * expert_s
        for missed in range(work.n_used + 1):
            chance = math.comb(work.n_used, missed) * miss**missed * (1 - miss) ** (work.n_used - missed)
            if chance > 1e-6:
                waiting_s += n * chance * layer_s(work.n_used, missed, layer.read_bytes, compute, reads)
    read_bytes = miss * work.n_used * sum(layer.read_bytes for layer in work.layers)
    return max(waiting_s, busy_s / (machine.limits.cpu_share or 1.0), read_bytes / (reads.limit_bytes_per_s or math.inf))


def prefill_s(work: Work, plan: Plan, machine: Machine, n_ubatch: int, prompt_tokens: int) -> float:
    """Seconds of a prompt, from no expert in memory; a ubatch reads each of its experts once.

    Routing is taken for independent from token to token, so a ubatch uses about all experts, as long ones do.
    """
    reads = machine.reads()
    share = resident_share(work, plan) if plan.paged else 1.0
    seconds, left, first = 0.0, prompt_tokens, True
    while left > 0:
        n = min(n_ubatch, left)
        compute_s = machine.compute_s(work.dense, n) + work.n_layers * OPS_PER_LAYER * machine.device.op_s
        read_s, contention_s = 0.0, 0.0
        for layer, count in Counter(work.layers).items():
            used = layer.n_experts * (1 - (1 - work.n_used / layer.n_experts) ** n)
            compute_s += count * used * machine.compute_s(layer.weights, n * work.n_used / used)
            if plan.paged:
                size = layer.read_bytes / PARTS
                rate = min(reads.bytes_per_s(size, READS_IN_FLIGHT), reads.limit_bytes_per_s or math.inf)
                rate = 1 / (1 / rate + (machine.device.wakeup_s + machine.repack_s(layer)) / READS_IN_FLIGHT / size)
                n_bytes = count * used * (1.0 if first else 1 - share) * layer.read_bytes
                read_s += n_bytes / rate
                contention_s += n_bytes * machine.contention_s(layer)
        seconds += max(compute_s / (machine.limits.cpu_share or 1.0), read_s, compute_s + contention_s)
        left, first = left - n, False
    return seconds + TOKEN_S


# -- the answer --


@dataclass(frozen=True)
class Forecast:
    """A plan and its speed; neither, and why, where the model does not fit."""

    limit_bytes: int
    sizes: Sizes
    n_ubatch: int
    plan: Plan | None
    speed: Speed | None
    why_not: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked: a model, on a machine, with these settings.

    Attributes:
        measure: sizes by ubatch.
        base_bytes: of the process besides the model.
        n_ubatch: None: what the limit allows.
    """

    work: Work
    measure: Callable[[int], Sizes]
    machine: Machine
    base_bytes: int
    n_ctx: int
    n_ubatch: int | None
    prompt_tokens: int

    @property
    def longest_ubatch(self) -> int:
        """What `spac run` begins with."""
        return min(512, self.n_ctx)

    def answer(self, limit_bytes: int) -> Forecast:
        """For a memory limit of the whole process."""
        measured: list[tuple[int, Sizes]] = []

        def measure(n_ubatch: int) -> Sizes:
            measured.append((n_ubatch, self.measure(n_ubatch)))
            return measured[-1][1]

        try:
            n_ubatch, plan = fit(
                limit_bytes, self.base_bytes, measure, self.n_ubatch or self.longest_ubatch,
                automatic_ubatch=self.n_ubatch is None, paging="auto", n_ctx=self.n_ctx,
            )  # fmt: skip
        except BudgetError as e:
            return Forecast(limit_bytes, measured[-1][1], measured[-1][0], None, None, str(e))
        found = speed(self.work, plan, self.machine, n_ctx=self.n_ctx, n_ubatch=n_ubatch, prompt_tokens=self.prompt_tokens)
        return Forecast(limit_bytes, plan.sizes, n_ubatch, plan, found)

    def quantised(self, type_name: str) -> Question:
        """The same with another type of weights."""
        work = self.work.quantised(type_name)
        return dataclasses.replace(self, work=work, measure=lambda n: scaled_sizes(self.measure(n), self.work, work))

    def with_disk(self, factor: float) -> Question:
        """The same with a faster disk."""
        device, limits = self.machine.device, self.machine.limits
        rows = tuple(
            dataclasses.replace(row, **{name: getattr(row, name) / factor for name in ("seconds", "fast_s", "slow_s")})
            for row in device.reads
        )
        limit = limits.read_bytes_per_s
        faster = dataclasses.replace(limits, read_bytes_per_s=None if limit is None else int(limit * factor))
        return dataclasses.replace(self, machine=Machine(dataclasses.replace(device, reads=rows), faster))


@dataclass(frozen=True)
class Point:
    """Of the curve: with so much memory, on this disk and on one twice as fast."""

    memory_bytes: int
    speed: Speed
    faster_disk_tokens_per_s: float


def curve(question: Question, limit_bytes: int) -> list[Point]:
    """Speed by memory, from the least that does to all that helps; the limit, and one GiB more if that helps, are among the points."""
    sizes = question.measure(question.n_ubatch or MIN_UBATCH)
    least = least_limit_bytes(question.base_bytes, sizes)
    most = whole_limit_bytes(question.base_bytes, question.measure(question.n_ubatch or question.longest_ubatch))
    steps = {least + (most - least) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)} | {limit_bytes}
    if limit_bytes < most:
        steps.add(limit_bytes + GIB)
    doubled = question.with_disk(2)
    points = []
    for memory in sorted(steps):
        found = question.answer(memory).speed
        faster = doubled.answer(memory).speed
        if found is not None and faster is not None:
            points.append(Point(memory, found, faster.decode_tokens_per_s))
    return points


@dataclass(frozen=True)
class Choice:
    """A quantisation of the same model."""

    type_name: str
    file_bytes: int
    speed: Speed | None
    paged: bool


def quantisations(question: Question, limit_bytes: int) -> list[Choice]:
    """The model in other types, most bits first; types whose blocks do not divide its rows are left out."""
    choices = []
    for name in CANDIDATES:
        if question.work.columns and question.work.columns % block_of(name) == 0:
            found = question.quantised(name).answer(limit_bytes)
            choices.append(Choice(name, found.sizes.file_bytes, found.speed, found.plan is not None and found.plan.paged))
    return choices


def block_of(type_name: str) -> int:
    """Weights in a block of a type."""
    from spac.gguf.reader import TENSOR_TYPES

    return next(block for name, block, _ in TENSOR_TYPES.values() if name == type_name)


def pick(choices: Sequence[Choice]) -> Choice | None:
    """The most bits that decode as fast as people read; else the fastest of those with four bits and more; None if none fits."""
    fitting = [choice for choice in choices if choice.speed is not None]
    fast = [c for c in fitting if c.speed is not None and c.speed.decode_tokens_per_s >= READING_SPEED]
    if fast:
        return max(fast, key=lambda choice: bits(choice.type_name))
    enough = [choice for choice in fitting if bits(choice.type_name) >= LEAST_BITS] or fitting
    return max(enough, key=lambda choice: choice.speed.decode_tokens_per_s if choice.speed else 0.0, default=None)
