"""The balancer beside decoding: what is measured while tokens come, and a thread that plans anew when that has changed.

Decoding tells it a few numbers for each token and asks what the last plan was; it never waits. One order keeps the experts of all
layers, so slots need no plan (docs/balancer.md): what is decided is how many tokens are drafted, how many verified at most, and
whether anything is read ahead. With one cache marginal gains are exact, and no solver is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from spac.balancer.cost import Costs
from spac.balancer.curves import MissCurve
from spac.balancer.heuristics import greedy
from spac.balancer.state import Cache, Choice, Lookahead, Plan, State
from spac.errors import OptionError
from spac.means import Mean, Usual
from spac.trace.timing import PARTS, Reads

_log = logging.getLogger(__name__)

FIRST_PLAN: Final = 8  # decodes
FAST: Final = 0.2  # weight of a new value in a running mean: of times and misses, which change with the machine
SLOW: Final = 0.03  # the same of what a text or a draft is like: from a few tokens of one kind it is up to 4 % off (docs/balancer.md)
MEDIUM: Final = 0.1  # the same of chances that rise while a text goes on, and while they are being calibrated
CHANGED: Final = 1.4  # a mean that has changed by this factor asks for a new plan
CHANGED_CHANCE: Final = 0.15  # a chance, by this much
LEAST_STEPS: Final = 4  # decodes between two plans
MOST_STEPS: Final = 64
GIVE_BACK_PLANS: Final = 2  # in a row that must find a draft not worth its memory
BETTER: Final = 0.005  # what a new choice must save, relative; drafting four tokens instead of two saves no more in an answer's first steps
BETTER_WITHOUT_DRAFT: Final = 0.02  # the same of closing the draft, which is for good
DEADLINE_S: Final = 1.0
NICE: Final = 19

MOST_VERIFIED: Final = 4
MOST_DRAFTED: Final = 4
HORIZON: Final = 4  # tokens, before there is a plan that knows the draft; beyond it a draft is rarely right
MOST_OF_START: Final = 3  # of what beginning to draft takes, in tokens
# Part of the misses that one more token's experts save if it is known, by its distance: between what known tokens save in the simulator
# and what drafted ones save live (two 14 % of the bytes, four 18 %: docs/benchmarks/cells/). A wrong guess saves a part of that,
# since the token that comes instead shares experts with it: what a real draft saves there is 0.74 to 0.88 of what known tokens do, where
# 0.62 to 0.74 of its guesses are right (docs/benchmarks/lookahead-misses.md, a quarter of the experts).
SAVED_BY_KNOWN: Final = (0.09, 0.06, 0.04, 0.04)
SAVED_BY_WRONG: Final = 0.4  # of that
GUESSED_SLOPE: Final = 0.25  # computing one more token, in that of one, before it was measured
GUESSED_LOOKAHEAD: Final = Lookahead(0.05, 0.8)  # before anything was read ahead
LEAST_DECODES: Final = 8  # that tell what a byte costs
MOST_OF_WAITING: Final = 1.5  # what reads are said to take at most, in what was waited for them
NOTHING: Final = 1e-9  # a mean that has faded so far
LEAST_AHEAD_BYTES: Final = 1 << 20  # by decode, to be measured


@dataclass(frozen=True)
class Decode:
    """One decode, as it was measured.

    Attributes:
        verified: drafted tokens in it.
        seconds: that it took; `stall_s`: those of them that it waited for reads.
        misses: bundles that were not there.
        read_bytes: all; `ahead_bytes`: those of guesses; `wasted_bytes`: those of guesses for nothing.
        budget_bytes: of experts now.
    """

    verified: int
    seconds: float
    stall_s: float
    misses: int
    read_bytes: int
    ahead_bytes: int
    wasted_bytes: int
    budget_bytes: int


class ReadCost:
    """What a decode's reads take of its time: the slope of time over bytes read, by least squares on which old decodes fade.

    That is more than is waited for, since reading takes the processors from computing as well (docs/balancer.md)."""

    def __init__(self) -> None:
        self._n = 0
        self._bytes, self._seconds, self._squares, self._products = (Mean(SLOW) for _ in range(4))

    def add(self, decode: Decode) -> None:
        """A decode that verified nothing: others compute more."""
        self._n += 1
        self._bytes.add(decode.read_bytes)
        self._seconds.add(decode.seconds)
        self._squares.add(decode.read_bytes**2)
        self._products.add(decode.read_bytes * decode.seconds)

    def seconds(self, decode: Decode) -> float:
        """Of this decode; never less than it waited, nor more than `MOST_OF_WAITING` times that."""
        variance = self._squares.get() - self._bytes.get() ** 2
        if self._n < LEAST_DECODES or variance < (self._bytes.get() / 100) ** 2:  # all read alike
            return decode.stall_s
        slope = (self._products.get() - self._bytes.get() * self._seconds.get()) / variance
        return min(max(decode.stall_s, slope * decode.read_bytes), MOST_OF_WAITING * decode.stall_s, decode.seconds)


class DraftCost:
    """What a proposal takes: its first token more than each other one, since drafting must begin, and the pager be told."""

    def __init__(self) -> None:
        self._seconds = [Usual() for _ in range(MOST_DRAFTED)]  # by number of tokens
        self._last = 0

    def add(self, n: int, seconds: float) -> None:
        """A proposal of n tokens."""
        self._last = min(n, MOST_DRAFTED)
        self._seconds[self._last - 1].add(seconds * self._last / n)

    def parts(self) -> tuple[float, float]:
        """Seconds of beginning, and of each token: on a line through the last number of tokens and the one farthest from it."""
        if self._last == 0:
            return 0.0, 0.0
        n, whole = self._last, self._seconds[self._last - 1].get()
        others = [(abs(i - n), i, mean.value) for i, mean in enumerate(self._seconds, 1) if i != n and mean.value is not None]
        _, i, seconds = max(others, default=(0, -1, 0.0))  # none: beginning is a token's work
        token_s = (whole - seconds) / (n - i)
        token_s = min(max(token_s, whole / (n + MOST_OF_START)), whole / n)
        return max(0.0, whole - n * token_s), token_s  # n times a n-th may be more, by rounding


@dataclass
class Measured:
    """Running means of what plans hang on.

    Attributes:
        compute_s: of a decode without its reads, by how many drafted tokens it verified; `growth`: its misses, in those of a decode
            that verified none.
        misses, reading_s: of a decode that verified none; `reading_s`: what its reads took.
        accepted: of each drafted token, the chance that it and those before it are right.
        known: of each drafted token and its alternatives, the chance that one of them comes.
    """

    compute_s: list[Mean] = field(default_factory=lambda: [Mean(FAST) for _ in range(MOST_VERIFIED + 1)])
    growth: list[Mean] = field(default_factory=lambda: [Mean(SLOW) for _ in range(MOST_VERIFIED + 1)])
    accepted: list[Mean] = field(default_factory=lambda: [Mean(FAST) for _ in range(MOST_VERIFIED)])
    known: list[Mean] = field(default_factory=lambda: [Mean(MEDIUM) for _ in range(MOST_DRAFTED)])
    misses: Mean = field(default_factory=lambda: Mean(FAST))
    reading_s: Mean = field(default_factory=lambda: Mean(FAST))
    draft: DraftCost = field(default_factory=DraftCost)
    recall: Mean = field(default_factory=lambda: Mean(SLOW))
    precision: Mean = field(default_factory=lambda: Mean(SLOW))
    budget_bytes: int = 0
    _read_cost: ReadCost = field(default_factory=ReadCost)

    def add(self, decode: Decode) -> None:
        if decode.verified == 0:
            self._read_cost.add(decode)
        reading_s = self._read_cost.seconds(decode)
        if decode.verified <= MOST_VERIFIED:
            self.compute_s[decode.verified].add(max(0.0, decode.seconds - reading_s))
            if decode.verified and self.misses.get() >= 1:
                self.growth[decode.verified].add(decode.misses / self.misses.get())
        if decode.verified == 0:
            self.misses.add(decode.misses)
            self.reading_s.add(reading_s)
        self.budget_bytes = decode.budget_bytes
        if decode.ahead_bytes >= LEAST_AHEAD_BYTES:
            used = max(0, decode.ahead_bytes - decode.wasted_bytes)
            self.precision.add(max(0.05, used / decode.ahead_bytes))
            self.recall.add(used / max(1, decode.read_bytes - decode.wasted_bytes))

    def drafted(self, chances: Sequence[float], known: Sequence[float], seconds: float) -> None:
        """A proposal of len(chances) tokens. The first one's time is not like the others': memory is touched for the first time."""
        if not chances:
            return
        if self.accepted[0].value is not None:
            self.draft.add(len(chances), seconds)
        for means, values in ((self.accepted, chances), (self.known, gone_on(known, MOST_DRAFTED))):
            for mean, value in zip(means, values, strict=False):
                mean.add(value)

    def marks(self) -> tuple[float, ...]:
        """By which a change is noticed."""
        return self.reading_s.get(), self.misses.get(), self.compute_s[0].get(), sum(self.draft.parts()), float(self.budget_bytes)

    def changed(self, marks: Sequence[float], chance: float) -> bool:
        """Since these marks, and this chance of the first drafted token."""
        least_s = (self.reading_s.get() + self.compute_s[0].get()) / 20  # what is smaller does not matter
        least = least_s, 1.0, least_s, least_s, 1.0
        ratios = ((now + small) / (then + small) for now, then, small in zip(self.marks(), marks, least, strict=True))
        moved = any(not 1 / CHANGED <= ratio <= CHANGED for ratio in ratios)
        # a budget is no running mean: it changes for good
        budget = abs(self.budget_bytes - marks[-1]) > 0.05 * marks[-1]
        return moved or budget or abs(self.accepted[0].get() - chance) > CHANGED_CHANCE


def gone_on(values: Sequence[float], n: int) -> list[float]:
    """Chances that fall along a proposal, n of them: a shorter proposal goes on as it ended, or what was drafted no longer would stay as
    it was."""
    last = values[-1] if values else 0.0
    ratio = min(1.0, last / values[-2]) if len(values) > 1 and values[-2] > 0 else last
    return [*values, *(last * ratio**i for i in range(1, n - len(values) + 1))]


@dataclass(frozen=True)
class Model:
    """What does not change.

    Attributes:
        n_used: bundles that a token uses, in all layers; `n_bundles`: that there are; `floor`: that must be in memory.
        bundle_bytes: of one.
        misses_at: misses for each use that are expected with so large a share of the bundles in memory.
    """

    n_used: int
    n_bundles: int
    floor: int
    bundle_bytes: int
    misses_at: Callable[[float], float]

    def state(self, measured: Measured, drafts: bool, verifies: bool) -> State:
        """What the balancer is told. `drafts`: there is a draft; `verifies`: its tokens may be verified."""
        slots = max(self.floor, min(self.n_bundles, measured.budget_bytes // self.bundle_bytes))
        even = self.n_used * (1 - slots / self.n_bundles)
        misses = min(measured.misses.get(), even)
        points = [(0, float(self.n_used)), (slots, misses), (self.n_bundles, 0.0)][: 2 if slots == self.n_bundles else 3]
        curve = MissCurve(np.array([n for n, _ in points]), np.array([m for _, m in points]))
        # all that reads take, by the bytes that are missed: what hides behind computing is left out on both sides
        reading_s = measured.reading_s.get()
        rate = self.bundle_bytes * misses / reading_s if min(reading_s, misses) > NOTHING else 1e15
        n = len([mean for mean in measured.accepted if mean.value is not None]) if drafts and verifies else 0
        base_s = measured.compute_s[0].get()
        compute = [mean.get(base_s * (1 + GUESSED_SLOPE * i)) for i, mean in enumerate(measured.compute_s[: n + 1])]
        growth = [mean.get(1.0 + i) for i, mean in enumerate(measured.growth[: n + 1])]
        known = [mean.get() for mean in measured.known] if drafts else []
        saved = [whole * (chance + (1 - chance) * SAVED_BY_WRONG) for whole, chance in zip(SAVED_BY_KNOWN, known, strict=False)]
        draft_start_s, draft_s = measured.draft.parts()
        recall, precision = measured.recall.get(GUESSED_LOOKAHEAD.recall), measured.precision.get(GUESSED_LOOKAHEAD.precision)
        slice_bytes = self.bundle_bytes // PARTS
        return State(
            caches=(Cache("model", self.bundle_bytes, curve, min(self.floor, slots)),),
            budget_bytes=slots * self.bundle_bytes + slice_bytes + 1,
            reads=Reads({(max(1, slice_bytes), 1): rate}),
            decode_s=tuple(compute),
            growth=(1.0, *growth[1:]),
            accepted=tuple(min(1.0, mean.get()) for mean in measured.accepted[:n]),
            draft_s=draft_s if drafts else None,
            draft_start_s=draft_start_s if drafts else 0.0,
            sensed=(0.0, *np.minimum(1.0, np.cumsum(saved)).tolist()),
            lookahead=(Lookahead(0.0, 1.0), Lookahead(min(1.0, recall), min(1.0, precision))),
            in_flight=(1,),
        )

    def without_draft(self, state: State, freed_bytes: int) -> State:
        """The same if the draft were gone and experts had its memory. The curve tells only how misses change from where they are."""
        cache = state.caches[0]
        share = (state.budget_bytes // self.bundle_bytes) / self.n_bundles
        more = min(1.0, share + freed_bytes / (self.n_bundles * self.bundle_bytes))
        curve = cache.curve.scaled(min(1.0, self.misses_at(more) / self.misses_at(share)))
        alone = replace(state, decode_s=state.decode_s[:1], growth=(1.0,), accepted=(), draft_s=None, draft_start_s=0.0, sensed=(0.0,))
        return replace(alone, caches=(replace(cache, curve=curve),))


def kept(before: Choice | None, plan: Plan, state: State) -> Choice:
    """The plan's choice, or the one before it if that is nearly as good."""
    costs = Costs(state)
    for i in range(len(costs)) if before is not None else ():
        if costs.choice(i) == before:
            same = costs.plan(state, i, plan.slots, plan.fast_slots, "")
            return before if same.seconds_per_token <= plan.seconds_per_token * (1 + BETTER) else plan.choice
    return plan.choice


