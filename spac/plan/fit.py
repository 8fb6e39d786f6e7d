"""The memory plan: what a model needs, whether it fits whole, and what is left for experts when it does not.

Pure arithmetic on sizes that others measured; every number is in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from spac.errors import BudgetError
from spac.host.memory import MIB, format_bytes

Paging = Literal["auto", "on", "off"]

# What llama.cpp's vocabulary takes on the heap, by the bytes of the GGUF header that it is read from (BPE merges are kept in
# a tree of string pairs). Only for the first estimate: the budget itself is set from what the loaded model really takes.
VOCABULARY_FACTOR: Final = 8

# Calibrated in a memory cgroup, page cache and kernel memory counted (tests/test_budget.py): growth of the heap while decoding,
# stacks, bounce blocks, slabs.
RESERVE_BYTES: Final = 14 * MIB
# page tables: 8 bytes for each page of 4 KiB
PAGE_TABLE_DIVISOR: Final = 512

MIN_UBATCH: Final = 32
COMPUTE_DIVISOR: Final = 2


@dataclass(frozen=True)
class Sizes:
    """What upstream says a model and its context take.

    Attributes:
        dense_bytes: weights that are not paged.
        expert_bytes: weights that can be paged, in whole pages.
        context_bytes: KV cache and recurrent state.
        compute_bytes: compute, work and output buffers.
        staging_bytes: for a moment while dense weights are read.
        vocabulary_bytes: estimate of the vocabulary's heap.
        file_bytes: the model's files.
        floor_bytes: the smallest expert budget.
    """

    dense_bytes: int
    expert_bytes: int
    context_bytes: int
    compute_bytes: int
    staging_bytes: int
    vocabulary_bytes: int
    file_bytes: int
    floor_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them at once: the address space that they take, paged or not."""
        parts = (self.dense_bytes, self.expert_bytes, self.context_bytes, self.compute_bytes, self.staging_bytes, self.vocabulary_bytes)
        return sum(parts)


@dataclass(frozen=True)
class Plan:
    """How a model is loaded into a limit.

    Attributes:
        limit_bytes: for the whole process.
        base_bytes: what the process took before the model.
        reserve_bytes: kept free for growth and for kernel memory.
        sizes: of the model.
        paged: whether experts are paged.
        direct_io: whether weights that are not paged are read without the page cache.
        expert_budget_bytes: what is left for experts if paged, else 0. An estimate until the model is loaded.
    """

    limit_bytes: int
    base_bytes: int
    reserve_bytes: int
    sizes: Sizes
    paged: bool
    direct_io: bool
    expert_budget_bytes: int


def reserve_bytes(limit_bytes: int) -> int:
    """What to keep free of a limit for what cannot be counted beforehand."""
    return RESERVE_BYTES + limit_bytes // PAGE_TABLE_DIVISOR