class LiveBalancer:
    """Plans for one context of a paged model. `decoded`, `drafted` and `choice` are its context's; the thread is its own.

    Args:
        solve: what plans; injected in tests.

    Attributes:
        choice: of the last plan; None before the first one.
        plans: how many there were; `late`: of these, how many came too late to be used.
        cpu_s: that the thread has used.
        has_drafted: there is a draft, and it was asked.
        verifies: whether drafted tokens may be verified.
        draft_bytes: of memory that would be free without the draft; 0: it cannot go.
        gives_back: experts would make more of the draft's memory than it saves: it should be closed.
    """

    def __init__(self, model: Model, solve: Callable[[State], Plan] = greedy) -> None:
        self.choice: Choice | None = None
        self.plans, self.late, self.cpu_s = 0, 0, 0.0
        self.has_drafted = False
        self.verifies = True
        self.draft_bytes = 0
        self.gives_back = False
        self._not_worth = 0  # plans in a row
        self.measured = Measured()
        self._model, self._solve = model, solve
        self._marks: tuple[tuple[float, ...], float] | None = None  # that the last plan was asked with
        self._steps = 0  # since then
        self._wake = threading.Condition()
        self._asked: State | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def drafted(self, chances: Sequence[float], known: Sequence[float], seconds: float) -> None:
        """See `Measured.drafted`. The first time, the next plan is a first one: those before it knew of no draft."""
        if not self.has_drafted:
            self.has_drafted, self.choice = True, None
            self._marks, self._steps = None, 0
        self.measured.drafted(chances, known, seconds)

    def begin(self) -> None:
        """Another text comes: the next plan is a first one. What a draft that was not worth asking is like there, is seen until then."""
        self._marks, self._steps = None, 0
        if self.choice is not None and self.choice.drafted == 0 and self.waits_for_reads:
            self.choice = replace(self.choice, drafted=HORIZON)

    def forget_draft(self) -> None:
        """The draft is closed."""
        self.has_drafted, self.draft_bytes, self.gives_back = False, 0, False
        if self.choice is not None:
            self.choice = replace(self.choice, drafted=0, verified=0)

    @property
    def waits_for_reads(self) -> bool:
        """Whether reads take longer than computing. Else the fifth of them that a draft may save is less than drafting."""
        return self.measured.reading_s.get() > self.measured.compute_s[0].get()

    @property
    def horizon(self) -> int:
        """How many tokens to draft: as planned; before a plan that knows the draft, some where decoding waits for reads."""
        choice = self.choice
        if choice is None or not self.has_drafted:
            return HORIZON if self.waits_for_reads else 0
        return choice.drafted

    @property
    def most_verified(self) -> int:
        """How many drafted tokens to verify at most: none where decoding waits for reads, or where that is not known yet. Elsewhere
        what pays is chosen for each proposal, and tried again now and then (spac/speculative/draft_length.py): a plan that drafts
        none would never learn that the draft has become better."""
        return 0 if self.waits_for_reads or self.measured.reading_s.value is None else MOST_VERIFIED

    def decoded(self, decode: Decode) -> None:
        """A decode is done; a plan is asked for if it is time."""
        self.measured.add(decode)
        self._steps += 1
        if self._steps >= (FIRST_PLAN if self._marks is None else LEAST_STEPS) and (
            self._marks is None or self._steps >= MOST_STEPS or self.measured.changed(*self._marks)
        ):
            self.ask()

    def ask(self) -> None:
        """Have a new plan made of what is measured now."""
        if self.measured.compute_s[0].value is None:
            return
        self._marks, self._steps = (self.measured.marks(), self.measured.accepted[0].get()), 0
        # where decoding waits for reads a verified token takes nearly as long as a decode of its own, and what is measured
        # of decodes that verify none must not grow old
        try:
            state = self._model.state(self.measured, self.has_drafted, self.verifies and not self.waits_for_reads)
        except OptionError as e:  # decoding goes on
            _log.warning("%s; the last plan stays", e)
            return
        self.have_planned(state)

    def have_planned(self, state: State) -> None:
        """Leave a state to the thread."""
        with self._wake:
            self._asked = state
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="spac-balancer", daemon=True)
                thread.start()
                self._thread = thread  # that can be joined
            self._wake.notify()

    def close(self) -> None:
        """End the thread and wait for it."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._asked is not None)
                state, self._asked = self._asked, None
                if self._closed or state is None:
                    return
            try:
                self.plan(state)
            except Exception as e:  # whatever it is, decoding goes on
                _log.warning("the balancer ends, the last plan stays: %s", e)
                return
            self.cpu_s = time.thread_time()

    def plan(self, state: State) -> None:
        """Decide anew, by this."""
        begin = time.monotonic()
        plan = self._solve(state)
        if 0 <= time.monotonic() - begin <= DEADLINE_S:
            choice = kept(self.choice, plan, state)
            if choice != self.choice:
                _log.info("balancer: %s, %.1f ms a token expected", choice, plan.seconds_per_token * 1e3)
            self.choice = choice
            self._weigh_draft(plan, state)
        else:
            self.late += 1
            _log.info("balancer: a plan took longer than %.1f s, the last one stays", DEADLINE_S)
        self.plans += 1

    def _weigh_draft(self, plan: Plan, state: State) -> None:
        if self.draft_bytes:
            without = self._solve(self._model.without_draft(state, self.draft_bytes))
            better = without.seconds_per_token < plan.seconds_per_token * (1 - BETTER_WITHOUT_DRAFT)
            self._not_worth = self._not_worth + 1 if better else 0
            self.gives_back = self._not_worth >= GIVE_BACK_PLANS