def paged_ubatch(n_ubatch: int, limit_bytes: int, base_bytes: int, sizes: Sizes) -> int:
    """The ubatch for a paged model: a power of two, at least MIN_UBATCH, with compute buffers of at most half of what they and
    experts share.

    A long ubatch reads every expert once for many tokens. Its buffers are the experts' again when the prompt is over. The ubatch that
    was measured stays if the model fits whole, or if its buffers are small already.

    Args:
        n_ubatch: tokens that `sizes` were measured with; buffers grow about in proportion.
    """
    if _whole(limit_bytes, base_bytes, sizes) <= limit_bytes:
        return n_ubatch
    shared = limit_bytes - _fixed(limit_bytes, base_bytes, replace(sizes, compute_bytes=0))
    while n_ubatch > MIN_UBATCH and sizes.compute_bytes > shared // COMPUTE_DIVISOR:
        n_ubatch, sizes = max(MIN_UBATCH, n_ubatch // 2), replace(sizes, compute_bytes=sizes.compute_bytes // 2)
    return n_ubatch


def _fixed(limit_bytes: int, base_bytes: int, sizes: Sizes) -> int:
    """What is taken once all is loaded, experts left out."""
    parts = (base_bytes, sizes.vocabulary_bytes, sizes.dense_bytes, sizes.context_bytes, sizes.compute_bytes, reserve_bytes(limit_bytes))
    return sum(parts)


def _loading(limit_bytes: int, base_bytes: int, sizes: Sizes) -> int:
    """The same while dense weights are read, before there is a context."""
    return base_bytes + sizes.vocabulary_bytes + sizes.dense_bytes + sizes.staging_bytes + reserve_bytes(limit_bytes)


def _whole(limit_bytes: int, base_bytes: int, sizes: Sizes) -> int:
    """What the model takes with all experts in memory."""
    return max(_fixed(limit_bytes, base_bytes, sizes), _loading(limit_bytes, base_bytes, sizes)) + sizes.expert_bytes


def least_limit_bytes(base_bytes: int, sizes: Sizes) -> int:
    """The smallest limit that a paged model runs in, or a dense one at all."""
    fixed = _fixed(0, base_bytes, sizes) + (sizes.floor_bytes if sizes.expert_bytes else 0)
    return with_reserve(max(fixed, _loading(0, base_bytes, sizes)))


def whole_limit_bytes(base_bytes: int, sizes: Sizes) -> int:
    """The smallest limit in which nothing is paged."""
    return with_reserve(_whole(0, base_bytes, sizes))


def with_reserve(n_bytes: int) -> int:
    """A limit, or what must be added to one, that leaves so much beside its reserve, whose constant part is counted already."""
    return -(-n_bytes * PAGE_TABLE_DIVISOR // (PAGE_TABLE_DIVISOR - 1)) + 1


def make_plan(limit_bytes: int, base_bytes: int, sizes: Sizes, *, paging: Paging, n_ctx: int, automatic: bool = False) -> Plan:
    """Decide between whole and paged, and what experts get.

    Args:
        limit_bytes: for the whole process.
        base_bytes: resident now.
        sizes: of the model and context to come.
        paging: "auto" pages if the model does not fit, "on" always (if it has experts), "off" never, whatever the limit.
        n_ctx: tokens, for messages.
        automatic: the limit was found and not given, for messages.

    Raises:
        BudgetError: the model does not fit, with what it needs at least.
    """
    reserve = reserve_bytes(limit_bytes)
    fixed, loading = _fixed(limit_bytes, base_bytes, sizes), _loading(limit_bytes, base_bytes, sizes)
    whole = _whole(limit_bytes, base_bytes, sizes)

    def plan(*, paged: bool, direct_io: bool, budget: int = 0) -> Plan:
        return Plan(limit_bytes, base_bytes, reserve, sizes, paged, direct_io, budget)

    if paging == "off":
        return plan(paged=False, direct_io=False)
    if whole <= limit_bytes and (paging == "auto" or sizes.expert_bytes == 0):
        # mapped weights that are repacked are in memory twice
        return plan(paged=False, direct_io=whole + sizes.file_bytes > limit_bytes)
    budget = min(limit_bytes - fixed, sizes.expert_bytes)
    if sizes.expert_bytes == 0 or budget < sizes.floor_bytes or loading > limit_bytes:
        raise BudgetError(_needs(limit_bytes, base_bytes, sizes, n_ctx, automatic))
    return plan(paged=True, direct_io=True, budget=budget)


def fit(
    limit_bytes: int,
    base_bytes: int,
    measure: Callable[[int], Sizes],
    n_ubatch: int,
    *,
    automatic_ubatch: bool,
    paging: Paging,
    n_ctx: int,
    automatic: bool = False,
) -> tuple[int, Plan]:
    """As `make_plan`, with the ubatch that the limit allows; returns that and the plan.

    Args:
        measure: sizes with a ubatch.
        n_ubatch: the longest one.
        automatic_ubatch: it may be made smaller.

    Raises:
        BudgetError: the model does not fit.
    """
    sizes = measure(n_ubatch)
    smaller = paged_ubatch(n_ubatch, limit_bytes, base_bytes, sizes)
    if automatic_ubatch and smaller < n_ubatch and paging != "off":
        n_ubatch, sizes = smaller, measure(smaller)
    while True:
        try:
            return n_ubatch, make_plan(limit_bytes, base_bytes, sizes, paging=paging, n_ctx=n_ctx, automatic=automatic)
        except BudgetError:
            if not automatic_ubatch or n_ubatch <= MIN_UBATCH:
                raise
        n_ubatch = max(MIN_UBATCH, n_ubatch // 2)
        sizes = measure(n_ubatch)


def _needs(limit_bytes: int, base_bytes: int, sizes: Sizes, n_ctx: int, automatic: bool) -> str:
    fixed, loading = _fixed(limit_bytes, base_bytes, sizes), _loading(limit_bytes, base_bytes, sizes)
    process = fixed - sizes.dense_bytes - sizes.context_bytes - sizes.compute_bytes
    parts = [
        f"dense weights {format_bytes(sizes.dense_bytes)}",
        f"context of {n_ctx} tokens {format_bytes(sizes.context_bytes)}",
        f"compute {format_bytes(sizes.compute_bytes)}",
        f"process {format_bytes(process)}",
    ]
    if sizes.floor_bytes:
        parts.append(f"expert floor {format_bytes(sizes.floor_bytes)}")
    if loading > fixed + sizes.floor_bytes:
        parts.append(f"while loading {format_bytes(sizes.staging_bytes)} more")
    limit = format_bytes(limit_bytes) + (" available" if automatic else " given")
    least = format_bytes(least_limit_bytes(base_bytes, sizes), up=True)
    return f"needs at least {least} of memory, {limit}: {', '.join(parts)}; lower --ctx or --ubatch, or raise --memory"
